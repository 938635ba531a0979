"""Breaks: found once, kept with both figures, and said how they ended."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, select

from positions.domain.events import Mode, PositionKey
from positions.storage.tables import breaks
from tests.integration.support import apply, execution, stored

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
HEDGE = PositionKey("BTCUSDT", Mode.HEDGE)


def report(second: int, size: str, **fields: Any) -> dict[str, Any]:
    at = f"2025-01-15T10:00:{second:02}Z"
    data = {"symbol": "BTCUSDT", "side": "Buy", "size": size, "avgPrice": "105", "timestamp": at, **fields}
    return {"event_type": "position", "data": data}


def kept(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(breaks).order_by(breaks.c.id)).mappings())


def test_a_size_taken_over_is_kept_as_a_resolved_break_and_an_adjustment(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=1)])
    assert apply(engine, [report(5, "2")]).counts["breaks"] == 1
    assert stored(engine)[BTC]["size"] == 2
    (found,) = kept(engine)
    assert (found["kind"], found["ours"], found["theirs"], found["resolution"]) == (
        "size",
        1,
        2,
        "taken_over",
    )
    with engine.connect() as connection:
        row = connection.exec_driver_sql("SELECT quantity, price FROM ledger WHERE kind = 'adjustment'").one()
    assert tuple(row) == (1, 105)


def test_a_disputed_size_stays_open_until_the_venue_agrees(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=5)])
    apply(engine, [report(5, "2")])
    assert stored(engine)[BTC]["size"] == 1
    (found,) = kept(engine)
    assert (found["kind"], found["ours"], found["theirs"], found["resolved_at"]) == ("size", 1, 2, None)
    apply(engine, [report(9, "1")])
    (found,) = kept(engine)
    assert found["resolution"] == "agrees"


def test_a_dispute_after_a_takeover_is_a_break_of_its_own(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=0)])
    apply(engine, [report(10, "5")])
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=20)])
    apply(engine, [report(20, "50")])
    taken, disputed = kept(engine)
    assert (taken["resolution"], disputed["resolved_at"]) == ("taken_over", None)
    assert (disputed["ours"], disputed["theirs"]) == (6, 50)
    apply(engine, [execution("BTCUSDT", "Buy", "7", "100", number=30)])
    assert kept(engine) == [taken, disputed]
    apply(engine, [report(40, "13")])
    assert [each["resolution"] for each in kept(engine)] == ["taken_over", "agrees"]


def test_a_missing_hedge_fill_is_a_break_until_it_arrives(engine: Engine) -> None:
    fills = [
        execution("BTCUSDT", side, quantity, "100", number=number, position_idx=1)
        for number, (side, quantity) in enumerate([("Buy", "1"), ("Buy", "2"), ("Sell", "2")])
    ]
    apply(engine, [fills[0], fills[2]])
    assert stored(engine)[HEDGE]["long_size"] == 0
    (found,) = kept(engine)
    assert (found["kind"], found["leg"], found["ours"], found["resolved_at"]) == (
        "over_reduction",
        "long",
        1,
        None,
    )
    apply(engine, [fills[1]])
    assert stored(engine)[HEDGE]["long_size"] == 1
    assert kept(engine)[0]["resolution"] == "agrees"
