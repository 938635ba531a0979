"""Fold a position anew from its whole ledger, and compare: no difference is the promise."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from sqlalchemy import Connection

from positions.domain.events import Entry, PositionKey
from positions.domain.figures import figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import Point, State, refolded
from positions.errors import NotFound
from positions.handlers.write_changes import Change, Rules, write_changes
from positions.storage import fold_points, ledger, positions
from positions.storage.positions import Stored

Differences = Mapping[str, tuple[object, object]]
"""Figures that differ: what is stored, and what the ledger folds to."""

# Since when a position that only reports tell of is open depends on which of them came first.
_OF_ARRIVAL = {"opened_at", "closed_at"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A position as it is stored, and as its whole ledger and its reports fold to."""

    stored: Stored
    state: State
    points: Sequence[Point]
    """What to keep of the way there."""
    differences: Differences
    entries: Sequence[Entry]
    """Its whole ledger."""


def rebuild_position(
    connection: Connection, key: PositionKey, *, rules: Rules, now: datetime, repair: bool
) -> Differences:
    """Return how the stored position differs from the fold of its whole ledger and its reports.

    To compare, the connection should see one moment (REPEATABLE READ); no lock is taken. To ``repair``,
    the position is locked, its points are made anew, and it is written where it differs.

    Raises:
        NotFound: there is no such position.
    """
    found = compared(connection, key, rules=rules, lock=repair)
    if repair:
        repaired(connection, found, rules=rules, now=now)
    return found.differences


def compared(connection: Connection, key: PositionKey, *, rules: Rules, lock: bool) -> Comparison:
    """Return the position beside the fold of its whole ledger.

    Without a ``lock``, a connection that does not see one moment may show differences that are none.

    Raises:
        NotFound: there is no such position.
    """
    load = positions.lock if lock else positions.read
    stored = load(connection, [key]).get(key)
    if stored is None:
        raise NotFound(f"There is no {key.mode} position in {key.asset}.")
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
    # Of what an older service left, nothing is known that it could be compared with.
    return Comparison(
        stored=stored,
        state=state,
        points=points,
        differences={} if stored.adopted else differences,
        entries=entries,
    )


def repaired(connection: Connection, found: Comparison, *, rules: Rules, now: datetime) -> None:
    """Make the points of a position anew, and write it where it differs; it must be locked."""
    fold_points.delete_from(connection, {found.stored.id: ledger.BEGINNING})
    fold_points.add(connection, [(found.stored.id, point) for point in found.points])
    if found.differences:
        change = Change(stored=found.stored, state=found.state, covers=0, source="validation")
        write_changes(connection, [change], stale_after=rules.price_stale_after, now=now)
