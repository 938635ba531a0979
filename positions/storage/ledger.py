"""The ledger: append-only; its unique key decides what is new."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, RowMapping

from positions.domain.events import Entry, Kind, LegName, PositionKey, TimeSource
from positions.domain.leg import FillOrder
from positions.storage import arrays

_KINDS = {
    "key": "text",
    "kind": "text",
    "leg": "text",
    "quantity": "numeric",
    "price": "numeric",
    "fee": "numeric",
    "executed_at": "timestamptz",
    "time_source": "text",
    "venue_seq": "bigint",
    "order_id": "text",
    "exec_type": "text",
    "trace_id": "text",
    "size_after": "numeric",
}
_COLUMNS = ", ".join(_KINDS)
_INSERTED = {"position_id": "uuid", **_KINDS}
# Sorted by key: two workers that insert the same entries wait for each other in the same order.
_INSERT = f"""
    INSERT INTO ledger (position_id, {_COLUMNS})
    SELECT v.* FROM {arrays.unnest(_INSERTED)} AS v (position_id, {_COLUMNS})
    ORDER BY v.key
    ON CONFLICT (key) DO NOTHING
    RETURNING key
"""
BEGINNING = FillOrder(datetime(1970, 1, 1, tzinfo=UTC), -1, "")
_SELECT = f"SELECT p.asset, p.mode, {', '.join('l.' + name for name in _KINDS)}"
_OF_ORDERS = f"""
    {_SELECT} FROM ledger l JOIN positions p ON p.id = l.position_id
    WHERE l.order_id IN (
        SELECT order_id FROM ledger WHERE order_id = ANY(%(orders)s::text[]) AND kind = 'order_report'
    )
"""
_AFTER = f"""
    {_SELECT} FROM unnest(
        %(position)s::uuid[], %(at)s::timestamptz[], %(seq)s::bigint[], %(after)s::text[]
    ) AS v (position_id, at, seq, key)
    JOIN positions p ON p.id = v.position_id
    CROSS JOIN LATERAL (
        SELECT * FROM ledger
        WHERE ledger.position_id = v.position_id AND ledger.executed_at BETWEEN v.at AND %(until)s
            AND kind IN ('trade', 'funding', 'order_report')
            AND (ledger.executed_at, coalesce(ledger.venue_seq, -1), ledger.key COLLATE "C")
                > (v.at, v.seq, v.key COLLATE "C")
        LIMIT %(limit)s
    ) l
"""
# The bounds on the time alone are what the index serves; of one time there are few.
_PAGE = f"""
    SELECT id, {_COLUMNS}, recorded_at FROM ledger
    WHERE position_id = %(position_id)s AND executed_at BETWEEN %(from)s AND %(to)s
        AND (executed_at, id) < (%(until)s, %(id)s)
    ORDER BY executed_at DESC, id DESC LIMIT %(limit)s
"""
_ADJUSTMENTS = f"""
    {_SELECT} FROM unnest(%(position)s::uuid[], %(since)s::timestamptz[]) AS v (position_id, since)
    JOIN positions p ON p.id = v.position_id
    JOIN ledger l ON l.position_id = v.position_id AND l.executed_at BETWEEN v.since AND %(until)s
    WHERE l.kind = 'adjustment' AND l.size_after IS NOT NULL
    ORDER BY l.executed_at, l.id
"""
_FIRST_TIMES = """
    SELECT v.id, l.at FROM unnest(%(position)s::uuid[]) AS v (id)
    CROSS JOIN LATERAL (SELECT min(executed_at) AS at FROM ledger WHERE position_id = v.id) l
    WHERE l.at IS NOT NULL
"""
_TOLD_APART = """
    SELECT DISTINCT v.id FROM unnest(%(position)s::uuid[], %(point)s::timestamptz[]) AS v (id, point)
    JOIN ledger l ON l.position_id = v.id AND l.executed_at <= v.point AND l.kind = 'order_report'
    WHERE EXISTS (
        SELECT FROM ledger later
        WHERE later.order_id = l.order_id AND later.position_id = l.position_id AND later.executed_at > %(at)s
            AND (later.kind <> 'order_report' OR abs(later.quantity) < abs(l.quantity))
    )
