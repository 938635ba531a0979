"""A position as a function of its ledger entries and exchange reports, and of nothing else.

Two states are kept for each leg. `ledger` is the fold of all fills. `held` is what the position is said
to be: the same fold, with what the newest report was allowed to overrule. The common event, a fill or a
report newer than all before it, moves both on by one step; where that is not possible, `refolded` walks
all fills again and gives the same digits.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import NamedTuple

from positions.domain.events import LegName, Mode, PositionKey, Report, TimeSource
from positions.domain.leg import Fill, FillOrder, Leg
from positions.domain.numbers import ZERO, proportion, quotient
from positions.domain.reports import Field, Newest, deciding, newest, sized
from positions.domain.values import value_class

LEGS: Mapping[Mode, tuple[LegName, ...]] = {
    Mode.ONE_WAY: (LegName.NET,),
    Mode.HEDGE: (LegName.LONG, LegName.SHORT),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The settings that decide who wins when sources disagree."""

    size_threshold: Decimal = Decimal("0.0001")
    average_threshold: Decimal = Decimal("0.001")
    """Relative to the folded average."""
    take_average: bool = True
    take_size: bool = True
    tolerance: timedelta = timedelta(0)


class Claim(NamedTuple):
    """What a report says of one field that moves a leg."""

    at: datetime
    field: Field
    report: Report

    @property
    def name(self) -> str:
        return f"{self.field}:{self.report.id}"


@value_class(frozen=True, kw_only=True, slots=True)
class Mark:
    """A valuation price, where it comes from and since when."""

    price: Decimal
    at: datetime
    source: str


@value_class(frozen=True, slots=True)
class Takeover:
    """A report that overruled the fills: size and average it set, and what it found."""

    report_id: str
    at: datetime
    size: Decimal
    average: Decimal | None
    found: Decimal
    """The size that was held until then."""


@value_class(frozen=True, slots=True)
class Held:
    """A leg as the position states it: the fold, corrected by what reports were allowed to overrule."""

    leg: Leg = field(default_factory=Leg)
    venue_realized: Decimal = ZERO
    """What the venue's realized PnL adds to the fold's own, so that the parts sum to the whole."""
    takeover: Takeover | None = None
    disputed: str | None = None
    """Id of the newest report, where its size differs from ours and was not taken over."""
    disputed_size: Decimal = ZERO
    """What was held when it was disputed."""
    averaged: bool = False
    """Whether a reported average replaced the folded one."""
    refused: tuple[str, ...] = ()
    """Ids of the reports whose size may not overrule, for they are no newer than a fill."""
    basis: tuple[str, ...] = ()
    """The claims it was settled on: field and id of each report that decided."""


@value_class(frozen=True, kw_only=True, slots=True)
class State:
    """Everything that is known of one position."""

    key: PositionKey
    ledger: Mapping[LegName, Leg]
    held: Mapping[LegName, Held]
    reports: tuple[Report, ...] = ()
    """The reports that still decide a field, of all legs."""
    last: FillOrder | None = None
    """The newest fill that was folded."""
    since_point: int = 0
    """How many fills were folded since the last :class:`Point`."""
    api_mark: Mark | None = None
    """The newest price from the price API."""

    @property
    def mark(self) -> Mark | None:
        """The newest mark price of reports and price API; at the same time, the report's."""
        report = newest(self.reports, "mark") if self.reports else None
        if report is None or report.mark is None:
            return self.api_mark
        if self.api_mark is not None and self.api_mark.at > report.at:
            return self.api_mark
        return Mark(price=report.mark, at=report.at, source="report")


@value_class(frozen=True, kw_only=True, slots=True)
class Point:
    """A state of the past to fold on from, so that a late fill costs what came after it and not a history."""

    order: FillOrder
    """The last fill in it."""
    ledger: Mapping[LegName, Leg]
    held: Mapping[LegName, Held]


POINT_EVERY = 100
"""So many fills are at most folded beside those that came after a late one."""


def empty(key: PositionKey) -> State:
    """Return the state of a position of which nothing is known yet."""
    legs = LEGS[key.mode]
    return State(key=key, ledger={name: Leg() for name in legs}, held={name: Held() for name in legs})


def with_report(state: State, report: Report) -> State:
    """Return ``state`` with ``report`` known; ``state`` itself where it was."""
    return with_reports(state, [report])[0]


