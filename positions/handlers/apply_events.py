"""Apply a batch of events: ledger, positions, outbox and quarantine in the caller's one transaction."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import uuid4

import structlog
from sqlalchemy import Connection

from positions.domain.events import Entry, Event, Kind, PositionKey, Report, TimeSource
from positions.domain.figures import Figures, figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of, new_fills
from positions.domain.position import Policy, State, advanced, refolded, with_report
from positions.messages.outbound import PositionView
from positions.messages.published import POSITION_UPDATED, position_updated
from positions.storage import ledger, outbox, positions, quarantine
from positions.storage.portfolio import GROSS_EXPOSURE
from positions.storage.positions import Stored

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What the handler takes from the settings."""

    policy: Policy
    price_stale_after: timedelta


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a batch: how many events were applied, duplicate, stale."""

    counts: Counter[str] = field(default_factory=Counter)


def apply_events(
    connection: Connection,
    events: Sequence[Event],
    refused: Sequence[quarantine.Refused],
    *,
    rules: Rules,
    now: datetime,
) -> Outcome:
    """Apply ``events`` and keep ``refused``; all of it, or nothing if this raises.

    The order of locks is the same in every transaction (rows of new positions, ledger keys, positions,
    each sorted), so that batches that overlap wait for each other and never deadlock.

    Raises:
        ConcurrencyConflict: another writer changed one of the positions meanwhile.
    """
    outcome = Outcome()
    quarantine.add(connection, refused, now=now)
    entries = {event.key: event for event in events if isinstance(event, Entry)}
    reports: defaultdict[PositionKey, list[Report]] = defaultdict(list)
    for event in events:
        if isinstance(event, Report):
            reports[event.position].append(event)
    keys = {entry.position for entry in entries.values()} | reports.keys()
    if not keys:
        return outcome
    positions.create_missing(connection, keys)
    new_keys = ledger.insert(connection, list(entries.values()))
    new = [entry for key, entry in entries.items() if key in new_keys]
    outcome.counts["duplicate"] += sum(isinstance(event, Entry) for event in events) - len(new)
    touched = {entry.position for entry in new} | reports.keys()
    if not touched:
        return outcome
    stored = positions.lock(connection, touched)
    with exact():
        changed = _changes(connection, stored, new, reports, rules=rules, outcome=outcome)
        adjustments = [entry for change in changed for entry in change.adjustments]
        ledger.insert(connection, adjustments)
        positions.write(
            connection, [(change.stored, change.state, change.figures) for change in changed], now=now
        )
        _publish(connection, changed, rules, now)
    return outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class _Change:
    """One position's way from what is stored to what is to be written."""

    stored: Stored
    state: State
    figures: Figures
    applied: Sequence[Event]
    adjustments: Sequence[Entry]


def _changes(
    connection: Connection,
    stored: Mapping[PositionKey, Stored],
    new: Sequence[Entry],
    reports: Mapping[PositionKey, Sequence[Report]],
    *,
    rules: Rules,
    outcome: Outcome,
) -> list[_Change]:
    """Fold what is new into each position; those where it is late are folded anew from the ledger."""
    by_position: defaultdict[PositionKey, list[Entry]] = defaultdict(list)
    for entry in new:
        by_position[entry.position].append(entry)
    orders = ledger.of_reported_orders(connection, [entry.order_id for entry in new if entry.order_id])
    folded: dict[PositionKey, State] = {}
    merged: dict[PositionKey, State] = {}
    applied: dict[PositionKey, list[Event]] = {}
    for key, before in stored.items():
        own = by_position[key]
        state, applied[key] = _with_reports(before.state, reports.get(key, ()), outcome)
        fills = new_fills(own, orders.get(key, ()))
        if own and fills is not None and not fills:
            # Order reports that add nothing to what the ledger holds of their orders.
            outcome.counts["duplicate"] += len(own)
        else:
            outcome.counts["applied"] += len(own)
            applied[key] += own
        if before.version and not applied[key]:
            continue
        merged[key] = state
        ahead = None if fills is None else advanced(state, fills, rules.policy)
        if ahead is not None:
            folded[key] = ahead
    late = [key for key in merged if key not in folded]
    histories = ledger.of_positions(connection, [stored[key].id for key in late])
    for key in late:
        log.debug("position_refolded", asset=key.asset, mode=key.mode, entries=len(histories.get(key, ())))
        folded[key] = refolded(merged[key], fills_of(histories.get(key, ())), rules.policy)
    outcome.counts["refolded"] += len(late)
    return [
        _Change(
            stored=stored[key],
            state=state,
            figures=figures(state),
            applied=applied[key],
            adjustments=_adjustments(key, stored[key].state, state),
        )
        for key, state in sorted(folded.items())
    ]


def _with_reports(state: State, reports: Sequence[Report], outcome: Outcome) -> tuple[State, list[Event]]:
    """Return ``state`` with ``reports`` merged, and those that told something new."""
    fresh: list[Event] = []
    for report in reports:
        updated = with_report(state, report)
        if updated is state:
            outcome.counts["stale"] += 1
        else:
            state = updated
            fresh.append(report)
    outcome.counts["applied"] += len(fresh)
    return state, fresh


def _adjustments(key: PositionKey, before: State, after: State) -> list[Entry]:
    """Return the ledger entries for sizes newly taken over from the venue, as a trail: no fold reads them."""
    made = []
    for leg, held in after.held.items():
        taken = held.takeover
        if taken is None or taken == before.held[leg].takeover:
            continue
        change = taken.size - before.held[leg].leg.size
        if not change:
            continue
        made.append(
            Entry(
                key=f"adjustment:{taken.report_id}:{leg}",
                position=key,
                leg=leg,
                kind=Kind.ADJUSTMENT,
                quantity=change,
                price=taken.average or (after.mark.price if after.mark else taken.size * 0),
                executed_at=taken.at,
                time_source=TimeSource.EVENT,
                exec_type="Takeover",
            )
        )
        if after.ledger[leg].traded_at is not None:
            log.warning(
                "size_discrepancy",
                asset=key.asset,
                mode=key.mode,
                leg=leg,
                reported=str(taken.size),
                folded=str(taken.found),
                outcome="taken_over",
            )
    return made


def _publish(connection: Connection, changes: Sequence[_Change], rules: Rules, now: datetime) -> None:
    """Write a `position_updated` for each change: its final state, and how many events it covers."""
    if not changes:
        return
    gross_exposure = connection.execute(GROSS_EXPOSURE).scalar_one()
    messages = []
    for change in changes:
        key = change.state.key
        trace_id = next((event.trace_id for event in reversed(change.applied) if event.trace_id), "")
        trace_id = trace_id or uuid4().hex
        view = PositionView.of_figures(
            change.figures,
            id=change.stored.id,
            key=key,
            version=change.stored.version + 1,
            last_updated=now,
            last_snapshot_at=change.stored.last_snapshot_at,
            created_at=change.stored.created_at,
            portfolio_exposure=gross_exposure,
            now=now,
            stale_after=rules.price_stale_after,
        )
        traded = any(isinstance(event, Entry) for event in change.applied)
        body = position_updated(
            view,
            update_source="order_execution" if traded else "websocket",
            events_covered=len(change.applied),
            trace_id=trace_id,
            now=now,
        )
        messages.append(outbox.Message(POSITION_UPDATED, trace_id, body))
        log.debug(
            "position_updated",
            asset=key.asset,
            mode=key.mode,
            version=view.version,
            size=str(view.size),
            trace_id=trace_id,
        )
    outbox.add(connection, messages)
