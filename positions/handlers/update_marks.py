"""Value positions at newer prices."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.numbers import exact
from positions.domain.position import Mark
from positions.handlers.apply_events import adjustments
from positions.handlers.write_changes import Change, Rules, write_changes
from positions.storage import positions


def update_marks(
    connection: Connection,
    marks: Mapping[PositionKey, Mark],
    *,
    rules: Rules,
    now: datetime,
    due_before: datetime | None = None,
) -> dict[PositionKey, bool]:
    """Value positions at ``marks``, and return for each that was free whether its price is another now.

    A position that somebody else is changing is left out, so that prices wait for no event. An event waits
    for this transaction at most, and never for its end and another's: all locks are taken at once.

    Args:
        connection: in a transaction that holds no locks.
        marks: new prices; one that is no newer than what a position has is not taken.
        rules: who wins.
        now: when it is written.
        due_before: a position whose price is from then or later needs none; None: any may have a newer one.

    Raises:
        ConcurrencyConflict: a writer that takes no locks was first; nothing of the transaction may stay.
    """
    stored = positions.lock_free(connection, marks)
    changes = []
    for key, before in stored.items():
        known, mark = before.state.mark, marks[key]
        fresh = known is not None and due_before is not None and known.at >= due_before
        if fresh or (known is not None and known.at >= mark.at):
            continue
        state = replace(before.state, api_mark=mark)
        changes.append(
            Change(
                stored=before,
                state=state,
                covers=1,
                source="price_refresh",
                # Of a row that an older service wrote, what it held is taken over with the first change.
                adjustments=adjustments(key, before, state),
            )
        )
    with exact():
        write_changes(connection, changes, stale_after=rules.price_stale_after, now=now)
    priced = {change.state.key for change in changes}
    return {key: key in priced for key in stored}
