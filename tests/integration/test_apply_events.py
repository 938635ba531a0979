"""Batches against a real database: what is new, what is late, and who wins a race."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, func, select, text
from sqlalchemy.exc import DataError

from positions.domain.events import Mode, PositionKey
from positions.domain.position import Mark
from positions.errors import ConcurrencyConflict, Unavailable
from positions.handlers.update_marks import update_marks
from positions.storage import positions, quarantine
from positions.storage.database import Retry, connect, in_transaction, transaction
from positions.storage.tables import ledger, outbox
from tests.integration.support import (
    RULES,
    apply,
    assert_positions_are_the_fold_of_the_ledger,
    execution,
    stored,
)

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)


def count(engine: Engine, table: Any) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_an_execution_opens_a_position_and_tells_the_neighbours(engine: Engine) -> None:
    outcome = apply(engine, [execution("BTCUSDT", "Buy", "0.5", "5000", execution_fees="1.375")])
    row = stored(engine)[BTC]
    assert (row["size"], row["average_entry_price"], row["realized_pnl"]) == (
        Decimal("0.5"),
        5000,
        Decimal("-1.375"),
    )
    assert (row["version"], row["closed_at"], row["opened_at"].isoformat()) == (
        1,
        None,
        "2025-01-15T10:00:00+00:00",
    )
    assert outcome.counts["applied"] == 1
    with engine.connect() as connection:
        message = connection.execute(select(outbox.c.event_type, outbox.c.trace_id)).one()
    assert tuple(message) == ("position_updated", "trace-BTCUSDT-0")


def test_a_duplicate_changes_nothing_whenever_it_comes(engine: Engine) -> None:
    message = execution("BTCUSDT", "Buy", "1", "100")
    assert apply(engine, [message, message]).counts["duplicate"] == 1
    before = stored(engine), count(engine, outbox)
    assert apply(engine, [message]).counts["duplicate"] == 1
    assert (stored(engine), count(engine, outbox)) == before


def test_several_events_of_a_position_make_one_version_and_one_message(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number) for number in range(5)])
    assert stored(engine)[BTC]["version"] == 1
    with engine.connect() as connection:
        body = connection.execute(select(outbox.c.body)).scalar_one()
    assert '"events_covered":5' in body


def test_a_late_fill_refolds_the_cycle(engine: Engine) -> None:
    fills = [
        execution("BTCUSDT", "Buy", "1", "100", number=1),
        execution("BTCUSDT", "Sell", "1", "110", number=2),
        execution("BTCUSDT", "Buy", "1", "120", number=3),
    ]
    apply(engine, [fills[0], fills[2]])
    assert apply(engine, [fills[1]]).counts["refolded"] == 1
    row = stored(engine)[BTC]
    assert (row["size"], row["average_entry_price"], row["realized_pnl"]) == (1, 120, 10)


def test_an_execution_known_under_another_asset_leaves_no_empty_position(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", execution_id="same")])
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100", execution_id="same")])
    assert list(stored(engine)) == [BTC]


def test_a_report_without_a_time_counts_when_it_first_arrived(engine: Engine) -> None:
    first, second = (
        {
            "event_type": "position",
            "event_id": size,
            "data": {"symbol": "BTCUSDT", "side": "Buy", "size": size},
        }
        for size in ("1", "2")
    )
    apply(engine, [first])
    apply(engine, [second])
    assert apply(engine, [first]).counts["duplicate"] == 1
    assert stored(engine)[BTC]["size"] == 2


def test_any_headers_are_kept_in_quarantine(engine: Engine) -> None:
    deep: dict[str, Any] = {}
    for _ in range(500):
        deep = {"in": deep}
    strange = {
        "nul": "a\0b",
        "half": "\ud800",
        "escaped": "\\u0000z",
        "nan": float("nan"),
        "bytes": b"\xff",
        "deep": deep,
    }
    refused = quarantine.Refused(
        queue="q\0", body=b"\0\xff", headers=strange, properties={"message_id": "\ud800"}, reason="r\0\ud800"
    )
    with transaction(engine) as connection:
        quarantine.add(connection, [refused, refused], now=datetime.now(UTC))
    with transaction(engine) as connection:
        (kept,) = quarantine.newest(connection, limit=5)
    assert kept.refused.body == b"\0\xff"
    assert kept.refused.headers["escaped"] == "\\u0000z"


def test_a_batch_that_fails_leaves_no_trace(engine: Engine) -> None:
    largest = [execution("ETHUSDT", "Buy", "9" * 20, "1", number=number) for number in range(2)]
    with pytest.raises(DataError, match="numeric field overflow"):
        apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), *largest])
    assert (stored(engine), count(engine, ledger), count(engine, outbox)) == ({}, 0, 0)


def test_writers_on_the_same_positions_converge_without_deadlock(engine: Engine) -> None:
    random = Random(7)
    messages = [
        execution(
            f"A{number % 7}USDT",
            random.choice(["Buy", "Sell"]),
            str(random.randint(1, 900) / 1000),
            str(random.randint(100, 900) / 10),
            number=number,
        )
        for number in range(600)
    ]
    arrived = messages + messages[::4]
    random.shuffle(arrived)
    batches = [arrived[start : start + 25] for start in range(0, len(arrived), 25)]
    with ThreadPoolExecutor(max_workers=6) as pool:
        list(pool.map(lambda batch: apply(engine, batch, Retry(retries=0)), batches))
    assert count(engine, ledger) == len(messages)
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_lost_race_is_tried_again_and_loses_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "lock_free", positions.read)  # writers that take no locks
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    marks = [
        Mark(price=Decimal(101 + n), at=datetime(2026, 1, 1 + n, tzinfo=UTC), source="price_api")
        for n in range(6)
    ]
    start = threading.Barrier(len(marks))

    def write(mark: Mark) -> bool:
        start.wait()
        # Six writers may lose more than three races; each loses fewer than there are writers.
        return in_transaction(
            engine,
            lambda connection: update_marks(connection, {BTC: mark}, rules=RULES, now=datetime.now(UTC))[BTC],
            retry=Retry(retries=6, base_ms=1),
        )

    with ThreadPoolExecutor(max_workers=len(marks)) as pool:
        written = sum(pool.map(write, marks))
    row = stored(engine)[BTC]
    assert row["current_price"] == 106
    assert row["version"] == 1 + written
    assert count(engine, outbox) == 1 + written


def test_the_waits_of_a_retry_are_100_200_and_400_ms_and_then_it_is_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "lock_free", positions.read)  # a writer that takes no locks
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    waits: list[float] = []
    tries = 0

    def always_late(connection: Any) -> None:
        nonlocal tries
        tries += 1
        mark = Mark(price=Decimal(200), at=datetime.now(UTC), source="price_api")

        class Overtaken:
            """Lets another writer commit between our read and our write."""

            def __getattr__(self, name: str) -> Any:
                return getattr(connection, name)

            def exec_driver_sql(self, statement: str, parameters: Any) -> Any:
                if statement.lstrip().startswith("UPDATE positions"):
                    with transaction(engine) as other:
                        other.execute(text("UPDATE positions SET version = version + 1"))
                return connection.exec_driver_sql(statement, parameters)

        update_marks(Overtaken(), {BTC: mark}, rules=RULES, now=datetime.now(UTC))  # type: ignore[arg-type]

    before = stored(engine)[BTC]
    with pytest.raises(ConcurrencyConflict):
        in_transaction(engine, always_late, retry=Retry(), sleep=waits.append)
    assert tries == 4
    for wait, expected in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert expected <= wait <= expected * 1.1
    after = stored(engine)[BTC]
    assert (after["current_price"], after["version"]) == (before["current_price"], before["version"] + 4)


def test_a_transaction_that_raises_is_rolled_back(engine: Engine) -> None:
    def fail_late(connection: Connection) -> None:
        connection.execute(text("INSERT INTO positions (asset, mode) VALUES ('BTCUSDT', 'one-way')"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_transaction(engine, fail_late, retry=Retry())
    assert stored(engine) == {}


def test_a_database_that_is_away_is_unavailable_after_every_try() -> None:
    nowhere = connect("postgresql+psycopg2://nobody@127.0.0.1:9/nothing")
    waits: list[float] = []
    with pytest.raises(Unavailable):
        in_transaction(nowhere, lambda _: None, retry=Retry(), sleep=waits.append)
    assert len(waits) == 3
    nowhere.dispose()
