"""Points to fold on from: what a late fill makes wrong is deleted with it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import psycopg2.extras
from sqlalchemy import Connection

from positions.domain.leg import FillOrder
from positions.domain.position import Point
from positions.storage import codec

_ARRAYS = "unnest(%(position)s::uuid[], %(at)s::timestamptz[], %(seq)s::bigint[], %(key)s::text[]"
_NAMES = "position_id, at, seq, key"
_INSERT = f"""
    INSERT INTO fold_points ({_NAMES}, state)
    SELECT v.* FROM {_ARRAYS}, %(state)s::jsonb[]) AS v ({_NAMES}, state)
    ON CONFLICT (position_id, at, seq, key) DO UPDATE SET state = excluded.state
"""
_DELETE = f"""
    DELETE FROM fold_points p USING {_ARRAYS}) AS v ({_NAMES})
    WHERE p.position_id = v.position_id AND (p.at, p.seq, p.key) >= (v.at, v.seq, v.key COLLATE "C")
"""
_BEFORE = f"""
    SELECT p.* FROM {_ARRAYS}, %(reported)s::timestamptz[]) AS v ({_NAMES}, reported)
    CROSS JOIN LATERAL (
        (SELECT * FROM fold_points f
         WHERE f.position_id = v.position_id AND (f.at, f.seq, f.key) < (v.at, v.seq, v.key COLLATE "C")
         ORDER BY f.at DESC, f.seq DESC, f.key DESC LIMIT 2)
        UNION
        (SELECT * FROM fold_points f
         WHERE f.position_id = v.position_id AND (f.at, f.seq, f.key) < (v.at, v.seq, v.key COLLATE "C")
            AND f.at < v.reported
         ORDER BY f.at DESC, f.seq DESC, f.key DESC LIMIT 1)
    ) p ORDER BY p.position_id, p.at DESC, p.seq DESC, p.key DESC
"""
_END = FillOrder(datetime(9999, 1, 1, tzinfo=UTC), 0, "")


def add(connection: Connection, points: Sequence[tuple[str, Point]]) -> None:
    """Keep points, each with the id of its position."""
    if points:
        states = [psycopg2.extras.Json(codec.encode_point(point)) for _, point in points]
        arrays = _arrays([(id_, point.order) for id_, point in points])
        connection.exec_driver_sql(_INSERT, {**arrays, "state": states})


def delete_from(connection: Connection, changes: Mapping[str, FillOrder]) -> None:
    """Forget the points of each position (by id) that have the fill in them which changed."""
    if changes:
        connection.exec_driver_sql(_DELETE, _arrays(list(changes.items())))


def before(
    connection: Connection, wanted: Mapping[str, tuple[FillOrder | None, datetime | None]]
) -> dict[str, list[Point]]:
    """Return the points worth looking at for each position (by id), the newest first.

    Args:
        connection: only read from.
        wanted: for each position, the first fill that changes, and the time of the oldest report that
            decides something of it: a point must be older than the first, and may have to be than the second.
    """
    found: defaultdict[str, list[Point]] = defaultdict(list)
    if not wanted:
        return found
    arrays = _arrays([(id_, change or _END) for id_, (change, _) in wanted.items()])
    reported = [at or _END.at for _, at in wanted.values()]
    for row in connection.exec_driver_sql(_BEFORE, {**arrays, "reported": reported}):
        order = FillOrder(row.at, row.seq, row.key)
        found[str(row.position_id)].append(codec.decode_point(order, row.state))
    return found


def _arrays(of: Sequence[tuple[str, FillOrder]]) -> dict[str, list[object]]:
    return {
        "position": [id_ for id_, _ in of],
        "at": [order.at for _, order in of],
        "seq": [order.seq for _, order in of],
        "key": [order.key for _, order in of],
    }
