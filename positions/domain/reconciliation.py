"""Our position beside the venue's own record of it: what differs, why, and what may be done about it.

Pure, as the rest of the domain: what the venue answered is an argument. A cause is found by trying it: the
position is folded anew with the executions that only the venue has, without those that only the ledger has,
and so on; what makes both say the same is the cause. Every function here must run inside
:func:`positions.domain.numbers.exact`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import NamedTuple

from positions.domain.breaks import Break, BreakKind, Cause
from positions.domain.events import Entry, Kind, LegName, Report
from positions.domain.numbers import ZERO, rounded
from positions.domain.orders import fills_of
from positions.domain.position import Held, Policy, State, refolded

SETTLED_AFTER = timedelta(seconds=60)
"""What is younger may still be on its way to us, and is judged the next time."""
SAME_TRADE_WITHIN = timedelta(seconds=5)
"""Two records of one trade under different ids are at most so far apart."""
NAMED_MAX = 5
"""So many executions are named in a break."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What the venue's own record says of one leg."""

    report: Report
    """Without what is of the moment of asking: mark and unrealized PnL."""
    created_at: datetime | None = None
    """When the venue first had a position there."""
    asked_at: datetime | None = None
    """When it was asked for: nothing changed there from the record's time until then. None: not known."""
    silent: bool = False
    """Whether there is no record: asked by name, the venue knew nothing of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """One execution as the venue has it."""

    entry: Entry
    by_hand: bool
    """Whether its order bears no name of ours, and was made by a person."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """All executions of a position that the venue has from ``since`` to ``until``, both included."""

    since: datetime
    until: datetime
    executions: Sequence[Execution]
    whole: bool = True
    """Whether it reaches back as far as was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """What a comparison with the venue found."""

    breaks: Mapping[tuple[LegName, BreakKind], Break] = field(default_factory=dict)
    missing: Sequence[Entry] = ()
    """Executions that the ledger lacks and may be given."""
    overrule: Sequence[Report] = ()
    """What the venue's record says, to be applied as its report would be."""
    agreed: frozenset[tuple[LegName, BreakKind]] = frozenset()
    """What was compared and does not differ."""
    moving: bool = False
    """Whether something is too young to be judged."""

    @property
    def doubtful(self) -> bool:
        """Whether the venue's executions would help."""
        return self.moving or any(each.cause is not Cause.ROUNDING for each in self.breaks.values())


class _Difference(NamedTuple):
    ours: Decimal
    theirs: Decimal
    tolerated: bool


def judge(
    state: State,
    entries: Sequence[Entry],
    statements: Sequence[Statement],
    window: Window | None,
    *,
    policy: Policy,
    now: datetime,
) -> Judgement:
    """Compare a position with the venue's record of it, as both were when it was asked for.

    Args:
        state: the position, with the reports it knows.
        entries: its whole ledger.
        statements: at most one for each leg.
        window: executions of the venue; None where they were not asked for: nothing is corrected then.
        policy: who wins.
        now: decides what is too young.
    """
    # A record older than a report that we know says nothing new.
    current = [each for each in statements if not _outdated(each.report, state)]
    case = _Case(state=state, entries=entries, statements=current, window=window, policy=policy, now=now)
    breaks: dict[tuple[LegName, BreakKind], Break] = {}
    agreed: set[tuple[LegName, BreakKind]] = set()
    moving = False
    for each in current:
        name = each.report.leg
        compared = case.compared(case.held[name], each)
        agreed.update((name, kind) for kind, found in compared.items() if found is None)
        if not each.silent or (name, BreakKind.SIZE) in agreed:
            agreed.add((name, BreakKind.ABSENT))
        for kind, found in compared.items():
            if found is None:
                continue
            cause, detail = (Cause.ROUNDING, None) if found.tolerated else case.cause(each, kind)
            added = case.missing and cause in (Cause.MISSING_FILL, Cause.MANUAL_TRADE, Cause.FUNDING)
            if cause is not Cause.ROUNDING and (not case.settled if added else case.young(each)):
                moving = True
                continue
            breaks[name, BreakKind.ABSENT if each.silent else kind] = Break(
                ours=found.ours,
                theirs=found.theirs,
                report_id=None if each.silent else each.report.id,
                cause=cause,
                detail=detail,
            )
    missing = case.settled if case.may_apply_missing else ()
    overrule = [case.claim(each) for each in current if not missing and case.may_overrule(each, breaks)]
    return Judgement(
        breaks=breaks, missing=missing, overrule=tuple(overrule), agreed=frozenset(agreed), moving=moving
    )


