"""Time travel: what positions were, by all that is known now, and nothing of what came after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine

from positions.domain import position as positions_domain
from positions.domain.events import Entry, Kind, Mode, PositionKey, Report, TimeSource
from positions.domain.figures import Figures, figures
from positions.domain.numbers import exact
from positions.domain.orders import fills_of
from positions.domain.position import Mark, empty, refolded, with_report
from positions.errors import NotFound
from positions.handlers.apply_events import apply_events
from positions.handlers.take_snapshots import take_snapshots
from positions.handlers.update_marks import update_marks
from positions.messages.outbound import PortfolioSums, PortfolioView, PositionView, object_of
from positions.queries.as_of import portfolio_as_of, position_as_of
from positions.queries.portfolio import portfolio
from positions.queries.positions import position
from positions.storage import ledger
from positions.storage.database import transaction
from positions.storage.portfolio import Sums
from tests.integration.support import RULES, apply, emptied, events_of, execution, executions, stored
from tests.unit.test_position_laws import KEYS, START, entries_of, reports_of

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
NOW = datetime(2025, 1, 20, tzinfo=UTC)
STALE = RULES.price_stale_after
# Since when a position of reports alone is open depends on which of them came first.
SAME = sorted({field.name for field in fields(Figures)} & {field.name for field in fields(PositionView)})
SAME = [name for name in SAME if name not in {"opened_at", "closed_at"}]


def was(engine: Engine, at: datetime, key: PositionKey = BTC) -> PositionView:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        return position_as_of(connection, key, at, policy=RULES.policy, now=NOW, stale_after=STALE)


def all_was(engine: Engine, at: datetime, *, asset: str | None = None) -> PortfolioView:
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as connection:
        whole, _ = portfolio_as_of(
            connection,
            at,
            policy=RULES.policy,
            now=NOW,
            stale_after=STALE,
            max_exposure=Decimal(10),
            asset=asset,
        )
        return whole


def shown(found: object) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SAME}


def fresh(key: PositionKey, events: Sequence[Entry | Report], until: datetime) -> Figures | None:
    """Return what a database would say that only ever got the events up to a moment."""
    early = [event for event in events if when(event) <= until]
    with exact():
        state = empty(key)
        for event in early:
            if isinstance(event, Report):
                state = with_report(state, event)
        entries = [event for event in early if isinstance(event, Entry)]
        return figures(refolded(state, fills_of(entries), RULES.policy)[0]) if early else None


def when(event: Entry | Report) -> datetime:
    return event.executed_at if isinstance(event, Entry) else event.at


def deliver(engine: Engine, events: Sequence[Entry | Report]) -> None:
    for start in range(0, len(events), 3):
        with transaction(engine) as connection:
            apply_events(connection, events[start : start + 3], [], rules=RULES, now=NOW)


def snapshot(engine: Engine, at: datetime) -> None:
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=at, stale_after=STALE)


def at_second(second: float) -> datetime:
    return START + timedelta(seconds=second)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_it_is_what_a_database_would_say_that_only_got_the_events_until_then(
    engine: Engine, data: st.DataObject
) -> None:
    """However late fills came, and whatever came after; the reports of then are in a snapshot."""
    key = KEYS[data.draw(st.sampled_from(Mode))]
    reports = [replace(report, time_source=TimeSource.EVENT) for report in data.draw(reports_of(key))]
    events: list[Entry | Report] = [*data.draw(entries_of(key)), *reports]
    at = at_second(data.draw(st.integers(-1, 12)))
    early = [event for event in events if when(event) <= at]
    late = [event for event in early if isinstance(event, Entry) and data.draw(st.booleans())]
    # A report that came ahead of its time would have superseded others before the snapshot.
    ahead = [
        event
        for event in events
        if isinstance(event, Entry) and when(event) > at and data.draw(st.integers(0, 3)) == 0
    ]
    first = [*(event for event in early if event not in late), *ahead]
    rest = [event for event in events if event not in first]
    emptied(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions_domain, "POINT_EVERY", data.draw(st.integers(1, 4)))
        deliver(engine, data.draw(st.permutations(first)))
        snapshot(engine, at)
        deliver(engine, data.draw(st.permutations(rest)))
    if data.draw(st.booleans()):
        snapshot(engine, at + timedelta(seconds=3))
    expected = fresh(key, events, at)
    if expected is None:
        # Taken of what came ahead of its time: the snapshot is of this moment all the same.
        assert not first or shown(was(engine, at, key)) == shown(figures(empty(key)))
        if not first:
            with pytest.raises(NotFound):
                was(engine, at, key)
    else:
        assert shown(was(engine, at, key)) == shown(expected)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_at_the_end_it_is_what_is_stored_also_when_it_is_the_end_no_more(
    engine: Engine, data: st.DataObject
) -> None:
    key = KEYS[data.draw(st.sampled_from(Mode))]
    events: list[Entry | Report] = [*data.draw(entries_of(key)), *data.draw(reports_of(key))]
    if not events:
        return
    emptied(engine)
    deliver(engine, data.draw(st.permutations(events)))
    row = stored(engine)[key]
    for at in (max(map(when, events)), NOW):
        assert shown(was(engine, at, key)) == {name: row[name] for name in SAME}
    assert was(engine, NOW, key).version == row["version"]
    later = Entry(
        key="later",
        position=key,
        leg=next(iter(empty(key).ledger)),
        kind=Kind.TRADE,
        quantity=Decimal(1),
        price=Decimal(50),
        executed_at=at_second(100),
    )
    traded = {event.leg for event in events if isinstance(event, Entry)}
    deliver(engine, [later])
    if later.leg in traded:  # else its reports are judged anew
        assert shown(was(engine, at_second(99), key)) == {name: row[name] for name in SAME}


def test_fills_of_every_moment_fold_to_what_they_did(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions_domain, "POINT_EVERY", 20)
    messages = [
        replace(entry, position=BTC)
        for entry in events_of(executions(300, assets=1))
        if isinstance(entry, Entry)
    ]
    shuffled = [*messages]
    Random(3).shuffle(shuffled)
    deliver(engine, shuffled)
    for second in (0, 17, 150, 151, 298):
        at = datetime(2025, 1, 15, 10, tzinfo=UTC) + timedelta(seconds=second)
        assert shown(was(engine, at)) == shown(fresh(BTC, messages, at))


def test_only_what_came_after_a_point_is_read_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions_domain, "POINT_EVERY", 20)
    messages = [execution("BTCUSDT", "Buy", "1", "10", number=each) for each in range(100)]
    for start in range(0, 100, 10):
        apply(engine, messages[start : start + 10])
    read: list[int] = []
    after = ledger.after

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = after(*args, **kwargs)
        read.extend(len(entries) for entries in found.values())
        return found

    monkeypatch.setattr(ledger, "after", counted)
    assert was(engine, at_second(69)).size == 70
    assert read == [10]


def test_an_order_that_was_told_apart_later_was_one_fill_then(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a point has the fills in it as they are implied now."""
    monkeypatch.setattr(positions_domain, "POINT_EVERY", 2)
    order = {"order_id": "A", "asset": "BTCUSDT", "side": "Buy", "average_price": 100, "fees": 0}
    whole = {**order, "filled_quantity": 10, "executed_at": at_second(1).isoformat()}
    apply(engine, [{"event_type": "filled", "event_id": "1", "order": whole}])
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=each) for each in (2, 3, 4, 5)])
    part = execution("BTCUSDT", "Buy", "4", "100", number=50, order_id="A")
    apply(engine, [part])
    assert was(engine, at_second(4)).size == 13
    assert was(engine, at_second(60)).size == 14


