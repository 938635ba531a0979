"""Snapshots: one consistent cut, one of a position and moment, in its month's partition, and told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from threading import Event
from typing import Any

import pytest
from sqlalchemy import Engine, text

from positions.domain.events import Mode, PositionKey
from positions.domain.position import Mark
from positions.errors import NotFound
from positions.handlers.take_snapshots import take_snapshots
from positions.handlers.update_marks import update_marks
from positions.messages.outbound import SnapshotView, object_of
from positions.queries.positions import position
from positions.queries.snapshots import snapshots
from positions.storage import codec, portfolio
from positions.storage import positions as store
from positions.storage import snapshots as snapshot_store
from positions.storage.database import transaction
from tests.integration.support import RULES, apply, execution, stored

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
ETH = PositionKey("ETHUSDT", Mode.ONE_WAY)
AT = datetime(2025, 1, 15, 12, tzinfo=UTC)
STALE = RULES.price_stale_after


def take(engine: Engine, keys: Sequence[PositionKey] | None = None, at: datetime = AT) -> list[SnapshotView]:
    with transaction(engine) as connection:
        return take_snapshots(connection, keys, at=at, stale_after=STALE, trace_id="t-1")


def hold(engine: Engine, mark: str | None = "110") -> None:
    """Hold two positions, of which the first has a price."""
    apply(engine, [execution("BTCUSDT", "Buy", "2", "100", execution_fees="0.1")])
    apply(engine, [execution("ETHUSDT", "Sell", "3", "10")])
    if mark:
        with transaction(engine) as connection:
            price = Mark(price=Decimal(mark), at=AT - timedelta(minutes=1), source="test")
            update_marks(connection, {BTC: price}, rules=RULES, now=AT)


def of_table(engine: Engine, statement: str, **values: Any) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text(statement), values).mappings())


def test_a_snapshot_is_the_position_object_of_its_moment_with_all_that_made_it(engine: Engine) -> None:
    hold(engine)
    with transaction(engine) as connection:
        was = object_of(position(connection, BTC, now=AT, stale_after=STALE))
        state = codec.encode(store.read(connection, [BTC])[BTC].state)
    (view,) = take(engine, [BTC])
    data = dict(view.snapshot_data)
    parts = ["realized_gross", "fees_paid", "funding_received", "realized_adjustment"]
    assert [data.pop(name) for name in parts] == ["0", "0.1", "0", "0"]
    assert data["current_price_source"] == "test"
    assert codec.decode(BTC, data.pop("state")) == codec.decode(BTC, json.loads(json.dumps(state)))
    assert data == was
    assert (was["unrealized_pnl"], was["position_size_norm"]) == ("20", "1")


def test_the_figures_to_add_up_are_columns_and_unknown_where_there_is_no_price(engine: Engine) -> None:
    hold(engine)
    apply(engine, [execution("XRPUSDT", side, "5", "1", number=n) for n, side in enumerate(["Buy", "Sell"])])
    take(engine)
    rows = of_table(engine, "SELECT * FROM position_snapshots ORDER BY asset")
    figures = [
        (row["exposure"], row["net_exposure"], row["unrealized_pnl"], row["realized_pnl"]) for row in rows
    ]
    assert figures == [(220, 220, 20, Decimal("-0.1")), (None, None, 0, 0), (0, 0, 0, 0)]


def test_a_short_position_s_net_exposure_is_negative(engine: Engine) -> None:
    hold(engine)
    with transaction(engine) as connection:
        update_marks(connection, {ETH: Mark(price=Decimal(9), at=AT, source="test")}, rules=RULES, now=AT)
    take(engine, [ETH])
    (row,) = of_table(engine, "SELECT * FROM position_snapshots")
    assert (row["exposure"], row["net_exposure"]) == (27, -27)


def test_it_is_told_with_figures_data_and_the_snapshot_itself(engine: Engine) -> None:
    hold(engine)
    (view,) = take(engine, [BTC])
    (row,) = of_table(engine, "SELECT * FROM outbox WHERE event_type = 'position_snapshot_created'")
    body = json.loads(row["body"])
    assert row["trace_id"] == body["trace_id"] == "t-1"
    assert body["snapshot"] == json.loads(json.dumps(object_of(view)))
    assert body["snapshot_data"] == body["snapshot"]["snapshot_data"]
    assert (body["snapshot_id"], body["position_id"]) == (view.id, stored(engine)[BTC]["id"])
    assert body["snapshot_timestamp"] == body["created_at"] == body["timestamp"] == "2025-01-15T12:00:00Z"
    assert (body["asset"], body["size"], body["unrealized_pnl"]) == ("BTCUSDT", "2", "20")


def test_a_moment_has_one_snapshot_however_many_take_it(engine: Engine) -> None:
    hold(engine)
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: take(engine), range(4)))
    assert sorted(len(views) for views in taken) == [0, 0, 0, 2]
    assert len(of_table(engine, "SELECT FROM position_snapshots")) == 2
    told = "SELECT FROM outbox WHERE event_type = 'position_snapshot_created'"
    assert len(of_table(engine, told)) == 2


def test_a_snapshot_changes_nothing_but_when_the_last_one_was(engine: Engine) -> None:
    hold(engine)
    before = stored(engine)
    with engine.connect() as connection:
        version = portfolio.version(connection)
    take(engine, [BTC])
    take(engine, [BTC], at=AT - timedelta(hours=1))
    after = stored(engine)
    assert after[BTC].pop("last_snapshot_at") == AT
    assert before[BTC].pop("last_snapshot_at") is None
    assert after == before
    with engine.connect() as connection:
        assert portfolio.version(connection) == version + 2


def test_who_writes_a_position_meanwhile_is_not_disturbed(engine: Engine) -> None:
    hold(engine)
    with transaction(engine) as connection:
        mark = Mark(price=Decimal(120), at=AT, source="test")
        known = store.read(connection, [BTC])  # what it writes is read before the snapshot
        take(engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "lock_free", lambda *_: known)
            assert update_marks(connection, {BTC: mark}, rules=RULES, now=AT) == {BTC: True}
    assert stored(engine)[BTC]["current_price"] == 120


def test_positions_are_locked_in_the_order_of_batches(engine: Engine) -> None:
    hold(engine)
    locked = Event()

    def batch() -> None:
        with transaction(engine) as connection:
            connection.execute(text("SELECT FROM positions WHERE asset = 'BTCUSDT' FOR NO KEY UPDATE"))
            locked.set()
            _until_someone_waits(engine)
            # Whoever locks in another order holds this row by now, and waits for ours.
            connection.execute(text("SELECT FROM positions WHERE asset = 'ETHUSDT' FOR NO KEY UPDATE NOWAIT"))

    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(batch)
        assert locked.wait(10)
        with transaction(engine) as connection:
            assert len(take_snapshots(connection, [ETH, BTC], at=AT, stale_after=STALE)) == 2
        ours.result()


def _until_someone_waits(engine: Engine) -> None:
    for _ in range(10_000):
        if of_table(
            engine,
            "SELECT FROM pg_locks l JOIN pg_stat_activity a USING (pid)"
            " WHERE NOT l.granted AND a.datname = current_database()",
        ):
            return
    raise AssertionError("nobody waits")


def test_of_unknown_positions_nothing_is_kept(engine: Engine) -> None:
    hold(engine)
    with pytest.raises(NotFound, match="XRPUSDT"):
        take(engine, [BTC, PositionKey("XRPUSDT", Mode.ONE_WAY)])
    with pytest.raises(NotFound, match="hedge"):
        take(engine, [PositionKey("BTCUSDT", Mode.HEDGE)])
    assert not of_table(engine, "SELECT FROM position_snapshots")


def test_an_empty_portfolio_has_no_snapshots(engine: Engine) -> None:
    assert take(engine) == []


def test_all_positions_are_of_one_moment(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of the exposure sum to the whole while prices move."""
    monkeypatch.setattr(store, "lock_free", store.lock)  # both or none, also beside a snapshot
    for key, side in ((BTC, "Buy"), (ETH, "Sell")):
        apply(engine, [execution(key.asset, side, "2", "100")])

    def move(step: int) -> None:
        at = AT + timedelta(seconds=step)
        with transaction(engine) as connection:
            price = Mark(price=Decimal(100 + step), at=at, source="test")
            update_marks(connection, {BTC: price, ETH: price}, rules=RULES, now=at)

    move(0)
    with ThreadPoolExecutor(1) as pool:
        moves = [pool.submit(move, step) for step in range(1, 60)]
        taken = 0
        while not moves[-1].done():
            taken += 1
            views = take(engine, at=AT + timedelta(hours=taken))
            assert [view.snapshot_data["position_size_norm"] for view in views] == ["0.5", "0.5"]
            assert len({view.snapshot_data["current_price"] for view in views}) == 1
        for each in moves:
            each.result()


