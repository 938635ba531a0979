"""The sums over all positions, exact: PostgreSQL adds and multiplies `numeric` without rounding."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import psycopg2
from sqlalchemy import Connection, Engine, RowMapping, and_, bindparam, case, func, literal, or_, select
from sqlalchemy.exc import SQLAlchemyError

from positions.errors import Unavailable
from positions.storage.database import refuse_while_silent
from positions.storage.tables import Amount, Time, portfolio_exposures, positions

_NOTHING = literal(0, Amount)
_gross_size = positions.c.long_size - positions.c.short_size
is_open = _gross_size != 0
"""True of a position with any leg that is not flat."""
_priced = positions.c.current_price.is_not(None)
# A flat position is worth 0 at whatever price; an open one without a price is left out of a sum (NULL).
_exposure = case((is_open, _gross_size * positions.c.current_price), else_=_NOTHING)
_net_exposure = case((is_open, positions.c.size * positions.c.current_price), else_=_NOTHING)

GROSS_EXPOSURE = select(func.coalesce(func.sum(portfolio_exposures.c.gross), _NOTHING))
"""Gross exposure of all priced positions in USDT, as one number; costs the same for any number of them."""


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


def version(connection: Connection) -> int:
    """Return the portfolio's version: it grows with every committed change of any position.

    A trigger sees to it, in the transaction of the change and as its last lock.
    """
    found: int = connection.exec_driver_sql(_VERSION).scalar_one()
    return found


_VERSION = "SELECT coalesce(sum(value), 0)::bigint FROM portfolio_versions"
# What changes where a version may come back with other figures: another database, one that was restored, or
# a server that was set back.
_ERA = """
    SELECT concat_ws('-', (SELECT oid FROM pg_database WHERE datname = current_database()),
        pg_relation_filenode('portfolio_versions'), extract(epoch FROM pg_postmaster_start_time()))
"""


class Versions:
    """Reads the portfolio's version, on one connection of its own.

    It is asked for at every request. Requests that come while it is being read share the next reading, which
    begins after all of them: none is told a version older than itself.
    """

    WAIT_S = 5.0
    """How long a request waits for the readings before its own."""

    def __init__(self, engine: Engine) -> None:
        """Open nothing yet."""
        self._engine = engine
        self._lock = threading.Lock()
        self._cursor: Any = None
        self.era = ""
        """Versions of one era can be compared, and others cannot."""
        self._begun = 0
        self._version = 0

    def __call__(self) -> int:
        """Return the version that is committed now.

        Raises:
            Unavailable: the database cannot be reached, or is too slow.
        """
        refuse_while_silent()
        begun = self._begun
        if not self._lock.acquire(timeout=self.WAIT_S):
            raise Unavailable("the database does not answer")
        try:
            # At least one reading has begun since, and none is under way: the last one is good.
            if self._begun == begun or self._cursor is None:
                self._begun += 1
                self._version = self._read()
            return self._version
        finally:
            self._lock.release()

    def _read(self) -> int:
        if self._cursor is not None:
            try:
                return self._ask()
            except psycopg2.Error as error:
                # A connection that was idle may be gone without a word: a new one tells whether the
                # database is. Who waited for a lock in vain does not wait again.
                gone = self._cursor.connection.closed
                self._close()
                if not gone:
                    raise Unavailable(f"{type(error).__name__} at the portfolio's version") from error
        try:
            self._connect()
            return self._ask()
        except (psycopg2.Error, SQLAlchemyError) as error:
            self._close()
            raise Unavailable(f"{type(error).__name__} at the portfolio's version") from error

    def _connect(self) -> None:
        own = self._engine.raw_connection()
        connection: Any = own.driver_connection
        own.detach()
        connection.autocommit = True
        self._cursor = connection.cursor()
        self._cursor.execute(_ERA)
        self.era = self._cursor.fetchone()[0]

    def _ask(self) -> int:
        self._cursor.execute(_VERSION)
        found: int = self._cursor.fetchone()[0]
        return found

    def _close(self) -> None:
        if self._cursor is not None:
            with suppress(psycopg2.Error):
                self._cursor.connection.close()
            self._cursor = None


_CLAIM = """
    INSERT INTO portfolio_mark (id, published_at, versions)
    SELECT 1, %(now)s, sum(value) FROM portfolio_versions HAVING sum(value) > 0
    ON CONFLICT (id) DO UPDATE SET published_at = excluded.published_at, versions = excluded.versions
    WHERE portfolio_mark.versions <> excluded.versions
        AND (portfolio_mark.published_at <= excluded.published_at - %(interval)s
            OR portfolio_mark.published_at > excluded.published_at + interval '1 minute')
"""


def claim_publication(connection: Connection, *, now: datetime, interval: timedelta) -> bool:
    """Return whether the portfolio is to be published now: it changed, and the last time is long enough ago.

    Where the last time is more than a minute to come, a clock was set back, and nobody waits for it. Who gets
    True holds the row until its transaction ends, so that two of them never publish the same.
    """
    # Beat ticks at the interval itself: a tick that comes a little early is not made to wait for another, one
    # of a second beat is.
    claimed = connection.exec_driver_sql(_CLAIM, {"now": now, "interval": interval * 0.9})
    return claimed.rowcount == 1
