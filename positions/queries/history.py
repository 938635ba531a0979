"""The portfolio's history: what its positions added up to, by their snapshots."""

from datetime import datetime, timedelta

from sqlalchemy import Connection, func, select

from positions.messages.outbound import EquityPoint
from positions.storage import tables
from positions.storage.snapshots import sums_at

POINTS_MAX = 1000
LOOKUPS_MAX = 400_000
"""Points times positions: what takes a second or two, some microseconds each."""


def points_max(connection: Connection) -> int:
    """Return how many points a curve may have: fewer where many positions are looked up for each."""
    held = connection.execute(select(func.count()).select_from(tables.positions)).scalar_one()
    return min(POINTS_MAX, max(2, LOOKUPS_MAX // max(held, 1)))


def points_in(from_: datetime, to: datetime, interval: timedelta) -> int:
    """Return how many points a curve has: one at ``from_``, and each ``interval`` on, until ``to``."""
    if interval <= timedelta(0) or to < from_:
        raise ValueError("a curve goes forward")
    return (to - from_) // interval + 1


def equity_curve(
    connection: Connection, *, from_: datetime, to: datetime, interval: timedelta, ends_now: bool = False
) -> tuple[EquityPoint, ...]:
    """Return the points of the curve, the oldest first, from the first one on that any snapshot tells of.

    At each point counts the newest snapshot of each position until then, however old it is. One that is
    closed now counts as it is from when it was, so that its PnL outlives its snapshots.

    Args:
        connection: only read from, and of one moment (REPEATABLE READ).
        from_: the first point.
        to: no point is later.
        interval: between two points.
        ends_now: the last point is the present, and shows what the positions are.

    Raises:
        ValueError: it would have more than `POINTS_MAX` points.
    """
    count = points_in(from_, to, interval)
    if count > POINTS_MAX:
        raise ValueError(f"{count} points: a curve has at most {POINTS_MAX}")
    return tuple(
        EquityPoint(
            at=row["at"],
            total_exposure_usdt=row["exposure"],
            net_exposure_usdt=row["net_exposure"],
            total_unrealized_pnl_usdt=row["unrealized_pnl"],
            total_realized_pnl_usdt=row["realized_pnl"],
            total_pnl_usdt=row["pnl"],
            drawdown_usdt=row["drawdown"],
            positions_count=int(row["count"]),
            unpriced_positions_count=int(row["unpriced"]),
        )
        for row in sums_at(connection, from_, interval=interval, count=count, ends_now=ends_now)
    )
