import json
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from positions.client import Position
from positions.domain.events import Entry, Event, Kind, LegName, Report
from positions.domain.leg import Leg
from positions.domain.numbers import ZERO, exact, rounded
from positions.domain.orders import fills_of
from positions.errors import InvalidEvent
from positions.messages.inbound import Delivery, decode
from positions.simulator import INSTRUMENTS, Faults, Feed, Message

QUEUES = ("reports", "executions", "order reports")
START = datetime(2026, 1, 5, 12, 0, 0, 123_456, tzinfo=UTC)
STEP = timedelta(milliseconds=50)
NONE = Faults(late=0, duplicate=0, malformed_every_s=0)
ROUGH = Faults(late=0.05, duplicate=0.05, malformed_every_s=0)

Leggings = tuple[str, LegName]


def feed(seed: int, *, faults: Faults = NONE, queues: tuple[str, ...] = QUEUES) -> Feed:
    return Feed(random.Random(seed), queues, START, assets=len(INSTRUMENTS), faults=faults)


def play(market: Feed, count: int) -> list[Message]:
    """Return ``count`` messages at twenty a second, and those still on their way then."""
    return [market.next(START + number * STEP) for number in range(count)] + market.drain()


def played(seed: int, count: int = 1500, *, faults: Faults = NONE) -> list[Message]:
    return play(feed(seed, faults=faults), count)


def events(messages: Iterable[Message]) -> list[Event]:
    """Return what the service makes of the messages."""
    return [event for message in messages for event in decode(delivery(message), max_bytes=10_000).events]


def delivery(message: Message) -> Delivery:
    return Delivery(
        queue=message.queue,
        body=message.body.encode(),
        headers=message.headers,
        properties={},
        received_at=message.at,
    )


def entries(messages: Iterable[Message]) -> list[Entry]:
    """Return the ledger's entries, each key once."""
    return list({event.key: event for event in events(messages) if isinstance(event, Entry)}.values())


def folded(ledger: Iterable[Entry]) -> dict[Leggings, Leg]:
    by_asset = defaultdict(list)
    for entry in ledger:
        by_asset[entry.position.asset].append(entry)
    legs: dict[Leggings, Leg] = defaultdict(Leg)
    with exact():
        for asset, of_asset in by_asset.items():
            for fill in fills_of(of_asset):
                legs[asset, fill.leg] = legs[asset, fill.leg].fold(fill)
    return legs


def figures(leg: Leg) -> tuple[Decimal, ...]:
    return leg.size, leg.cost, leg.gross, leg.fees, leg.funding


def content(message: Message) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(message.body)
    return parsed


def decimals(record: dict[str, Any], *names: str) -> list[Decimal]:
    assert all(type(record[name]) is str and "E" not in record[name] for name in names)
    return [Decimal(record[name]) for name in names]


def test_a_seed_tells_one_market() -> None:
    assert played(1, faults=Faults()) == played(1, faults=Faults())
    assert [each.body for each in played(1)] != [each.body for each in played(2)]


def test_ids_are_unique_and_differ_from_seed_to_seed() -> None:
    ids = [
        name
        for seed in (1, 2)
        for message in played(seed, 1000)
        for name in (content(message)["event_id"], message.headers["trace_id"])
    ]
    assert len(set(ids)) == len(ids)
    first, second = ({entry.key for entry in entries(played(seed))} for seed in (1, 2))
    assert not first & second


def test_envelopes_name_kind_and_trace_in_body_and_headers() -> None:
    for message in played(3):
        body = content(message)
        assert set(message.headers) <= {"event_type", "topic", "trace_id"}
        assert message.headers.items() <= body.items()
        assert datetime.fromisoformat(body["timestamp"]) == message.at


def test_executions_have_the_contracts_shape() -> None:
    said = [content(each) for each in played(3) if each.headers.get("event_type") == "order_executed"]
    assert {each["side"] for each in said} == {"Buy", "Sell"}
    for body in said:
        quantity, price, _ = decimals(body, "execution_quantity", "execution_price", "execution_fees")
        assert quantity > 0
        assert price > 0
        assert body["executed_at"].endswith("Z")
        assert body["execution_id"]
        assert body["order_id"]
        assert (body["mode"], body["position_idx"]) in {("one-way", 0), ("hedge", 1), ("hedge", 2)}
    fees = [Decimal(body["execution_fees"]) for body in said]
    assert min(fees) < 0 < max(fees)


def test_order_reports_are_cumulative_and_end_filled() -> None:
    orders = defaultdict(list)
    for message in played(4):
        if message.queue == "order reports":
            body = content(message)
            assert body["event_type"] == body["order"]["status"]
            orders[body["order"]["order_id"]].append(body["order"])
    assert any(len(reports) > 1 for reports in orders.values())
    for reports in orders.values():
        filled = [decimals(each, "filled_quantity", "average_price", "fees")[0] for each in reports]
        assert filled == sorted(set(filled))
        for each, so_far in zip(reports, filled, strict=True):
            assert each["is_dry_run"] is False
            assert (each["status"] == "filled") is (so_far == Decimal(each["quantity"]))