def price(engine: Engine, key: PositionKey, number: str, at: datetime) -> None:
    with transaction(engine) as connection:
        mark = Mark(price=Decimal(number), at=at, source="test")
        update_marks(connection, {key: mark}, rules=RULES, now=NOW)


def reported(second: int, size: str, **more: Any) -> dict[str, Any]:
    data = {"symbol": "BTCUSDT", "side": "Buy", "size": size, "timestamp": at_second(second).isoformat()}
    return {"event_type": "position", "data": {**data, **more}}


def test_a_size_taken_over_is_known_from_the_ledger_where_no_snapshot_has_it(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=1)])
    for second, size in ((10, "5"), (20, "7"), (30, "8"), (40, "9"), (50, "11"), (60, "12"), (70, "13")):
        apply(engine, [reported(second, size, avgPrice="105")])
    sizes = [was(engine, at_second(second)).size for second in (1, 9, 10, 25, 45, 65, 75)]
    assert sizes == [1, 1, 5, 7, 9, 12, 13]
    assert was(engine, at_second(15)).average_entry_price == 105


def test_a_position_of_reports_was_open_since_it_was_reported_open(engine: Engine) -> None:
    for second, size in ((0, "1"), (60, "2"), (120, "0"), (180, "3"), (300, "4"), (360, "5"), (420, "0")):
        apply(engine, [reported(second, size, avgPrice="100")])
    found = [was(engine, at_second(second)) for second in (90, 150, 310, 500)]
    assert [(view.size, view.opened_at, view.closed_at) for view in found] == [
        (2, at_second(0), None),
        (0, None, at_second(120)),
        (4, at_second(180), None),
        (0, None, at_second(420)),
    ]
    assert found[2].time_held_minutes == 2


