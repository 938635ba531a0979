"""The sums over all positions, exact: PostgreSQL adds and multiplies `numeric` without rounding."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection, RowMapping, and_, bindparam, case, func, literal, or_, select

from positions.storage.tables import Amount, Time, positions

_NOTHING = literal(0, Amount)
_gross_size = positions.c.long_size - positions.c.short_size
is_open = _gross_size != 0
"""True of a position with any leg that is not flat."""
_priced = positions.c.current_price.is_not(None)
# A flat position is worth 0 at whatever price; an open one without a price is left out of a sum (NULL).
_exposure = case((is_open, _gross_size * positions.c.current_price), else_=_NOTHING)
_net_exposure = case((is_open, positions.c.size * positions.c.current_price), else_=_NOTHING)

GROSS_EXPOSURE = select(func.coalesce(func.sum(_exposure), _NOTHING))
"""Gross exposure of all priced positions in USDT, as one number."""


_price_at = positions.c.current_price_at
_SUMS = (
    select(
        positions.c.asset,
        func.sum(_exposure).label("exposure"),
        func.sum(_net_exposure).label("net_exposure"),
        *(
            func.sum(positions.c[name]).label(name)
            for name in (
                "size",
                "unrealized_pnl",
                "realized_pnl",
                "realized_gross",
                "fees_paid",
                "funding_received",
                "realized_adjustment",
            )
        ),
        func.count().filter(is_open).label("open_count"),
        func.count().filter(positions.c.size > 0).label("long_count"),
        func.count().filter(positions.c.size < 0).label("short_count"),
        func.bool_or(and_(is_open, ~_priced)).label("unpriced"),
        func.bool_or(
            and_(
                is_open, _priced, or_(_price_at.is_(None), _price_at < bindparam("stale_before", type_=Time))
            )
        ).label("stale"),
    )
    .group_by(positions.c.asset)
    .order_by(positions.c.asset)
)


def sums_by_asset(connection: Connection, *, stale_before: datetime) -> Sequence[RowMapping]:
    """Return the sums of each asset's positions, open and closed, in order of the asset.

    Exposures are None where every position of the asset is open and unpriced.

    Args:
        connection: only read from.
        stale_before: an open position with an older price, or one of unknown time, makes its asset stale.
    """
    return connection.execute(_SUMS, {"stale_before": stale_before}).mappings().all()


def advance(connection: Connection) -> None:
    """Say that positions changed in this transaction. To be the last lock that it takes."""
    connection.exec_driver_sql(
        "UPDATE portfolio_versions SET value = value + 1 WHERE shard = (pg_backend_pid() & 15)"
    )


def version(connection: Connection) -> int:
    """Return the portfolio's version: it grows with every committed change of any position."""
    found: int = connection.exec_driver_sql(VERSION).scalar_one()
    return found


VERSION = "SELECT sum(value)::bigint FROM portfolio_versions"

_CLAIM = """
    INSERT INTO portfolio_mark (id, published_at, versions)
    SELECT 1, %(now)s, sum(value) FROM portfolio_versions HAVING sum(value) > 0
    ON CONFLICT (id) DO UPDATE SET published_at = excluded.published_at, versions = excluded.versions
    WHERE portfolio_mark.versions <> excluded.versions
        AND portfolio_mark.published_at <= excluded.published_at - %(interval)s
"""


def claim_publication(connection: Connection, *, now: datetime, interval: timedelta) -> bool:
    """Return whether the portfolio is to be published now: it changed, and the last time is long enough ago.

    Who gets True holds the row until its transaction ends, so that two of them never publish the same.
    """
    # Beat ticks at the interval itself: a tick that comes a little early is not made to wait for another.
    claimed = connection.exec_driver_sql(_CLAIM, {"now": now, "interval": interval * 0.5})
    return claimed.rowcount == 1