def test_no_order_is_told_both_ways() -> None:
    told = defaultdict(set)
    for entry in entries(played(5)):
        if entry.order_id:
            told[entry.order_id].add(entry.kind)
    assert {frozenset(kinds) for kinds in told.values()} == {
        frozenset({Kind.TRADE}),
        frozenset({Kind.ORDER_REPORT}),
    }


def test_without_a_queue_for_order_reports_every_order_is_told_by_executions() -> None:
    messages = play(feed(5, queues=QUEUES[:2]), 1000)
    assert {message.queue for message in messages} == set(QUEUES[:2])
    assert Kind.ORDER_REPORT not in {entry.kind for entry in entries(messages)}


def test_exchange_reports_come_in_both_spellings() -> None:
    said = [content(each) for each in played(6) if each.queue == "reports"]
    for gateway, exchange in zip(said[::2], said[1::2], strict=False):
        record, normalised = exchange["data"], gateway["payload"]
        decimals(record, "size", "avgPrice", "markPrice", "unrealisedPnl", "cumRealisedPnl")
        assert record["updatedTime"].isdigit()
        decimals(normalised, "size", "mark_price", "unrealised_pnl", "realised_pnl")
        assert normalised["avg_price"] is None
        assert "entryPrice" in normalised["raw"]
        assert datetime.fromisoformat(normalised["timestamp"]).tzinfo is None
        assert normalised["mode"] in (0, 1, 2)


def test_prices_and_quantities_keep_to_tick_and_lot() -> None:
    instruments = {each.symbol: each for each in INSTRUMENTS}
    for entry in entries(played(7)):
        instrument = instruments[entry.position.asset]
        assert not entry.quantity % instrument.lot
        assert entry.kind is Kind.ORDER_REPORT or not entry.price % instrument.tick


@pytest.mark.parametrize("seed", range(3))
def test_books_are_the_fold_of_what_was_published(seed: int) -> None:
    market = feed(seed, faults=ROUGH)
    messages = play(market, 4000)
    random.Random(seed).shuffle(messages)
    ledger = entries(messages)
    assert {entry.kind for entry in ledger} == {Kind.TRADE, Kind.ORDER_REPORT, Kind.FUNDING}
    legs = folded(ledger)
    for each in market.markets:
        for name, leg in each.legs.items():
            assert figures(leg) == figures(legs[each.instrument.symbol, name])


def test_reports_say_what_the_fills_until_then_come_to() -> None:
    messages = played(8, 1500, faults=ROUGH)
    ledger = entries(messages)
    reports = [event for event in events(messages) if isinstance(event, Report)]
    assert len(reports) > 500
    for report in reports[::7]:
        place = (report.position.asset, report.leg)
        leg = folded(
            entry
            for entry in ledger
            if (entry.position.asset, entry.leg) == place and entry.executed_at <= report.at
        )[place]
        assert report.mark
        with exact():
            assert report.size == leg.size
            assert report.average == leg.average
            assert report.realized == rounded(leg.gross - leg.fees + leg.funding)
            assert report.unrealized == rounded(leg.size * report.mark - leg.cost.copy_sign(leg.size))


def test_a_changed_leg_is_reported_shortly_and_an_open_one_again_and_again() -> None:
    market = feed(9)
    reports: dict[Leggings, list[Report]] = defaultdict(list)
    for event in events(play(market, 1500)):
        if isinstance(event, Report):
            reports[event.position.asset, event.leg].append(event)
    end = START + 1500 * STEP
    for each in market.markets:
        for name, leg in each.legs.items():
            told = reports[each.instrument.symbol, name]
            assert leg.touched_at
            assert told[-1].at > min(leg.touched_at, end - timedelta(seconds=1.5))
            for report, following in pairwise(told):
                assert not report.size or following.at - report.at < timedelta(seconds=5)


def test_legs_of_a_hedge_never_go_through_zero() -> None:
    legs: dict[Leggings, Leg] = defaultdict(Leg)
    closed = set()
    for entry in entries(played(10, 6000)):
        if entry.leg is LegName.NET:
            continue
        place = (entry.position.asset, entry.leg)
        with exact():
            (fill,) = fills_of([entry])
            legs[place] = leg = legs[place].fold(fill)
        assert not leg.missing
        assert not leg.size or (leg.size > 0) is (entry.leg is LegName.LONG)
        if not leg.size:
            closed.add(place)
    assert set(legs) == closed
    assert len(legs) == 4


