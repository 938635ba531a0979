"""From the wire to the domain: every message of the foreign queues, decoded and validated.

The shapes are those of docs/reference/messages (contract): exchange reports, executions, order reports,
and the exchange's own raw messages. What can never be applied raises
:class:`~positions.errors.InvalidEvent` with the field at fault and a reason an operator understands.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final, NamedTuple, NoReturn

from positions.domain.events import Entry, Event, Kind, LegName, Mode, PositionKey, Report, TimeSource
from positions.domain.numbers import (
    INTEGER_DIGITS,
    SCALE,
    ZERO,
    fits,
    in_units_of,
    plain,
    without_padding,
)
from positions.domain.values import value_class
from positions.errors import InvalidEvent

RECORDS_MAX = 500
TEXT_MAX = 200
TRADE_TYPES: Final = {"Trade", "AdlTrade", "BustTrade", "Delivery", "Settle", "MovePosition"}
# Settled and moved positions may have a price of zero; nobody trades at it.
_FREE_TYPES: Final = {"Delivery", "Settle", "MovePosition"}
IGNORED_TYPES: Final = {"created", "cancelled", "rejected", "modified"}
_ASSET: Final = re.compile(r"[A-Z0-9][A-Z0-9-]{1,39}")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_EARLIEST: Final = datetime(2009, 1, 1, tzinfo=UTC)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
AHEAD_MAX: Final = timedelta(minutes=10)
"""An event of a later time than this from now is refused: all that is right would be older than it."""

Record = Mapping[str, Any]


class Delivery(NamedTuple):
    """One message as it came from a queue, undecoded."""

    queue: str
    body: bytes
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    """AMQP properties that were set, e.g. `timestamp`, `message_id`, `content_type`."""
    received_at: datetime


@value_class(frozen=True, slots=True)
class Decoded:
    """What a message tells: events for positions, or the reason why it concerns none."""

    events: tuple[Event, ...] = ()
    ignored: str | None = None
    refused: InvalidEvent | None = None
    """Why one of the records in the message cannot be applied; `events` are those of the others."""


def decode(delivery: Delivery, *, max_bytes: int, now: datetime | None = None) -> Decoded:
    """Return the events in ``delivery``.

    Args:
        delivery: the message.
        max_bytes: a longer one is refused undecoded.
        now: what lies in the future is judged by; the message's arrival if not given.

    Raises:
        InvalidEvent: it can never be applied as it is.
    """
    if len(delivery.body) > max_bytes:
        raise InvalidEvent(f"message of {len(delivery.body)} bytes, more than the {max_bytes} allowed")
    envelope: Record = {}
    try:
        envelope = _parse(delivery.body)
        return _events(envelope, delivery, now or delivery.received_at)
    except RecursionError:
        raise InvalidEvent("JSON nested too deep") from None
    except InvalidEvent as refused:
        refused.trace_id = trace_id(envelope, delivery.headers)
        raise


# Numbers have up to 38 digits, and Python's usual context rounds to 28: nothing here calculates with them.
def _events(envelope: Record, delivery: Delivery, now: datetime) -> Decoded:
    kind = envelope.get("event_type") or delivery.headers.get("event_type")
    topic = envelope.get("topic") or delivery.headers.get("topic")
    for said in (kind, topic):
        if said is not None and not isinstance(said, str):
            raise InvalidEvent(f"unknown event type {_quoted(said)}", "event_type")
    source = _Source(envelope, delivery, now)
    if kind in ("order_executed", "position_updated_from_order"):
        record = _inner(envelope)
        return Decoded((_execution(record, source, filled=kind != "order_executed"),))
    if kind in ("filled", "partially_filled") or kind in IGNORED_TYPES:
        return _order_report(kind, _inner(envelope), source)
    if kind == "position" or (kind is None and topic == "position"):
        return _each(envelope, lambda record, index, _: _reports(record, source, index))
    if kind in (None, "execution") and topic == "execution":
        return _each(envelope, lambda record, _, place: [_execution(record, source, place=place)])
    if kind is None and topic is None:
        raise InvalidEvent("missing, and there is no topic either", "event_type")
    raise InvalidEvent(f"unknown event type {_quoted(topic if kind is None else kind)}", "event_type")


def _each(envelope: Record, events_of: Callable[[Record, int, str], Iterable[Event]]) -> Decoded:
    """Return the events of every record; one that is refused does not keep the others back."""
    records = _records(envelope)
    events: list[Event] = []
    refused: InvalidEvent | None = None
    for index, record in enumerate(records):
        # Several records share their envelope's id and content: their place in it tells them apart.
        place = f":{index}" if len(records) > 1 else ""
        try:
            events.extend(events_of(record, index, place))
        except InvalidEvent as error:
            if len(records) == 1:
                raise
            refused = refused or InvalidEvent(f"record {index}: {error.reason}", error.field)
    return Decoded(tuple(events), refused=refused)


def trace_id(envelope: Record, headers: Record) -> str:
    """Return the message's trace id, or "" where it has none that is well-formed."""
    for said in (envelope, headers):
        value = said.get("trace_id")
        if isinstance(value, str) and 0 < len(value) <= TEXT_MAX and not _has_control(value):
            return value
    return ""


