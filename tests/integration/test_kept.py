"""What a connection keeps of the positions it wrote is what the database has, whoever else writes to it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine

from positions.domain.events import Mode, PositionKey
from positions.domain.position import State
from positions.handlers.apply_events import apply_events
from positions.storage import codec, outbox, positions
from positions.storage.database import Retry, transaction
from tests.integration.support import (
    RULES,
    apply,
    assert_positions_are_the_fold_of_the_ledger,
    connected,
    events_of,
    execution,
    executions,
    stored,
)

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)


@pytest.fixture
def one(database_url: str) -> Iterator[Engine]:
    """One of two workers: it has one connection."""
    with connected(database_url, 1) as engine:
        yield engine


@pytest.fixture
def other(database_url: str) -> Iterator[Engine]:
    with connected(database_url, 1) as engine:
        yield engine


def fill(number: int, side: str = "Buy") -> dict[str, Any]:
    return execution("BTCUSDT", side, "1", str(100 + number), number=number)


def apply_at(engine: Engine, messages: list[dict[str, Any]], now: datetime) -> None:
    with transaction(engine) as connection:
        apply_events(connection, events_of(messages), [], rules=RULES, now=now)


def sql(engine: Engine, statement: str) -> Any:
    with engine.begin() as connection:
        return connection.exec_driver_sql(statement)


def test_a_state_is_read_once_and_not_again_while_nobody_else_writes(
    engine: Engine, one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[PositionKey] = []
    decode = codec.decode

    def decoded(key: PositionKey, data: Any) -> State:
        read.append(key)
        return decode(key, data)

    monkeypatch.setattr(codec, "decode", decoded)
    apply(engine, [fill(0)])
    for number in range(1, 6):
        apply(one, [fill(number)])
    assert read == [BTC, BTC]  # when it was made, and by the second worker
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_workers_that_take_turns_see_what_each_other_wrote(
    engine: Engine, one: Engine, other: Engine
) -> None:
    messages = executions(300, assets=5)
    for start in range(0, len(messages), 20):
        apply(one if start % 60 else other, messages[start : start + 20])
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_what_was_rolled_back_was_never_kept(
    engine: Engine, one: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(one, [fill(0)])

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    now = datetime.now(UTC)
    with monkeypatch.context() as patched:
        patched.setattr(outbox, "add", fail)
        with pytest.raises(ZeroDivisionError):
            apply_at(one, [fill(1), fill(2)], now)
    # Another writes the version that was rolled back, at the very same moment.
    apply_at(other, [fill(3, "Sell")], now)
    apply(one, [fill(4)])
    assert (stored(engine)[BTC]["version"], stored(engine)[BTC]["size"]) == (3, 1)
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_database_that_was_set_back_is_what_counts(engine: Engine, one: Engine, other: Engine) -> None:
    apply(one, [fill(0)])
    sql(
        engine,
        "CREATE TABLE kept_ledger AS SELECT * FROM ledger; CREATE TABLE kept AS SELECT * FROM positions",
    )
    apply(one, [fill(1)])
    names = "version, size, state, last_updated, average_entry_price, long_size, long_avg_price, fees_paid"
    sql(
        engine,
        "DELETE FROM ledger WHERE key NOT IN (SELECT key FROM kept_ledger);"
        f"UPDATE positions SET ({names}) = (SELECT {names} FROM kept);"
        "DROP TABLE kept, kept_ledger",
    )
    # Of the same version as what the first has kept, and not the same.
    apply(other, [fill(2), fill(3)])
    apply(one, [fill(4)])
    assert (stored(engine)[BTC]["version"], stored(engine)[BTC]["size"]) == (3, 4)
    assert_positions_are_the_fold_of_the_ledger(engine)


@pytest.mark.parametrize("number", [1, 2])
def test_a_position_that_was_deleted_by_hand_is_made_again(engine: Engine, one: Engine, number: int) -> None:
    report = {
        "event_type": "position",
        "data": {"symbol": "BTCUSDT", "markPrice": "100", "timestamp": "2025-01-15T10:00:00Z"},
    }
    apply(one, [report])
    sql(engine, "DELETE FROM positions")
    later = {**report, "data": {**report["data"], "timestamp": "2025-01-15T10:00:01Z"}}  # type: ignore[dict-item]
    apply(one, [later if number == 1 else fill(0)], Retry(retries=1, base_ms=1))
    assert stored(engine)[BTC]["version"] == 1


def test_no_more_is_kept_than_so_many_positions_the_last_written(
    one: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(positions, "KEPT_MAX", 3)
    for number, asset in enumerate(("AUSDT", "BUSDT", "CUSDT", "AUSDT", "DUSDT")):
        apply(one, [execution(asset, "Buy", "1", "100", number=number)])
    with transaction(one) as connection:
        ids, made = positions.identify(connection, [])
        kept = connection.info["positions_kept"]
    assert (ids, made) == ({}, set())
    assert [key.asset for key in kept] == ["CUSDT", "AUSDT", "DUSDT"]