def with_reports(state: State, reports: Iterable[Report]) -> tuple[State, list[Report]]:
    """Return ``state`` with ``reports`` known, and those of them that were not.

    What the legs make of them, and which reports are worth knowing then, is for `advanced` or `refolded` to
    say.
    """
    known = {(each.id, each.leg) for each in state.reports}
    fresh = []
    for report in reports:
        if (report.id, report.leg) not in known:
            known.add((report.id, report.leg))
            fresh.append(report)
    return replace(state, reports=(*state.reports, *fresh)) if fresh else state, fresh


def _pruned(state: State) -> State:
    """Return ``state`` without the reports that can decide nothing any more."""
    if not state.reports:
        return state
    held = dict(state.held)
    kept: set[tuple[LegName, str]] = set()
    for name, each in state.held.items():
        reports = _of(state, name)
        in_effect = each.takeover.report_id if each.takeover else None
        own = deciding(reports, in_effect=in_effect, refused=each.refused)
        kept.update((name, report.id) for report in own)
        if len(own) < len(reports):
            ids = {report.id for report in own}
            claims = _claims(own, traded=state.ledger[name].traded_at is not None)
            refused = tuple(id_ for id_ in each.refused if id_ in ids)
            held[name] = replace(each, basis=_basis(claims), refused=refused)
    if len(kept) == len(state.reports):
        return state
    reports_ = tuple(report for report in state.reports if (report.leg, report.id) in kept)
    return replace(state, held=held, reports=reports_)


def advanced(state: State, fills: Sequence[Fill], policy: Policy) -> State | None:
    """Return ``state`` after new ``fills`` (sorted) and merged reports, or None where only a refold can tell.

    Possible where everything new is newer than all that was settled before it.
    """
    if fills and state.last is not None and fills[0].order <= state.last:
        return None
    ledger, held = dict(state.ledger), dict(state.held)
    for name, before in state.ledger.items():
        own = [fill for fill in fills if fill.leg is name]
        leg = _folded(before, own)
        reports = _of(state, name)
        settled = _advanced_leg(held[name], before, leg, own=own, reports=reports, policy=policy)
        if settled is None:
            return None
        ledger[name], held[name] = leg, settled
    return _pruned(
        State(
            key=state.key,
            ledger=ledger,
            held=held,
            reports=state.reports,
            last=fills[-1].order if fills else state.last,
            since_point=state.since_point + len(fills),
            api_mark=state.api_mark,
        )
    )


def _advanced_leg(
    held: Held, before: Leg, leg: Leg, *, own: Sequence[Fill], reports: Sequence[Report], policy: Policy
) -> Held | None:
    """Return what is held after ``own`` fills and ``reports``, or None where only a refold can tell."""
    claims = _claims(reports, traded=leg.traded_at is not None)
    if not claims:
        return Held(leg)
    basis = _basis(claims)
    if basis == held.basis and not own:
        return held
    if leg.touched_at is None or leg.touched_at <= claims[0].at:
        return _settled(Held(leg), leg, held.leg, claims, policy)
    if before.traded_at is None and leg.traded_at is not None:
        return None
    known = set(held.basis)
    new = [claim for claim in claims if claim.name not in known]
    # A claim that was settled may count no more, as one of the same time does that is now the older.
    settled = (at for at, names in _named(reports) if not known.isdisjoint(names))
    settled_until = max(settled, default=None)
    if settled_until is not None:
        if own and own[0].order.at <= settled_until:
            return None
        if any(claim.at <= settled_until for claim in new):
            return None
    if any(claim.at < leg.touched_at for claim in new):
        return None
    # What a claim that counts no more had done is undone by a newer one, but for a replaced average.
    gone = known.difference(basis)
    if any(name.startswith("average") for name in gone) and held.averaged:
        return None
    lapsed = any(name.startswith("size") for name in gone)
    if lapsed and not any(claim.field == "size" for claim in new):
        return None
    same = held.leg == before
    carried = replace(held, leg=leg) if same else _carried(held, own)
    return _settled(carried, leg, held.leg, new, policy, basis=basis)


def due_point(state: State) -> tuple[State, Point | None]:
    """Return ``state`` and, after every `POINT_EVERY` fills, the point to keep of it."""
    if state.last is None or state.since_point < POINT_EVERY:
        return state, None
    return replace(state, since_point=0), Point(order=state.last, ledger=state.ledger, held=state.held)


def decided_since(state: State) -> datetime | None:
    """Return the time of the oldest report that decides a size, average or realized PnL."""
    legs = (_claims(_of(state, name), traded=True) for name in state.held)
    return min((claim.at for claims in legs for claim in claims), default=None)


