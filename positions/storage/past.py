"""What positions were at a moment, by all that is known now.

Fills and sizes taken over come from the ledger. Of other reports only those are still known that decide
something now, or did when one of the snapshots around that moment was taken: between snapshots a price,
or what the venue said of the PnL, may be the one before. The ledger does not tell it better. A snapshot
that was taken a little after its moment may know of later reports alone: so the one before it counts too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection

from positions.domain.events import Entry, PositionKey, Report
from positions.domain.figures import Figures, figures, position_exposure, total
from positions.domain.leg import FillOrder, Leg
from positions.domain.numbers import ZERO, exact
from positions.domain.orders import fills_of
from positions.domain.position import (
    Held,
    Policy,
    State,
    decided_since,
    empty,
    refolded,
    usable,
    with_report,
)
from positions.domain.reports import SIZED_KEPT
from positions.storage import codec, fold_points, ledger, positions, snapshots
from positions.storage.positions import Stored

LATE = timedelta(hours=1)
"""So much older than a snapshot that has not seen it a report may be and still be looked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """A position as it was."""

    stored: Stored
    """What it is now."""
    state: State
    figures: Figures
    last_updated: datetime
    """Time of the newest event in it."""
    last_snapshot_at: datetime | None

    @property
    def exposure(self) -> Decimal | None:
        """Gross, in USDT; None when open without a price. To be asked for inside `exact`."""
        return position_exposure(self.figures.long_size - self.figures.short_size, self.figures.current_price)


def cut_at(connection: Connection, at: datetime, policy: Policy) -> list[Mapping[str, object]]:
    """Return all positions there were at the moment ``at``, like :func:`positions.storage.snapshots.cut`.

    Args:
        connection: only read from, and of one moment (REPEATABLE READ).
        at: of events' own times, itself included.
        policy: who wins when sources disagree.
    """
    past = positions_at(connection, positions.keys(connection), at, policy)
    exposure = gross_exposure(past.values())
    return [
        {
            **{field.name: getattr(each.figures, field.name) for field in fields(Figures)},
            "id": each.stored.id,
            "asset": key.asset,
            "mode": str(key.mode),
            "version": each.stored.version,
            "last_updated": each.last_updated,
            "last_snapshot_at": each.last_snapshot_at,
            "created_at": each.stored.created_at,
            "state": codec.encode(each.state),
            "portfolio_exposure": exposure,
        }
        for key, each in sorted(past.items())
    ]


def gross_exposure(past: Iterable[Past]) -> Decimal:
    """Return what positions were worth together, in USDT, as far as they had a price."""
    with exact():
        return total(each.exposure for each in past)


def positions_at(
    connection: Connection, keys: Iterable[PositionKey], at: datetime, policy: Policy
) -> dict[PositionKey, Past]:
    """Return those of the positions that there were at the moment ``at``."""
    stored = positions.read(connection, keys)
    ids = [each.id for each in stored.values()]
    around = snapshots.states_around(connection, ids, at)
    first = ledger.first_times(connection, ids)
    earlier = {key: each for key, each in stored.items() if not _is_of(each.state, at)}
    states = {key: each.state for key, each in stored.items() if key not in earlier}
    with exact():
        states |= _folded(connection, _known(connection, earlier, around, at), earlier, at, policy)
        found = {}
        for key, state in states.items():
            taken = [(of, then) for of, then in around[stored[key].id] if of <= at]
            # What an older service kept does not tell what the position was.
            begun = [*_times(state), *(of for of, then in taken if then is not None)]
            if since := first.get(stored[key].id):
                begun.append(since)
            if begun and min(begun) <= at:
                found[key] = Past(
                    stored=stored[key],
                    state=state,
                    figures=figures(state),
                    last_updated=max(_times(state), default=min(begun)),
                    last_snapshot_at=taken[0][0] if taken else None,
                )
    return found


def _times(state: State) -> list[datetime]:
    """Return the times of the events that a state is made of: those that are the newest of their kind."""
    times = [report.at for report in state.reports]
    if state.last is not None:
        times.append(state.last.at)
    if state.api_mark is not None:
        times.append(state.api_mark.at)
    return times


def _is_of(state: State, at: datetime) -> bool:
    """Tell whether there is nothing in ``state`` that came after ``at``."""
    return all(time <= at for time in _times(state))


