"""A market to look at: plays the order manager and the exchange gateway, for first users and for trials.

`Feed` is pure: what the two neighbours say, message by message, from a random generator and the times it is
given, with books of its own that the exchange reports are taken from. `run` publishes it.
"""

import heapq
import json
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple, TypeVar

import structlog
from amqp.exceptions import NotFound
from kombu.connection import Connection
from kombu.messaging import Producer

from positions.client import Client, ClientError, Position
from positions.domain.events import LegName, Mode
from positions.domain.leg import Fill, FillOrder, Leg
from positions.domain.numbers import ZERO, exact, plain, quotient, rounded
from positions.domain.position import LEGS
from positions.domain.times import utc_text
from positions.settings import Settings

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

REPORT_DELAY = timedelta(milliseconds=150)
MARK_INTERVAL = timedelta(seconds=3)
# Eight hours on a venue; here something has to happen.
FUNDING_INTERVAL = timedelta(minutes=10)
FIRST_MALFORMED_S = 30.0
WALK_INTERVAL = timedelta(milliseconds=200)
WALK_LIMIT = timedelta(minutes=1)
POSITION_LIMIT_ORDERS = 5
SERVICE_LIMIT_S = 30
BACKLOG_CHECK_S = 1.0
BROKER_TIMEOUT_S = 5
BROKER_WAIT_MAX_S = 30.0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)
_DAY_MS = Decimal(86_400_000)
_BASIS_POINT = Decimal("0.0001")
# Taker, maker, and the rebate a market maker is paid.
_FEE_RATES, _FEE_WEIGHTS = (Decimal("0.00055"), Decimal("0.0002"), Decimal("-0.00005")), (35, 45, 20)
_INDEX = {LegName.NET: 0, LegName.LONG: 1, LegName.SHORT: 2}
# How often an open position is added to, reduced, closed and flipped, relative to each other.
_STRATEGIES = {
    "trend": (5, 2, 1, 1),
    "reversion": (3, 4, 1, 2),
    "market-making": (5, 5, 0, 2),
    "scalping": (1, 1, 3, 3),
    "long-short": (3, 3, 1, 0),
}


class Instrument(NamedTuple):
    """A linear perpetual, and who trades it."""

    symbol: str
    price: Decimal
    """Where it starts."""
    tick: Decimal
    lot: Decimal
    volatility_bp: int
    """Standard deviation of a day's return, in basis points."""
    strategy: str
    order_usdt: int
    """Notional of a typical order."""
    mode: Mode


INSTRUMENTS = tuple(
    Instrument(symbol, Decimal(price), Decimal(tick), Decimal(lot), volatility_bp, strategy, order_usdt, mode)
    for symbol, price, tick, lot, volatility_bp, strategy, order_usdt, mode in (
        ("BTCUSDT", "95000", "0.1", "0.001", 250, "trend", 12_000, Mode.ONE_WAY),
        ("ETHUSDT", "3300", "0.01", "0.01", 350, "long-short", 10_000, Mode.HEDGE),
        ("SOLUSDT", "140", "0.01", "0.1", 450, "trend", 8_000, Mode.ONE_WAY),
        ("XRPUSDT", "2.1", "0.0001", "0.1", 450, "reversion", 6_000, Mode.ONE_WAY),
        ("BNBUSDT", "900", "0.1", "0.01", 280, "market-making", 4_000, Mode.ONE_WAY),
        ("DOGEUSDT", "0.14", "0.00001", "1", 500, "scalping", 3_000, Mode.ONE_WAY),
        ("LINKUSDT", "13.5", "0.001", "0.1", 450, "long-short", 5_000, Mode.HEDGE),
        ("ADAUSDT", "0.4", "0.0001", "1", 480, "reversion", 5_000, Mode.ONE_WAY),
        ("AVAXUSDT", "14", "0.001", "0.1", 500, "trend", 6_000, Mode.ONE_WAY),
        ("LTCUSDT", "80", "0.01", "0.1", 380, "market-making", 3_000, Mode.ONE_WAY),
        ("SUIUSDT", "1.8", "0.0001", "10", 600, "scalping", 3_000, Mode.ONE_WAY),
        ("1000PEPEUSDT", "0.006", "0.0000001", "100", 700, "market-making", 2_000, Mode.ONE_WAY),
    )
)


