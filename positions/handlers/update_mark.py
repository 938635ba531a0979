"""Value a position at a newer price."""

from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.position import Mark
from positions.errors import NotFound
from positions.handlers.write_changes import Change, Rules, write_changes
from positions.storage import positions


def update_mark(connection: Connection, key: PositionKey, mark: Mark, *, rules: Rules, now: datetime) -> bool:
    """Value the position at ``mark``, and return whether it is newer than the price it had.

    Takes no lock before it writes: a writer that was faster makes it fail, and the caller tries again
    (:func:`positions.storage.database.in_transaction`).

    Raises:
        NotFound: there is no such position.
        ConcurrencyConflict: the position changed meanwhile.
    """
    stored = positions.read(connection, [key]).get(key)
    if stored is None:
        raise NotFound(f"no {key.mode} position in {key.asset}")
    known = stored.state.mark
    if known is not None and known.at >= mark.at:
        return False
    change = Change(
        stored=stored, state=replace(stored.state, api_mark=mark), covers=1, source="price_refresh"
    )
    write_changes(connection, [change], stale_after=rules.price_stale_after, now=now)
    return True
