"""Scheduled snapshots: one of each position and slot, whatever beats and workers do; the clock is told."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.event import listen

from positions.domain.events import Mode, PositionKey
from positions.domain.position import Mark
from positions.errors import Unavailable
from positions.handlers.take_snapshots import take_snapshots
from positions.handlers.update_marks import update_marks
from positions.settings import load
from positions.storage import outbox, slots
from positions.storage.database import transaction
from positions.tasks.resources import Resources
from positions.tasks.snapshots import MISSED_FOR, SLOTS_PER_RUN, take_due
from tests.integration.support import RULES, apply, execution, stored

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)
NOON = datetime(2025, 1, 15, 12, tzinfo=UTC)
BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)


@pytest.fixture
def own(database_url: str) -> Resources:
    return resources(database_url)


def resources(database_url: str, **settings: str) -> Resources:
    named = {f"POSITION_MANAGER_{name.upper()}": value for name, value in settings.items()}
    return Resources(load({"POSITION_MANAGER_DATABASE_URL": database_url, **named}))


def trade(engine: Engine, side: str, quantity: str, price: str, at: datetime, asset: str = "BTCUSDT") -> None:
    number = int(at.timestamp())
    message = execution(asset, side, quantity, price, execution_id=f"{asset}-{number}")
    apply(engine, [{**message, "executed_at": at.isoformat()}])


def price(engine: Engine, amount: str, at: datetime) -> None:
    with transaction(engine) as connection:
        mark = Mark(price=Decimal(amount), at=at, source="test")
        update_marks(connection, {BTC: mark}, rules=RULES, now=at)


def taken(engine: Engine) -> list[tuple[str, datetime, dict[str, Any]]]:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT asset, created_at, snapshot_data FROM position_snapshots ORDER BY created_at, asset")
        )
        return [(row.asset, row.created_at, row.snapshot_data) for row in rows]


def moments(engine: Engine, asset: str = "BTCUSDT") -> list[datetime]:
    return [at for of, at, _ in taken(engine) if of == asset]


def told(engine: Engine) -> Counter[tuple[str, str]]:
    with engine.connect() as connection:
        rows = connection.execute(
            text("SELECT body::json AS body FROM outbox WHERE event_type = 'position_snapshot_created'")
        )
        return Counter((row.body["asset"], row.body["snapshot_timestamp"]) for row in rows)


def take_due_in_a_process(database_url: str, now: datetime) -> dict[str, int]:
    return take_due(resources(database_url), now=now)


def test_beat_stopped_for_three_intervals_then_two_at_once_leave_one_snapshot_a_slot(
    engine: Engine, database_url: str, own: Resources
) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    trade(engine, "Sell", "2", "10", NOON - MINUTE, asset="ETHUSDT")
    take_due(own, now=NOON)
    trade(engine, "Buy", "1", "110", NOON + HOUR / 2)
    trade(engine, "Buy", "1", "120", NOON + 5 * HOUR / 2)
    now = NOON + 4 * HOUR + timedelta(seconds=5)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as beats:
        runs = [beats.submit(take_due_in_a_process, database_url, now) for _ in range(2)]
        done = [run.result(60) for run in runs]
    assert [sum(run[name] for run in done) for name in ("slots", "snapshots")] == [4, 8]
    slots_ = [NOON + hour * HOUR for hour in range(5)]
    assert moments(engine, "BTCUSDT") == moments(engine, "ETHUSDT") == slots_
    assert set(told(engine).values()) == {1}
    assert len(told(engine)) == 10
    # What it was at each of them, not what it is.
    sizes = [data["size"] for asset, _, data in taken(engine) if asset == "BTCUSDT"]
    assert sizes == ["1", "2", "2", "3", "3"]


def test_any_number_of_runs_at_once_take_each_slot_once(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    with ThreadPoolExecutor(2) as pool:
        for hour in range(1, 12, 3):
            list(pool.map(lambda _, hour=hour: take_due(own, now=NOON + hour * HOUR), range(6)))
    assert moments(engine) == [NOON + hour * HOUR for hour in range(11)]
    assert set(told(engine).values()) == {1}


def test_a_slot_is_a_whole_number_of_intervals_since_the_epoch(engine: Engine, database_url: str) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    own = resources(database_url, snapshot_interval="420")
    take_due(own, now=NOON + timedelta(seconds=59))
    (at,) = moments(engine)
    assert at.timestamp() % 420 == 0
    assert timedelta() <= NOON + timedelta(seconds=59) - at < timedelta(seconds=420)
    assert take_due(own, now=at + timedelta(seconds=419)) == {"slots": 0, "snapshots": 0}
    assert take_due(own, now=at + timedelta(seconds=420)) == {"slots": 1, "snapshots": 1}


def test_what_is_taken_on_time_has_the_price_of_the_moment(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    price(engine, "107", NOON + timedelta(seconds=2))
    take_due(own, now=NOON + timedelta(seconds=3))
    ((_, at, data),) = taken(engine)
    assert (at, data["current_price"], data["unrealized_pnl"]) == (NOON, "107", "7")


def test_what_is_taken_late_is_what_was_with_all_that_follows_from_it(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "2", "100", NOON - 2 * HOUR)
    price(engine, "105", NOON - HOUR)
    trade(engine, "Sell", "1", "90", NOON + 10 * MINUTE)
    take_due(own, now=NOON + 20 * MINUTE)
    ((_, at, data),) = taken(engine)
    assert (at, data["size"], data["average_entry_price"], data["realized_pnl"]) == (NOON, "2", "100", "0")
    assert (data["current_price"], data["unrealized_pnl"], data["unrealized_pnl_pct"]) == ("105", "10", "5")
    assert (data["time_held_minutes"], data["position_size_norm"], data["price_is_stale"]) == (120, "1", True)
    assert data["state"]
    # With it the past is still told right.
    take_due(own, now=NOON + HOUR)
    assert [data["size"] for _, _, data in taken(engine)] == ["2", "1"]


def test_a_closed_position_has_one_more_snapshot_and_then_none(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    trade(engine, "Sell", "1", "110", NOON + MINUTE)
    for hour in (1, 2, 3):
        take_due(own, now=NOON + hour * HOUR)
    assert moments(engine) == [NOON, NOON + HOUR]
    trade(engine, "Buy", "1", "100", NOON + 3 * HOUR + MINUTE)
    trade(engine, "Sell", "1", "100", NOON + 3 * HOUR + 2 * MINUTE)
    take_due(own, now=NOON + 4 * HOUR)
    take_due(own, now=NOON + 5 * HOUR)
    assert moments(engine)[2:] == [NOON + 4 * HOUR]


def test_a_close_that_is_known_late_is_still_told(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - HOUR)
    take_due(own, now=NOON)
    trade(engine, "Sell", "1", "110", NOON - MINUTE)  # before the snapshot that showed it open
    take_due(own, now=NOON + HOUR)
    assert [data["size"] for _, _, data in taken(engine)] == ["1", "0"]


def test_a_position_closed_in_a_gap_is_told_once_in_it(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    trade(engine, "Sell", "1", "110", NOON + HOUR / 2)
    take_due(own, now=NOON + 4 * HOUR)
    sizes = {at: data["size"] for _, at, data in taken(engine)}
    assert sizes == {NOON: "1", NOON + HOUR: "0", NOON + 4 * HOUR: "0"}
    take_due(own, now=NOON + 5 * HOUR)
    assert len(taken(engine)) == 3


def test_before_there_was_a_first_slot_none_was_missed(engine: Engine, own: Resources) -> None:
    assert take_due(own, now=NOON) == {"slots": 1, "snapshots": 0}
    trade(engine, "Buy", "1", "100", NOON - 10 * HOUR)
    assert take_due(own, now=NOON + MINUTE) == {"slots": 0, "snapshots": 0}
    assert take_due(own, now=NOON + HOUR) == {"slots": 1, "snapshots": 1}


def test_a_clock_that_was_ahead_does_not_hide_what_is_missed_later(engine: Engine, own: Resources) -> None:
    take_due(own, now=NOON + 6 * HOUR)
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    assert take_due(own, now=NOON + 3 * HOUR) == {"slots": 3, "snapshots": 3}
    assert moments(engine) == [NOON + hour * HOUR for hour in range(4)]


def test_the_present_comes_first_and_a_long_gap_is_made_up_for_bit_by_bit(
    engine: Engine, own: Resources
) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    now = NOON + 2 * MISSED_FOR
    assert take_due(own, now=now) == {"slots": SLOTS_PER_RUN, "snapshots": SLOTS_PER_RUN}
    assert moments(engine)[-1] == now
    oldest = now - MISSED_FOR
    assert moments(engine)[1:-1] == [oldest + hour * HOUR for hour in range(SLOTS_PER_RUN - 1)]
    while take_due(own, now=now)["slots"]:
        pass
    assert moments(engine) == [NOON, *(oldest + hour * HOUR for hour in range(7 * 24 + 1))]


def test_of_a_short_interval_only_so_many_slots_are_made_up_for(engine: Engine, database_url: str) -> None:
    own = resources(database_url, snapshot_interval="1")
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    now = NOON + 24 * HOUR
    while take_due(own, now=now)["slots"]:
        pass
    second = timedelta(seconds=1)
    assert moments(engine)[1:] == [now - n * second for n in range(slots.MISSED_MAX, -1, -1)]


def test_another_interval_makes_no_slots_of_the_past(
    engine: Engine, database_url: str, own: Resources
) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    for hour in range(3):
        take_due(own, now=NOON + hour * HOUR)
    shorter = resources(database_url, snapshot_interval="600")
    take_due(shorter, now=NOON + 2 * HOUR + 25 * MINUTE)
    assert moments(engine)[3:] == [NOON + 2 * HOUR + 10 * MINUTE, NOON + 2 * HOUR + 20 * MINUTE]


def test_a_run_that_fails_half_way_leaves_nothing_of_the_slot_and_the_next_takes_it(
    engine: Engine, database_url: str
) -> None:
    own = resources(database_url, optimistic_lock_retries="0")
    trade(engine, "Buy", "1", "100", NOON - MINUTE)

    def fail(*_: object, **__: object) -> None:
        raise Unavailable("told to be")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outbox, "add", fail)
        with pytest.raises(Unavailable):
            take_due(own, now=NOON)
    assert moments(engine) == []
    assert take_due(own, now=NOON + 2 * MINUTE) == {"slots": 1, "snapshots": 1}
    assert moments(engine) == [NOON]


def test_a_snapshot_that_was_asked_for_does_not_stand_in_the_way(engine: Engine, own: Resources) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    with transaction(engine) as connection:
        take_snapshots(connection, [BTC], at=NOON, stale_after=RULES.price_stale_after)
    assert take_due(own, now=NOON) == {"slots": 1, "snapshots": 0}
    assert set(told(engine).values()) == {1}


def test_writers_are_not_disturbed_and_slots_of_the_past_do_not_even_lock(
    engine: Engine, own: Resources
) -> None:
    trade(engine, "Buy", "1", "100", NOON - MINUTE)
    take_due(own, now=NOON)
    take_due(own, now=NOON + HOUR)
    take_due(own, now=NOON + 3 * HOUR)  # the gap's one slot is noted, and taken below
    with transaction(engine) as connection:
        connection.execute(
            text("DELETE FROM position_snapshots WHERE created_at = :at"), {"at": NOON + 2 * HOUR}
        )
        connection.execute(
            text("UPDATE snapshot_slots SET taken = false WHERE at = :at"), {"at": NOON + 2 * HOUR}
        )
    before = stored(engine)
    with transaction(engine) as connection:
        connection.execute(text("SELECT FROM positions FOR NO KEY UPDATE"))
        assert take_due(own, now=NOON + 3 * HOUR) == {"slots": 1, "snapshots": 1}
    assert stored(engine) == before
    assert before[BTC]["version"] == 1


def test_slots_of_long_ago_are_forgotten_but_never_the_newest(engine: Engine, own: Resources) -> None:
    for hour in range(3):
        take_due(own, now=NOON + hour * HOUR)
    with transaction(engine) as connection:
        slots.forget(connection, NOON + HOUR)
        slots.forget(connection, NOON + 10 * HOUR)
        left = connection.execute(text("SELECT at FROM snapshot_slots")).scalars().all()
    assert left == [NOON + 2 * HOUR]


def test_five_hundred_positions_are_one_statement(engine: Engine, own: Resources) -> None:
    apply(engine, [execution(f"A{n}USDT", "Buy", "1", "100", number=n) for n in range(500)])
    statements: list[str] = []
    listen(own.engine, "before_cursor_execute", lambda _, __, statement, *___: statements.append(statement))
    assert take_due(own, now=NOON) == {"slots": 1, "snapshots": 500}
    assert sum("INSERT INTO position_snapshots (" in statement for statement in statements) == 1
    assert len(statements) < 30