def _known(
    connection: Connection,
    stored: Mapping[PositionKey, Stored],
    around: Mapping[str, Sequence[tuple[datetime, State | None]]],
    at: datetime,
) -> dict[PositionKey, State]:
    """Return for each position the state to fold its fills into: with the reports and the price of then."""
    since = {
        each.id: max((of - LATE for of, state in around[each.id] if state and of <= at), default=ledger.FIRST)
        for each in stored.values()
    }
    taken_over = ledger.adjustments(connection, since, until=at)
    known = {}
    for key, each in stored.items():
        told = [(of, state) for of, state in around[each.id] if state is not None]
        sources = [each.state, *(state for _, state in told)]
        before = next((state for of, state in told if of <= at), empty(key))
        marks = [source.api_mark for source in sources if source.api_mark and source.api_mark.at <= at]
        adjustments = taken_over.get(key, [])
        of_leg = {name: [entry for entry in adjustments if entry.leg is name] for name in before.held}
        state = State(
            key=key,
            ledger=empty(key).ledger,
            held={name: Held(_since(held.leg, of_leg[name], at)) for name, held in before.held.items()},
            api_mark=max(marks, key=lambda mark: mark.at, default=None),
        )
        for report in (report for source in sources for report in source.reports):
            if report.at <= at:
                state = with_report(state, report)
        # As many as the present state keeps: an older one may overrule where a newer one may not.
        for entry in (entry for own in of_leg.values() for entry in own[-SIZED_KEPT:]):
            state = with_report(state, _report(entry))
        known[key] = state
    return known


def _since(leg: Leg, adjustments: Iterable[Entry], at: datetime) -> Leg:
    """Return since when a leg of reports alone was open or closed, as it was held and then taken over."""
    size = leg.size
    opened_at = leg.opened_at if leg.opened_at and leg.opened_at <= at else None
    closed_at = leg.closed_at if leg.closed_at and leg.closed_at <= at else None
    for entry in adjustments:
        now = entry.size_after or ZERO
        if not now:
            opened_at, closed_at = None, entry.executed_at
        elif now * size <= 0:
            opened_at, closed_at = entry.executed_at, None
        size = now
    return Leg(size=size, opened_at=opened_at, closed_at=closed_at)


def _report(adjustment: Entry) -> Report:
    """Return what the ledger still tells of a report whose size was taken over."""
    _, report_id = adjustment.key.removesuffix(f":{adjustment.leg}").split(":", 1)
    return Report(
        id=report_id,
        position=adjustment.position,
        leg=adjustment.leg,
        at=adjustment.executed_at,
        time_source=adjustment.time_source,
        size=adjustment.size_after,
        average=adjustment.price if adjustment.size_after else None,
    )


def _folded(
    connection: Connection,
    known: Mapping[PositionKey, State],
    stored: Mapping[PositionKey, Stored],
    at: datetime,
    policy: Policy,
) -> dict[PositionKey, State]:
    """Return the states with the fills up to ``at`` folded, from the last points that are good for that."""
    end = FillOrder(at + timedelta(microseconds=1), -1, "")
    points = fold_points.before(
        connection, {stored[key].id: (end, decided_since(state)) for key, state in known.items()}
    )
    bases = {
        key: next((point for point in points[stored[key].id] if usable(point, state, end)), None)
        for key, state in known.items()
    }
    apart = ledger.told_apart_later(
        connection, {stored[key].id: base.order.at for key, base in bases.items() if base}, at=at
    )
    bases = {key: None if stored[key].id in apart else base for key, base in bases.items()}
    starts = {stored[key].id: base.order if base else None for key, base in bases.items()}
    entries = ledger.after(connection, starts, until=at)
    of_orders = ledger.of_reported_orders(
        connection, [entry.order_id for found in entries.values() for entry in found if entry.order_id]
    )
    folded = {}
    for key, state in known.items():
        base = bases[key]
        orders = (entry for entry in of_orders.get(key, ()) if entry.executed_at <= at)
        whole = {entry.key: entry for entry in (*orders, *entries.get(key, ()))}
        fills = [fill for fill in fills_of(whole.values()) if base is None or fill.order > base.order]
        folded[key], _ = refolded(state, fills, policy, base=base)
    return folded