"""
FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)


def insert(connection: Connection, entries: Sequence[Entry], ids: Mapping[PositionKey, str]) -> set[str]:
    """Write ``entries`` of the positions with these ``ids``, and return the keys of those that were new."""
    if not entries:
        return set()
    columns: dict[str, Iterable[Any]] = {name: map(attrgetter(name), entries) for name in _KINDS}
    columns["position_id"] = [ids[entry.position] for entry in entries]
    rows = connection.exec_driver_sql(_INSERT, arrays.literals(_INSERTED, columns))
    return set(rows.scalars())


def of_reported_orders(connection: Connection, orders: Iterable[str]) -> dict[PositionKey, list[Entry]]:
    """Return all entries of those ``orders`` of which the ledger holds an order report, by position."""
    wanted = sorted(set(orders))
    if not wanted:
        return {}
    return _by_position(connection.exec_driver_sql(_OF_ORDERS, {"orders": arrays.texts(wanted)}))


def after(
    connection: Connection,
    starts: Mapping[str, FillOrder | None],
    *,
    limit: int | None = None,
    until: datetime | None = None,
) -> dict[PositionKey, list[Entry]]:
    """Return the entries that are folded into positions, from where each is to be folded on.

    Args:
        connection: only read from.
        starts: id of each position, and the fill after which its entries are wanted; None for all.
        limit: so many entries of each at most.
        until: only of this time and earlier.
    """
    if not starts:
        return {}
    orders = [start or BEGINNING for start in starts.values()]
    return _by_position(
        connection.exec_driver_sql(
            _AFTER,
            {
                "position": list(starts),
                "at": [order.at for order in orders],
                "seq": [order.seq for order in orders],
                "after": [order.key for order in orders],
                "limit": limit,
                "until": until or LAST,
            },
        )
    )


def adjustments(
    connection: Connection, since: Mapping[str, datetime], *, until: datetime
) -> dict[PositionKey, list[Entry]]:
    """Return the sizes taken over in positions (by id), each since its own moment, in the order of time."""
    rows = connection.exec_driver_sql(
        _ADJUSTMENTS, {"position": list(since), "since": list(since.values()), "until": until}
    )
    return _by_position(rows)


def first_times(connection: Connection, position_ids: Sequence[str]) -> dict[str, datetime]:
    """Return the time of the oldest entry of each position that has any."""
    rows = connection.exec_driver_sql(_FIRST_TIMES, {"position": list(position_ids)})
    return {str(row.id): row.at for row in rows}


def told_apart_later(connection: Connection, points: Mapping[str, datetime], *, at: datetime) -> set[str]:
    """Return the positions whose fills up to a point were told apart by entries of later than ``at``.

    An order report implies other fills once an execution of its order is known, or a report of less.

    Args:
        connection: only read from.
        points: position id to the time up to which its fills matter, no later than ``at``.
        at: what is later must not have had a say.
    """
    rows = connection.exec_driver_sql(
        _TOLD_APART, {"position": list(points), "point": list(points.values()), "at": at}
    )
    return {str(row.id) for row in rows}


def page(
    connection: Connection,
    position_id: str,
    *,
    limit: int,
    after: tuple[datetime, int] | None = None,
    from_: datetime | None = None,
    to: datetime | None = None,
) -> Sequence[RowMapping]:
    """Return entries of a position, of all kinds, as rows: the newest first, of equal times the last stored.

    Args:
        connection: only read from.
        position_id: which position.
        limit: most to return.
        after: time and id of the entry behind which to begin.
        from_: only of this time and later.
        to: only of this time and earlier.
    """
    until, id_ = after or (LAST, 0)
    return (
        connection.exec_driver_sql(
            _PAGE,
            {
                "position_id": position_id,
                "from": from_ or FIRST,
                "to": min(to or LAST, until),
                "until": until,
                "id": id_,
                "limit": limit,
            },
        )
        .mappings()
        .all()
    )


def _by_position(rows: Iterable[Any]) -> dict[PositionKey, list[Entry]]:
    found: defaultdict[PositionKey, list[Entry]] = defaultdict(list)
    for row in rows:
        entry = _entry(row)
        found[entry.position].append(entry)
    return found


def _entry(row: Any) -> Entry:
    return Entry(
        key=row.key,
        position=PositionKey.of(row.asset, row.mode),
        leg=LegName(row.leg),
        kind=Kind(row.kind),
        quantity=row.quantity,
        price=row.price,
        fee=row.fee,
        executed_at=row.executed_at,
        time_source=TimeSource(row.time_source),
        venue_seq=row.venue_seq,
        order_id=row.order_id,
        exec_type=row.exec_type,
        trace_id=row.trace_id,
        size_after=row.size_after,
    )