def test_one_way_positions_are_opened_added_to_reduced_closed_and_flipped() -> None:
    ledger = [entry for entry in entries(played(11)) if entry.leg is LegName.NET]
    sides, sizes = set(), set()
    with exact():
        for asset in {entry.position.asset for entry in ledger}:
            after = ZERO
            for fill in fills_of(entry for entry in ledger if entry.position.asset == asset):
                before, after = after, after + fill.quantity
                sides.add((before.compare(ZERO), after.compare(ZERO)))
                if before * after > 0:
                    sizes.add(abs(after) > abs(before))
    assert {(0, 1), (0, -1), (1, 0), (-1, 0), (1, -1), (-1, 1)} < sides
    assert sizes == {True, False}


def test_times_of_an_asset_never_repeat() -> None:
    market = feed(12)
    now = [market.next(START) for _ in range(500)]
    times = defaultdict(list)
    for event in events(now):
        at = event.executed_at if isinstance(event, Entry) else event.at
        assert at.microsecond % 1000 == 0
        times[event.position.asset].append(at)
    assert all(each == sorted(set(each)) for each in times.values())


def test_faults_hold_messages_back_and_double_them() -> None:
    market = feed(13, faults=ROUGH)
    messages = [market.next(START + number * STEP) for number in range(2000)]
    bodies = [message.body for message in messages]
    assert 50 < len(bodies) - len(set(bodies)) < 150
    assert (
        sum(START + number * STEP - each.at > timedelta(seconds=2) for number, each in enumerate(messages))
        > 50
    )
    held = market.held
    assert held
    market.next(START, faults=False)
    assert market.held == held


def test_malformed_messages_are_for_the_quarantine() -> None:
    messages = played(14, 2000, faults=Faults(late=0, duplicate=0, malformed_every_s=5))
    refused = []
    for message in messages:
        try:
            decode(delivery(message), max_bytes=10_000)
        except InvalidEvent as error:
            refused.append(str(error))
    assert 13 < len(refused) < 30
    assert len({reason.split(":")[0] for reason in refused}) > 2


def row(asset: str, mode: str, **others: str) -> Position:
    flat: dict[str, Any] = dict.fromkeys(field.name for field in fields(Position))
    zeros = dict.fromkeys(("size", "long_size", "short_size", "realized_pnl"), ZERO)
    figures = {name: Decimal(text) for name, text in others.items()}
    return Position(**{**flat, "asset": asset, "mode": mode, **zeros, **figures})


def test_a_restart_goes_on_from_the_services_positions() -> None:
    market = feed(15)
    btc = row("BTCUSDT", "one-way", size="-1.5", average_entry_price="90000.1", realized_pnl="-12.5")
    legs = {"long_size": "2", "short_size": "-0.5", "long_avg_price": "3000", "short_avg_price": "3100"}
    eth = row("ETHUSDT", "hedge", size="1.5", realized_pnl="7", current_price="3050.5", **legs)
    other_mode = row("SOLUSDT", "hedge", size="10", long_size="10", long_avg_price="100")
    market.restore([btc, eth, other_mode, row("ELSEUSDT", "one-way", size="1")], START)
    first = [
        event
        for event in events(market.next(START + number * STEP) for number in range(20))
        if isinstance(event, Report)
    ]
    told = {(each.position.asset, each.leg): (each.size, each.average, each.realized) for each in first[:3]}
    assert told == {
        ("BTCUSDT", LegName.NET): (Decimal("-1.5"), Decimal("90000.1"), Decimal("-12.5")),
        ("ETHUSDT", LegName.LONG): (2, 3000, 7),
        ("ETHUSDT", LegName.SHORT): (Decimal("-0.5"), 3100, 0),
    }
    sol = next(each for each in market.markets if each.instrument.symbol == "SOLUSDT")
    assert not sol.legs[LegName.NET].size or sol.legs[LegName.NET].opened_at
    marks = {each.position.asset: each.mark for each in first}
    assert marks["ETHUSDT"] is not None
    assert abs(marks["ETHUSDT"] - Decimal("3050.5")) < 10


def test_a_start_without_the_service_reports_every_leg() -> None:
    market = feed(16)
    market.restore(None, START)
    legs = {
        (event.position.asset, event.leg)
        for event in events(market.next(START + number * STEP) for number in range(60))
        if isinstance(event, Report)
    }
    assert legs == {(each.instrument.symbol, name) for each in market.markets for name in each.legs}


def test_books_restored_off_the_grid_can_still_be_reduced_and_closed() -> None:
    market, dust = feed(17), "0.000000000000000007"
    hedge = {"long_size": dust, "long_avg_price": "1", "short_size": f"-{dust}", "short_avg_price": "1"}
    rows = [row(each.symbol, each.mode, size=dust, average_entry_price="1", **hedge) for each in INSTRUMENTS]
    market.restore(rows, START)
    events(play(market, 1500))
    for each in market.markets:
        for leg in each.legs.values():
            assert not leg.missing
            assert not leg.size % each.instrument.lot
