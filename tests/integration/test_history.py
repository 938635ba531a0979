"""The equity curve: what the newest snapshots of all positions add up to, point by point."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random

import pytest
from sqlalchemy import Engine

from positions.domain.events import PositionKey
from positions.handlers.take_snapshots import take_snapshots
from positions.messages.outbound import EquityPoint, object_of
from positions.queries.history import equity_curve, points_in
from positions.storage import positions as store
from positions.storage.database import transaction
from positions.storage.snapshots import Snapshot, add
from tests.integration.support import RULES, apply, execution, stored

START = datetime(2025, 1, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)


def curve(
    engine: Engine, from_: datetime, to: datetime, interval: timedelta, *, ends_now: bool = False
) -> tuple[EquityPoint, ...]:
    with engine.connect() as connection:
        return equity_curve(connection, from_=from_, to=to, interval=interval, ends_now=ends_now)


def held(engine: Engine, assets: int) -> dict[str, PositionKey]:
    apply(engine, [execution(f"A{number}USDT", "Buy", "1", "1") for number in range(assets)])
    with transaction(engine) as connection:
        return {each.id: key for key, each in store.read(connection, store.keys(connection)).items()}


def kept(engine: Engine, id_: str, key: PositionKey, at: datetime, *figures: Decimal | None) -> None:
    exposure, net, unrealized, realized = figures
    with transaction(engine) as connection:
        add(
            connection,
            [
                Snapshot(
                    position_id=id_,
                    key=key,
                    created_at=at,
                    exposure=exposure,
                    net_exposure=net,
                    unrealized_pnl=unrealized,
                    realized_pnl=realized,
                    data={},
                )
            ],
        )


def test_each_point_adds_up_the_newest_snapshot_of_each_position(engine: Engine) -> None:
    """Beside the plain way to do it, on snapshots at any time, with gaps, across months."""
    random = Random(4)
    ids = held(engine, 5)
    taken: list[tuple[datetime, str, list[Decimal | None]]] = []
    for number in range(120):
        at = START + timedelta(minutes=random.choice([random.randrange(6000), 60 * random.randrange(100)]))
        id_ = random.choice([*ids][: 1 + number // 20])
        figures: list[Decimal | None] = [
            Decimal(random.randrange(-(10**20), 10**20)).scaleb(-18) for _ in range(4)
        ]
        if random.random() < 0.1:
            figures[:2] = [None, None]
        if (at, id_) not in [each[:2] for each in taken]:
            taken.append((at, id_, figures))
            kept(engine, id_, ids[id_], at, *figures)
    found = curve(engine, START, START + timedelta(days=5), 3 * HOUR)
    expected, peak = [], None
    for number in range(41):
        at = START + number * 3 * HOUR
        newest = {id_: figures for of, id_, figures in sorted(taken, key=lambda each: each[0]) if of <= at}
        if not newest:
            continue
        sums = [
            sum((each[place] or Decimal(0) for each in newest.values()), Decimal(0)) for place in range(4)
        ]
        pnl = sums[2] + sums[3]
        peak = pnl if peak is None else max(peak, pnl)
        unpriced = sum(each[0] is None for each in newest.values())
        expected.append((at, *sums, pnl, peak - pnl, len(newest), unpriced))
    assert [
        (
            point.at,
            point.total_exposure_usdt,
            point.net_exposure_usdt,
            point.total_unrealized_pnl_usdt,
            point.total_realized_pnl_usdt,
            point.total_pnl_usdt,
            point.drawdown_usdt,
            point.positions_count,
            point.unpriced_positions_count,
        )
        for point in found
    ] == expected
    assert len(expected) > 30
    assert {point.unpriced_positions_count for point in found} > {0}
    assert any(point.drawdown_usdt for point in found)


def test_a_position_is_carried_from_before_the_curve_began(engine: Engine) -> None:
    ((id_, key),) = held(engine, 1).items()
    kept(engine, id_, key, START - timedelta(days=90), *map(Decimal, (10, -10, 3, 4)))
    (point,) = curve(engine, START, START, HOUR)
    assert object_of(point) == {
        "at": "2025-01-30T00:00:00Z",
        "total_exposure_usdt": "10",
        "net_exposure_usdt": "-10",
        "total_unrealized_pnl_usdt": "3",
        "total_realized_pnl_usdt": "4",
        "total_pnl_usdt": "7",
        "drawdown_usdt": "0",
        "positions_count": 1,
        "unpriced_positions_count": 0,
    }


def test_it_begins_where_the_first_snapshot_is_and_is_empty_without_any(engine: Engine) -> None:
    ((id_, key),) = held(engine, 1).items()
    assert curve(engine, START, START + 9 * HOUR, HOUR) == ()
    kept(engine, id_, key, START + 2 * HOUR, *map(Decimal, (1, 1, -3, 1)))
    found = curve(engine, START, START + 4 * HOUR, HOUR)
    assert [(point.at - START, point.drawdown_usdt) for point in found] == [
        (2 * HOUR, 0),
        (3 * HOUR, 0),
        (4 * HOUR, 0),
    ]


def test_what_an_older_service_kept_without_figures_tells_nothing(engine: Engine) -> None:
    ((id_, key),) = held(engine, 1).items()
    kept(engine, id_, key, START, *map(Decimal, (1, 1, 2, 3)))
    kept(engine, id_, key, START + HOUR, None, None, None, None)
    assert [point.total_pnl_usdt for point in curve(engine, START, START + HOUR, HOUR)] == [5, 5]


def test_it_is_what_snapshots_of_the_service_add_up_to(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", execution_fees="2")])
    apply(engine, [execution("ETHUSDT", "Sell", "1", "100", execution_fees="1")])
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=START, stale_after=RULES.price_stale_after)
    (point,) = curve(engine, START, START, HOUR)
    rows = stored(engine).values()
    assert point.total_realized_pnl_usdt == sum(row["realized_pnl"] for row in rows) == -3
    assert point.total_exposure_usdt == 0  # neither has a price


def test_a_position_that_was_closed_between_snapshots_is_so_from_then_on(engine: Engine) -> None:
    opened = datetime(2025, 1, 15, 10, tzinfo=UTC)
    price = {"symbol": "BTCUSDT", "markPrice": "110", "timestamp": opened.isoformat()}
    apply(engine, [execution("BTCUSDT", "Buy", "2", "100"), {"event_type": "position", "data": price}])
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=opened + HOUR, stale_after=RULES.price_stale_after)
    apply(engine, [execution("BTCUSDT", "Sell", "2", "130", number=90 * 60)])
    half = HOUR / 2
    found = curve(engine, opened + half, opened + 4 * half, half)
    assert [
        (point.total_exposure_usdt, point.total_unrealized_pnl_usdt, point.total_realized_pnl_usdt)
        for point in found
    ] == [(220, 20, 0), (0, 0, 60), (0, 0, 60)]
    assert [point.positions_count for point in found] == [1, 1, 1]
    # Also where both lie between the same two points.
    (coarse,) = curve(engine, opened, opened + 2 * HOUR, 2 * HOUR)
    assert coarse == found[-1]


def test_what_a_closed_position_won_outlives_its_snapshots(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), execution("ETHUSDT", "Buy", "1", "1")])
    apply(engine, [execution("BTCUSDT", "Sell", "1", "150", number=60)])
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=START, stale_after=RULES.price_stale_after)
        connection.exec_driver_sql("DELETE FROM position_snapshots WHERE asset = 'BTCUSDT'")
    found = curve(engine, START - HOUR, START + HOUR, HOUR)
    assert [(point.total_realized_pnl_usdt, point.positions_count) for point in found] == [
        (50, 1),
        (50, 2),
        (50, 2),
    ]


def test_now_it_is_what_the_positions_are(engine: Engine) -> None:
    """Also one that has no snapshot yet; and the drawdown is from what the snapshots told before."""
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", execution_fees="2")])
    price = {"symbol": "BTCUSDT", "markPrice": "150", "timestamp": START.isoformat()}
    apply(engine, [{"event_type": "position", "data": price}])
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=START, stale_after=RULES.price_stale_after)
    later = {**price, "markPrice": "120", "timestamp": (START + HOUR).isoformat()}
    apply(engine, [{"event_type": "position", "data": later}, execution("ETHUSDT", "Sell", "1", "50")])
    then, now = curve(engine, START, START + 2 * HOUR, 2 * HOUR, ends_now=True)
    assert (then.total_pnl_usdt, then.positions_count, then.unpriced_positions_count) == (48, 1, 0)
    assert (now.total_pnl_usdt, now.drawdown_usdt, now.total_exposure_usdt) == (18, 30, 120)
    assert (now.positions_count, now.unpriced_positions_count) == (2, 1)
    (_, past) = curve(engine, START, START + 2 * HOUR, 2 * HOUR)
    assert (past.total_pnl_usdt, past.positions_count) == (48, 1)


def test_a_curve_of_too_many_points_is_refused(engine: Engine) -> None:
    assert points_in(START, START + 999 * HOUR + timedelta(minutes=59), HOUR) == 1000
    assert curve(engine, START, START + 999 * HOUR, HOUR) == ()
    for to, interval in ((START + 1000 * HOUR, HOUR), (START - HOUR, HOUR), (START, 0 * HOUR)):
        with pytest.raises(ValueError, match="curve"):
            curve(engine, START, to, interval)