class _Source:
    """Where a record comes from: its envelope and delivery, for what the record itself does not say."""

    __slots__ = ("delivery", "envelope", "event_id", "now", "trace_id")

    def __init__(self, envelope: Record, delivery: Delivery, now: datetime) -> None:
        self.envelope = envelope
        self.delivery = delivery
        self.now = now
        self.trace_id = trace_id(envelope, delivery.headers)
        said = envelope.get("event_id")
        self.event_id: str | None = _read("event_id", _text, said) if said else None

    def digest(self, content: Record) -> str:
        """Return the SHA-256 of the canonical form of ``content``."""
        return hashlib.sha256(_canonical(content).encode()).hexdigest()

    def time(self, own: datetime | None) -> tuple[datetime, TimeSource]:
        """Return the event's time and where it is from: its own, the envelope's, AMQP's, its arrival."""
        if own is None:
            own = _read("timestamp", _moment, _pick((self.envelope,), ("timestamp", "creationTime")))
        latest = self.now + AHEAD_MAX
        if own is not None:
            if own > latest:
                raise InvalidEvent(f"{own.isoformat()} is in the future", "timestamp")
            return own, TimeSource.EVENT
        try:
            at = _moment(self.delivery.properties.get("timestamp"))
        except ValueError:
            at = None
        if at is None or at > latest:
            return self.delivery.received_at, TimeSource.ARRIVAL
        return at, TimeSource.AMQP


def _parse(body: bytes) -> Record:
    """Return the JSON object in ``body``, numbers with a fraction as exact decimals."""
    try:
        # As json.loads does it, which makes a new decoder for each message, and looks longer at each.
        encoding = "utf-8" if body.startswith(b'{"') else json.detect_encoding(body)
        parsed = _decoder.decode(body.decode(encoding, "surrogatepass"))
    except InvalidEvent:
        raise
    except (ValueError, InvalidOperation) as error:
        raise InvalidEvent(f"not JSON: {str(error)[:TEXT_MAX]}") from None
    if not isinstance(parsed, dict):
        raise InvalidEvent("not a JSON object")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidEvent(f"{name} is not a number JSON allows")


_decoder = json.JSONDecoder(parse_float=Decimal, parse_constant=_refuse_constant)
_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str, check_circular=False).encode


def _inner(envelope: Record) -> Record:
    """Return the record of an envelope that may keep it under `data` or `payload`."""
    for name in ("data", "payload"):
        if isinstance(inner := envelope.get(name), dict):
            return inner
    return envelope


def _records(envelope: Record) -> list[Record]:
    """Return the records of an envelope: one object, or a list of them."""
    for name in ("data", "payload"):
        inner = envelope.get(name)
        if inner is not None and inner != "":
            break
    else:
        return [envelope]
    if isinstance(inner, dict):
        return [inner]
    records = inner if isinstance(inner, list) else [inner]
    if not records or len(records) > RECORDS_MAX or not all(isinstance(each, dict) for each in records):
        raise InvalidEvent(f"must be an object, or a list of 1 to {RECORDS_MAX} objects", name)
    return records


def _pick(records: tuple[Record, ...], names: tuple[str, ...]) -> Any:
    """Return the first value given under any of ``names``; the exchange sends "" for none."""
    for record in records:
        for name in names:
            value = record.get(name)
            if value is not None and value != "":
                return value
    return None


