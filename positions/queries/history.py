"""The portfolio's history: what the snapshots of its positions add up to."""

from datetime import datetime, timedelta

from sqlalchemy import Connection

from positions.messages.outbound import EquityPoint
from positions.storage.snapshots import sums_at

POINTS_MAX = 1000


def points_in(from_: datetime, to: datetime, interval: timedelta) -> int:
    """Return how many points a curve has: one at ``from_``, and each ``interval`` on, until ``to``."""
    if interval <= timedelta(0) or to < from_:
        raise ValueError("a curve goes forward")
    return (to - from_) // interval + 1


def equity_curve(
    connection: Connection, *, from_: datetime, to: datetime, interval: timedelta
) -> tuple[EquityPoint, ...]:
    """Return the points of the curve, the oldest first, from the first one on that any snapshot tells of.

    At each point counts the newest snapshot of each position until then, however old it is.

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
        )
        for row in sums_at(connection, from_, interval=interval, count=count)
    )