def _outdated(report: Report, state: State) -> bool:
    return any(
        each.leg is report.leg and each.size is not None and each.at > report.at for each in state.reports
    )


@dataclass(kw_only=True)
class _Case:
    """One position, and what is known of it on both sides."""

    state: State
    entries: Sequence[Entry]
    statements: Sequence[Statement]
    window: Window | None
    policy: Policy
    now: datetime

    def __post_init__(self) -> None:
        """Sort out which executions only one side has, and which reports count."""
        times = {each.report.leg: each.report.at for each in self.statements}
        # Fills up to when it was asked, not to its time: clocks and their digits are not the same everywhere.
        self.until = {
            each.report.leg: max(each.report.at, each.asked_at or each.report.at) for each in self.statements
        }
        # What the reports up to then were allowed to say counts; for a cause, only those before: else the
        # venue's own record may make whatever is tried agree with it.
        self.known = self._state(lambda each: each.at <= times.get(each.leg, each.at))
        self.before = self._state(lambda each: each.leg not in times or each.at < times[each.leg])
        self.missing: list[Execution] = []
        self.surplus: list[Entry] = []
        self.matched = self.renamed = 0
        if self.window is not None:
            self._compare_ids(self.window)
        self._tried: dict[str, Mapping[LegName, Held]] = {}

    def _state(self, counts: Callable[[Report], bool]) -> State:
        return replace(self.state, reports=tuple(each for each in self.state.reports if counts(each)))

    def _folded(self, state: State, entries: Iterable[Entry]) -> Mapping[LegName, Held]:
        fills = [
            each for each in fills_of(entries) if each.order.at <= self.until.get(each.leg, each.order.at)
        ]
        return refolded(state, fills, self.policy)[0].held

    @cached_property
    def held(self) -> Mapping[LegName, Held]:
        """What we held when the venue was asked."""
        last = self.state.last
        if self.known == self.state and (last is None or all(last.at <= at for at in self.until.values())):
            return self.state.held
        return self._folded(self.known, self.entries)

    def _compare_ids(self, window: Window) -> None:
        """Find which executions only one side has: by id first, then what is one trade under two ids."""
        keys = {entry.key for entry in self.entries}
        theirs = {each.entry.key for each in window.executions}
        orders = {each.entry.order_id for each in window.executions}
        covered = self._covered(window)
        latest = max(self.until.values(), default=window.until)
        self.missing = [
            each
            for each in window.executions
            if each.entry.key not in keys
            and each.entry.order_id not in covered
            and each.entry.executed_at <= self.until.get(each.entry.leg, latest)
        ]
        settled = self.now - SETTLED_AFTER
        for entry in self.entries:
            until = min(self.until.get(entry.leg, latest), settled)
            if not window.since <= entry.executed_at <= until:
                continue
            reported = entry.kind is Kind.ORDER_REPORT
            if entry.key in theirs or (reported and entry.order_id in orders):
                self.matched += 1
                continue
            if not reported and entry.kind not in (Kind.TRADE, Kind.FUNDING):
                continue
            twin = next((each for each in self.missing if _same_trade(entry, each.entry)), None)
            if twin is None:
                self.surplus.append(entry)
            else:
                self.missing.remove(twin)
                self.renamed += 1

    def _covered(self, window: Window) -> set[str | None]:
        """Return the orders of which the ledger has a report of all that the venue executed."""
        executed: defaultdict[str | None, Decimal] = defaultdict(Decimal)
        for each in window.executions:
            executed[each.entry.order_id] += abs(each.entry.quantity)
        return {
            entry.order_id
            for entry in self.entries
            if entry.kind is Kind.ORDER_REPORT and abs(entry.quantity) >= executed[entry.order_id]
        }

    @cached_property
    def settled(self) -> tuple[Entry, ...]:
        """The executions that the ledger should have had by now."""
        latest = self.now - SETTLED_AFTER
        return tuple(each.entry for each in self.missing if each.entry.executed_at <= latest)

    def young(self, statement: Statement) -> bool:
        """Tell whether there was a change so late that what it came of may still be on its way to us."""
        name = statement.report.leg
        changed = [entry.executed_at for entry in self.entries if entry.leg is name]
        if not statement.silent:
            changed.append(statement.report.at)
        return max(changed, default=self.now) > self.now - SETTLED_AFTER

    def compared(self, held: Held, statement: Statement) -> Mapping[BreakKind, _Difference | None]:
        """Return by kind what differs in a leg; None where it was compared and is the same."""
        leg, report = held.leg, statement.report
        found: dict[BreakKind, _Difference | None] = {}
        size = report.size
        if size is None:
            return found
        apart = abs(size - leg.size)
        within = apart <= self.policy.size_threshold
        found[BreakKind.SIZE] = _Difference(leg.size, size, within) if apart else None
        average = leg.average
        if within and report.average and average:
            off = abs(report.average - average)
            tolerated = off <= self.policy.average_threshold * average
            same = tolerated and off <= _unit(report.average)
            found[BreakKind.AVERAGE] = None if same else _Difference(average, report.average, tolerated)
        if report.realized is not None and self._tells_all(statement):
            ours = rounded(leg.gross - leg.fees + leg.funding + held.venue_realized)
            off, unit = abs(report.realized - ours), _unit(report.realized)
            tolerated = off <= unit * (len(self.entries) + 1)
            found[BreakKind.REALIZED] = None if off <= unit else _Difference(ours, report.realized, tolerated)
        return found

    def _tells_all(self, statement: Statement) -> bool:
        """Tell whether our realized PnL is of the same time as the venue's, which is of all time."""
        name = statement.report.leg
        if self._follows(name):
            return True
        first = min((each.executed_at for each in self.entries if each.leg is name), default=None)
        created = statement.created_at
        return first is not None and created is not None and first <= created + SAME_TRADE_WITHIN

    def cause(self, statement: Statement, kind: BreakKind) -> tuple[Cause, str | None]:
        """Return why the two differ in ``kind``, and the evidence in words."""
        name = statement.report.leg
        missing = [each for each in self.missing if each.entry.leg is name]
        funding = [each.entry for each in missing if each.entry.kind is Kind.FUNDING]
        if funding and kind is BreakKind.REALIZED and self._agree(statement, kind, "funding", add=funding):
            return Cause.FUNDING, _named("the venue alone has", funding)
        if missing:
            added = [each.entry for each in missing]
            if self._agree(statement, kind, "missing", add=added):
                by_hand = all(
                    each.by_hand and each.entry.order_id not in self._orders
                    for each in missing
                    if each.entry.kind is Kind.TRADE
                )
                cause = Cause.MANUAL_TRADE if by_hand else Cause.MISSING_FILL
                return cause, _named("the venue alone has", added)
        for label, extra in (("surplus", self.surplus), ("doubles", self._doubles)):
            # Without all that an account has not, it is in accord with any account that has nothing.
            own = [each for each in extra if each.leg is name and (label == "doubles" or self._ours)]
            if own and self._agree(statement, kind, label, drop=own):
                words = (
                    "the ledger alone has" if label == "surplus" else "the ledger has under another key too"
                )
                return Cause.DUPLICATE, _named(words, own)
        paid = [each for each in self.entries if each.kind is Kind.FUNDING and each.leg is name]
        if paid and kind is BreakKind.REALIZED and self._agree(statement, kind, "unfunded", drop=paid):
            return Cause.FUNDING, "the venue's figure is without funding"
        return Cause.UNKNOWN, None

    @property
    def _ours(self) -> bool:
        """Whether it is shown that the venue speaks of our account: it knows some of our fills."""
        return bool(self.matched or self.renamed)

    @cached_property
    def _orders(self) -> set[str]:
        return {entry.order_id for entry in self.entries if entry.order_id}

    @cached_property
    def _doubles(self) -> list[Entry]:
        """The trades of the ledger that are another's double, and not known to the venue as two."""
        theirs = {each.entry.key for each in self.window.executions} if self.window else set()
        seen: set[tuple[object, ...]] = set()
        found = []
        for entry in sorted(self.entries, key=lambda each: (each.key not in theirs, each.key)):
            if entry.kind is not Kind.TRADE:
                continue
            trade = (entry.leg, entry.quantity, entry.price, entry.executed_at, entry.order_id)
            if trade in seen and entry.key not in theirs:
                found.append(entry)
            seen.add(trade)
        return found

    def _agree(
        self,
        statement: Statement,
        kind: BreakKind,
        label: str,
        *,
        add: Sequence[Entry] = (),
        drop: Sequence[Entry] = (),
    ) -> bool:
        """Tell whether with other entries the two would not differ in ``kind``."""
        name = statement.report.leg
        tried = f"{label}:{name}"
        if tried not in self._tried:
            keys = {entry.key for entry in drop}
            entries = [*(each for each in self.entries if each.key not in keys), *add]
            self._tried[tried] = self._folded(self.before, entries)
        found = self.compared(self._tried[tried][name], statement).get(kind)
        return found is None or found.tolerated

    @cached_property
    def may_apply_missing(self) -> bool:
        """Tell whether the ledger may be given what it lacks.

        It may where both sides call the same trades by the same ids: else a trade would count once as the
        venue calls it and once as we do. And not where it would lead away from what the venue says. Where we
        have no trade to compare ids with, both must say the same then.
        """
        named = all(each.key.startswith("exec:") for each in self.entries if each.kind is Kind.TRADE)
        if not (self.settled and named) or self.renamed or self.surplus:
            return False
        after = self._folded(self.known, [*self.entries, *self.settled])
        known = any(each.kind is not Kind.REPORT for each in self.entries)
        for each in self.statements:
            name, size = each.report.leg, each.report.size or ZERO
            was = abs(size - self.held[name].leg.size) if known else self.policy.size_threshold
            if abs(size - after[name].leg.size) > was:
                return False
        return True

    def claim(self, statement: Statement) -> Report:
        """Return what the venue's record may claim: realized PnL only where its reports do already.

        The venue's is of all time; the ledger's begins with the ledger.
        """
        report = statement.report
        return report if self._follows(report.leg) else replace(report, realized=None)

    def _follows(self, name: LegName) -> bool:
        """Tell whether the venue's realized PnL stands for what came before it."""
        return any(each.leg is name and each.realized is not None for each in self.state.reports)

    def may_overrule(self, statement: Statement, breaks: Mapping[tuple[LegName, BreakKind], Break]) -> bool:
        """Tell whether the venue's record may be applied as its report would be.

        Not where it says nothing or flat: no position is wiped because a source knew nothing of it. And not
        where nothing shows that it is our account that it speaks of.
        """
        report = statement.report
        if statement.silent or any(each.id == report.id for each in self.state.reports):
            return False
        kinds = [BreakKind.SIZE, BreakKind.AVERAGE]
        if self._follows(report.leg):
            kinds.append(BreakKind.REALIZED)
        found = [breaks.get((report.leg, kind)) for kind in kinds]
        wrong = [each for each in found if each is not None and each.cause is not Cause.ROUNDING]
        if not wrong:
            # A newer record that agrees ends an older dispute.
            disputed = self.state.held[report.leg].disputed is not None
            return disputed and report.size == self.held[report.leg].leg.size
        if not report.size or self.window is None or not self.window.whole:
            return False
        explained = any(each.cause is not Cause.UNKNOWN for each in wrong)
        traded = any(each.kind in (Kind.TRADE, Kind.ORDER_REPORT) for each in self.entries)
        return (self._ours or not traded) and (explained or not self.surplus)


def _same_trade(one: Entry, other: Entry) -> bool:
    if one.kind is not other.kind or one.leg is not other.leg or one.fee is None:
        return False
    same_fee = one.kind is not Kind.FUNDING or one.fee == other.fee
    return (
        one.quantity == other.quantity
        and one.price == other.price
        and same_fee
        and (
            abs(one.executed_at - other.executed_at) <= SAME_TRADE_WITHIN
            or (one.order_id or "") == other.order_id
        )
    )


def _named(words: str, entries: Sequence[Entry]) -> str:
    """Return the evidence in words: the first few keys by name."""
    keys = ", ".join(entry.key for entry in entries[:NAMED_MAX])
    more = f" and {len(entries) - NAMED_MAX} more" if len(entries) > NAMED_MAX else ""
    return f"{words}: {keys}{more}"


def _unit(figure: Decimal) -> Decimal:
    """Return one unit of the last digit that the venue's ``figure`` carries, a hundredth at most."""
    exponent = figure.as_tuple().exponent
    return Decimal(1).scaleb(min(exponent, -2)) if isinstance(exponent, int) else ZERO