# What JSON's numbers and texts are made into; a bool, which Python takes for an int, is none of them.
_NUMBERS: Final = frozenset((int, str, Decimal))


def _amount(value: Any) -> Decimal:
    if type(value) not in _NUMBERS:
        raise ValueError("must be a number")
    try:
        number = Decimal(value)
    except InvalidOperation:
        raise ValueError(f"{_quoted(value)} is not a number") from None
    if not fits(number):
        if not number.is_finite():
            raise ValueError(f"{_quoted(value)} is not a finite number")
        raise ValueError(f"more than {INTEGER_DIGITS} integer digits or {SCALE} decimals")
    # The wire may carry any number of padding zeros.
    return without_padding(number)


def _moment(value: Any) -> datetime | None:
    """Return a point in time from ISO 8601 (no zone means UTC) or epoch seconds or milliseconds."""
    if value is None or value == "":
        return None
    if type(value) is str and not value.strip().isdecimal():
        try:
            at = datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(f"{_quoted(value)} is not an ISO 8601 time") from None
    elif type(value) in _NUMBERS:
        epoch = Decimal(value)
        # Seconds have ten digits until the year 2286, milliseconds thirteen.
        if not epoch >= 0 or epoch.adjusted() > 12 or not fits(epoch):
            raise ValueError("not a point in time")
        seconds = epoch.adjusted() < 11
        at = _EPOCH + timedelta(microseconds=in_units_of(-6 if seconds else -3, epoch))
    elif isinstance(value, datetime):
        at = value
    else:
        raise ValueError("must be an ISO 8601 time or epoch milliseconds")
    if at.tzinfo is not UTC:
        try:
            at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
        except OverflowError:
            raise ValueError("not a point in time") from None
    if at < _EARLIEST:
        raise ValueError("a time before 2009")
    return at


def _has_control(text: str) -> bool:
    # What is printable has none, and is told in half the time.
    return not text.isprintable() and _CONTROL.search(text) is not None


def _text(value: Any) -> str:
    if type(value) is not str and type(value) is not int:
        raise ValueError("must be text")
    text = str(value).strip()
    if not text or len(text) > TEXT_MAX or _has_control(text):
        raise ValueError(f"must be 1 to {TEXT_MAX} characters without control characters")
    return text


def named_asset(body: bytes) -> bytes:
    """Return what is likely the asset that an undecoded message is about; b"" where that is not plain.

    For putting together what belongs together: nothing that has to be right may depend on it.
    """
    places = [at + len(name) for name in (b'"asset"', b'"symbol"') if (at := body.find(name)) >= 0]
    if not places:
        return b""
    begin = body.find(b'"', min(places)) + 1
    return body[begin : body.find(b'"', begin)]


def _asset(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    symbol = _symbol(text) if len(text) <= TEXT_MAX else None
    if symbol is None:
        raise ValueError(f"{_quoted(value)} is not the symbol of an asset")
    return symbol


@lru_cache(maxsize=10_000)
def _symbol(text: str) -> str | None:
    # Kept: there are few, and they come again and again.
    symbol = text.upper()
    return symbol if _ASSET.fullmatch(symbol) else None


_SIGNS: Final[Mapping[str, int | None]] = {"buy": 1, "sell": -1, "none": None}


def _sign(value: Any) -> int | None:
    sign = _SIGNS.get(value.strip().lower(), 0) if isinstance(value, str) else 0
    if sign == 0:
        raise ValueError(f"{_quoted(value)} is neither Buy nor Sell")
    return sign


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,18}", str(value)):
        raise ValueError("must be a whole number of at most 18 digits")
    return int(value)


_MODES: Final[Mapping[str, Mode | LegName]] = {
    "0": Mode.ONE_WAY,
    "one-way": Mode.ONE_WAY,
    "hedge": Mode.HEDGE,
    "1": LegName.LONG,
    "2": LegName.SHORT,
}
_SIDE_LEGS: Final[Mapping[str, LegName | None]] = {
    "long": LegName.LONG,
    "short": LegName.SHORT,
    "both": None,
    "none": None,
}


