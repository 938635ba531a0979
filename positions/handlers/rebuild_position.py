"""Fold a position anew from its whole ledger, and compare: no difference is the promise."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.figures import figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import refolded
from positions.errors import NotFound
from positions.handlers.write_changes import Change, Rules, write_changes
from positions.storage import fold_points, ledger, positions

Differences = Mapping[str, tuple[object, object]]
"""Figures that differ: what is stored, and what the ledger folds to."""

# Since when a position that only reports tell of is open depends on which of them came first.
_OF_ARRIVAL = {"opened_at", "closed_at"}


def rebuild_position(
    connection: Connection, key: PositionKey, *, rules: Rules, now: datetime, repair: bool
) -> Differences:
    """Return how the stored position differs from the fold of its whole ledger and its reports.

    To compare, the connection should see one moment (REPEATABLE READ); no lock is taken. To ``repair``,
    the position is locked, its points are made anew, and it is written where it differs.

    Raises:
        NotFound: there is no such position.
    """
    load = positions.lock if repair else positions.read
    stored = load(connection, [key]).get(key)
    if stored is None:
        raise NotFound(f"no {key.mode} position in {key.asset}")
    entries = ledger.after(connection, {stored.id: None}).get(key, [])
    with exact():
        state, points = refolded(stored.state, fills_of(entries), rules.policy)
        wanted = asdict(figures(state))
        found = positions.figures_of(connection, stored.id)
    traded = any(leg.traded_at for leg in state.ledger.values())
    names = [name for name in wanted if traded or name not in _OF_ARRIVAL]
    differences = {name: (found[name], wanted[name]) for name in names if found[name] != wanted[name]}
    if not differences and stored.state.ledger != state.ledger:
        differences = {"state": (stored.state.ledger, state.ledger)}
    if repair:
        fold_points.delete_from(connection, {stored.id: ledger.BEGINNING})
        fold_points.add(connection, [(stored.id, point) for point in points])
    if differences and repair:
        change = Change(stored=stored, state=state, covers=0, source="validation")
        write_changes(connection, [change], stale_after=rules.price_stale_after, now=now)
    return differences