def usable(point: Point, state: State, before: FillOrder | None) -> bool:
    """Tell whether ``state`` can be folded on from ``point``.

    Args:
        point: a point kept of the same position.
        state: with the reports it knows now.
        before: the first fill that changes; None where only reports did.
    """
    if before is not None and point.order >= before:
        return False
    for name, held in point.held.items():
        claims = _claims(_of(state, name), traded=True)
        if not claims or point.order.at < claims[0].at:
            continue
        traded = point.ledger[name].traded_at is not None
        if not traded or held.basis != _basis(claims) or point.order.at <= claims[-1].at:
            return False
    return True


def refolded(
    state: State, fills: Sequence[Fill], policy: Policy, *, base: Point | None = None
) -> tuple[State, list[Point]]:
    """Return ``state`` folded anew, and the points on the way that are worth keeping.

    Args:
        state: with the reports it knows.
        fills: all fills of the position (sorted); with a ``base`` those after it.
        policy: who wins.
        base: a `usable` point to fold on from.
    """
    ledger = dict(base.ledger) if base else {name: Leg() for name in LEGS[state.key.mode]}
    held = {name: Held(leg) for name, leg in ledger.items()}
    traded = {name for name, leg in ledger.items() if leg.traded_at} | {f.leg for f in fills if f.quantity}
    claims = {name: _claims(_of(state, name), traded=name in traded) for name in ledger}
    due = {name: deque(of_leg) for name, of_leg in claims.items()}
    if base is not None:
        for name, of_leg in claims.items():
            if of_leg and base.order.at > of_leg[-1].at:
                held[name], due[name] = base.held[name], deque()

    def overrule(name: LegName, until: datetime | None) -> None:
        """Settle the claims of times before ``until``; all that are left where it is None."""
        now = []
        while due[name] and (until is None or due[name][0].at < until):
            now.append(due[name].popleft())
        if now:
            basis = () if due[name] else _basis(claims[name])
            held[name] = _settled(
                held[name],
                ledger[name],
                state.held[name].leg,
                now,
                policy,
                basis=basis,
                traded=name in traded,
            )

    points: list[Point] = []
    for number, fill in enumerate(fills, 1):
        name = fill.leg
        overrule(name, fill.order.at)
        before = ledger[name]
        ledger[name] = before.fold(fill)
        # Where no report overruled the fills, both are the same leg: folded once.
        same = held[name].leg == before
        held[name] = replace(held[name], leg=ledger[name]) if same else _carried(held[name], [fill])
        if number % POINT_EVERY == 0:
            points.append(Point(order=fill.order, ledger=dict(ledger), held=dict(held)))
    for name in ledger:
        overrule(name, None)
    last = fills[-1].order if fills else base.order if base else None
    since = len(fills) % POINT_EVERY
    state = replace(state, ledger=ledger, held=held, last=last, since_point=since)
    return _pruned(state), points


_STEPS: Mapping[Field, int] = {"size": 0, "average": 1, "realized": 2}


def _claims(reports: Sequence[Report], *, traded: bool) -> list[Claim]:
    """Return what the ``reports`` of a leg say that counts, in the order in which it is settled.

    Of an average and a realized PnL the newest counts. So it does of a size while the leg has no fills;
    with fills, older ones that may overrule count too: the newest may turn out to be no newer than a fill.
    """
    if not reports:
        return []
    newest_of = Newest(reports)
    winners = {field: report for field in _STEPS if (report := newest_of.of(field))}
    claims = [Claim(report.at, field, report) for field, report in winners.items()]
    if traded and (size := winners.get("size")):
        # Of one time only the newest; none of a later time, which the venue's sequence says is older.
        older = {each.at: each for each in sized(reports) if each.at < size.at}
        claims += [Claim(each.at, "size", each) for each in older.values()]
    return sorted(claims, key=lambda claim: (claim.at, _STEPS[claim.field]))


def _named(reports: Iterable[Report]) -> Iterable[tuple[datetime, list[str]]]:
    """Yield the time of each report, and the names its claims have."""
    for report in reports:
        yield report.at, [Claim(report.at, field, report).name for field in _STEPS]


def _basis(claims: Iterable[Claim]) -> tuple[str, ...]:
    return tuple(claim.name for claim in claims)


def _of(state: State, name: LegName) -> list[Report]:
    return [report for report in state.reports if report.leg is name]


def _folded(leg: Leg, fills: Iterable[Fill]) -> Leg:
    for fill in fills:
        leg = leg.fold(fill)
    return leg


