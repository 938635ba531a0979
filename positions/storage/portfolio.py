"""The sums over all positions, exact: PostgreSQL adds and multiplies `numeric` without rounding."""

import threading
import time
from collections.abc import Iterable, Sized
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from select import POLLIN, poll
from typing import Any, Generic, Protocol, Self, TypeVar

import psycopg2
from psycopg2.extensions import POLL_OK
from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Select,
    and_,
    case,
    column,
    func,
    literal,
    select,
    text,
    true,
)
from sqlalchemy.exc import SQLAlchemyError

from positions.errors import Unavailable
from positions.storage.database import refuse_while_silent, wait
from positions.storage.tables import Amount, portfolio_exposures, positions

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

_VERSION = "SELECT coalesce(sum(value), 0)::bigint FROM portfolio_versions"
# What changes where a version may come back with other figures: another database, one that was restored, or
# a server that was set back.
_ERA = """
    SELECT concat_ws('-', (SELECT oid FROM pg_database WHERE datname = current_database()),
        pg_relation_filenode('portfolio_versions'), extract(epoch FROM pg_postmaster_start_time()))
"""


def version(connection: Connection) -> int:
    """Return the portfolio's version: it grows with every committed change of any position.

    A trigger sees to it, in the transaction of the change and as its last lock.
    """
    found: int = connection.exec_driver_sql(_VERSION).scalar_one()
    return found


# What this moment sees of a row, and an earlier one did not, was written by a transaction that was running
# then or began later: its number is not below the lowest that was running. Numbers of transactions go round
# after 32 bits, so it is ages that are compared.
_HEAD = (
    text(f"""
        SELECT ({_ERA}) AS era, ({_VERSION}) AS version,
            pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS horizon,
            coalesce(sum(uuid_hash(id)), 0) AS all_ids,
            array_agg(asset) FILTER (WHERE age(xmin)
                BETWEEN (SELECT age(pg_snapshot_xmax(pg_current_snapshot())::xid))
                AND (SELECT age(CAST(:since AS xid8)::xid))) AS written
        FROM positions
    """)
    .columns(column("era"), column("version"), column("horizon"), column("all_ids"), column("written"))
    .cte("head")
)
SUMMED = (
    "size",
    "unrealized_pnl",
    "realized_pnl",
    "realized_gross",
    "fees_paid",
    "funding_received",
    "realized_adjustment",
)
"""The columns of positions that an asset has the sums of."""
_SUMS = select(
    positions.c.asset,
    func.sum(_exposure).label("exposure"),
    func.sum(_net_exposure).label("net_exposure"),
    *(func.sum(positions.c[name]).label(name) for name in SUMMED),
    func.count().filter(is_open).label("open_count"),
    func.count().filter(positions.c.size > 0).label("long_count"),
    func.count().filter(positions.c.size < 0).label("short_count"),
    func.bool_or(and_(is_open, ~_priced)).label("unpriced"),
    # A price of unknown time is as old as can be.
    func.min(func.coalesce(positions.c.current_price_at, func.to_timestamp(0)))
    .filter(is_open, _priced)
    .label("oldest_price_at"),
    func.sum(func.uuid_hash(positions.c.id)).label("ids"),
).group_by(positions.c.asset)


def _read(sums: Select[Any]) -> Select[Any]:
    """Return the statement that reads the head and the sums beside it, all of one moment."""
    beside = sums.lateral("sums")
    return select(_HEAD, beside).select_from(_HEAD.outerjoin(beside, true()))


_READ_ALL = _read(_SUMS)
_READ_WRITTEN = _read(_SUMS.where(positions.c.asset.in_(select(func.unnest(_HEAD.c.written)))))
TRANSACTIONS_MAX = 2**30
"""How many transactions later one can still go on from a reading: half of their numbers are of the past."""
KEPT_MAX_ASSETS = 100_000
"""Of how many assets at most a process keeps the sums."""


class Whole(Protocol):
    """What the sums of the assets are gathered in."""

    @property
    def by_asset(self) -> Sized:
        """One for each asset."""

    @property
    def ids(self) -> int:
        """The sum of the column `ids` over all assets."""

    def with_rows(self, rows: Iterable[RowMapping]) -> Self:
        """Return what has the sums of these assets, instead of those that it has of them."""


