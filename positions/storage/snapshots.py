"""Snapshots of positions, one partition for each month; the primary key allows one for each moment."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import psycopg2.extras
from sqlalchemy import Connection, RowMapping, select, tuple_

from positions.domain.events import PositionKey
from positions.domain.numbers import plain
from positions.domain.position import State
from positions.storage import codec
from positions.storage.ledger import FIRST, LAST
from positions.storage.portfolio import GROSS_EXPOSURE
from positions.storage.tables import positions

PARTITIONS_LOCK = 4_800_003
"""Advisory lock: one partition is made or taken away at a time."""

_TYPED = ("exposure", "net_exposure", "unrealized_pnl", "realized_pnl")
# Sorted as every writer's: two that add the same snapshots wait for each other and never deadlock.
_INSERT = f"""
    INSERT INTO position_snapshots (position_id, asset, mode, created_at, {", ".join(_TYPED)}, snapshot_data)
    SELECT v.* FROM unnest(
        %(position_id)s::uuid[], %(asset)s::text[], %(mode)s::text[], %(created_at)s::timestamptz[],
        {", ".join(f"%({name})s::numeric[]" for name in _TYPED)}, %(data)s::jsonb[]
    ) AS v (position_id, asset, mode, created_at, {", ".join(_TYPED)}, snapshot_data)
    ORDER BY v.position_id, v.created_at
    ON CONFLICT (position_id, created_at) DO NOTHING
    RETURNING id, position_id, created_at
"""
# Locked in key order, as batches of events lock positions. The version stays: nothing of a position changed.
_MARK = """
    WITH locked AS MATERIALIZED (
        SELECT id FROM positions
        WHERE id = ANY(%(ids)s::uuid[]) AND (last_snapshot_at < %(at)s OR last_snapshot_at IS NULL)
        ORDER BY asset, mode FOR NO KEY UPDATE
    )
    UPDATE positions p SET last_snapshot_at = greatest(p.last_snapshot_at, %(at)s)
    FROM locked WHERE p.id = locked.id
"""
_SELECT = (
    "SELECT id, position_id, asset, mode, created_at, snapshot_data::text AS data FROM position_snapshots"
)
_LISTED = f"""
    {_SELECT} WHERE position_id = %(position_id)s AND created_at BETWEEN %(from)s AND %(to)s
    ORDER BY created_at DESC LIMIT %(limit)s OFFSET %(offset)s
"""
_CUT = select(
    positions, GROSS_EXPOSURE.correlate(None).scalar_subquery().label("portfolio_exposure")
).order_by(positions.c.asset, positions.c.mode)

_NEWEST_BEFORE = """
    SELECT v.id, s.created_at, s.exposure, s.realized_pnl
    FROM unnest(%(ids)s::uuid[]) AS v (id)
    CROSS JOIN LATERAL (
        SELECT created_at, exposure, realized_pnl FROM position_snapshots
        WHERE position_id = v.id AND created_at < %(at)s ORDER BY created_at DESC LIMIT 1
    ) s
"""
_STATES = """
    SELECT s.position_id, s.asset, s.mode, s.created_at, s.snapshot_data -> 'state' AS state
    FROM unnest(%(ids)s::uuid[]) AS v (id)
    CROSS JOIN LATERAL (
        (SELECT * FROM position_snapshots
         WHERE position_id = v.id AND created_at <= %(at)s ORDER BY created_at DESC LIMIT 2)
        UNION ALL
        (SELECT * FROM position_snapshots
         WHERE position_id = v.id AND created_at > %(at)s ORDER BY created_at LIMIT 1)
    ) s