def _carried(held: Held, fills: Sequence[Fill]) -> Held:
    """Return ``held`` after ``fills`` newer than what it was settled on.

    A size taken over without any price has no cost: the first price seen after it stands in.
    """
    leg = held.leg
    for fill in fills:
        if leg.size and not leg.cost and fill.quantity:
            leg = replace(leg, cost=proportion(fill.notional, abs(leg.size), abs(fill.quantity)))
        leg = leg.fold(fill)
    return replace(held, leg=leg) if fills else held


def _settled(
    held: Held,
    fold: Leg,
    before: Leg,
    claims: Sequence[Claim],
    policy: Policy,
    *,
    basis: tuple[str, ...] | None = None,
    traded: bool | None = None,
) -> Held:
    """Return ``held`` after ``claims``, as far as they may overrule the fills.

    Args:
        held: what is held just before the first of them.
        fold: the fold of all fills up to the last of them; none is newer than the first.
        before: what was held when the event arrived; tells since when a reported position is open.
        claims: in their order.
        policy: who wins.
        basis: all claims that are settled then, where that is not just these.
        traded: whether the leg has any fill, at any time.
    """
    traded = fold.traded_at is not None if traded is None else traded
    for claim in claims:
        report, leg = claim.report, held.leg
        if claim.field == "size":
            held = _with_size(held, fold, report, before, policy, traded=traded)
        elif claim.field == "average" and report.average and leg.size:
            held = _with_average(held, report, report.average, policy, traded=traded)
        elif claim.field == "realized" and report.realized is not None:
            held = replace(held, venue_realized=report.realized - (leg.gross - leg.fees + leg.funding))
    return replace(held, basis=_basis(claims) if basis is None else basis)


def _with_size(held: Held, fold: Leg, report: Report, before: Leg, policy: Policy, *, traded: bool) -> Held:
    """Return ``held`` with the reported size, where fills allow it (domain rules, who wins, 1)."""
    size = report.size if report.size is not None else ZERO
    if not report.sided and fold.size < 0:
        size = -size
    if traded:
        may = policy.take_size and report.time_source is TimeSource.EVENT
        able = may and _newer(report, fold.traded_at, policy)
        # What only an implied fill stands in the way of may yet be able: an execution may take its place.
        if not (may and _newer(report, fold.certain_at, policy)) and report.id not in held.refused:
            held = replace(held, refused=(*held.refused, report.id))
        if abs(size - held.leg.size) <= policy.size_threshold:
            return replace(held, disputed=None, disputed_size=ZERO)
        if not able:
            return replace(held, disputed=report.id, disputed_size=held.leg.size)
    elif not size and not before.size and not before.closed_at:
        return held
    average = _reported_average(report, size, fold)
    if not size:
        opened_at = None
    else:
        same_side = (leg for leg in (fold, before) if leg.opened_at and leg.size * size > 0)
        opened_at = min((leg.opened_at or report.at for leg in same_side), default=report.at)
        opened_at = min(opened_at, report.at)
    # What was realized before is what the fills say: older reports that were taken over count no more.
    leg = replace(
        held.leg,
        size=size,
        cost=abs(size) * average if average is not None else ZERO,
        gross=fold.gross,
        opened_at=opened_at,
        closed_at=None if size else before.closed_at or report.at,
    )
    taken = Takeover(report.id, report.at, size, average, held.leg.size)
    return replace(held, leg=leg, takeover=taken, disputed=None, disputed_size=ZERO, averaged=False)


def _newer(report: Report, fill_at: datetime | None, policy: Policy) -> bool:
    return fill_at is None or report.at - fill_at > policy.tolerance


def _reported_average(report: Report, size: Decimal, fold: Leg) -> Decimal | None:
    """Return the average entry a report states or implies, else the fold's on that side, else the mark."""
    if not size:
        return None
    if report.average:
        return report.average
    if report.mark is not None and report.unrealized is not None:
        implied = report.mark - quotient(report.unrealized, size)
        if implied > 0:
            return implied
    if fold.size * size > 0:
        return fold.average
    return report.mark


def _with_average(held: Held, report: Report, average: Decimal, policy: Policy, *, traded: bool) -> Held:
    """Return ``held`` with the reported average, where it may replace the folded one (rule 2)."""
    leg = held.leg
    if traded:
        if report.size is not None and abs(abs(report.size) - abs(leg.size)) > policy.size_threshold:
            return held
        differs = abs(average * abs(leg.size) - leg.cost) > policy.average_threshold * leg.cost
        if not (policy.take_average and differs):
            return held
    return replace(held, leg=replace(leg, cost=abs(leg.size) * average), averaged=traded)