def test_price_share_and_times_are_of_then(engine: Engine) -> None:
    eth = PositionKey("ETHUSDT", Mode.ONE_WAY)
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), execution("ETHUSDT", "Buy", "10", "30")])
    price(engine, BTC, "100", at_second(10))
    price(engine, eth, "30", at_second(10))
    snapshot(engine, at_second(60))
    price(engine, BTC, "900", at_second(70))
    price(engine, eth, "10", at_second(70))
    apply(engine, [execution("ETHUSDT", "Sell", "10", "10", number=80)])
    then, later, now = was(engine, at_second(65)), was(engine, at_second(1000)), was(engine, NOW)
    assert (then.current_price, then.position_size_norm, then.price_is_stale) == (100, Decimal("0.25"), False)
    assert (then.time_held_minutes, then.last_snapshot_at) == (1, at_second(60))
    assert (then.last_updated, then.version) == (at_second(10), now.version)
    assert (later.current_price, later.position_size_norm, later.price_is_stale) == (900, 1, True)
    assert later.time_held_minutes == 16
    assert was(engine, at_second(5)).current_price is None


def test_a_snapshot_taken_late_hides_no_price_that_the_one_before_it_knew(engine: Engine) -> None:
    apply(engine, [reported(0, "1", markPrice="100")])
    snapshot(engine, at_second(10))
    apply(engine, [reported(21, "2", markPrice="101")])
    snapshot(engine, at_second(20))
    apply(engine, [reported(30, "3", markPrice="102")])
    then = was(engine, at_second(20))
    assert (then.size, then.current_price, then.last_snapshot_at) == (1, 100, at_second(20))


def test_a_moment_to_come_is_now(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    with transaction(engine) as connection:
        now = position(connection, BTC, now=NOW, stale_after=STALE)
    future = was(engine, datetime.max.replace(tzinfo=UTC))
    assert {**object_of(future), "last_updated": 0} == {**object_of(now), "last_updated": 0}


def test_before_its_first_event_there_was_no_position(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=1)])
    assert was(engine, at_second(1)).size == 1
    for at in (at_second(0.999999), datetime.min.replace(tzinfo=UTC)):
        with pytest.raises(NotFound, match="BTCUSDT"):
            was(engine, at)
    with pytest.raises(NotFound):
        was(engine, NOW, PositionKey("BTCUSDT", Mode.HEDGE))


