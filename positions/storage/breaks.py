"""Kept breaks: first and last seen, both figures, and how each ended."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, RowMapping, select

from positions.domain.breaks import Break
from positions.storage.tables import breaks

Found = tuple[str, str, str, Break]
"""A break and where it is: position id, leg, kind."""

_FIGURES = ("ours", "theirs", "report_id", "cause", "detail")
_RESOLVE = """
    UPDATE breaks b SET resolved_at = %(now)s, resolution = %(resolution)s
    FROM unnest(%(position)s::uuid[], %(leg)s::text[], %(kind)s::text[]) AS v (position_id, leg, kind)
    WHERE b.position_id = v.position_id AND b.leg = v.leg AND b.kind = v.kind AND b.resolved_at IS NULL
"""
_KEEP = """
    INSERT INTO breaks AS b
        (position_id, leg, kind, ours, theirs, report_id, cause, detail, first_seen_at, last_seen_at)
    SELECT v.*, %(now)s, %(now)s
    FROM unnest(
        %(position)s::uuid[], %(leg)s::text[], %(kind)s::text[], %(ours)s::numeric[], %(theirs)s::numeric[],
        %(report_id)s::text[], %(cause)s::text[], %(detail)s::text[]
    ) AS v
    ON CONFLICT (position_id, leg, kind) WHERE resolved_at IS NULL
    DO UPDATE SET ours = excluded.ours, theirs = excluded.theirs, report_id = excluded.report_id,
        -- Who sees it again without evidence takes none away.
        (cause, detail) = (
            SELECT b.cause, b.detail
            WHERE excluded.cause = 'unknown' AND (b.ours, b.theirs) = (excluded.ours, excluded.theirs)
            UNION ALL SELECT excluded.cause, excluded.detail LIMIT 1
        ),
        last_seen_at = excluded.last_seen_at
"""


def keep(connection: Connection, found: Sequence[Found], *, now: datetime) -> None:
    """Keep breaks: a new one is opened, one that is open already has its figures brought up to date."""
    if not found:
        return
    arrays = _arrays([each[:3] for each in found])
    figures = {name: [getattr(each[3], name) for each in found] for name in _FIGURES}
    connection.exec_driver_sql(_KEEP, {**arrays, **figures, "now": now})
    taken = [each[:3] for each in found if each[3].taken_over_at is not None]
    resolve(connection, taken, resolution="taken_over", now=now)


def resolve(
    connection: Connection,
    ended: Sequence[tuple[str, str, str]],
    *,
    resolution: str,
    now: datetime,
) -> None:
    """Say of open breaks how they ended."""
    if ended:
        connection.exec_driver_sql(_RESOLVE, {**_arrays(ended), "now": now, "resolution": resolution})


def listed(connection: Connection, position_id: str, *, open_only: bool) -> Sequence[RowMapping]:
    """Return the breaks of a position as rows, in the order in which they were first seen."""
    statement = select(breaks).where(breaks.c.position_id == position_id).order_by(breaks.c.id)
    if open_only:
        statement = statement.where(breaks.c.resolved_at.is_(None))
    return connection.execute(statement).mappings().all()


def _arrays(of: Sequence[tuple[str, str, str]]) -> Mapping[str, list[str]]:
    return {name: [str(each[place]) for each in of] for place, name in enumerate(("position", "leg", "kind"))}