def _mode(value: Any) -> Mode | LegName:
    """Return the mode, or the leg where the value is a position index (1 long, 2 short)."""
    if type(value) is str and value in _MODES:
        return _MODES[value]
    text = str(value).strip().lower()
    if isinstance(value, bool) or text not in _MODES:
        raise ValueError(f"{_quoted(value)} is none of one-way, hedge, 0, 1, 2")
    return _MODES[text]


def _side_leg(value: Any) -> LegName | None:
    text = str(value).strip().lower()
    if text not in _SIDE_LEGS:
        raise ValueError(f"{_quoted(value)} is neither long nor short")
    return _SIDE_LEGS[text]


def _quoted(value: Any) -> str:
    return repr(value if len(str(value)) <= 40 else f"{str(value)[:40]}...")


Reader = Callable[[Any], Any]
Fields = Mapping[str, tuple[Reader, tuple[str, ...]]]
"""Of each field what reads its value, and its spellings; the first one that has a value counts."""


def _read(field: str, reader: Reader, value: Any) -> Any:
    """Return what ``reader`` makes of a value that is given; None of none."""
    if value is None:
        return None
    try:
        return reader(value)
    except ValueError as error:
        raise InvalidEvent(str(error), field) from None


class _Names:
    """The fields of a kind of record, found by the names that a record has: fewer than it might have."""

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self._of_name = {
            name: (field, reader) for field, (reader, spellings) in fields.items() for name in spellings
        }

    def given(self, *records: Record) -> dict[str, Any]:
        """Return what the records say of each field they have, read; the first that cannot be is named."""
        found: dict[str, Any] = {}
        of_name = self._of_name.get
        try:
            for record in records:
                for name, value in record.items():
                    if value is not None and value != "" and (known := of_name(name)):
                        field, reader = known
                        if field in found:
                            return self._picked(records)
                        found[field] = reader(value)
        except ValueError:
            return self._picked(records)
        return found

    def _picked(self, records: tuple[Record, ...]) -> dict[str, Any]:
        """Return the same where one says a field twice, or cannot be read.

        The order of records and spellings counts, not that of the names in a record.
        """
        return {
            field: _read(field, reader, _pick(records, spellings))
            for field, (reader, spellings) in self.fields.items()
        }


@dataclass(slots=True)
class _Place:
    """Which position and leg a record is about."""

    symbol: str | None = None
    mode: Mode | LegName | None = None
    position_idx: Mode | LegName | None = None
    position_side: LegName | None = None
    side: int | None = None

    @property
    def key(self) -> PositionKey:
        if self.symbol is None:
            raise InvalidEvent("missing", "symbol")
        return PositionKey(self.symbol, self._mode)

    @property
    def _mode(self) -> Mode:
        for said in (self.mode, self.position_idx):
            if said is not None:
                return said if isinstance(said, Mode) else Mode.HEDGE
        return Mode.ONE_WAY

    @property
    def named_leg(self) -> LegName | None:
        """The leg the record names; in one-way mode always the net one."""
        if self._mode is Mode.ONE_WAY:
            return LegName.NET
        for said in (self.mode, self.position_idx, self.position_side):
            if isinstance(said, LegName):
                return said
        return None


_PLACE: Fields = {
    "symbol": (_asset, ("symbol", "asset")),
    "mode": (_mode, ("mode",)),
    "position_idx": (_mode, ("positionIdx", "position_idx")),
    "position_side": (_side_leg, ("position_side", "positionSide")),
    "side": (_sign, ("side",)),
}


@dataclass(slots=True)
class _Report(_Place):
    size: Decimal | None = None
    avg_price: Decimal | None = None
    unrealised_pnl: Decimal | None = None
    realised_pnl: Decimal | None = None
    mark_price: Decimal | None = None
    timestamp: datetime | None = None
    seq: int | None = None


_REPORT_NAMES = _Names(
    {
        **_PLACE,
        "size": (_amount, ("size",)),
        "avg_price": (_amount, ("avg_price", "avgPrice", "entry_price", "entryPrice")),
        "unrealised_pnl": (_amount, ("unrealised_pnl", "unrealisedPnl")),
        "realised_pnl": (_amount, ("realised_pnl", "cum_realised_pnl", "cumRealisedPnl", "realisedPnl")),
        "mark_price": (_amount, ("mark_price", "markPrice")),
        "timestamp": (_moment, ("timestamp", "updatedTime", "updated_time")),
        "seq": (_whole, ("seq",)),
    }
)