"""

# Added up over the positions at each point of a curve.
_CHANGES = {
    **{name: f"coalesce(s.{name}, 0)" for name in _TYPED},
    "count": "1",
    "unpriced": "(s.exposure IS NULL)::integer",
}
# Looked up point by point and not read through: of what lies between two points only the last counts. Each
# position adds what changed since it was last seen; so it is carried forward where a point has none of it.
_SUMS = f"""
    WITH points AS (
        SELECT n, %(first)s + n * %(interval)s AS at,
            CASE n WHEN 0 THEN '-infinity' ELSE %(first)s + (n - 1) * %(interval)s END AS after
        FROM generate_series(0, %(count)s - 1) AS n
    ), changes AS (
        SELECT n, {
    ", ".join(f"{value} - lag({value}, 1, 0) OVER own AS {name}" for name, value in _CHANGES.items())
}
        FROM positions p CROSS JOIN LATERAL (
            SELECT n, taken.* FROM points CROSS JOIN LATERAL (
                SELECT created_at, {", ".join(_TYPED)} FROM position_snapshots
                WHERE position_id = p.id AND created_at > points.after AND created_at <= points.at
                    AND unrealized_pnl IS NOT NULL
                ORDER BY created_at DESC LIMIT 1
            ) taken
            UNION ALL
            SELECT n, p.closed_at, 0, 0, p.unrealized_pnl, p.realized_pnl FROM points
            WHERE p.closed_at > points.after AND p.closed_at <= points.at
            UNION ALL
            SELECT %(count)s - 1, 'infinity', present.* FROM (
                SELECT CASE flat WHEN true THEN 0 ELSE (p.long_size - p.short_size) * p.current_price END,
                    CASE flat WHEN true THEN 0 ELSE p.size * p.current_price END,
                    p.unrealized_pnl, p.realized_pnl
                FROM (SELECT p.long_size = p.short_size AS flat) sizes
            ) present WHERE %(ends_now)s
        ) s
        WINDOW own AS (PARTITION BY p.id ORDER BY n, s.created_at)
    ), changed AS (
        SELECT n, {", ".join(f"sum({name}) AS {name}" for name in _CHANGES)} FROM changes GROUP BY n
    ), sums AS (
        SELECT at, {", ".join(f"sum({name}) OVER past AS {name}" for name in _CHANGES)}
        FROM points LEFT JOIN changed USING (n) WINDOW past AS (ORDER BY n)
    )
    SELECT *, unrealized_pnl + realized_pnl AS pnl,
        max(unrealized_pnl + realized_pnl) OVER (ORDER BY at) - unrealized_pnl - realized_pnl AS drawdown
    FROM sums WHERE unrealized_pnl IS NOT NULL ORDER BY at
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A position as it was at a moment."""

    position_id: str
    key: PositionKey
    created_at: datetime
    """The moment it is of."""
    exposure: Decimal | None = None
    """Gross, in USDT; None when open without a price. This and the next three: None in an older service's."""
    net_exposure: Decimal | None = None
    unrealized_pnl: Decimal | None = None
    realized_pnl: Decimal | None = None
    data: Mapping[str, Any]
    """JSON-ready: the position object, the parts of its realized PnL, and its state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A snapshot that is in the database."""

    id: str
    position_id: str
    key: PositionKey
    created_at: datetime
    data: Any
    """As of :class:`Snapshot`; of an older service's row whatever it kept, fractions as plain strings."""


def cut(connection: Connection, keys: Iterable[PositionKey] | None) -> Sequence[RowMapping]:
    """Return the rows of the positions of ``keys`` (None: of all), all of one moment, in key order.

    Each row has all columns of the table, and the `portfolio_exposure` of that moment. No lock is taken.
    """
    statement = _CUT
    if keys is not None:
        of_keys = [(key.asset, str(key.mode)) for key in keys]
        statement = _CUT.where(tuple_(positions.c.asset, positions.c.mode).in_(of_keys))
    return connection.execute(statement).mappings().all()


def add(connection: Connection, snapshots: Sequence[Snapshot]) -> dict[tuple[str, datetime], str]:
    """Write ``snapshots`` where there is none of the same position and moment yet.

    Makes the partitions of their months where they are missing (:func:`make_partition`).

    Returns:
        Position id and moment of each that was new, and its own id.
    """
    if not snapshots:
        return {}
    for month in sorted({month_of(each.created_at) for each in snapshots}):
        make_partition(connection, month)
    rows = connection.exec_driver_sql(
        _INSERT,
        {
            **{
                name: [getattr(each, name) for each in snapshots]
                for name in ("position_id", "created_at", *_TYPED)
            },
            "asset": [each.key.asset for each in snapshots],
            "mode": [str(each.key.mode) for each in snapshots],
            "data": [psycopg2.extras.Json(each.data) for each in snapshots],
        },
    )
    return {(str(row.position_id), row.created_at): str(row.id) for row in rows}


def mark_taken(connection: Connection, position_ids: Sequence[str], *, at: datetime) -> None:
    """Say of positions that their last snapshot is of ``at``, unless they have a later one."""
    if position_ids:
        connection.exec_driver_sql(_MARK, {"ids": list(position_ids), "at": at})


def newest_before(connection: Connection, position_ids: Sequence[str], at: datetime) -> dict[str, RowMapping]:
    """Return `created_at`, `exposure` and `realized_pnl` of each position's last snapshot before ``at``."""
    rows = connection.exec_driver_sql(_NEWEST_BEFORE, {"ids": list(position_ids), "at": at}).mappings()
    return {str(row["id"]): row for row in rows}


