"""Apply a batch of events: ledger, positions, outbox and quarantine in the caller's one transaction."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog
from sqlalchemy import Connection

from positions.domain.events import Entry, Event, Kind, PositionKey, Report, TimeSource
from positions.domain.numbers import ZERO, exact
from positions.domain.orders import changed_fills
from positions.domain.position import Point, State, advanced, due_point, empty, with_reports
from positions.domain.reports import Newest
from positions.errors import ConcurrencyConflict
from positions.handlers.refold import Late, refold
from positions.handlers.write_changes import Change, Rules, write_changes
from positions.storage import ledger, positions, quarantine
from positions.storage.positions import Stored

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch: events applied, duplicate, stale; positions refolded; breaks found."""

    counts: Counter[str] = field(default_factory=Counter)


def apply_events(
    connection: Connection,
    events: Sequence[Event],
    refused: Sequence[quarantine.Refused],
    *,
    rules: Rules,
    now: datetime,
    patient: bool = False,
    source: str | None = None,
) -> Outcome:
    """Apply ``events`` and keep ``refused``; all of it, or nothing if this raises.

    However late something is, a ``patient`` caller has it folded, and its other positions wait. With a
    ``source`` the neighbours are told that it made the update, not of what kind the events were.

    The order of locks is the same in every transaction (rows of new positions, ledger keys, positions,
    each sorted), so that batches that overlap wait for each other and never deadlock.

    Raises:
        ConcurrencyConflict: another writer changed one of the positions meanwhile.
        DeepRefold: something so late that its positions are to be applied each alone.
    """
    outcome = Outcome()
    quarantine.add(connection, refused, now=now)
    entries: dict[str, Entry] = {}
    reports: list[Report] = []
    for event in events:
        if isinstance(event, Report):
            reports.append(event)
            if event.time_source is not TimeSource.ARRIVAL:
                continue
        entry = _arrival_of(event) if isinstance(event, Report) else event
        if entry.key in entries:
            outcome.counts["duplicate"] += not isinstance(event, Report)
        else:
            entries[entry.key] = entry
    keys = {event.position for event in events}
    if not keys:
        return outcome
    ids, created = positions.identify(connection, keys)
    if len(ids) < len(keys):
        raise ConcurrencyConflict("a position was deleted meanwhile")
    new_keys = ledger.insert(connection, list(entries.values()), ids)
    trades = [entry for entry in entries.values() if entry.kind is not Kind.REPORT]
    new = [entry for entry in trades if entry.key in new_keys]
    outcome.counts["duplicate"] += len(trades) - len(new)
    # A report without a time of its own has that of its first arrival: a later one is the same report.
    told: defaultdict[PositionKey, list[Report]] = defaultdict(list)
    for report in reports:
        if report.time_source is TimeSource.ARRIVAL and _arrival_of(report).key not in new_keys:
            outcome.counts["duplicate"] += 1
        else:
            told[report.position].append(report)
    touched = {entry.position for entry in new} | told.keys()
    # An execution that is known already, under another asset: its row would be a position of nothing.
    positions.remove(connection, created - touched)
    if not touched:
        return outcome
    stored = positions.lock_to_go_on(connection, touched)
    if len(stored) < len(touched):
        raise ConcurrencyConflict("a position that was known has been deleted")
    with exact():
        changed = _changes(
            connection, stored, new, told, rules=rules, outcome=outcome, patient=patient, source=source
        )
        outcome.counts["breaks"] += write_changes(
            connection, changed, stale_after=rules.price_stale_after, now=now
        )
    return outcome


