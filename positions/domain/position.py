"""A position as a function of its ledger entries and exchange reports, and of nothing else.

Two states are kept for each leg. `ledger` is the fold of all fills. `held` is what the position is said
to be: the same fold, with what the newest report was allowed to overrule. The common event, a fill or a
report newer than all before it, moves both on by one step; where that is not possible, `refolded` walks
all fills again and gives the same digits.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal

from positions.domain.events import LegName, Mode, PositionKey, Report, TimeSource
from positions.domain.leg import Fill, FillOrder, Leg
from positions.domain.numbers import ZERO, proportion, quotient
from positions.domain.reports import Field, merged, newest

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A valuation price, where it comes from and since when."""

    price: Decimal
    at: datetime
    source: str


@dataclass(frozen=True, slots=True)
class Takeover:
    """A report that overruled the fills: size and average it set, and what it found."""

    report_id: str
    at: datetime
    size: Decimal
    average: Decimal | None
    found: Decimal
    """Size folded from the fills up to `at`."""


@dataclass(frozen=True, slots=True)
class Held:
    """A leg as the position states it: the fold, corrected by what reports were allowed to overrule."""

    leg: Leg = field(default_factory=Leg)
    venue_realized: Decimal = ZERO
    """What the venue's realized PnL adds to the fold's own, so that the parts sum to the whole."""
    takeover: Takeover | None = None
    disputed: str | None = None
    """Id of the newest report, where its size differs from the fills and was not taken over."""
    basis: tuple[str | None, ...] = (None, None, None)
    """Ids of the reports that decided size, average and realized PnL."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
        report = newest(self.reports, "mark")
        if report is None or report.mark is None:
            return self.api_mark
        if self.api_mark is not None and self.api_mark.at > report.at:
            return self.api_mark
        return Mark(price=report.mark, at=report.at, source="report")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A state of the past to fold on from, so that a late fill costs what came after it and not a history."""

    order: FillOrder
    """The last fill in it."""
    ledger: Mapping[LegName, Leg]
    held: Mapping[LegName, Held]


POINT_EVERY = 500
"""So many fills are at most folded beside those that came after a late one."""


def empty(key: PositionKey) -> State:
    """Return the state of a position of which nothing is known yet."""
    legs = LEGS[key.mode]
    return State(key=key, ledger={name: Leg() for name in legs}, held={name: Held() for name in legs})


def with_report(state: State, report: Report) -> State:
    """Return ``state`` with ``report`` merged in; ``state`` itself where it tells nothing new.

    What the legs make of it is for `advanced` or `refolded` to say.
    """
    mine = tuple(each for each in state.reports if each.leg is report.leg)
    updated = merged(mine, report)
    if updated is mine:
        return state
    others = tuple(each for each in state.reports if each.leg is not report.leg)
    return replace(state, reports=others + updated)


def advanced(state: State, fills: Sequence[Fill], policy: Policy) -> State | None:
    """Return ``state`` after new ``fills`` (sorted) and merged reports, or None where only a refold can tell.

    Possible for a leg whose new fills are all newer than those folded before, and whose deciding reports
    are either all newer than its last fill, or all settled already and older than the new fills.
    """
    if fills and state.last is not None and fills[0].order <= state.last:
        return None
    ledger, held = dict(state.ledger), dict(state.held)
    for name, before in state.ledger.items():
        own = [fill for fill in fills if fill.leg is name]
        deciding = _deciding(state.reports, name)
        leg = _folded(before, own)
        ledger[name] = leg
        times = [report.at for report in deciding.values()]
        if not times:
            held[name] = Held(leg)
        elif leg.touched_at is None or leg.touched_at <= min(times):
            held[name] = _settled(leg, deciding, held[name], policy)
        elif held[name].basis != _basis(deciding):
            return None
        elif own:
            if own[0].order.at <= max(times) or before.traded_at is None:
                return None
            same = held[name].leg is before
            held[name] = replace(held[name], leg=leg) if same else _carried(held[name], own)
    if not fills:
        return replace(state, ledger=ledger, held=held)
    since = state.since_point + len(fills)
    return replace(state, ledger=ledger, held=held, last=fills[-1].order, since_point=since)


def due_point(state: State) -> tuple[State, Point | None]:
    """Return ``state`` and, after every `POINT_EVERY` fills, the point to keep of it."""
    if state.last is None or state.since_point < POINT_EVERY:
        return state, None
    return replace(state, since_point=0), Point(order=state.last, ledger=state.ledger, held=state.held)


