"""What differs from the venue, why, and what may be done about it: each cause made on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest

from positions.domain.breaks import BreakKind
from positions.domain.events import Entry, Kind, LegName, Report
from positions.domain.numbers import exact
from positions.domain.position import Policy, State
from positions.domain.reconciliation import Execution, Judgement, Statement, Window, judge
from tests.unit.test_position_laws import Keeper
from tests.unit.test_who_wins import KEY, START, fill, order_report, report

NOW = START + timedelta(hours=1)
NET = LegName.NET


def state_of(*events: Entry | Report) -> State:
    with exact():
        keeper = Keeper(KEY, Policy())
        keeper.apply(events)
        return keeper.state


def said(second: int, created: int | None = None, **fields: Any) -> Statement:
    created_at = None if created is None else START + timedelta(seconds=created)
    return Statement(report=replace(report(second, **fields), id=f"venue-{second}"), created_at=created_at)


def told(*executions: Entry, by_hand: bool = False) -> Window:
    return Window(
        since=START - timedelta(days=1),
        until=NOW,
        executions=[Execution(entry=each, by_hand=by_hand) for each in executions],
    )


def judged(
    ours: Sequence[Entry | Report],
    statement: Statement,
    window: Window | None = None,
    *,
    now: Any = NOW,
    policy: Policy | None = None,
) -> Judgement:
    entries = [each for each in ours if isinstance(each, Entry)]
    with exact():
        return judge(state_of(*ours), entries, [statement], window, policy=policy or Policy(), now=now)


def causes(judgement: Judgement) -> dict[str, str]:
    return {str(kind): str(each.cause) for (_, kind), each in judgement.breaks.items()}


def funding(paid: str, second: int) -> Entry:
    return replace(fill("0", "0", second), kind=Kind.FUNDING, fee=Decimal(paid), key=f"exec:funding-{second}")


ONE, TWO, THREE = fill("1", "100", 1), fill("2", "110", 2), fill("-1", "120", 3)


def test_what_agrees_is_no_break() -> None:
    found = judged(
        [ONE, TWO], said(2, size="3", average="106.666667", realized="0", created=1), told(ONE, TWO)
    )
    assert not found.breaks
    assert found.agreed >= {(NET, BreakKind.SIZE), (NET, BreakKind.AVERAGE), (NET, BreakKind.REALIZED)}
    assert (found.missing, found.overrule) == ((), ())


def test_an_execution_that_only_the_venue_has_is_a_missing_fill_and_may_be_applied() -> None:
    found = judged([ONE], said(2, size="3", average="106.67"), told(ONE, TWO))
    assert causes(found) == {"size": "missing_fill"}
    (each,) = found.breaks.values()
    assert (each.ours, each.theirs, each.detail) == (1, 3, "the venue alone has: exec:2")
    assert list(found.missing) == [TWO]
    assert not found.overrule


def test_without_the_venue_s_executions_nothing_is_known_and_nothing_corrected() -> None:
    found = judged([ONE], said(2, size="3"))
    assert causes(found) == {"size": "unknown"}
    assert (found.missing, found.overrule) == ((), ())


def test_an_execution_by_hand_is_a_manual_trade_unless_its_order_is_ours() -> None:
    by_hand = replace(TWO, order_id="by-hand")
    assert causes(judged([ONE], said(2, size="3"), told(by_hand, ONE, by_hand=True))) == {
        "size": "manual_trade"
    }
    ours = replace(ONE, order_id="by-hand")
    found = judged([ours], said(2, size="3"), told(by_hand, ours, by_hand=True))
    assert causes(found) == {"size": "missing_fill"}


def test_an_execution_that_only_the_ledger_has_is_a_duplicate_and_the_venue_s_size_may_overrule() -> None:
    double = replace(fill("2", "110", 30), key="exec:other")
    found = judged([ONE, TWO, double], said(60, size="3"), told(ONE, TWO))
    assert causes(found) == {"size": "duplicate"}
    assert not found.missing
    assert [each.size for each in found.overrule] == [3]


def test_a_trade_held_twice_under_different_keys_is_a_duplicate_without_the_venue_s_executions() -> None:
    double = replace(TWO, key="exec:other")
    found = judged([ONE, TWO, double], said(60, size="3"))
    assert causes(found) == {"size": "duplicate"}
    assert next(iter(found.breaks.values())).detail == "the ledger has under another key too: exec:other"
    # Two fills of one order at one price and moment are none where the venue knows both.
    assert causes(judged([ONE, TWO, double], said(60, size="3"), told(ONE, TWO, double))) == {
        "size": "unknown"
    }


def test_funding_that_the_ledger_lacks_explains_the_realized_pnl() -> None:
    paid = funding("0.25", 5)
    found = judged([ONE], said(5, size="1", realized="-0.25", created=1), told(ONE, paid))
    assert causes(found) == {"realized": "funding"}
    assert list(found.missing) == [paid]


def test_a_venue_s_figure_without_the_funding_of_the_ledger_is_funding_too() -> None:
    paid = funding("0.25", 5)
    found = judged([ONE, paid], said(60, size="1", realized="0", created=1), told(ONE, paid))
    assert causes(found) == {"realized": "funding"}
    assert (found.missing, found.overrule) == ((), ())


def test_a_missing_round_trip_shows_in_the_realized_pnl() -> None:
    back = fill("-2", "115", 3)
    found = judged(
        [ONE], said(3, size="1", average="106.666667", realized="16.666667", created=1), told(ONE, TWO, back)
    )
    assert causes(found) == {"average": "missing_fill", "realized": "missing_fill"}
    assert list(found.missing) == [TWO, back]


def test_a_realized_pnl_of_all_time_is_not_compared_with_a_ledger_that_began_later() -> None:
    late = fill("2", "110", 20)
    assert not judged([late], said(60, size="2", realized="999", created=1), told(late)).breaks
    # Clocks differ a little: the fill that made the position is as old as the position.
    assert causes(judged([TWO], said(60, size="2", realized="999", created=1), told(TWO))) == {
        "realized": "unknown"
    }
    assert not judged([TWO], said(60, size="2", realized="999"), told(TWO)).breaks


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"size": "3.00009"}, "size"), ({"size": "3", "average": "106.6"}, "average")],
)
def test_within_the_thresholds_it_is_rounding_and_stays(fields: dict[str, Any], kind: str) -> None:
    found = judged([ONE, TWO], said(60, **fields), told(ONE, TWO))
    assert causes(found) == {kind: "rounding"}
    assert (found.missing, found.overrule, found.doubtful) == ((), (), False)


def test_what_nothing_explains_is_unknown_and_overrules_where_the_account_is_shown_to_be_ours() -> None:
    found = judged([ONE, TWO], said(60, size="7", average="100"), told(ONE, TWO))
    assert causes(found) == {"size": "unknown"}
    assert [(each.size, each.realized) for each in found.overrule] == [(7, None)]


def test_an_account_that_knows_nothing_of_our_fills_corrects_nothing() -> None:
    stranger = fill("5", "90", 9)
    found = judged([ONE, TWO], said(60, size="5"), told(stranger))
    assert causes(found) == {"size": "unknown"}
    assert (found.missing, found.overrule) == ((), ())


def test_flat_at_the_venue_wipes_nothing_unless_executions_say_so() -> None:
    found = judged([ONE], said(60, size="0"), told(ONE))
    assert causes(found) == {"size": "unknown"}
    assert (found.missing, found.overrule) == ((), ())
    closing = fill("-1", "120", 3)
    found = judged([ONE], said(60, size="0"), told(ONE, closing))
    assert list(found.missing) == [closing]


def test_silence_of_the_venue_is_a_break_and_nothing_else() -> None:
    silence = replace(said(3600, size="0"), silent=True)
    found = judged([ONE], silence, told(ONE))
    assert causes(found) == {"absent": "unknown"}
    assert (found.missing, found.overrule) == ((), ())
    flat = judged([ONE, fill("-1", "100", 5)], silence, told())
    assert (flat.breaks, flat.agreed >= {(NET, BreakKind.ABSENT)}) == ({}, True)


def test_a_trade_that_we_call_by_another_id_is_never_applied_again() -> None:
    renamed = replace(ONE, key="exec:of-our-own")
    found = judged([renamed], said(2, size="3"), told(ONE, TWO))
    assert causes(found) == {"size": "missing_fill"}
    assert not found.missing
    # A report of its time is: what comes late from before it is inside it.
    assert [each.size for each in found.overrule] == [3]


def test_fills_without_the_venue_s_ids_keep_executions_from_being_applied() -> None:
    nameless = replace(ONE, key="sha256:abc", executed_at=START - timedelta(days=3))
    found = judged([nameless], said(2, size="3"), told(TWO))
    assert not found.missing


def test_executions_of_an_order_that_reports_tell_of_are_not_missing() -> None:
    reported = order_report("3", "106.67", 2)
    executed = [replace(each, order_id="A") for each in (ONE, TWO)]
    found = judged([reported], said(60, size="3.5"), told(*executed))
    assert not found.missing
    part = order_report("1", "100", 1)
    found = judged([part], said(60, size="3"), told(*executed))
    assert causes(found) == {"size": "missing_fill"}
    assert list(found.missing) == executed


def test_what_leads_away_from_the_venue_s_size_is_not_applied() -> None:
    """A position that a report opened would be its one fill alone."""
    opened, reduced = report(5, size="10", average="100"), fill("-1", "100", 5)
    found = judged([opened], said(60, size="9", average="100"), told(reduced))
    assert not found.missing
    assert [each.size for each in found.overrule] == [9]
    # A fill after the report is on top of it.
    found = judged([opened], said(60, size="9", average="100"), told(fill("-1", "100", 6)))
    assert [each.key for each in found.missing] == ["exec:6"]


def test_what_is_young_is_judged_the_next_time() -> None:
    moment = START + timedelta(seconds=30)
    found = judged([ONE], said(2, size="3"), told(ONE, TWO), now=moment)
    assert (found.breaks, found.missing, found.moving) == ({}, (), True)
    found = judged([ONE], said(2, size="7"), told(ONE), now=moment)
    assert (found.breaks, found.overrule, found.moving) == ({}, (), True)


def test_fills_after_the_venue_s_record_are_not_in_its_figure() -> None:
    assert not judged([ONE, TWO], said(1, size="1", average="100"), told(ONE, TWO)).breaks


def test_a_record_older_than_a_report_that_we_know_says_nothing() -> None:
    newer = report(50, size="9", average="100")
    assert judged([ONE, newer], said(40, size="1"), told(ONE)) == Judgement()


def test_a_newer_record_that_agrees_ends_a_dispute() -> None:
    disputed = report(1, size="7")
    found = judged([ONE, disputed], said(60, size="1"), told(ONE))
    assert (found.breaks, [each.id for each in found.overrule]) == ({}, ["venue-60"])
    again = judged([ONE, disputed, said(60, size="1").report], said(60, size="1"), told(ONE))
    assert not again.overrule


def test_a_fill_whose_clock_is_ahead_of_the_record_s_is_in_its_figure() -> None:
    asked = replace(said(1, size="3", average="106.67"), asked_at=NOW)
    assert not judged([ONE, TWO], asked, told(ONE, TWO)).breaks
    assert causes(judged([ONE, TWO], said(1, size="3"), told(ONE, TWO))) == {"size": "unknown"}


def test_executions_of_a_part_of_the_time_explain_but_do_not_let_the_record_overrule() -> None:
    part = replace(told(ONE, TWO), whole=False)
    assert not judged([ONE, TWO], said(60, size="7"), part).overrule
    assert list(judged([ONE], said(2, size="3"), part).missing) == [TWO]


def test_an_account_that_has_nothing_makes_nothing_a_duplicate() -> None:
    silence = replace(said(3600, size="0"), silent=True)
    assert causes(judged([ONE], silence, told())) == {"absent": "unknown"}


def test_silence_ends_no_dispute() -> None:
    closed, disputed = fill("-1", "100", 5), report(5, size="7")
    silence = replace(said(3600, size="0"), silent=True)
    assert not judged([ONE, closed, disputed], silence, told(ONE, closed)).overrule