def _reports(record: Record, source: _Source, index: int) -> list[Report]:
    """Return the report in ``record``; two where it says that both legs of a hedge are flat."""
    raw = record.get("raw")
    wire = _Report(**_REPORT_NAMES.given(record, *([raw] if isinstance(raw, dict) else [])))
    if wire.avg_price is not None and wire.avg_price < 0:
        raise InvalidEvent("must not be negative", "avg_price")
    if wire.mark_price is not None and wire.mark_price < 0:
        raise InvalidEvent("must not be negative", "mark_price")
    at, time_source = source.time(wire.timestamp)
    key, leg = wire.key, wire.named_leg
    if leg is None and wire.side is not None:
        leg = LegName.LONG if wire.side > 0 else LegName.SHORT
    if leg is None and wire.size:
        raise InvalidEvent("a hedge position needs positionIdx or a side", "positionIdx")
    many = source.envelope.get("data") or source.envelope.get("payload")
    if source.event_id:
        identity = f"{source.event_id}:{index}" if isinstance(many, list) else source.event_id
    else:
        identity = source.digest(record if isinstance(many, list) else source.envelope)
    return [
        Report(
            id=identity,
            position=key,
            leg=each,
            at=at,
            time_source=time_source,
            seq=wire.seq,
            size=_signed(wire, each),
            sided=each is not LegName.NET or wire.side is not None or not wire.size,
            # Zero is how the exchange says that there is no average, or no mark.
            average=wire.avg_price or None,
            unrealized=wire.unrealised_pnl,
            realized=wire.realised_pnl,
            mark=wire.mark_price or None,
            trace_id=source.trace_id,
        )
        for each in ([leg] if leg else [LegName.LONG, LegName.SHORT])
    ]


_SIGN_OF: Final = {LegName.LONG: Decimal(1), LegName.SHORT: Decimal(-1)}


def _signed(wire: _Report, leg: LegName) -> Decimal | None:
    """Return the reported size with its sign: by leg in hedge mode, else by side, which sells negative."""
    if not wire.size:
        return wire.size
    if leg is LegName.NET:
        return wire.size if wire.side is None else wire.size.copy_sign(Decimal(wire.side))
    return wire.size.copy_sign(_SIGN_OF[leg])


@dataclass(slots=True)
class _Execution(_Place):
    quantity: Decimal | None = None
    price: Decimal | None = None
    fee: Decimal | None = None
    executed_at: datetime | None = None
    execution_id: str | None = None
    order_id: str | None = None
    closed_size: Decimal | None = None
    exec_type: str | None = None
    seq: int | None = None


_EXECUTION_FIELDS: Fields = {
    **_PLACE,
    "quantity": (_amount, ("execution_quantity", "exec_qty", "execQty")),
    "price": (_amount, ("execution_price", "exec_price", "execPrice")),
    "fee": (_amount, ("execution_fees", "execution_fee", "exec_fee", "execFee")),
    "executed_at": (_moment, ("executed_at", "exec_time", "execTime")),
    "execution_id": (_text, ("execution_id", "exec_id", "execId")),
    "order_id": (_text, ("order_id", "orderId")),
    "closed_size": (_amount, ("closed_size", "closedSize")),
    "exec_type": (_text, ("exec_type", "execType")),
    "seq": (_whole, ("seq",)),
}
_EXECUTION_NAMES = _Names(_EXECUTION_FIELDS)
# position_updated_from_order: one execution all the same, with the quantity under another name.
_FILLED_NAMES = _Names(
    {
        **_EXECUTION_FIELDS,
        "quantity": (_amount, ("filled_quantity", "execution_quantity")),
        "price": (_amount, ("execution_price", "average_price", "price")),
        "fee": (_amount, ("execution_fees", "execution_fee", "fees")),
    }
)


