"""Which source decides when fills and exchange reports disagree, rule by rule."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest

from positions.domain.events import Entry, Kind, LegName, Mode, PositionKey, Report, TimeSource
from positions.domain.figures import Figures, figures
from positions.domain.numbers import exact
from positions.domain.position import Policy, State
from tests.unit.test_position_laws import Keeper

START = datetime(2025, 1, 15, 10, tzinfo=UTC)
KEY = PositionKey("BTCUSDT", Mode.ONE_WAY)


def fill(quantity: str, price: str, second: int, **fields: Any) -> Entry:
    return Entry(
        key=fields.pop("key", f"exec:{second}"),
        position=KEY,
        leg=LegName.NET,
        kind=Kind.TRADE,
        quantity=Decimal(quantity),
        price=Decimal(price),
        executed_at=START + timedelta(seconds=second),
        **fields,
    )


def order_report(cumulative: str, average: str, second: int) -> Entry:
    return Entry(
        key=f"order:A:{cumulative}",
        position=KEY,
        leg=LegName.NET,
        kind=Kind.ORDER_REPORT,
        quantity=Decimal(cumulative),
        price=Decimal(average),
        executed_at=START + timedelta(seconds=second),
        order_id="A",
    )


def report(second: int, **fields: Any) -> Report:
    values: dict[str, Any] = {
        name: Decimal(fields.pop(name))
        for name in ("size", "average", "unrealized", "realized", "mark")
        if name in fields
    }
    at = START + timedelta(seconds=second)
    return Report(
        id=f"report-{second}-{fields.get('seq')}", position=KEY, leg=LegName.NET, at=at, **fields, **values
    )


def kept(*events: Entry | Report, policy: Policy | None = None) -> tuple[State, Figures]:
    """Return what is kept after ``events``, arrived one by one; the same whichever way they arrive."""
    found = [_kept(order, policy) for order in (events, events[::-1])]
    assert found[0][1] == found[1][1]
    with exact():
        keeper = Keeper(KEY, policy)
        keeper.apply(events)
        assert figures(keeper.state) == found[0][1]
    return found[0]


def _kept(events: Sequence[Entry | Report], policy: Policy | None) -> tuple[State, Figures]:
    with exact():
        keeper = Keeper(KEY, policy)
        for event in events:
            keeper.apply([event])
        return keeper.state, figures(keeper.state)


def test_a_position_without_fills_follows_its_newest_report() -> None:
    _, found = kept(report(1, size="1", average="100"), report(2, size="-2", average="90", mark="80"))
    assert (found.size, found.average_entry_price, found.unrealized_pnl) == (-2, 90, 20)
    assert found.short_size == -2


def test_the_venues_sequence_decides_over_time() -> None:
    _, found = kept(report(1, size="1", average="100", seq=8), report(2, size="3", average="100", seq=7))
    assert found.size == 1


def test_a_report_overrules_older_fills_beyond_the_threshold() -> None:
    state, found = kept(fill("1", "100", 1), report(2, size="2", average="105"))
    assert (found.size, found.average_entry_price) == (2, 105)
    takeover = state.held[LegName.NET].takeover
    assert takeover is not None
    assert (takeover.found, takeover.size) == (1, 2)


def test_fills_after_the_report_fold_on_top() -> None:
    _, found = kept(fill("1", "100", 1), report(2, size="2", average="100"), fill("2", "130", 3))
    assert (found.size, found.average_entry_price) == (4, 115)


def test_a_late_fill_from_before_the_report_is_already_inside_it() -> None:
    _, found = kept(report(3, size="2", average="101"), fill("1", "100", 2), fill("1", "102", 1))
    assert (found.size, found.average_entry_price) == (2, 101)


def test_a_difference_within_the_threshold_changes_nothing() -> None:
    _, found = kept(fill("1", "100", 1), report(2, size="1.0001", average="100.1"))
    assert (found.size, found.average_entry_price) == (1, 100)


def test_a_report_as_old_as_the_last_fill_does_not_overrule_it() -> None:
    state, found = kept(fill("1", "100", 2), report(2, size="2", average="105"))
    assert (found.size, found.average_entry_price) == (1, 100)
    assert state.held[LegName.NET].disputed is not None


def test_tolerance_is_the_time_a_report_must_be_newer_by() -> None:
    events = (fill("1", "100", 1), report(3, size="2", average="105"))
    assert kept(*events, policy=Policy(tolerance=timedelta(seconds=2)))[1].size == 1
    assert kept(*events, policy=Policy(tolerance=timedelta(seconds=1)))[1].size == 2


def test_resolution_switched_off_keeps_the_fills() -> None:
    events = (fill("1", "100", 1), report(2, size="2", average="105", unrealized="7", mark="101"))
    _, found = kept(*events, policy=Policy(take_size=False))
    assert (found.size, found.average_entry_price, found.unrealized_pnl) == (1, 100, 1)


def test_a_report_timed_on_arrival_opens_but_never_overrules_fills() -> None:
    untimed = report(2, size="5", average="100", time_source=TimeSource.ARRIVAL)
    assert kept(untimed)[1].size == 5
    assert kept(untimed, fill("1", "100", 1))[1].size == 1
    assert kept(untimed, fill("1", "100", 3))[1].size == 1


def test_a_reported_size_of_zero_closes() -> None:
    _, found = kept(fill("1", "100", 1), report(2, size="0", realized="-3"))
    assert (found.size, found.average_entry_price, found.unrealized_pnl) == (0, None, 0)
    assert found.realized_pnl == -3
    assert found.closed_at == START + timedelta(seconds=2)


def test_a_reported_average_replaces_the_folded_one_beyond_the_threshold() -> None:
    events = (fill("2", "100", 1), report(2, size="2", average="100.11"))
    assert kept(*events)[1].average_entry_price == Decimal("100.11")
    assert kept(*events, policy=Policy(take_average=False))[1].average_entry_price == 100
    at_threshold = (fill("2", "100", 1), report(2, size="2", average="100.1"))
    assert kept(*at_threshold)[1].average_entry_price == 100


def test_reported_realized_pnl_stands_and_later_fills_add_to_it() -> None:
    _, found = kept(
        fill("2", "100", 1, fee=Decimal(1)), report(2, realized="40"), fill("-1", "110", 3, fee=Decimal(2))
    )
    assert found.realized_pnl == 48
    assert (found.realized_gross, found.fees_paid, found.realized_adjustment) == (10, 3, 41)


def test_reported_unrealized_pnl_stands_until_a_newer_mark_or_fill() -> None:
    opened = (fill("1", "100", 1), report(2, unrealized="9", mark="110"))
    assert kept(*opened)[1].unrealized_pnl == 9
    assert kept(*opened, report(3, mark="111"))[1].unrealized_pnl == 11
    assert kept(*opened, fill("1", "110", 3))[1].unrealized_pnl == 10


def test_an_average_that_is_not_reported_follows_from_mark_and_unrealized_pnl() -> None:
    _, found = kept(report(1, size="-2", unrealized="20", mark="100"))
    assert found.average_entry_price == 110


def test_executions_of_an_order_take_the_place_of_what_its_reports_implied() -> None:
    executions = (
        fill("0.4", "100", 3, key="exec:a", order_id="A"),
        fill("0.6", "110", 4, key="exec:b", order_id="A"),
    )
    _, found = kept(order_report("1.0", "106", 2), *executions)
    assert (found.size, found.average_entry_price) == (1, 106)
    _, partly = kept(order_report("1.0", "106", 2), executions[0])
    assert (partly.size, partly.average_entry_price) == (1, 106)


def test_a_report_of_no_field_that_is_newer_changes_nothing() -> None:
    newest = report(5, size="1", average="100", mark="100", unrealized="0", realized="0")
    state, found = kept(newest)
    with exact():
        keeper = Keeper(KEY)
        keeper.state = state
        keeper.apply([report(4, size="7", average="1", mark="1", unrealized="1", realized="1")])
        assert keeper.state.held == state.held
        assert figures(keeper.state) == found


def test_a_size_without_a_side_is_long_unless_the_fills_are_short() -> None:
    unsided = report(2, size="2", average="100", sided=False)
    assert kept(unsided)[1].size == 2
    assert kept(fill("-1", "100", 1), unsided)[1].size == -2
    assert kept(fill("1", "100", 1), unsided)[1].size == 2


def test_a_hedge_order_s_reports_belong_to_the_leg_of_its_executions() -> None:
    key = PositionKey("BTCUSDT", Mode.HEDGE)
    opened = replace(fill("1", "100", 1), position=key, leg=LegName.LONG)
    closed = replace(fill("-1", "110", 2, order_id="A"), position=key, leg=LegName.LONG)
    # Without closed size, side Sell alone would have opened a short.
    told = replace(order_report("-1", "110", 2), position=key, leg=LegName.SHORT)
    for arrived in permutations([opened, closed, told]):
        with exact():
            keeper = Keeper(key)
            for entry in arrived:
                keeper.apply([entry])
            found = figures(keeper.state)
        assert (found.long_size, found.short_size, found.realized_pnl) == (0, 0, 10)


def test_a_report_that_agrees_with_what_is_held_never_undoes_an_older_takeover() -> None:
    opened = report(1, size="10", average="100")
    agreeing = report(2, size="11", average="101")
    _, found = kept(opened, fill("1", "111", 2), agreeing)
    assert (found.size, found.average_entry_price) == (11, 101)
    _, later = kept(opened, fill("1", "111", 2), agreeing, fill("1", "101", 3))
    assert later.size == 12


def test_a_dispute_leaves_the_older_takeover_in_force() -> None:
    opened = report(1, size="10", average="100")
    untimed = report(4, size="50", average="1", time_source=TimeSource.ARRIVAL)
    state, found = kept(opened, fill("1", "111", 2), untimed)
    assert found.size == 11
    assert state.held[LegName.NET].disputed == untimed.id


def test_a_position_of_reports_that_closes_says_when() -> None:
    with exact():
        keeper = Keeper(KEY)
        keeper.apply([report(1, size="3", average="10")])
        assert figures(keeper.state).opened_at == START + timedelta(seconds=1)
        keeper.apply([report(2, size="0")])
        assert figures(keeper.state).closed_at == START + timedelta(seconds=2)
        keeper.apply([report(3, size="0")])
        assert figures(keeper.state).closed_at == START + timedelta(seconds=2)


def test_flat_reports_need_no_refold() -> None:
    with exact():
        keeper = Keeper(KEY)
        keeper.apply([fill("1", "100", 1), report(2, size="1", average="100", realized="0")])
        keeper.apply([fill("-1", "110", 3)])
        for second in range(4, 14):
            keeper.apply([report(second, size="0", realized="10")])
        assert keeper.refolds == 0
        assert figures(keeper.state).realized_pnl == 10


def test_an_order_report_that_does_not_tell_the_fee_refunds_none() -> None:
    first = replace(order_report("0.3", "100", 1), fee=Decimal("0.03"))
    last = replace(order_report("1.0", "107", 2), fee=None)
    _, found = kept(first, last)
    assert found.fees_paid == Decimal("0.03")


@pytest.mark.parametrize("pairs", [3, 4, 8])
def test_an_opening_report_is_kept_however_many_may_not_overrule_after_it(pairs: int) -> None:
    policy = Policy(take_average=False)
    events: list[Entry | Report] = [report(1, size="10", average="50")]
    for number in range(pairs):
        events += [
            fill("1", "100", 2 + number),
            report(2 + number, size=str(11 + number), average="1"),
        ]
    assert kept(*events, policy=policy)[1].size == 10 + pairs
    late = [*events[1:], events[0]]
    assert kept(*late, policy=policy)[1].size == 10 + pairs