@dataclass(frozen=True, slots=True)
class Message:
    """What is published: to which queue, with which headers, and the JSON (or what pretends to be)."""

    queue: str
    headers: dict[str, str]
    body: str
    at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Faults:
    """How often the network misbehaves; 0 is never."""

    late: float = 0.005
    """Share of the messages that arrive some seconds after their successors."""
    duplicate: float = 0.01
    """Share of the messages that arrive twice."""
    malformed_every_s: float = 180.0


@dataclass(kw_only=True, slots=True)
class Order:
    """An order at work: its executions to come, and what has been filled so far."""

    id: str
    leg: LegName
    quantity: Decimal
    """Signed, as its pieces are."""
    pieces: list[Decimal]
    fee_rate: Decimal
    cumulative: bool
    """Told by cumulative reports, where there is a queue for them, instead of executions; never by both."""
    filled: Decimal = ZERO
    notional: Decimal = ZERO
    fees: Decimal = ZERO
    implied: Decimal = ZERO
    """Notional as its reports tell it: their average is rounded."""


@dataclass(kw_only=True, slots=True)
class Market:
    """One instrument's price, and the books of the account that trades it."""

    instrument: Instrument
    value: Decimal
    """Where the walk is: between two ticks, or small steps would all be rounded away."""
    funding_at: datetime
    legs: dict[LegName, Leg]
    at: datetime = _EPOCH
    """Time of its last event."""
    report_at: dict[LegName, datetime] = field(default_factory=dict)
    order: Order | None = None

    def on_tick(self, value: Decimal) -> Decimal:
        return value // self.instrument.tick * self.instrument.tick

    @property
    def mark(self) -> Decimal:
        return self.on_tick(self.value)

    def time(self, now: datetime) -> datetime:
        """Return the time of an event: in milliseconds, as on the wire, and after all before it."""
        self.at = max(now.replace(microsecond=now.microsecond // 1000 * 1000), self.at + _MS)
        return self.at

    def changed(self, name: LegName, fill: Fill) -> None:
        """Fold ``fill`` into its leg, which the gateway will report shortly."""
        self.legs[name] = self.legs[name].fold(fill)
        due = self.at + REPORT_DELAY
        self.report_at[name] = min(self.report_at.get(name, due), due)


class Feed:
    """What the order manager and the gateway say, one message after the other."""

    def __init__(
        self, rng: random.Random, queues: Sequence[str], now: datetime, *, assets: int, faults: Faults
    ) -> None:
        """Start flat at ``now`` (UTC), with the first ``assets`` of `INSTRUMENTS`.

        The queues are those of exchange reports, of executions and, where there is one more, of order
        reports. Ids are as unique as the seed of ``rng``.
        """
        self._rng, self._faults = rng, faults
        self._reports, self._executions, *others = queues
        self._order_reports = others[0] if others else None
        self._walked_at = now
        self._malformed_at = now + timedelta(seconds=min(FIRST_MALFORMED_S, faults.malformed_every_s))
        self._held: list[tuple[datetime, int, Message]] = []
        self._serial, self._normalised = 0, False
        self.markets = [
            Market(
                instrument=each,
                value=each.price,
                funding_at=now + FUNDING_INTERVAL * rng.random(),
                legs={name: Leg() for name in LEGS[each.mode]},
            )
            for each in INSTRUMENTS[:assets]
        ]

    @property
    def held(self) -> int:
        """How many messages are still on their way."""
        return len(self._held)

    def restore(self, positions: Iterable[Position] | None, now: datetime) -> None:
        """Go on from the service's ``positions``, or from flat books if None.

        What is gone on from is reported first, as by a gateway that connects: service and venue agree.
        """
        found = None if positions is None else {(each.asset, each.mode): each for each in positions}
        for market in self.markets:
            if found is None:
                market.report_at = dict.fromkeys(market.legs, now)
            elif position := found.get((market.instrument.symbol, market.instrument.mode)):
                market.value = position.current_price or market.value
                held_by = {
                    LegName.NET: (position.size, position.average_entry_price),
                    LegName.LONG: (position.long_size, position.long_avg_price),
                    LegName.SHORT: (position.short_size, position.short_avg_price),
                }
                # Which leg of a hedge earned it the service does not say: the first carries it all.
                realized = position.realized_pnl
                for name in market.legs:
                    held, average = held_by[name]
                    with exact():
                        cost = abs(held) * (average or market.value)
                    market.legs[name] = Leg(size=held, cost=cost, gross=realized)
                    market.report_at[name], realized = now, ZERO

    def next(self, now: datetime, *, faults: bool = True) -> Message:
        """Return the next message at ``now`` (UTC).

        Holds at most one more back that comes later; none without ``faults``.
        """
        self._walk(now)
        with exact():
            if self._held and self._held[0][0] <= now:
                return heapq.heappop(self._held)[2]
            rng, rates = self._rng, self._faults
            if faults and rates.malformed_every_s and self._malformed_at <= now:
                self._malformed_at = now + timedelta(seconds=rates.malformed_every_s * rng.uniform(0.5, 1.5))
                return self._malformed(now)
            message, chance = self._event(now), rng.random() if faults else 1.0
            if chance < rates.late:
                self._hold(message, now + timedelta(seconds=rng.uniform(2, 15)))
                return self._event(now)
            if chance < rates.late + rates.duplicate:
                self._hold(message, now + timedelta(seconds=rng.uniform(0.05, 3)))
            return message

    def drain(self) -> list[Message]:
        """Return what is still on its way, and forget it."""
        held, self._held = sorted(self._held), []
        return [message for _, _, message in held]

    def _hold(self, message: Message, until: datetime) -> None:
        self._serial += 1
        heapq.heappush(self._held, (until, self._serial, message))

    def _walk(self, now: datetime) -> None:
        """Move every price by its share of a day's volatility, which grows with the root of time."""
        if now - self._walked_at < WALK_INTERVAL:
            return
        elapsed, self._walked_at = min(now - self._walked_at, WALK_LIMIT), now
        share = (Decimal(elapsed // _MS) / _DAY_MS).sqrt() * _BASIS_POINT
        for market in self.markets:
            # Three uniform draws of variance 1/3 each: near enough to normal, and no float.
            noise = Decimal(sum(self._rng.randint(-1000, 1000) for _ in range(3))) / 1000
            market.value += market.value * market.instrument.volatility_bp * share * noise

    def _event(self, now: datetime) -> Message:
        due = [
            (at, index, name)
            for index, market in enumerate(self.markets)
            for name, at in market.report_at.items()
            if at <= now
        ]
        # At a rate too low for all reports fills still get their turn.
        if due and self._rng.random() < 0.7:
            _, index, name = min(due)
            return self._report(self.markets[index], name, now)
        for market in self.markets:
            if market.funding_at <= now:
                market.funding_at = now + FUNDING_INTERVAL
                if any(leg.size for leg in market.legs.values()):
                    return self._funding(market, now)
        return self._fill(self._rng.choice(self.markets), now)

    def _fill(self, market: Market, now: datetime) -> Message:
        """Fill the next piece of the market's order, or of a new one."""
        order = market.order or self._new_order(market)
        quantity = order.pieces.pop()
        market.order = order if order.pieces else None
        # A little better than the mark on average, or fees would bleed the account dry.
        edge = self._rng.randint(-4, 10) * _BASIS_POINT * (1 if quantity > 0 else -1)
        price = market.on_tick(market.value * (1 - edge))
        notional = abs(quantity) * price
        fee = rounded(notional * order.fee_rate)
        order.filled += quantity
        order.notional += notional
        order.fees += fee
        at, execution, held = market.time(now), self._id(), market.legs[order.leg].size
        said = {
            "asset": market.instrument.symbol,
            "side": "Buy" if quantity > 0 else "Sell",
            "order_id": order.id,
            "executed_at": utc_text(at),
            "strategy_id": market.instrument.strategy,
        }
        if order.cumulative and self._order_reports:
            average = quotient(order.notional, abs(order.filled))
            # What can be made of a rounded average, so that the service folds the same.
            notional = abs(order.filled) * average - order.implied
            order.implied += notional
            queue, kind = self._order_reports, "partially_filled" if order.pieces else "filled"
            report = {
                **said,
                "id": order.id,
                "status": kind,
                "quantity": plain(abs(order.quantity)),
                "price": None,
                "filled_quantity": plain(abs(order.filled)),
                "average_price": plain(average),
                "fees": plain(order.fees),
                "is_dry_run": False,
            }
            content: dict[str, Any] = {"mode": market.instrument.mode, "order": report}
        else:
            queue, kind = self._executions, "order_executed"
            content = {
                **said,
                "execution_id": execution,
                "execution_quantity": plain(abs(quantity)),
                "execution_price": plain(price),
                "execution_fees": plain(fee),
                "exec_type": "Trade",
                "closed_size": plain(min(abs(quantity), abs(held)) if held * quantity < 0 else ZERO),
                "mode": market.instrument.mode,
                "position_idx": _INDEX[order.leg],
            }
        place = FillOrder(at, -1, execution)
        market.changed(order.leg, Fill(place, order.leg, quantity, notional, fee, ZERO))
        return self._message(queue, at, content, event_type=kind)

    def _new_order(self, market: Market) -> Order:
        """Return what the strategy does next with one of the market's legs."""
        rng, instrument, lot = self._rng, market.instrument, market.instrument.lot
        leg = rng.choice(list(market.legs))
        held = market.legs[leg].size
        buys = rng.random() < 0.5 if leg is LegName.NET else leg is LegName.LONG
        side = Decimal(1).copy_sign(held) if held else Decimal(1 if buys else -1)
        unit = side * lot * (self._part(Decimal(instrument.order_usdt), market.mark * lot, 50, 150) or 1)
        some = min(lot * (self._part(abs(held), lot, 20, 60) or 1), abs(held))
        add, reduce, close, flip = unit, -side * some, -held, -held - unit
        if not held:
            quantity = add
        elif abs(held) * market.mark > POSITION_LIMIT_ORDERS * instrument.order_usdt:
            quantity = rng.choice((reduce, close))
        else:
            (quantity,) = rng.choices((add, reduce, close, flip), _STRATEGIES[instrument.strategy])
        pieces, rest = [], quantity
        for _ in range(rng.randint(0, 4)):
            if piece := (self._part(abs(rest), lot, 20, 60) * lot).copy_sign(quantity):
                pieces.append(piece)
                rest -= piece
        # A cumulative report does not say which leg of a hedge it is about.
        cumulative = leg is LegName.NET and rng.random() < 0.3
        return Order(
            id=self._id(),
            leg=leg,
            quantity=quantity,
            pieces=[*pieces, rest],
            fee_rate=rng.choices(_FEE_RATES, _FEE_WEIGHTS)[0],
            cumulative=cumulative,
        )

    def _part(self, amount: Decimal, unit: Decimal, low: int, high: int) -> Decimal:
        """Return how many whole units there are in ``low`` to ``high`` percent of ``amount``."""
        return amount * self._rng.randint(low, high) / 100 // unit

    def _funding(self, market: Market, now: datetime) -> Message:
        """Settle funding for every open leg: at a positive rate longs pay and shorts are paid."""
        at, rate, records = market.time(now), self._rng.randint(-50, 150) * _BASIS_POINT / 100, []
        for name, leg in market.legs.items():
            if not leg.size:
                continue
            execution, paid = self._id(), rounded(leg.size * market.mark * rate)
            records.append(
                {
                    "symbol": market.instrument.symbol,
                    "side": "Buy" if leg.size > 0 else "Sell",
                    "execId": execution,
                    "execType": "Funding",
                    "execQty": plain(abs(leg.size)),
                    "execPrice": plain(market.mark),
                    "execFee": plain(paid),
                    "feeRate": plain(rate),
                    "execTime": _ms(at),
                    "positionIdx": _INDEX[name],
                }
            )
            market.changed(name, Fill(FillOrder(at, -1, execution), name, ZERO, ZERO, ZERO, -paid))
        content = {"creationTime": _ms(at), "data": records}
        return self._message(self._executions, at, content, topic="execution")

    def _report(self, market: Market, name: LegName, now: datetime) -> Message:
        """Report a leg as the venue sees it: in the exchange's spelling and the gateway's in turn."""
        at, leg, mark = market.time(now), market.legs[name], market.mark
        market.report_at[name] = at + MARK_INTERVAL
        if not leg.size:
            del market.report_at[name]
        self._normalised = not self._normalised
        record: dict[str, Any] = {
            "symbol": market.instrument.symbol,
            "side": ("Buy" if leg.size > 0 else "Sell") if leg.size else "",
            "size": plain(abs(leg.size)),
            "entryPrice" if self._normalised else "avgPrice": plain(leg.average or ZERO),
            "markPrice": plain(mark),
            "unrealisedPnl": plain(rounded(leg.size * mark - leg.cost.copy_sign(leg.size))),
            "cumRealisedPnl": plain(rounded(leg.gross - leg.fees + leg.funding)),
            "positionIdx": _INDEX[name],
            "updatedTime": _ms(at),
            "seq": int(_ms(at)),
        }
        if self._normalised:
            record = {
                "symbol": record["symbol"],
                "side": record["side"] or None,
                "size": record["size"],
                "avg_price": None,
                "unrealised_pnl": record["unrealisedPnl"],
                "realised_pnl": record["cumRealisedPnl"],
                "mark_price": record["markPrice"],
                "mode": record["positionIdx"],
                # As the gateway writes it: UTC, which it does not say.
                "timestamp": at.replace(tzinfo=None).isoformat(),
                "raw": record,
            }
        content = {"channel": "position", "payload" if self._normalised else "data": record}
        return self._message(self._reports, at, content, event_type="position", topic="position")

    def _malformed(self, now: datetime) -> Message:
        """Return what some neighbour will send some day."""
        symbol = self._rng.choice(self.markets).instrument.symbol
        samples: list[tuple[str, str, dict[str, Any]]] = [
            (self._reports, "position", {"data": {"size": "1.5", "side": "Buy", "markPrice": "100"}}),
            (self._reports, "position", {"data": {"symbol": symbol, "size": "a lot", "side": "Buy"}}),
            (self._executions, "order_executed", {"asset": symbol, "side": "Hold"}),
            (self._executions, "order_exploded", {"asset": symbol}),
        ]
        queue, kind, content = self._rng.choice(samples)
        message = self._message(queue, now, content, event_type=kind)
        return replace(message, body=message.body[: self._rng.choice((-20, None))])

    def _message(self, queue: str, at: datetime, content: Mapping[str, Any], **kind: str) -> Message:
        headers = {**kind, "trace_id": self._id()}
        envelope = {**headers, "event_id": self._id(), "timestamp": utc_text(at), **content}
        return Message(queue, headers, json.dumps(envelope), at)

    def _id(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))


def _ms(at: datetime) -> str:
    """Return a time as the exchange writes it: milliseconds since the epoch."""
    return str((at - _EPOCH) // _MS)


class Stop:
    """Notes SIGTERM and SIGINT: they cut waits short, and no publication."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def wait(self, seconds: float) -> None:
        """Return after ``seconds``, or soon after a stop is asked for."""
        end = time.monotonic() + seconds
        while not self.asked and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))


class Publisher:
    """The way to the broker, RabbitMQ or Redis; outlasts its absence."""

    def __init__(self, url: str, queues: Sequence[str], stop: Stop) -> None:
        self._queues, self._stop = queues, stop
        # Each transport takes the options it knows: no wait for a broker is without end.
        limits = ("read_timeout", "write_timeout", "socket_timeout", "socket_connect_timeout")
        options = {"confirm_publish": True, **dict.fromkeys(limits, BROKER_TIMEOUT_S)}
        self._connection = Connection(url, connect_timeout=BROKER_TIMEOUT_S, transport_options=options)
        self._channel: Any = None

    def publish(self, message: Message) -> bool:
        """Publish ``message`` as soon as the broker is there; return False where a stop came first.

        One whose confirmation is lost is published again: a duplicate, as from any publisher.
        """

        def work() -> bool:
            Producer(self._channel, auto_declare=False).publish(
                message.body,
                routing_key=message.queue,
                content_type="application/json",
                content_encoding="utf-8",
                headers=message.headers,
                timestamp=int(message.at.timestamp()),
                delivery_mode="persistent",
                confirm_timeout=BROKER_TIMEOUT_S,
            )
            return True

        return self._call(work) or False

    def backlog(self) -> int:
        """Return how many messages wait in the queues, which are there from then on."""
        return self._call(lambda: sum(map(self._size, self._queues))) or 0

    def close(self) -> None:
        self._connection.release()

    def _call(self, work: Callable[[], Result]) -> Result | None:
        """Return what ``work`` does, tried until the broker is there; None where a stop came first."""
        connection, wait_s = self._connection, 1.0
        errors = connection.connection_errors + connection.channel_errors
        while True:
            try:
                if self._channel is None:
                    self._channel = connection.channel()
                    sum(map(self._size, self._queues))
                return work()
            except (*errors, *connection.recoverable_connection_errors) as error:
                self._channel = None
                log.warning("simulator_broker_away", reason=repr(error), retry_in_s=wait_s)
            with suppress(*errors):
                connection.collect()
            self._stop.wait(wait_s)
            if self._stop.asked:
                return None
            wait_s = min(wait_s * 2, BROKER_WAIT_MAX_S)

    def _size(self, queue: str) -> int:
        """Return how many messages wait in ``queue``; declare it, plain, where it is missing."""
        # Its owner may have declared it with arguments of its own; in Redis a queue is there when not empty.
        if self._connection.transport.driver_type == "amqp":
            try:
                return int(self._channel.queue_declare(queue, passive=True).message_count)
            except NotFound:
                self._channel = self._connection.channel()
        return int(self._channel.queue_declare(queue, durable=True, auto_delete=False).message_count)


def run(
    settings: Settings, *, rate: float, count: int, seed: int | None, assets: int, room: int, faults: Faults
) -> None:
    """Publish a market of so many ``assets``, ``rate`` messages a second, until stopped.

    Ends after ``count`` messages (0: never), pauses while ``room`` or more wait in the queues. The same
    ``seed`` makes the same ids and, at the same times, the same market; None never repeats itself.
    """
    stop = Stop()
    publisher = Publisher(settings.broker, settings.queues, stop)
    positions = _present(settings, publisher, stop)
    now = datetime.now(UTC)
    feed = Feed(random.Random(seed), settings.queues, now, assets=assets, faults=faults)  # noqa: S311 - no secret
    feed.restore(positions, now)
    log.info("simulator_started", rate=rate, assets=assets, positions=positions and len(positions))
    published, due, check_at, paused = 0, time.monotonic(), 0.0, False
    while not stop.asked and (not count or published + feed.held < count):
        if time.monotonic() >= check_at:
            backlog, check_at = publisher.backlog(), time.monotonic() + BACKLOG_CHECK_S
            if paused is not (backlog >= room):
                paused = not paused
                log.info("simulator_paused" if paused else "simulator_resumed", backlog=backlog)
        if paused:
            stop.wait(BACKLOG_CHECK_S)
            continue
        calm = count > 0 and published + feed.held + 1 >= count
        published += publisher.publish(feed.next(datetime.now(UTC), faults=not calm))
        # What a pause cost is not made up for.
        due = max(due + 1 / rate, time.monotonic() - 1)
        stop.wait(due - time.monotonic())
    for message in feed.drain():
        if not publisher.publish(message):
            break
        published += 1
    publisher.close()
    log.info("simulator_stopped", published=published)


def _present(settings: Settings, publisher: Publisher, stop: Stop) -> list[Position] | None:
    """Return the positions the service holds once it has worked off its queues; None if it is away."""
    end, behind = time.monotonic() + SERVICE_LIMIT_S, False
    while not stop.asked:
        backlog = publisher.backlog()
        # What was taken from the queues last may still be in work.
        stop.wait(1)
        positions = _fetch(settings)
        if positions is not None and not backlog:
            return positions
        if positions is None and time.monotonic() > end:
            log.warning("simulator_service_away", goes_on="from flat books")
            break
        if positions is not None and not behind:
            behind = True
            log.info("simulator_waits", backlog=backlog)
    return None


def _fetch(settings: Settings) -> list[Position] | None:
    key = settings.api_key.get_secret_value() if settings.api_key else ""
    with Client(f"http://127.0.0.1:{settings.port}", key, retries=0) as client:
        try:
            return list(client.positions())
        except ClientError as error:
            log.debug("simulator_service_silent", reason=repr(error))
            return None