def _changes(
    connection: Connection,
    stored: Mapping[PositionKey, Stored],
    new: Sequence[Entry],
    reports: Mapping[PositionKey, Sequence[Report]],
    *,
    rules: Rules,
    outcome: Outcome,
    patient: bool,
    source: str | None,
) -> list[Change]:
    """Fold what is new into each position; those where it is late are folded anew from the ledger."""
    by_position: defaultdict[PositionKey, list[Entry]] = defaultdict(list)
    for entry in new:
        by_position[entry.position].append(entry)
    orders = ledger.of_reported_orders(connection, [entry.order_id for entry in new if entry.order_id])
    folded: dict[PositionKey, tuple[State, Sequence[Point]]] = {}
    late: dict[PositionKey, Late] = {}
    applied: dict[PositionKey, list[Event]] = {}
    for key, before in stored.items():
        own = by_position[key]
        state, applied[key] = _with_reports(before.state, reports.get(key, ()), outcome)
        added, removed = changed_fills(own, orders.get(key, ()))
        if own and not added and not removed:
            # Order reports that add nothing to what the ledger holds of their orders.
            outcome.counts["duplicate"] += len(own)
        else:
            outcome.counts["applied"] += len(own)
            applied[key] += own
        if before.version and not applied[key]:
            continue
        ahead = None if removed else advanced(state, added, rules.policy)
        if ahead is None:
            first = min((fill.order for fill in (*added, *removed)), default=None)
            late[key] = Late(id=before.id, state=state, change=first)
        else:
            state, point = due_point(ahead)
            folded[key] = state, [point] if point else []
    folded |= refold(connection, late, policy=rules.policy, alone=patient or len(stored) == 1)
    outcome.counts["refolded"] += len(late)
    return [
        Change(
            stored=stored[key],
            state=state,
            covers=len(applied[key]),
            trace_id=next((each.trace_id for each in reversed(applied[key]) if each.trace_id), ""),
            source=source or _source(applied[key]),
            adjustments=adjustments(key, stored[key], state),
            points=points,
        )
        for key, (state, points) in sorted(folded.items(), key=lambda item: item[0])
        # Where all that came was stale, there is nothing to write or to tell.
        if by_position[key] or not stored[key].version or state != stored[key].state
    ]


def _source(applied: Sequence[Event]) -> str:
    return "order_execution" if any(isinstance(each, Entry) for each in applied) else "websocket"


def _arrival_of(report: Report) -> Entry:
    """Return the ledger entry that keeps when a report without a time of its own first arrived."""
    return Entry(
        key=f"report:{report.id}:{report.leg}",
        position=report.position,
        leg=report.leg,
        kind=Kind.REPORT,
        quantity=report.size or ZERO,
        price=report.average or report.mark or ZERO,
        executed_at=report.at,
        time_source=report.time_source,
        venue_seq=report.seq,
        exec_type="Report",
        trace_id=report.trace_id,
    )


def _with_reports(state: State, reports: Sequence[Report], outcome: Outcome) -> tuple[State, list[Event]]:
    """Return ``state`` with ``reports`` merged, and those that told something new."""
    if not reports:
        return state, []
    merged, fresh = with_reports(state, reports)
    outcome.counts["duplicate"] += len(reports) - len(fresh)
    newest = Newest(state.reports)
    for report in fresh:
        # An older report may be kept for what it says of the size, and is stale all the same.
        outcome.counts["applied" if newest.see(report) else "stale"] += 1
    return merged, list(fresh)


def adjustments(key: PositionKey, stored: Stored, after: State) -> list[Entry]:
    """Return the ledger entries for sizes newly taken over from the venue, as a trail: no fold reads them."""
    made = []
    reports = {(report.id, report.leg): report for report in after.reports}
    for leg, held in after.held.items():
        # What an older service had is taken over with the first change.
        before = empty(key).held[leg] if stored.adopted else stored.state.held[leg]
        taken = held.takeover
        if taken is None or taken == before.takeover:
            continue
        change = taken.size - before.leg.size
        if not change:
            continue
        report = reports.get((taken.report_id, leg))
        made.append(
            Entry(
                key=f"adjustment:{taken.report_id}:{leg}",
                position=key,
                leg=leg,
                kind=Kind.ADJUSTMENT,
                quantity=change,
                price=taken.average or (after.mark.price if after.mark else ZERO),
                executed_at=taken.at,
                time_source=report.time_source if report else TimeSource.EVENT,
                trace_id=report.trace_id if report else "",
                exec_type="Takeover",
                size_after=taken.size,
            )
        )
    return made