Gathered = TypeVar("Gathered", bound=Whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading(Generic[Gathered]):
    """The sums at one moment."""

    era: str
    version: int
    horizon: int
    """No transaction with a lower number was running."""
    whole: Gathered


class Sums(Generic[Gathered]):
    """The sums over the positions of each asset, kept by a process, which then reads only what changed.

    Each reading looks all rows over for what was written since the last one, and sums up the assets of those
    anew. A checksum of ids tells whether a row is gone: then, and wherever else one cannot go on from what is
    kept, all is read.

    Rows are by asset. In them exposures are None where every position is open and unpriced, and
    `oldest_price_at` is where none is open and priced.
    """

    def __init__(self, nothing: Gathered) -> None:
        """Read nothing yet; ``nothing`` has no rows."""
        self._nothing = nothing
        self._last: _Reading[Gathered] | None = None

    def read(self, connection: Connection) -> Gathered:
        """Return the sums of all positions, open and closed.

        Args:
            connection: only read from; its transaction has changed no position itself.
        """
        # Another thread may put a reading of its own there meanwhile, which is as good to go on from.
        last = self._last
        found = self._read_on(connection, last) if last else None
        if found is None:
            head, rows = self._ask(connection, _READ_ALL)
            found = self._reading(head, self._nothing.with_rows(rows))
        self._last = found if len(found.whole.by_asset) <= KEPT_MAX_ASSETS else None
        return found.whole

    def _read_on(self, connection: Connection, last: _Reading[Gathered]) -> _Reading[Gathered] | None:
        """Return what ``last`` has become; None where one cannot go on from it."""
        head, rows = self._ask(connection, _READ_WRITTEN, since=last.horizon)
        if head["era"] != last.era or head["horizon"] - last.horizon > TRANSACTIONS_MAX:
            return None
        # The moment may be before the last one, where another thread was quicker.
        if head["version"] < last.version:
            return None
        whole = last.whole.with_rows(rows)
        return self._reading(head, whole) if whole.ids == head["all_ids"] else None

    @staticmethod
    def _ask(
        connection: Connection, statement: Select[Any], since: int | None = None
    ) -> tuple[RowMapping, list[RowMapping]]:
        found = connection.execute(statement, {"since": since and str(since)}).mappings().all()
        return found[0], [row for row in found if row["asset"] is not None]

    @staticmethod
    def _reading(head: RowMapping, whole: Gathered) -> _Reading[Gathered]:
        return _Reading(era=head["era"], version=head["version"], horizon=head["horizon"], whole=whole)


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


class VersionsAside:
    """Reads the portfolio's version without waiting for it; for one thread, which has other things to do.

    It is asked on a connection of its own, which another thread makes.
    """

    def __init__(self, engine: Engine) -> None:
        """Open nothing yet."""
        self._engine = engine
        self._cursor: Any = None
        self._poll = poll()
        self._open = False
        """Whether a question was not answered yet."""

    def connect(self) -> None:
        """Connect, and wait for that.

        Raises:
            Unavailable: the database cannot be reached.
        """
        try:
            with closing(self._engine.raw_connection()) as other:
                info = other.driver_connection.info  # type: ignore[union-attr]
                connection = psycopg2.connect(**info.dsn_parameters, password=info.password, async_=True)
            wait(connection)
            self._poll = poll()
            self._poll.register(connection.fileno(), POLLIN)
            self._cursor, self._open = connection.cursor(), False
        except (psycopg2.Error, SQLAlchemyError) as error:
            raise Unavailable(f"{type(error).__name__} at the portfolio's version") from error

    def begin(self) -> bool:
        """Ask for the version; return whether it was asked for: not while the last question is open.

        Raises:
            Unavailable: there is no connection any more.
        """
        if self._cursor is None or (self._open and not self._answered(0)):
            return False
        try:
            self._cursor.execute(_VERSION)
        except psycopg2.Error as error:
            raise self._lost(error) from error
        self._open = True
        return True

    def end(self, wait_s: float) -> int | None:
        """Return the version that was asked for; None if it is not told in time.

        Raises:
            Unavailable: it will never be told.
        """
        if not self._answered(wait_s):
            return None
        found: int = self._cursor.fetchone()[0]
        return found

    def _answered(self, wait_s: float) -> bool:
        deadline = time.monotonic() + wait_s
        try:
            while self._cursor.connection.poll() != POLL_OK:
                if not self._poll.poll(max(deadline - time.monotonic(), 0) * 1000):
                    return False
        except psycopg2.Error as error:
            raise self._lost(error) from error
        self._open = False
        return True

    def _lost(self, error: psycopg2.Error) -> Unavailable:
        with suppress(psycopg2.Error):
            self._cursor.connection.close()
        self._cursor = None
        return Unavailable(f"{type(error).__name__} at the portfolio's version")


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