def test_the_portfolio_of_now_is_the_portfolio(engine: Engine) -> None:
    apply(engine, executions(200, assets=6))
    for number in range(5):
        price(engine, PositionKey(f"A{number}USDT", Mode.ONE_WAY), "7", at_second(500 + number))
    for asset in (None, "A1USDT"):
        with transaction(engine) as connection:
            now = portfolio(
                connection,
                Sums(PortfolioSums()),
                now=NOW,
                stale_after=STALE,
                max_exposure=Decimal(10),
                asset=asset,
            )
        assert all_was(engine, NOW, asset=asset) == now
    assert now.stale_assets == ("A1USDT",)


def test_the_portfolio_of_then_had_the_positions_of_then(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=0, execution_fees="1")])
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100", number=50)])
    price(engine, BTC, "110", at_second(5))
    price(engine, PositionKey("ETHUSDT", Mode.ONE_WAY), "110", at_second(55))
    apply(engine, [execution("BTCUSDT", "Sell", "1", "150", number=60)])
    then = all_was(engine, at_second(20))
    assert (then.total_exposure_usdt, then.total_unrealized_pnl_usdt, then.total_pnl_usdt) == (110, 10, 9)
    assert (list(then.by_asset), then.open_positions_count, then.limit_exceeded) == (["BTCUSDT"], 1, True)
    assert all_was(engine, at_second(-1)).by_asset == {}


def plain_fold(fills: Sequence[tuple[int, str, int, int, int]]) -> tuple[Fraction, Fraction, Fraction]:
    """Return size, average and realized PnL of fills: second, id, signed quantity, price, fee."""
    size, average, realized = Fraction(0), Fraction(0), Fraction(0)
    for _, _, quantity, price, fee in sorted(fills):
        closed = min(Fraction(abs(quantity)), abs(size)) if quantity * size < 0 else Fraction(0)
        realized += closed * (price - average) * (1 if size > 0 else -1) - fee
        opened = abs(quantity) - closed
        if opened:
            held = abs(size) - closed
            average = (held * average + opened * price) / (held + opened)
        size += quantity
    return size, average, realized


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_every_moment_is_the_plain_fold_of_the_fills_until_then(engine: Engine, data: st.DataObject) -> None:
    """However they came, through closings and flips, and whatever snapshots say that were taken late."""
    number = st.integers(1, 4)
    drawn = data.draw(
        st.lists(st.tuples(st.integers(0, 9), number, number, number, st.booleans()), max_size=12)
    )
    fills = [
        (second, f"exec:e{each:02}", quantity if bought else -quantity, price, fee)
        for each, (second, quantity, price, fee, bought) in enumerate(drawn)
    ]
    messages = [
        execution(
            "BTCUSDT",
            "Buy" if quantity > 0 else "Sell",
            str(abs(quantity)),
            str(price),
            number=second,
            execution_fees=str(fee),
            execution_id=id_.removeprefix("exec:"),
        )
        for second, id_, quantity, price, fee in fills
    ]
    emptied(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positions_domain, "POINT_EVERY", data.draw(st.integers(1, 4)))
        shuffled = data.draw(st.permutations(messages))
        while shuffled:
            batch = data.draw(st.integers(1, 5))
            apply(engine, shuffled[:batch])
            shuffled = shuffled[batch:]
            if data.draw(st.booleans()):
                snapshot(engine, at_second(data.draw(st.integers(0, 10)) + 0.5))
    for second in range(-1, 11):
        until = [fill for fill in fills if fill[0] <= second]
        if not until:
            continue
        size, average, realized = plain_fold(until)
        found = was(engine, at_second(second))
        assert found.size == size
        assert abs(Fraction(found.realized_pnl) - realized) < Fraction(1, 10**15)
        assert abs(Fraction(found.average_entry_price or 0) - (average if size else 0)) < Fraction(1, 10**15)
        assert (found.closed_at is None) == bool(size)