def partitions(engine: Engine) -> dict[str, int]:
    """Return how many snapshots lie in which partition."""
    rows = of_table(engine, "SELECT tableoid::regclass::text AS name FROM position_snapshots")
    names = [row["name"] for row in rows]
    return {name: names.count(name) for name in names}


def test_a_snapshot_lies_in_the_partition_of_its_month(engine: Engine) -> None:
    hold(engine)
    take(engine, at=datetime(2025, 1, 31, 23, 59, 59, 999999, tzinfo=UTC))
    take(engine, at=datetime(2025, 2, 1, tzinfo=UTC))
    take(engine, at=datetime(2025, 12, 31, 23, tzinfo=UTC))
    assert partitions(engine) == {
        "position_snapshots_2025_01": 2,
        "position_snapshots_2025_02": 2,
        "position_snapshots_2025_12": 2,
    }


def test_a_month_s_partition_is_made_once_by_however_many(engine: Engine) -> None:
    def make(_: int) -> bool:
        with transaction(engine) as connection:
            return snapshot_store.make_partition(connection, datetime(2025, 3, 1, tzinfo=UTC))

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(make, range(6))) == [False] * 5 + [True]


def test_snapshots_of_a_new_month_are_taken_by_many_at_once(engine: Engine) -> None:
    hold(engine)
    with ThreadPoolExecutor(6) as pool:
        hours = [AT + timedelta(hours=hour) for hour in range(6)]
        assert [len(views) for views in pool.map(lambda at: take(engine, at=at), hours)] == [2] * 6
    assert partitions(engine) == {"position_snapshots_2025_01": 12}


