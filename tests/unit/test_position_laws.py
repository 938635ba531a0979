"""Laws of the fold: arrival order, duplicates and batching change nothing; the accounts always balance."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from positions.domain import position as positions_domain
from positions.domain.events import Entry, Kind, LegName, Mode, PositionKey, Report, TimeSource
from positions.domain.figures import Figures, figures
from positions.domain.leg import Fill, Leg
from positions.domain.numbers import ZERO, exact, rounded
from positions.domain.orders import changed_fills, fills_of
from positions.domain.position import (
    LEGS,
    Point,
    Policy,
    State,
    advanced,
    due_point,
    empty,
    refolded,
    usable,
    with_report,
)
from positions.storage import codec

START = datetime(2025, 1, 15, 10, tzinfo=UTC)
POLICY = Policy()
KEYS = {mode: PositionKey("BTCUSDT", mode) for mode in Mode}

moments = st.integers(0, 12).map(lambda seconds: START + timedelta(seconds=seconds))
# Mostly small and round, so that orders are filled, positions closed and sizes agreed on by chance.
quantities = (st.integers(1, 6) | st.integers(1, 3000).map(lambda milli: Decimal(milli) / 1000)).map(Decimal)
prices = st.integers(1, 30_000).map(lambda cents: Decimal(cents) / 100)
fees = st.integers(-50, 500).map(lambda cents: Decimal(cents) / 100)
signs = st.sampled_from([1, -1])


@st.composite
def entries_of(draw: st.DrawFn, key: PositionKey, *, orders: bool = True) -> list[Entry]:
    """Draw trades, funding, and the cumulative reports of orders (some with direct executions too)."""
    legs = st.sampled_from(LEGS[key.mode])
    made: list[Entry] = []
    for number in range(draw(st.integers(0, 8))):
        funding = draw(st.integers(0, 9)) == 0
        made.append(
            Entry(
                key=f"exec:{number}",
                position=key,
                leg=draw(legs),
                kind=Kind.FUNDING if funding else Kind.TRADE,
                quantity=ZERO if funding else draw(quantities) * draw(signs),
                price=draw(prices),
                fee=draw(fees),
                executed_at=draw(moments),
                venue_seq=draw(st.none() | st.integers(1, 5)),
                order_id=draw(st.sampled_from([None, "mixed-0"])),
            )
        )
    for number in range(draw(st.integers(0, 2)) if orders else 0):
        order_id, leg, sign = f"mixed-{number}", draw(legs), draw(signs)
        cumulative = notional = fee = ZERO
        for _ in range(draw(st.integers(1, 4))):
            cumulative += draw(quantities)
            notional += draw(prices)
            fee += draw(fees)
            made.append(
                Entry(
                    key=f"order:{order_id}:{cumulative}",
                    position=key,
                    leg=leg,
                    kind=Kind.ORDER_REPORT,
                    quantity=cumulative * sign,
                    price=rounded(notional / cumulative),
                    fee=fee,
                    executed_at=draw(moments),
                    order_id=order_id,
                )
            )
    return made


@st.composite
def reports_of(draw: st.DrawFn, key: PositionKey) -> list[Report]:
    """Draw exchange reports, complete and partial ones."""
    made = []
    for number in range(draw(st.integers(0, 4))):
        leg = draw(st.sampled_from(LEGS[key.mode]))
        size = draw(st.none() | quantities | st.just(ZERO))
        if size is not None:
            size = {LegName.LONG: size, LegName.SHORT: -size}.get(leg, size * draw(signs))
        made.append(
            Report(
                id=f"report-{number}",
                position=key,
                leg=leg,
                at=draw(moments),
                time_source=draw(st.sampled_from([TimeSource.EVENT, TimeSource.ARRIVAL])),
                seq=draw(st.none() | st.integers(1, 5)),
                size=size,
                sided=leg is not LegName.NET or not size or size < 0 or draw(st.booleans()),
                average=draw(st.none() | prices),
                unrealized=draw(st.none() | fees),
                realized=draw(st.none() | fees),
                mark=draw(st.none() | prices),
                trace_id=draw(st.sampled_from(["", "trace"])),
            )
        )
    return made


class Keeper:
    """Applies batches as the service does, with a list in place of the database."""

    def __init__(self, key: PositionKey, policy: Policy | None = None, *, keeps: bool = False) -> None:
        self.policy = policy or POLICY
        self.keeps = keeps
        """Whether the next event starts from the very state, as in a worker that wrote it."""
        self.state = empty(key)
        self.ledger: dict[str, Entry] = {}
        self.points: list[Point] = []
        self.refolds = self.from_points = 0

    def apply(self, batch: Sequence[Entry | Report]) -> None:
        new = {e.key: e for e in batch if isinstance(e, Entry) and e.key not in self.ledger}
        self.ledger |= new
        reported = {e.order_id for e in self.ledger.values() if e.kind is Kind.ORDER_REPORT}
        of_orders = [
            e for e in self.ledger.values() if e.order_id in reported & {n.order_id for n in new.values()}
        ]
        state = self.state
        for report in batch:
            if isinstance(report, Report):
                state = with_report(state, report)
        added, removed = changed_fills(list(new.values()), of_orders)
        ahead = None if removed else advanced(state, added, self.policy)
        if ahead is not None:
            ahead, point = due_point(ahead)
            self.points += [point] if point else []
        else:
            self.refolds += 1
            change = min((fill.order for fill in (*added, *removed)), default=None)
            base = next((each for each in reversed(self.points) if usable(each, state, change)), None)
            fills = [
                fill for fill in fills_of(self.ledger.values()) if base is None or fill.order > base.order
            ]
            self.from_points += base is not None
            ahead, points = refolded(state, fills, self.policy, base=base)
            firsts = [order for order in (change, fills[0].order if fills else None) if order]
            kept = [each for each in self.points if not firsts or each.order < min(firsts)]
            self.points = kept + points
        self.points = [
            codec.decode_point(each.order, json.loads(json.dumps(codec.encode_point(each))))
            for each in self.points
        ]
        # What is stored is what the next event starts from.
        self.state = ahead if self.keeps else codec.decode(state.key, codec.encode(ahead))


def comparable(state: State) -> tuple[Figures, object]:
    """Return what must not depend on the order of arrival.

    Not in it is since when a position that only reports tell of is open, or which of them closed it.
    """
    found = replace(figures(state), opened_at=None, closed_at=None)
    legs = {
        name: (
            held.leg.size,
            held.leg.cost,
            held.leg.gross,
            held.venue_realized,
            held.disputed,
            held.takeover if state.ledger[name].traded_at else None,
        )
        for name, held in state.held.items()
    }
    return found, (legs, state.ledger)


@st.composite
def histories(draw: st.DrawFn) -> tuple[PositionKey, list[Entry | Report], list[list[Entry | Report]]]:
    """Draw events, and the same events shuffled, repeated and cut into batches."""
    key = KEYS[draw(st.sampled_from(Mode))]
    events: list[Entry | Report] = [*draw(entries_of(key)), *draw(reports_of(key))]
    arrived = draw(st.permutations([*events, *events[::2]]))
    batches = []
    while arrived:
        length = draw(st.integers(1, len(arrived)))
        batches.append(list(arrived[:length]))
        arrived = arrived[length:]
    return key, events, batches


History = tuple[PositionKey, list[Entry | Report], list[list[Entry | Report]]]


def assert_converges(history: History) -> None:
    key, events, batches = history
    with exact():
        at_once = empty(key)
        for event in events:
            if isinstance(event, Report):
                at_once = with_report(at_once, event)
        entries = [event for event in events if isinstance(event, Entry)]
        at_once, _ = refolded(at_once, fills_of(entries), POLICY)
        keeper = Keeper(key)
        for batch in batches:
            keeper.apply(batch)
        assert comparable(keeper.state) == comparable(at_once)


@settings(max_examples=400)
@given(histories())
def test_arrival_order_duplicates_and_batches_change_nothing(history: History) -> None:
    assert_converges(history)


@settings(max_examples=400)
@given(histories())
def test_a_state_that_was_kept_goes_on_as_one_that_was_read(history: History) -> None:
    key, _, batches = history
    keeper, reader = Keeper(key, keeps=True), Keeper(key)
    with exact():
        for batch in batches:
            keeper.apply(batch)
            reader.apply(batch)
            assert keeper.state == reader.state
            assert codec.encode(keeper.state) == codec.encode(reader.state)


@settings(max_examples=400)
@given(histories(), st.integers(1, 3))
def test_folding_on_from_a_point_changes_nothing(history: History, every: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions_domain, "POINT_EVERY", every)
        assert_converges(history)


def test_a_report_as_old_as_an_implied_fill_counts_again_when_an_execution_takes_its_place() -> None:
    key = KEYS[Mode.ONE_WAY]

    def entry(key_: str, kind: Kind, second: int, quantity: int) -> Entry:
        made = replace(_late(key_), kind=kind, quantity=Decimal(quantity), order_id="mixed")
        return replace(made, executed_at=START + timedelta(seconds=second))

    def report(id_: str, second: int, size: str) -> Report:
        at = START + timedelta(seconds=second)
        return Report(
            id=id_, position=key, leg=LegName.NET, at=at, time_source=TimeSource.EVENT, size=Decimal(size)
        )

    first = entry("exec:1", Kind.TRADE, 0, 1)
    implying = entry("order:mixed:2", Kind.ORDER_REPORT, 6, 2)
    replacing = entry("exec:2", Kind.TRADE, 0, 1)
    # The second is within the threshold of the first, which stays in effect where it is known.
    reports: list[Entry | Report] = [report("report-1", 6, "5"), report("report-2", 7, "5.00005")]
    events = [first, implying, *reports, replacing]
    assert_converges((key, events, [[first, implying, *reports], [replacing]]))
    assert_converges((key, events, [[first, replacing], [implying], reports]))


def test_a_late_fill_is_folded_from_the_last_point_before_it() -> None:
    key = KEYS[Mode.ONE_WAY]
    entries = [
        replace(_late(f"exec:{number}"), executed_at=START + timedelta(seconds=number))
        for number in range(1250)
    ]
    late = entries.pop(1230)
    with exact():
        keeper = Keeper(key)
        for start in range(0, len(entries), 100):
            keeper.apply(entries[start : start + 100])
        keeper.apply([late])
        assert keeper.refolds == keeper.from_points == 1
        assert keeper.state.held[LegName.NET].leg.size == 1250
        assert max(point.order for point in keeper.points).at < late.executed_at


@given(entries_of(KEYS[Mode.ONE_WAY]), prices)
def test_realized_and_unrealized_account_for_every_fill(entries: list[Entry], mark: Decimal) -> None:
    with exact():
        fills = fills_of(entries)
        state, _ = refolded(empty(KEYS[Mode.ONE_WAY]), fills, POLICY)
        leg = state.held[LegName.NET].leg
        value = leg.size * mark - (leg.cost if leg.size > 0 else -leg.cost)
        paid = sum((fill.notional if fill.quantity < 0 else -fill.notional for fill in fills), ZERO)
        other = sum((fill.funding - fill.fee for fill in fills), ZERO)
        assert leg.gross - leg.fees + leg.funding + value == paid + other + leg.size * mark


@given(histories())
def test_parts_sum_to_realized_pnl(history: History) -> None:
    key, _, batches = history
    with exact():
        keeper = Keeper(key)
        for batch in batches:
            keeper.apply(batch)
            found = figures(keeper.state)
            parts = found.realized_gross - found.fees_paid + found.funding_received
            assert parts + found.realized_adjustment == found.realized_pnl


@given(entries_of(KEYS[Mode.ONE_WAY], orders=False))
def test_short_is_the_mirror_of_long(entries: list[Entry]) -> None:
    mirrored = [replace(entry, quantity=-entry.quantity, fee=ZERO) for entry in entries]
    plain = [replace(entry, fee=ZERO) for entry in entries]
    with exact():
        one = refolded(empty(KEYS[Mode.ONE_WAY]), fills_of(plain), POLICY)[0].held[LegName.NET].leg
        other = refolded(empty(KEYS[Mode.ONE_WAY]), fills_of(mirrored), POLICY)[0].held[LegName.NET].leg
        assert (one.size, one.cost, one.gross) == (-other.size, other.cost, -other.gross)


@given(entries_of(KEYS[Mode.ONE_WAY], orders=False), quantities, prices, fees)
def test_a_flip_is_a_close_and_an_open(
    entries: list[Entry], beyond: Decimal, price: Decimal, fee: Decimal
) -> None:
    with exact():
        leg = refolded(empty(KEYS[Mode.ONE_WAY]), fills_of(entries), POLICY)[0].ledger[LegName.NET]
        whole = abs(leg.size) + beyond
        flip = Fill(
            order=fills_of([_late("flip")])[0].order,
            leg=LegName.NET,
            quantity=-whole.copy_sign(leg.size),
            notional=whole * price,
            fee=fee,
            funding=ZERO,
        )
        close = replace(flip, quantity=-leg.size, notional=abs(leg.size) * price, fee=ZERO)
        reopen = replace(flip, quantity=-beyond.copy_sign(leg.size), notional=beyond * price)
        one = leg.fold(flip)
        two = leg.fold(close).fold(reopen) if leg.size else leg.fold(reopen)
    assert (one.size, one.fees, one.opened_at) == (two.size, two.fees, two.opened_at)
    tolerance = Decimal("1e-12") * whole * price
    assert abs(one.cost - two.cost) <= tolerance
    assert abs(one.gross - two.gross) <= tolerance


@given(entries_of(KEYS[Mode.ONE_WAY], orders=False), quantities, quantities, prices, signs)
def test_splitting_a_fill_at_one_price_changes_nothing(
    entries: list[Entry], first: Decimal, second: Decimal, price: Decimal, sign: int
) -> None:
    with exact():
        leg = refolded(empty(KEYS[Mode.ONE_WAY]), fills_of(entries), POLICY)[0].ledger[LegName.NET]
        parts = [
            replace(_late(f"part-{number}"), quantity=quantity * sign, price=price)
            for number, quantity in enumerate((first, second))
        ]
        merged = replace(parts[0], quantity=(first + second) * sign)
        one, two = leg, leg
        for fill in fills_of([merged]):
            one = one.fold(fill)
        for fill in fills_of(parts):
            two = two.fold(fill)
    assert one.size == two.size
    tolerance = Decimal("1e-12") * max(Decimal(1), (first + second) * price + leg.cost)
    assert abs(one.cost - two.cost) <= tolerance
    assert abs(one.gross - two.gross) <= tolerance


@given(entries_of(KEYS[Mode.HEDGE]))
def test_a_hedge_leg_never_goes_through_zero(entries: list[Entry]) -> None:
    with exact():
        legs = refolded(empty(KEYS[Mode.HEDGE]), fills_of(entries), POLICY)[0].ledger
    assert legs[LegName.LONG].size >= 0
    assert legs[LegName.SHORT].size <= 0


@given(entries_of(KEYS[Mode.ONE_WAY]))
def test_a_flat_leg_costs_exactly_nothing(entries: list[Entry]) -> None:
    leg = Leg()
    with exact():
        for fill in fills_of(entries):
            leg = leg.fold(fill)
            assert (leg.size == 0) == (leg.cost == 0)


def _late(key: str) -> Entry:
    return Entry(
        key=key,
        position=KEYS[Mode.ONE_WAY],
        leg=LegName.NET,
        kind=Kind.TRADE,
        quantity=Decimal(1),
        price=Decimal(1),
        executed_at=START + timedelta(hours=1),
    )
