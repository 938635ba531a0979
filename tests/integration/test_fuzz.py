"""Mutated messages of every kind, and properties of any kind, through a real queue and worker.

Whatever comes is applied, ignored or quarantined; no process ends, and nothing goes round and round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, select

from positions.domain.events import Entry, Report
from positions.errors import InvalidEvent
from positions.messages.inbound import Delivery, decode
from positions.settings import load
from positions.storage.tables import attempts, ledger, quarantine
from tests.integration.processes import Process, environment, worker
from tests.integration.support import EXECUTION_QUEUE, execution, publish
from tests.integration.test_crash_points import count, outcomes, waiting
from tests.services import wait_until

REAL: list[dict[str, Any]] = [
    execution("BTCUSDT", "Buy", "0.5", "42000.5"),
    execution("ETHUSDT", "Sell", "1", "3000", positionIdx=2),
    {
        "event_type": "partially_filled",
        "order": {
            "order_id": "o-1",
            "symbol": "SOLUSDT",
            "side": "Sell",
            "filled_quantity": "3",
            "average_price": "150.25",
            "fees": "0.2",
            "executed_at": "2025-01-15T10:00:00Z",
        },
    },
    {
        "event_type": "position",
        "event_id": "r-1",
        "data": [
            {
                "symbol": "BTCUSDT",
                "side": "Buy",
                "size": "0.5",
                "avgPrice": "42000",
                "updatedTime": 1736935200000,
            },
            {"symbol": "ETHUSDT", "side": "", "size": "0", "positionIdx": 2, "markPrice": "3001", "seq": 7},
        ],
    },
    {
        "topic": "execution",
        "creationTime": 1736935200000,
        "data": [
            {"symbol": "BTCUSDT", "side": "Sell", "execQty": "0.1", "execPrice": "42100", "execId": "raw-1"},
            {"symbol": "BTCUSDT", "execType": "Funding", "execFee": "0.3", "execId": "raw-2"},
        ],
    },
]
NASTY: tuple[Any, ...] = (
    *(
        "",
        " ",
        "\0",
        "\ud800",
        "NaN",
        "-Infinity",
        "1_000",
        "0x10",
        " 7 ",
        "1e400",
        "1e-400",
        "\u0663",
        "9" * 300,
    ),
    *("9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2025-01-15", "buy", "Sell", "hedge", "long"),
    *(0, -1, 2**63, 10**40, -(10**400), 1.5, 1e300, True, None, [], {}, [[]], {"a": {}}, ["x"] * 600),
)
HEADERS = st.dictionaries(
    st.sampled_from(["task", "id", "event_type", "topic", "trace_id", "x-death", "lang"]),
    st.one_of(
        st.sampled_from(["os.system", "position", "execution", "\0", "a" * 500]),
        st.integers(-(2**31), 2**31),
        st.lists(st.integers(0, 9), max_size=3),
        st.dictionaries(st.sampled_from("ab"), st.text(max_size=5), max_size=2),
    ),
    max_size=3,
)
PROPERTIES = st.fixed_dictionaries(
    {"application_headers": HEADERS},
    optional={
        "content_encoding": st.sampled_from(["utf-8", "binary", "gzip", "no-such"]),
        "message_id": st.text(st.characters(codec="ascii"), max_size=20),
        "type": st.sampled_from(["", "position"]),
        "priority": st.integers(0, 255),
        "reply_to": st.just("nobody"),
        "correlation_id": st.just("c"),
    },
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in items:
        yield (*path, name)
        yield from _places(each, (*path, name))


class Sent(NamedTuple):
    """A message, and the ledger keys it must lead to; None where it was mutated."""

    body: bytes
    keys: set[str] | None


KEYS = {
    "BTCUSDT-0": "exec:{}",
    "ETHUSDT-0": "exec:{}",
    "o-1": "order:{}:3",
    "raw-1": "exec:{}",
    "raw-2": "exec:{}",
}
"""The ledger keys of what is named so in `REAL`."""


@st.composite
def mutated(draw: st.DrawFn) -> Sent:
    """Return a real message with some values replaced, names dropped, and bytes changed, or none of it."""
    real = json.dumps(draw(st.sampled_from(REAL)))
    keys: set[str] = set()
    # Most have an identity of their own, or all would be duplicates.
    for name in (*KEYS, "r-1"):
        own = f"{name}-{draw(st.integers(0, 10_000))}"
        if f'"{name}"' in real and name in KEYS:
            keys.add(KEYS[name].format(own))
        real = real.replace(f'"{name}"', f'"{own}"')
    content = json.loads(real)
    for place in draw(st.lists(st.sampled_from(sorted(_places(content), key=str)), max_size=3)):
        inner = content
        try:
            for name in place[:-1]:
                inner = inner[name]
            if draw(st.booleans()):
                inner[place[-1]] = draw(st.sampled_from(NASTY))
            else:
                del inner[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue
    body = bytearray(json.dumps(content).encode())
    for _ in range(draw(st.integers(0, 2)) if draw(st.booleans()) else 0):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        body[at : at + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
    return Sent(bytes(body), keys if bytes(body) == real.encode() else None)


@pytest.fixture
def fuzzed(database_url: str, broker_url: str, redis_url: str, tmp_path: Path) -> Iterator[Process]:
    with worker(environment(database_url, broker_url, redis_url), tmp_path) as running:
        yield running


def test_whatever_comes_is_accounted_for(engine: Engine, broker_url: str, fuzzed: Process) -> None:
    sent: list[Delivery] = []
    intact: list[Sent] = []

    @settings(
        max_examples=25,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.lists(mutated(), min_size=10, max_size=60), PROPERTIES)
    def send(messages: list[Sent], properties: dict[str, Any]) -> None:
        # These headers may say of another kind of message.
        if not {"event_type", "topic"} & properties["application_headers"].keys():
            intact.extend(each for each in messages if each.keys is not None)
        bodies = [each.body for each in messages]
        publish(broker_url, [(EXECUTION_QUEUE, body) for body in bodies], **properties)
        known = {name: each for name, each in properties.items() if name != "application_headers"}
        now = datetime.now(UTC)
        sent.extend(
            Delivery(
                queue=EXECUTION_QUEUE,
                body=body,
                headers=properties["application_headers"],
                properties=known,
                received_at=now,
            )
            for body in bodies
        )
        assert wait_until(lambda: outcomes(fuzzed, "messages") >= len(sent) or fuzzed.ended, limit_s=60)

    send()
    assert fuzzed.terminate() == 0
    keys: set[str] = set()
    refused: set[bytes] = set()
    ignored = 0
    for delivery in sent:
        try:
            decoded = decode(delivery, max_bytes=load({}).message_max_bytes)
        except InvalidEvent:
            refused.add(delivery.body)
            continue
        ignored += decoded.ignored is not None
        refused |= {delivery.body} if decoded.refused else set()
        keys |= {event.key for event in decoded.events if isinstance(event, Entry)}
    assert len(refused) > 50
    assert len(keys) > 20
    assert any(isinstance(each, Report) for each in _events(sent))
    # What was sent as it is, by keys that our decoder has no part in.
    known = {key for each in intact for key in each.keys or ()}
    assert len(known) > 20
    assert known <= keys
    with engine.connect() as connection:
        stored = select(ledger.c.key).where(ledger.c.kind.in_(("trade", "funding", "order_report")))
        assert set(connection.execute(stored).scalars()) == keys
        assert {bytes(body) for body in connection.execute(select(quarantine.c.body)).scalars()} == refused
    assert outcomes(fuzzed, "messages") == len(sent)
    assert outcomes(fuzzed, "ignored") == ignored
    for gone_wrong in ("batch_isolated", "batch_held", "event_failed_alone", "properties_unreadable"):
        assert fuzzed.logged(gone_wrong) == 0, gone_wrong
    assert fuzzed.logged("intake_started") == 1
    assert waiting(broker_url, EXECUTION_QUEUE) == count(engine, attempts) == 0


def _events(sent: list[Delivery]) -> Iterator[Any]:
    for delivery in sent:
        try:
            yield from decode(delivery, max_bytes=load({}).message_max_bytes).events
        except InvalidEvent:
            continue