def test_rows_of_a_month_that_lie_in_the_default_partition_move_into_its_own(engine: Engine) -> None:
    insert = """
        INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
        VALUES (gen_random_uuid(), 'BTCUSDT', 'one-way', :at, '{}')
    """
    with transaction(engine) as connection:
        for at in (
            "2025-02-28T23:59:59Z",
            "2025-03-01T00:00:00Z",
            "2025-03-31T23:59:59Z",
            "2025-04-01T00:00Z",
        ):
            connection.execute(text(insert), {"at": at})
        snapshot_store.make_partition(connection, datetime(2025, 3, 1, tzinfo=UTC))
    assert partitions(engine) == {"position_snapshots_default": 2, "position_snapshots_2025_03": 2}


def test_they_are_listed_newest_first_page_by_page_and_by_range(engine: Engine) -> None:
    hold(engine)
    hours = [AT + timedelta(days=20 * day) for day in range(5)]
    for at in hours:
        take(engine, at=at)

    def listed(**asked: Any) -> list[datetime]:
        with engine.connect() as connection:
            return [each.created_at for each in snapshots(connection, BTC, **{"limit": 100, **asked})]

    assert listed() == hours[::-1]
    assert listed(limit=2, offset=1) == hours[3:1:-1]
    assert listed(from_=hours[1], to=hours[3]) == hours[3:0:-1]
    assert listed(from_=hours[4] + timedelta(microseconds=1)) == []
    with engine.connect() as connection, pytest.raises(NotFound):
        snapshots(connection, PositionKey("XRPUSDT", Mode.ONE_WAY), limit=1)


def test_a_listed_snapshot_is_the_one_that_was_taken(engine: Engine) -> None:
    hold(engine)
    (view,) = take(engine, [BTC])
    with engine.connect() as connection:
        (listed,) = snapshots(connection, BTC, limit=1)
    assert json.dumps(object_of(listed), sort_keys=True) == json.dumps(object_of(view), sort_keys=True)


def test_fractions_that_an_older_service_kept_as_numbers_lose_no_digit(engine: Engine) -> None:
    hold(engine)
    with transaction(engine) as connection:
        connection.execute(
            text("""
                INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
                SELECT id, asset, mode, now(), '{"size": 0.1234567890123456789, "legs": [1.50], "n": 1}'
                FROM positions WHERE asset = 'BTCUSDT'
            """)
        )
        (listed,) = snapshots(connection, BTC, limit=1)
    assert listed.snapshot_data == {"size": "0.1234567890123456789", "legs": ["1.5"], "n": 1}
