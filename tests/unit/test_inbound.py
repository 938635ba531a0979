"""Every shape of the wire, in both spellings, and a clear reason for each refusal."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from positions.domain.events import Entry, Event, Kind, LegName, Mode, PositionKey, Report, TimeSource
from positions.errors import InvalidEvent
from positions.messages.inbound import Decoded, Delivery, decode

ARRIVAL = datetime(2026, 3, 1, tzinfo=UTC)
AT = datetime(2025, 1, 15, 10, tzinfo=UTC)


def delivered(message: Any, **fields: Any) -> Delivery:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return Delivery(
        queue="queue",
        body=body,
        headers=fields.get("headers", {}),
        properties=fields.get("properties", {}),
        received_at=ARRIVAL,
    )


def decoded(message: Any, **fields: Any) -> Decoded:
    return decode(delivered(message, **fields), max_bytes=262_144)


def only(message: Any, **fields: Any) -> Event:
    (event,) = decoded(message, **fields).events
    return event


def refusal(message: Any) -> tuple[str | None, str]:
    with pytest.raises(InvalidEvent) as refused:
        decoded(message)
    return refused.value.field, refused.value.reason


def position(**data: Any) -> dict[str, Any]:
    return {
        "event_type": "position",
        "event_id": "e1",
        "trace_id": "t1",
        "data": {"symbol": "BTCUSDT", **data},
    }


def executed(**fields: Any) -> dict[str, Any]:
    whole = {
        "event_type": "order_executed",
        "asset": "BTCUSDT",
        "side": "Buy",
        "execution_quantity": "0.5",
        "execution_price": "5000",
        "execution_fees": "1.375",
        "executed_at": "2025-01-15T10:00:00Z",
        "order_id": "o1",
        "trace_id": "t1",
        **fields,
    }
    return {name: value for name, value in whole.items() if value is not ...}


def order(kind: str = "filled", **fields: Any) -> dict[str, Any]:
    whole = {
        "id": "internal",
        "order_id": "o1",
        "asset": "BTCUSDT",
        "side": "Buy",
        "filled_quantity": "1.0",
        "average_price": "107",
        "fees": "0.10",
        "executed_at": "2025-01-15T10:00:00Z",
        "is_dry_run": False,
        **fields,
    }
    return {"event_type": kind, "event_id": "e1", "timestamp": "2025-01-15T11:00:00", "order": whole}


EXPECTED = Report(
    id="e1",
    position=PositionKey("BTCUSDT", Mode.ONE_WAY),
    leg=LegName.NET,
    at=AT,
    seq=9,
    size=Decimal("-1.5"),
    average=Decimal("50000.00"),
    unrealized=Decimal("-150.00"),
    realized=Decimal("50.00"),
    mark=Decimal("50100.00"),
    trace_id="t1",
)
RAW = {
    "execId": "x1",
    "symbol": "BTCUSDT",
    "side": "Sell",
    "execQty": "0.5",
    "execPrice": "5000",
    "execFee": "1.375",
    "execType": "Trade",
    "closedSize": "",
    "execTime": "1736935200123",
    "seq": 4,
    "orderId": "o1",
}
CAMEL = {
    "side": "Sell",
    "size": "1.5",
    "avgPrice": "50000.00",
    "unrealisedPnl": "-150.00",
    "cumRealisedPnl": "50.00",
    "markPrice": "50100.00",
    "positionIdx": 0,
    "updatedTime": "1736935200000",
    "seq": 9,
}
SNAKE = {
    "side": "Sell",
    "size": 1.5,
    "avg_price": 50000.00,
    "unrealised_pnl": "-150.00",
    "realised_pnl": "50.00",
    "mark_price": "50100.00",
    "mode": "0",
    "timestamp": "2025-01-15T10:00:00",
    "seq": "9",
}


@pytest.mark.parametrize("data", [CAMEL, SNAKE, {"raw": CAMEL}, {**SNAKE, "avg_price": None, "raw": CAMEL}])
def test_a_report_reads_the_same_in_either_spelling(data: dict[str, Any]) -> None:
    assert only(position(**data)) == EXPECTED


@given(st.permutations([*{**CAMEL, **SNAKE}]))
def test_of_several_spellings_one_counts_wherever_it_stands(names: list[str]) -> None:
    said = {**dict.fromkeys(CAMEL, "7"), "positionIdx": 0, **SNAKE, "raw": dict.fromkeys(SNAKE, "8")}
    assert only(position(**{name: said[name] for name in ["raw", *names]})) == EXPECTED


@given(st.permutations([("markPrice", "x"), ("size", "y"), ("symbol", "BTC/USDT"), ("timestamp", "z")]))
def test_of_several_errors_one_is_told_wherever_it_stands(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidEvent) as refused:
        only({"event_type": "position", "data": dict(fields)})
    assert refused.value.field == "symbol"


def test_the_record_stands_under_payload_too() -> None:
    message = position(**CAMEL)
    message["payload"] = message.pop("data")
    assert only(message) == EXPECTED


def test_what_the_gateway_sends() -> None:
    record = {
        "symbol": "BTCUSDT",
        "side": "Sell",
        "size": "2",
        "mode": 2,
        "avg_price": None,
        "raw": {"entryPrice": "99.5", "markPrice": "", "avgPrice": ""},
        "timestamp": "2025-01-15T10:00:00.123456",
    }
    report = only({"data": record, "received_at": "x"}, headers={"event_type": "position", "trace_id": "h"})
    assert isinstance(report, Report)
    assert (report.position.mode, report.leg, report.size) == (Mode.HEDGE, LegName.SHORT, Decimal(-2))
    assert (report.average, report.mark, report.trace_id) == (Decimal("99.5"), None, "h")
    assert report.at == datetime(2025, 1, 15, 10, 0, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize("nothing", [None, "", ...])
def test_only_the_symbol_is_required(nothing: Any) -> None:
    names = [*CAMEL, *SNAKE]
    report = only(position(**({} if nothing is ... else dict.fromkeys(names, nothing))))
    assert isinstance(report, Report)
    fields = (report.size, report.average, report.unrealized, report.realized, report.mark, report.seq)
    assert fields == (None,) * 6
    assert (report.at, report.time_source) == (ARRIVAL, TimeSource.ARRIVAL)


def test_an_empty_side_with_size_zero_is_flat() -> None:
    report = only(position(side="", size="0"))
    assert isinstance(report, Report)
    assert report.size == 0


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({"mode": "one-way"}, (Mode.ONE_WAY, LegName.NET, 1)),
        ({"mode": "hedge"}, (Mode.HEDGE, LegName.LONG, 1)),
        ({"mode": "hedge", "side": "Sell"}, (Mode.HEDGE, LegName.SHORT, -1)),
        ({"mode": "hedge", "positionIdx": "2"}, (Mode.HEDGE, LegName.SHORT, -1)),
        ({"mode": 1}, (Mode.HEDGE, LegName.LONG, 1)),
        ({"positionIdx": 2, "side": "Sell"}, (Mode.HEDGE, LegName.SHORT, -1)),
        ({"positionIdx": 0, "side": "Sell"}, (Mode.ONE_WAY, LegName.NET, -1)),
    ],
)
def test_mode_and_leg(place: dict[str, Any], expected: tuple[Any, ...]) -> None:
    report = only(position(**{"side": "Buy", "size": "1", **place}))
    assert isinstance(report, Report)
    assert (report.position.mode, report.leg, report.size) == expected


def test_a_flat_hedge_of_no_leg_closes_both() -> None:
    events = decoded(position(mode="hedge", side="", size="0")).events
    assert [event.leg for event in events] == [LegName.LONG, LegName.SHORT]


def test_each_record_of_a_raw_message_is_an_event() -> None:
    message = {"topic": "position", "id": "x", "data": [{"symbol": "BTCUSDT"}, {"symbol": "ethusdt"}]}
    assert [event.position.asset for event in decoded(message).events] == ["BTCUSDT", "ETHUSDT"]


def test_a_record_that_is_refused_does_not_keep_the_others_back() -> None:
    records = [RAW, {**RAW, "execId": "x2", "execType": "Gift"}, {**RAW, "execId": "x3"}]
    found = decoded({"topic": "execution", "data": records})
    assert [event.key for event in found.events if isinstance(event, Entry)] == ["exec:x1", "exec:x3"]
    assert found.refused is not None
    assert (found.refused.field, found.refused.reason) == (
        "exec_type",
        "record 1: unknown kind of execution 'Gift'",
    )


def test_a_size_without_a_side_is_marked_as_such() -> None:
    report = only(position(size="2"))
    assert isinstance(report, Report)
    assert (report.size, report.sided) == (2, False)
    flat = only(position(size="0"))
    assert isinstance(flat, Report)
    assert flat.sided


def test_an_execution() -> None:
    assert only(executed(side="SELL", execution_id="x1", seq=4)) == Entry(
        key="exec:x1",
        position=PositionKey("BTCUSDT", Mode.ONE_WAY),
        leg=LegName.NET,
        kind=Kind.TRADE,
        quantity=Decimal("-0.5"),
        price=Decimal(5000),
        fee=Decimal("1.375"),
        executed_at=AT,
        venue_seq=4,
        order_id="o1",
        trace_id="t1",
    )


def test_position_updated_from_order_is_one_execution() -> None:
    message = executed(
        event_type="position_updated_from_order", execution_quantity=..., filled_quantity="0.5"
    )
    entry = only(message)
    assert isinstance(entry, Entry)
    assert (entry.kind, entry.quantity) == (Kind.TRADE, Decimal("0.5"))


def test_the_key_is_the_execution_then_the_event_then_the_content() -> None:
    def key(message: dict[str, Any]) -> str:
        entry = only(message)
        assert isinstance(entry, Entry)
        return entry.key

    for name in ("execution_id", "exec_id", "execId"):
        assert key(executed(**{name: "x"}, event_id="e")) == "exec:x"
    assert key(executed(event_id="e")) == "event:e"
    content = executed()
    reordered = dict(reversed(content.items()))
    assert key(content) == key(reordered) != key(executed(execution_quantity="0.6"))
    assert key(content).startswith("sha256:")
    assert key(order(order_id="o", filled_quantity="1.50")) == "order:o:1.5"


@pytest.mark.parametrize(
    ("side", "closed", "leg"),
    [("Buy", "0", "long"), ("Sell", "1", "long"), ("Sell", None, "short"), ("Buy", "1", "short")],
)
def test_a_hedge_fill_finds_its_leg_by_side_and_closed_size(side: str, closed: str | None, leg: str) -> None:
    entry = only(executed(mode="hedge", side=side, closed_size=closed))
    assert entry.leg == leg


@pytest.mark.parametrize(
    "place", [{"position_idx": 2}, {"mode": "hedge", "position_side": "SHORT"}, {"mode": 2}]
)
def test_a_hedge_fill_belongs_to_the_leg_it_names(place: dict[str, Any]) -> None:
    assert only(executed(side="Buy", **place)).leg is LegName.SHORT


def test_raw_executions() -> None:
    trade, funding = decoded(
        {"topic": "execution", "data": [RAW, {**RAW, "execType": "Funding", "execFee": "2.1"}]}
    ).events
    assert isinstance(trade, Entry)
    assert (trade.key, trade.quantity, trade.executed_at.microsecond) == ("exec:x1", Decimal("-0.5"), 123000)
    assert isinstance(funding, Entry)
    assert (funding.kind, funding.quantity, funding.fee) == (Kind.FUNDING, Decimal(0), Decimal("2.1"))


@pytest.mark.parametrize("envelope", [{}, {"event_id": "e1"}])
def test_records_of_one_message_without_ids_are_told_apart(envelope: dict[str, Any]) -> None:
    records = [{**RAW, "execId": "", "execQty": quantity} for quantity in ("1", "1", "2")]
    message = {"topic": "execution", **envelope, "data": records}
    keys = [event.key for event in decoded(message).events if isinstance(event, Entry)]
    assert len(set(keys)) == 3
    assert keys == [event.key for event in decoded(message).events if isinstance(event, Entry)]


@pytest.mark.parametrize("kind", ["filled", "partially_filled", "cancelled"])
def test_an_order_report_is_cumulative(kind: str) -> None:
    entry = only(order(kind, side="sell"))
    assert isinstance(entry, Entry)
    assert (entry.kind, entry.key, entry.order_id) == (Kind.ORDER_REPORT, "order:o1:1", "o1")
    assert (entry.quantity, entry.price, entry.fee, entry.executed_at) == (
        Decimal(-1),
        Decimal(107),
        Decimal("0.10"),
        AT,
    )


def test_an_order_report_without_a_time_of_its_own_has_its_envelopes() -> None:
    entry = only(order(executed_at=None))
    assert isinstance(entry, Entry)
    assert entry.executed_at == AT.replace(hour=11)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (order(is_dry_run=True), "dry_run"),
        (order("cancelled", filled_quantity="0"), "cancelled"),
        (order("created"), "created"),
        ({"event_type": "rejected"}, "rejected"),
        (order("modified", filled_quantity="1"), "modified"),
    ],
)
def test_what_changes_no_position_is_ignored(message: dict[str, Any], reason: str) -> None:
    assert decoded(message) == Decoded(ignored=reason)


def test_without_a_time_the_broker_s_then_the_arrival_s_is_taken() -> None:
    stamped = only(executed(executed_at=None), properties={"timestamp": 1736935200})
    assert isinstance(stamped, Entry)
    assert (stamped.executed_at, stamped.time_source) == (AT, TimeSource.AMQP)
    arrived = only(executed(executed_at=None), properties={"timestamp": "junk"})
    assert isinstance(arrived, Entry)
    assert (arrived.executed_at, arrived.time_source) == (ARRIVAL, TimeSource.ARRIVAL)


def test_every_digit_of_a_number_is_kept() -> None:
    body = json.dumps(executed()).replace('"0.5"', "12345678901234567890.123456789012345678").encode()
    entry = only(body)
    assert isinstance(entry, Entry)
    assert entry.quantity == Decimal("12345678901234567890.123456789012345678")


def test_zeros_are_not_carried_along() -> None:
    entry = only(executed(execution_price="100." + "0" * 20_000, execution_fees="0e-999999999"))
    assert isinstance(entry, Entry)
    assert (str(entry.price), str(entry.fee)) == ("1E+2", "0")


@pytest.mark.parametrize("at", [1736935200.25, "1736935200250", 1736935200250])
def test_a_time_in_seconds_or_milliseconds_keeps_its_fraction(at: Any) -> None:
    report = only(position(timestamp=at))
    assert isinstance(report, Report)
    assert report.at == AT.replace(microsecond=250_000)


def test_a_message_replayed_later_is_no_longer_of_the_future() -> None:
    message = delivered(position(timestamp="2026-03-01T01:00:00Z"))
    with pytest.raises(InvalidEvent):
        decode(message, max_bytes=1000)
    assert decode(message, max_bytes=1000, now=ARRIVAL.replace(day=2)).events


def test_a_refusal_knows_the_trace_of_its_message() -> None:
    with pytest.raises(InvalidEvent) as refused:
        decoded({**executed(side=None), "trace_id": "t9"})
    assert refused.value.trace_id == "t9"


def test_json_nested_as_deep_as_the_parser_goes_is_an_event_or_a_refusal() -> None:
    for depth in range(900, 1100):
        nested = b"[" * depth + b"]" * depth
        message = b'{"event_type": "position", "data": {"symbol": "B1"}, "x": ' + nested + b"}"
        with suppress(InvalidEvent):
            decoded(message)


@pytest.mark.parametrize(
    ("message", "field", "reason"),
    [
        (b'{"event_type": "order_exec', None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[]", None, "not a JSON object"),
        (b"[" * 100_000, None, "nested too deep"),
        (b'{"a": NaN}', None, "NaN is not a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "not JSON"),
        (b" " * 300_000, None, "message of 300000 bytes"),
        ({}, "event_type", "missing"),
        ({"event_type": "teleported"}, "event_type", "unknown event type 'teleported'"),
        ({"event_type": ["position"]}, "event_type", "unknown event type"),
        ({"topic": "wallet"}, "event_type", "unknown event type 'wallet'"),
        (position(symbol=""), "symbol", "missing"),
        (position(symbol="BTC/USDT"), "symbol", "not the symbol"),
        (position(symbol="B" * 41), "symbol", "not the symbol"),
        (position(size="1e40"), "size", "more than 20 integer digits or 18 decimals"),
        (position(size="1e999999999"), "size", "more than 20 integer digits"),
        (position(size="0." + "0" * 18 + "1"), "size", "18 decimals"),
        (position(size=True), "size", "must be a number"),
        (position(size={}), "size", "must be a number"),
        (position(size="1", side="Bye"), "side", "neither Buy nor Sell"),
        (position(mode="cross"), "mode", "none of one-way, hedge"),
        (position(mode="hedge", size="1"), "positionIdx", "needs positionIdx or a side"),
        (position(markPrice="-1"), "mark_price", "must not be negative"),
        (position(timestamp="yesterday"), "timestamp", "not an ISO 8601 time"),
        (position(timestamp=10**30), "timestamp", "not a point in time"),
        (
            b'{"event_type": "position", "data": {"symbol": "B1", "updatedTime": 1e1000000}}',
            "timestamp",
            "not a point",
        ),
        (position(timestamp="9999-12-31T23:59:59-10:00"), "timestamp", "not a point in time"),
        (position(timestamp="2099-01-01T00:00:00Z"), "timestamp", "is in the future"),
        (position(timestamp="1999-01-01T00:00:00Z"), "timestamp", "before 2009"),
        (position(seq="x"), "seq", "whole number"),
        ({"topic": "position", "data": []}, "data", "1 to 500"),
        ({"topic": "position", "data": ["x"]}, "data", "1 to 500"),
        ({"topic": "position", "data": [{"symbol": "A1"}] * 501}, "data", "1 to 500"),
        (executed(side=None), "side", "missing"),
        (executed(execution_quantity="0"), "quantity", "above 0"),
        (executed(execution_quantity="-1"), "quantity", "above 0"),
        (executed(execution_quantity=None), "quantity", "missing"),
        (executed(execution_price="NaN"), "price", "not a finite number"),
        (executed(execution_price="Infinity"), "price", "not a finite number"),
        (executed(execution_price="0"), "price", "above 0"),
        (executed(execution_price=None), "price", "missing"),
        (executed(execution_id="x\x00"), "execution_id", "control characters"),
        (executed(execution_id="x" * 201), "execution_id", "1 to 200"),
        ({"topic": "execution", "data": [{**RAW, "execType": "Gift"}]}, "exec_type", "unknown kind"),
        ({"topic": "execution", "data": [{**RAW, "execType": "Funding", "execFee": ""}]}, "fee", "missing"),
        ({"event_type": "filled"}, "order", "missing"),
        (order(filled_quantity=None), "filled_quantity", "missing"),
        (order(average_price=None), "average_price", "missing"),
        (order(order_id=None, id=""), "order_id", "missing"),
        (order("cancelled", filled_quantity="x"), "filled_quantity", "not a number"),
    ],
)
def test_a_refusal_names_the_field_and_the_reason(message: Any, field: str | None, reason: str) -> None:
    found_field, found_reason = refusal(message)
    assert found_field == field
    assert reason in found_reason
    assert len(found_reason) < 300


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(
    {*CAMEL, *SNAKE, *RAW, *executed(), *order()["order"], "raw", "data", "payload", "topic", "order"}
)


@given(
    st.sampled_from(
        [position(**CAMEL), position(**SNAKE), executed(), order(), {"topic": "execution", "data": [RAW]}]
    ),
    st.dictionaries(st.sampled_from(NAMES), json_values, max_size=4),
    st.booleans(),
)
def test_anything_else_is_an_event_or_a_refusal(
    message: dict[str, Any], changes: dict[str, Any], inside: bool
) -> None:
    inner = message.get("data") or message.get("order")
    changed = {**message, **({} if inside else changes)}
    if inside and isinstance(inner, dict):
        changed["data" if "data" in message else "order"] = {**inner, **changes}
    with suppress(InvalidEvent):
        decoded(json.dumps(changed).encode())