def _execution(record: Record, source: _Source, *, filled: bool = False, place: str = "") -> Entry:
    """Return the ledger entry of one execution."""
    wire = _Execution(**(_FILLED_NAMES if filled else _EXECUTION_NAMES).given(record))
    exec_type = wire.exec_type or "Trade"
    funding = exec_type == "Funding"
    if not funding and exec_type not in TRADE_TYPES:
        raise InvalidEvent(f"unknown kind of execution {_quoted(exec_type)}", "exec_type")
    if funding and wire.fee is None:
        raise InvalidEvent("missing: it is what was paid", "fee")
    leg = wire.named_leg
    if funding:
        leg = leg or (LegName.SHORT if wire.side == -1 else LegName.LONG)
        quantity = ZERO
    else:
        quantity = _traded(wire.side, wire.quantity, "quantity")
        _check_price(wire.price, exec_type)
        closes = bool(wire.closed_size)
        leg = leg or (LegName.LONG if (quantity > 0) is not closes else LegName.SHORT)
    at, time_source = source.time(wire.executed_at)
    if wire.execution_id:
        key = f"exec:{wire.execution_id}"
    elif source.event_id:
        key = f"event:{source.event_id}{place}"
    else:
        key = f"sha256:{source.digest(source.envelope)}{place}"
    return Entry(
        key=key,
        position=wire.key,
        leg=leg,
        kind=Kind.FUNDING if funding else Kind.TRADE,
        quantity=quantity,
        price=wire.price or ZERO,
        fee=wire.fee or ZERO,
        executed_at=at,
        time_source=time_source,
        venue_seq=wire.seq,
        order_id=wire.order_id,
        exec_type=exec_type,
        trace_id=source.trace_id,
    )


@dataclass(slots=True)
class _Order(_Place):
    filled_quantity: Decimal | None = None
    average_price: Decimal | None = None
    fees: Decimal | None = None
    executed_at: datetime | None = None
    order_id: str | None = None


_ORDER_NAMES = _Names(
    {
        **_PLACE,
        "filled_quantity": (_amount, ("filled_quantity",)),
        "average_price": (_amount, ("average_price",)),
        "fees": (_amount, ("fees",)),
        "executed_at": (_moment, ("executed_at",)),
        "order_id": (_text, ("order_id", "id")),
    }
)


def _order_report(kind: str, record: Record, source: _Source) -> Decoded:
    """Return the order report in ``record``, or why it changes no position."""
    order = record.get("order")
    if not isinstance(order, dict):
        if kind in IGNORED_TYPES:
            return Decoded(ignored=kind)
        raise InvalidEvent("missing", "order")
    if _pick((order, record), ("is_dry_run",)) in (True, "true", "True", 1):
        return Decoded(ignored="dry_run")
    if kind in IGNORED_TYPES and (kind != "cancelled" or not _filled(order)):
        return Decoded(ignored=kind)
    wire = _Order(**_ORDER_NAMES.given(order, record))
    quantity = _traded(wire.side, wire.filled_quantity, "filled_quantity")
    _check_price(wire.average_price, "Trade", "average_price")
    if wire.order_id is None:
        raise InvalidEvent("missing", "order_id")
    at, time_source = source.time(wire.executed_at)
    entry = Entry(
        key=f"order:{wire.order_id}:{plain(quantity.copy_abs())}",
        position=wire.key,
        leg=wire.named_leg or (LegName.LONG if quantity > 0 else LegName.SHORT),
        kind=Kind.ORDER_REPORT,
        quantity=quantity,
        price=wire.average_price or ZERO,
        fee=wire.fees,
        executed_at=at,
        time_source=time_source,
        order_id=wire.order_id,
        trace_id=source.trace_id,
    )
    return Decoded((entry,))


def _filled(order: Record) -> bool:
    return bool(_read("filled_quantity", _amount, _pick((order,), ("filled_quantity",))))


def _traded(side: int | None, quantity: Decimal | None, field: str) -> Decimal:
    """Return the signed quantity of a trade."""
    if side is None:
        raise InvalidEvent("missing", "side")
    if quantity is None:
        raise InvalidEvent("missing", field)
    if quantity <= 0:
        raise InvalidEvent("must be above 0", field)
    return quantity if side > 0 else quantity.copy_negate()


def _check_price(price: Decimal | None, exec_type: str, field: str = "price") -> None:
    if price is None:
        raise InvalidEvent("missing", field)
    if price < 0 or (price == 0 and exec_type not in _FREE_TYPES):
        raise InvalidEvent("must be above 0", field)