def month_of(at: datetime) -> datetime:
    """Return the beginning of the month, in UTC, that ``at`` lies in."""
    return at.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


def next_month(month: datetime) -> datetime:
    """Return the beginning of the month after the one that begins at ``month``."""
    return month_of(month + timedelta(days=31))


def make_partition(connection: Connection, month: datetime) -> bool:
    """Make the partition of the month that begins at ``month``, unless it is there; tell whether it was made.

    Rows of that month that lie in the default partition move into it. Whoever else makes a partition
    waits until this transaction ends; who reads or writes snapshots, only where this one does make one. To
    be called before the transaction reads snapshots: two that did could wait for each other.
    """
    name = f"position_snapshots_{month:%Y_%m}"
    if _attached(connection, name):
        return False
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%(lock)s)", {"lock": PARTITIONS_LOCK})
    if _attached(connection, name):
        return False
    bounds = {"from": month, "to": next_month(month)}
    # Made apart and attached, which other months' readers and writers need not wait for.
    connection.exec_driver_sql(f"CREATE TABLE {name} (LIKE position_snapshots INCLUDING ALL)")
    connection.exec_driver_sql("LOCK TABLE position_snapshots_default IN ACCESS EXCLUSIVE MODE")
    connection.exec_driver_sql(
        f"""
        WITH moved AS (
            DELETE FROM position_snapshots_default
            WHERE created_at >= %(from)s AND created_at < %(to)s RETURNING *
        )
        INSERT INTO {name} SELECT * FROM moved
        """,
        bounds,
    )
    connection.exec_driver_sql(
        f"ALTER TABLE position_snapshots ATTACH PARTITION {name} FOR VALUES FROM (%(from)s) TO (%(to)s)",
        bounds,
    )
    return True


def listed(
    connection: Connection,
    position_id: str,
    *,
    limit: int,
    offset: int = 0,
    from_: datetime | None = None,
    to: datetime | None = None,
) -> list[Kept]:
    """Return snapshots of a position from ``from_`` to ``to``, both included, the newest first."""
    rows = connection.exec_driver_sql(
        _LISTED,
        {
            "position_id": position_id,
            "from": from_ or FIRST,
            "to": to or LAST,
            "limit": limit,
            "offset": offset,
        },
    )
    return [_kept(row) for row in rows]


def sums_at(
    connection: Connection, first: datetime, *, interval: timedelta, count: int, ends_now: bool = False
) -> Sequence[RowMapping]:
    """Return what the newest snapshots of all positions added up to, at ``count`` points from ``first`` on.

    A row for each point `at`, from the first one on that anything tells of: `exposure`, `net_exposure`,
    `unrealized_pnl`, `realized_pnl`, their sum `pnl`, its `drawdown` from the highest before, all exact; the
    `count` of the positions in it, and how many of them are `unpriced`, which add nothing to exposures. A
    position that is closed now counts as it is from when it was. Where the curve `ends_now`, its last point
    is of the present.
    """
    values = {"first": first, "interval": interval, "count": count, "ends_now": ends_now}
    return connection.exec_driver_sql(_SUMS, values).mappings().all()


def states_around(
    connection: Connection, position_ids: Sequence[str], at: datetime
) -> dict[str, list[tuple[datetime, State | None]]]:
    """Return moment and state of the snapshots of each position around ``at``, the newest first.

    They are the two newest up to ``at``, and the next one. The state is None in what an older service wrote.
    """
    found: defaultdict[str, list[tuple[datetime, State | None]]] = defaultdict(list)
    for row in connection.exec_driver_sql(_STATES, {"ids": list(position_ids), "at": at}):
        key = PositionKey.of(row.asset, row.mode)
        state = None if row.state is None else codec.decode(key, row.state)
        found[str(row.position_id)].append((row.created_at, state))
    for each in found.values():
        each.sort(key=lambda taken: taken[0], reverse=True)
    return found


def _attached(connection: Connection, name: str) -> bool:
    statement = """
        SELECT EXISTS (
            SELECT FROM pg_inherits
            WHERE inhparent = 'position_snapshots'::regclass AND inhrelid = to_regclass(%(name)s)
        )
    """
    return bool(connection.exec_driver_sql(statement, {"name": name}).scalar_one())


def _kept(row: Any) -> Kept:
    return Kept(
        id=str(row.id),
        position_id=str(row.position_id),
        key=PositionKey.of(row.asset, row.mode),
        created_at=row.created_at,
        data=json.loads(row.data, parse_float=lambda digits: plain(Decimal(digits))),
    )