def decided_since(state: State) -> datetime | None:
    """Return the time of the oldest report that decides a size, average or realized PnL."""
    deciding = (_deciding(state.reports, name) for name in state.held)
    return min((report.at for of_leg in deciding for report in of_leg.values()), default=None)


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
        deciding = _deciding(state.reports, name)
        times = [report.at for report in deciding.values()]
        untouched = not times or point.order.at < min(times)
        if not untouched and (held.basis != _basis(deciding) or point.order.at <= max(times)):
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
    deciding = {name: _deciding(state.reports, name) for name in LEGS[state.key.mode]}
    due = {name: sorted({report.at for report in of_leg.values()}) for name, of_leg in deciding.items()}
    ledger = dict(base.ledger) if base else {name: Leg() for name in deciding}
    held = {name: Held(leg) for name, leg in ledger.items()}
    if base is not None:
        for name, times in due.items():
            if times and base.order.at > times[-1]:
                held[name], due[name] = base.held[name], []
    traded = {name for name, leg in ledger.items() if leg.traded_at} | {f.leg for f in fills if f.quantity}

    def overrule(name: LegName, until: datetime | None) -> None:
        """Apply the reports of times before ``until``; all that are left where it is None."""
        while due[name] and (until is None or due[name][0] < until):
            at = due[name].pop(0)
            of_time = {each: report for each, report in deciding[name].items() if report.at == at}
            before = state.held[name].leg
            held[name] = _overruled(held[name], ledger[name], of_time, before, policy, traded=name in traded)
            if not due[name]:
                held[name] = replace(held[name], basis=_basis(deciding[name]))

    points: list[Point] = []
    for number, fill in enumerate(fills, 1):
        name = fill.leg
        overrule(name, fill.order.at)
        before = ledger[name]
        ledger[name] = before.fold(fill)
        # Where no report overruled the fills, both are the same leg: folded once.
        same = held[name].leg is before
        held[name] = replace(held[name], leg=ledger[name]) if same else _carried(held[name], [fill])
        if number % POINT_EVERY == 0:
            points.append(Point(order=fill.order, ledger=dict(ledger), held=dict(held)))
    for name in ledger:
        overrule(name, None)
    last = fills[-1].order if fills else base.order if base else None
    since = len(fills) % POINT_EVERY
    return replace(state, ledger=ledger, held=held, last=last, since_point=since), points


_DECIDING: tuple[Field, ...] = ("size", "average", "realized")


def _deciding(reports: Iterable[Report], name: LegName) -> dict[Field, Report]:
    """Return the newest report for each field that moves a leg."""
    mine = [report for report in reports if report.leg is name]
    return {each: report for each in _DECIDING if (report := newest(mine, each))}


def _basis(deciding: Mapping[Field, Report]) -> tuple[str | None, ...]:
    return tuple(deciding[each].id if each in deciding else None for each in _DECIDING)


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


def _settled(leg: Leg, deciding: Mapping[Field, Report], before: Held, policy: Policy) -> Held:
    """Return what is held where every deciding report is newer than every fill."""
    held = Held(leg)
    traded = leg.traded_at is not None
    for at in sorted({report.at for report in deciding.values()}):
        due = {each: report for each, report in deciding.items() if report.at == at}
        held = _overruled(held, leg, due, before.leg, policy, traded=traded)
    return replace(held, basis=_basis(deciding))


def _overruled(
    held: Held, fold: Leg, due: Mapping[Field, Report], before: Leg, policy: Policy, *, traded: bool
) -> Held:
    """Return ``held`` after the reports ``due`` at one time, as far as they may overrule the fills.

    Args:
        held: what is held just before that time.
        fold: the fold of all fills up to that time.
        due: the newest report for each field, where it is of that time.
        before: what was held when the event arrived; tells since when a reported position is open.
        policy: who wins.
        traded: whether the leg has any fill, at any time.
    """
    if report := due.get("size"):
        held = _with_size(held, fold, report, before, policy, traded=traded)
    if (report := due.get("average")) and report.average and held.leg.size:
        held = _with_average(held, report, report.average, policy, traded=traded)
    if (report := due.get("realized")) and report.realized is not None:
        leg = held.leg
        held = replace(held, venue_realized=report.realized - (leg.gross - leg.fees + leg.funding))
    return held


def _with_size(held: Held, fold: Leg, report: Report, before: Leg, policy: Policy, *, traded: bool) -> Held:
    """Return ``held`` with the reported size, where fills allow it (domain rules, who wins, 1)."""
    size = report.size if report.size is not None else ZERO
    if not report.sided and fold.size < 0:
        size = -size
    if traded:
        if abs(size - fold.size) <= policy.size_threshold:
            return held
        newer = fold.traded_at is None or report.at - fold.traded_at > policy.tolerance
        if not (policy.take_size and newer and report.time_source is TimeSource.EVENT):
            return replace(held, disputed=report.id)
    elif size == held.leg.size:
        return held
    average = _reported_average(report, size, fold)
    if not size:
        opened_at = None
    else:
        same_side = (leg for leg in (fold, before) if leg.opened_at and leg.size * size > 0)
        opened_at = min((leg.opened_at or report.at for leg in same_side), default=report.at)
        opened_at = min(opened_at, report.at)
    leg = replace(
        held.leg,
        size=size,
        cost=abs(size) * average if average is not None else ZERO,
        opened_at=opened_at,
        closed_at=None if size else before.closed_at or report.at,
    )
    taken = Takeover(report.id, report.at, size, average, fold.size)
    return replace(held, leg=leg, takeover=taken, disputed=None)


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
    return replace(held, leg=replace(leg, cost=abs(leg.size) * average))
