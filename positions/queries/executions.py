"""The ledger behind a position: what made the number."""

from dataclasses import dataclass, fields
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.messages.outbound import ExecutionView
from positions.queries.identity import position_id
from positions.storage import ledger

_FIELDS = tuple(field.name for field in fields(ExecutionView))


class Place(NamedTuple):
    """Where an entry stands among those of its position: what a cursor is made of."""

    executed_at: datetime
    id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionPage:
    """Some entries of a position's ledger, the newest first."""

    executions: tuple[ExecutionView, ...]
    next: Place | None
    """The last one's place where more follow."""


def executions(
    connection: Connection,
    key: PositionKey,
    *,
    limit: int,
    after: Place | None = None,
    from_: datetime | None = None,
    to: datetime | None = None,
) -> ExecutionPage:
    """Return entries of the position's ledger, the newest first, of equal times the last stored first.

    Of all kinds, also those that no fold reads: they tell why a number is what it is.

    Args:
        connection: only read from.
        key: which position.
        limit: most to return.
        after: the page begins behind this place.
        from_: only of this time and later.
        to: only of this time and earlier.

    Raises:
        NotFound: nothing was ever recorded of the position.
    """
    id_ = position_id(connection, key)
    rows = ledger.page(connection, id_, limit=limit + 1, after=after, from_=from_, to=to)
    views = tuple(ExecutionView(**{name: row[name] for name in _FIELDS}) for row in rows[:limit])
    last = Place(views[-1].executed_at, views[-1].id) if len(rows) > limit else None
    return ExecutionPage(executions=views, next=last)
