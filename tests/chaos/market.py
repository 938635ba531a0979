"""What is published in a chaos run, made from a seed, and what must come of it.

The expected figures are computed here anew from docs/reference/rules.md, in fractions: nothing of the
service's own domain is called.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from random import Random
from typing import Any, NamedTuple

from tests.integration.support import EXECUTION_QUEUE, ORDER_QUEUE, POSITION_QUEUE

BEGINNING = datetime(2025, 1, 15, 10, tzinfo=UTC)
KILLER, ASSASSIN = "KILLER", "ASSASSIN"
"""What tests.integration.poisoned_app dies of: a process of the pool, or the whole worker."""
TOLERANCE = Fraction(1, 10**15)
"""Quotients are rounded at the 36th decimal, and figures at the 18th."""


class Message(NamedTuple):
    """One message; equal ones are duplicates."""

    queue: str
    body: bytes


class Fill(NamedTuple):
    """A fill, in the order in which fills are folded."""

    at: datetime
    key: str
    quantity: Fraction
    notional: Fraction
    fee: Fraction
    funding: Fraction = Fraction(0)


@dataclass
class Expected:
    """What a position must be; None: not computed here."""

    size: Fraction = Fraction(0)
    average: Fraction | None = None
    gross: Fraction = Fraction(0)
    fees: Fraction = Fraction(0)
    funding: Fraction = Fraction(0)
    realized: Fraction = Fraction(0)
    unrealized: Fraction | None = None
    mark: Fraction | None = None


class Takeover(NamedTuple):
    """The newest reported size and average, which overrule the fills before it."""

    at: datetime
    size: Fraction
    average: Fraction


@dataclass
class _Leg:
    size: Fraction = Fraction(0)
    cost: Fraction = Fraction(0)
    gross: Fraction = Fraction(0)
    fees: Fraction = Fraction(0)
    funding: Fraction = Fraction(0)

    def overrule(self, taken: Takeover) -> None:
        self.size, self.cost = taken.size, abs(taken.size) * taken.average


def _fold(fills: Sequence[Fill], *, opens: int | None = None, taken: Takeover | None = None) -> _Leg:
    """Fold ``fills``; ``opens`` is the sign of a hedge leg, which never goes through zero."""
    leg = _Leg()
    for fill in sorted(fills, key=lambda each: (each.at, each.key)):
        if taken and taken.at < fill.at:
            leg.overrule(taken)
            taken = None
        leg.fees += fill.fee
        leg.funding += fill.funding
        quantity, notional = fill.quantity, fill.notional
        if not quantity:
            continue
        reduces = leg.size * quantity < 0 or (opens is not None and quantity * opens < 0)
        if reduces:
            closed = min(abs(quantity), abs(leg.size))
            if closed:
                out = leg.cost * closed / abs(leg.size)
                gain = notional * closed / abs(quantity) - out
                sign = 1 if leg.size > 0 else -1
                leg.gross += gain * sign
                leg.cost -= out
                leg.size -= closed * sign
            if opens is not None:
                continue
            notional = notional * (abs(quantity) - closed) / abs(quantity)
            quantity -= closed * (1 if quantity > 0 else -1)
        if quantity:
            leg.size += quantity
            leg.cost += notional
    if taken:
        leg.overrule(taken)
    return leg


@dataclass
class Market:
    """What is published, and what it makes of each position."""

    messages: list[Message] = field(default_factory=list)
    """In the order of publication, duplicates among them."""
    poison: dict[bytes, tuple[str, ...]] = field(default_factory=dict)
    """Bodies that belong into quarantine, and how the reason for each may begin."""
    keys: set[str] = field(default_factory=set)
    """Ledger keys of all fills and order reports."""
    positions: dict[tuple[str, str], Expected] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class _Maker:
    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.good: list[Message] = []
        self.keys: set[str] = set()
        self.fills: defaultdict[tuple[str, str, str], list[Fill]] = defaultdict(list)
        self.told: dict[str, Expected] = {}
        self.marks: dict[str, tuple[datetime, Decimal]] = {}
        self.taken: dict[str, Takeover] = {}
        self._ticks: set[int] = set()

    def time(self) -> datetime:
        """Return a time that no other event has."""
        tick = 0
        while tick % 1000 == 0 or tick in self._ticks:  # at whole seconds there are others
            tick = self.random.randrange(10_000_000)
        self._ticks.add(tick)
        return BEGINNING + timedelta(milliseconds=tick)

    def amount(self, low: int, high: int, decimals: int) -> Decimal:
        return Decimal(self.random.randint(low, high)).scaleb(-decimals)

    def publish(self, queue: str, content: Mapping[str, Any]) -> None:
        self.good.append(Message(queue, json.dumps(content).encode()))

    def execution(self, number: int, asset: str, mode: str) -> None:
        at = self.time()
        if number % 10 == 0:
            at = BEGINNING + timedelta(seconds=number // 200)  # many at one time: the key decides
        side = self.random.choice(("Buy", "Sell"))
        quantity, price = self.amount(1, 90_000, 4), self.amount(100_000, 130_000, 3)
        fee = self.amount(-50, 900, 4)
        identity = f"x{number}-{self.random.getrandbits(32):x}"
        content: dict[str, Any] = {
            "event_type": "order_executed",
            "asset": asset,
            "side": side,
            "execution_quantity": str(quantity),
            "execution_price": str(price),
            "execution_fees": str(fee),
            "executed_at": at.isoformat(),
            "order_id": f"o{number}",
            "execution_id": identity,
            "trace_id": f"trace-{identity}",
        }
        leg = "net"
        if mode == "hedge":
            index = self.random.choice((1, 2))
            leg, content["positionIdx"] = ("long", "short")[index - 1], index
        key = f"exec:{identity}"
        sign = 1 if side == "Buy" else -1
        if number % 97 == 0:
            content["exec_type"] = "Funding"
            fill = Fill(at, key, Fraction(0), Fraction(0), Fraction(0), -Fraction(fee))
        else:
            fill = Fill(at, key, Fraction(quantity) * sign, Fraction(quantity * price), Fraction(fee))
        self.keys.add(key)
        self.fills[asset, mode, leg].append(fill)
        self.publish(EXECUTION_QUEUE, content)

    def order(self, number: int, asset: str) -> None:
        """One order in three reports, each cumulative."""
        side = self.random.choice(("Buy", "Sell"))
        sign, identity = (1 if side == "Buy" else -1), f"cum{number}"
        quantity, paid, before = Decimal(0), Decimal(0), Fraction(0)
        start = self.amount(100_000, 130_000, 3)
        for step in range(3):
            at = self.time()
            added = self.amount(10_000, 20_000, 4)
            average = start + self.amount(0, 900, 3)
            extra = self.amount(0, 900, 4)
            quantity, paid = quantity + added, paid + extra
            order = {
                "order_id": identity,
                "symbol": asset,
                "side": side,
                "filled_quantity": str(quantity),
                "average_price": str(average),
                "fees": str(paid),
                "executed_at": at.isoformat(),
            }
            kind = "filled" if step == 2 else "partially_filled"
            key = f"order:{identity}:{format(quantity.normalize(), 'f')}"
            self.keys.add(key)
            notional = Fraction(quantity * average)
            fill = Fill(at, key, Fraction(added) * sign, notional - before, Fraction(extra))
            before = notional
            self.fills[asset, "one-way", "net"].append(fill)
            self.publish(ORDER_QUEUE, {"event_type": kind, "order": order, "trace_id": f"trace-{key}"})

    def price(self) -> Decimal:
        return self.amount(100_000, 130_000, 3)

    def size(self) -> Decimal:
        return self.amount(500_000, 900_000, 4) * self.random.choice((1, -1))

    def report(self, asset: str, at: datetime, **figures: Decimal) -> None:
        size = figures.pop("size", None)
        data: dict[str, Any] = {"symbol": asset, "updatedTime": round(at.timestamp() * 1000)}
        if size is not None:
            data |= {"size": str(abs(size)), "side": "Buy" if size > 0 else "Sell"}
        data |= {name: str(value) for name, value in figures.items()}
        if (mark := figures.get("markPrice")) and (asset not in self.marks or at > self.marks[asset][0]):
            self.marks[asset] = at, mark
        identity = f"r-{asset}-{data['updatedTime']}"
        content = {"event_type": "position", "event_id": identity, "data": data, "trace_id": identity}
        self.publish(POSITION_QUEUE, content)

    def told_only(self, asset: str) -> None:
        """A position that only exchange reports tell of: of each field the newest that has it decides.

        All reports but the oldest have one field, or two, that no other newer one has: each shows.
        """
        times = sorted(self.time() for _ in range(5))
        size, average, mark = self.size(), self.price(), self.price()
        unrealized, realized = self.amount(-90_000, 90_000, 4), self.amount(-90_000, 90_000, 4)
        self.report(
            asset,
            times[0],
            size=self.size(),
            avgPrice=self.price(),
            markPrice=self.price(),
            unrealisedPnl=self.amount(-90_000, 90_000, 4),
            cumRealisedPnl=self.amount(-90_000, 90_000, 4),
        )
        self.report(asset, times[1], size=size, avgPrice=average)
        self.report(asset, times[2], cumRealisedPnl=realized)
        self.report(asset, times[3], markPrice=mark)
        self.report(asset, times[4], unrealisedPnl=unrealized)
        self.told[asset] = Expected(
            size=Fraction(size),
            average=Fraction(average),
            realized=Fraction(realized),
            unrealized=Fraction(unrealized),
            mark=Fraction(mark),
        )

    def marked(self, asset: str) -> None:
        """Two marks, of which the newer decides."""
        for _ in range(2):
            self.report(asset, self.time(), markPrice=self.price())

    def overruled(self, asset: str) -> None:
        """Two reports of a size and average the fills know nothing of; what came after them folds on top."""
        for at in sorted(self.time() for _ in range(2)):
            size, average = self.size(), self.price()
            self.report(asset, at, size=size, avgPrice=average, markPrice=self.price())
            self.taken[asset] = Takeover(at, Fraction(size), Fraction(average))

    def expected(self) -> Iterator[tuple[tuple[str, str], Expected]]:
        for asset, told in self.told.items():
            yield (asset, "one-way"), told
        for asset, mode in {(asset, mode) for asset, mode, _ in self.fills}:
            if mode == "hedge":
                legs = [_fold(self.fills[asset, mode, "long"], opens=1)]
                legs.append(_fold(self.fills[asset, mode, "short"], opens=-1))
            else:
                legs = [_fold(self.fills[asset, mode, "net"], taken=self.taken.get(asset))]
            found = Expected(
                size=sum((leg.size for leg in legs), Fraction(0)),
                gross=sum((leg.gross for leg in legs), Fraction(0)),
                fees=sum((leg.fees for leg in legs), Fraction(0)),
                funding=sum((leg.funding for leg in legs), Fraction(0)),
            )
            found.realized = found.gross - found.fees + found.funding
            opened = [leg for leg in legs if leg.size]
            if len(opened) == 1:
                found.average = opened[0].cost / abs(opened[0].size)
            if mode == "one-way" and asset in self.marks:
                found.mark = Fraction(self.marks[asset][1])
                if not found.size:
                    found.unrealized = Fraction(0)
                elif found.average is not None:
                    found.unrealized = found.size * (found.mark - found.average)
            yield (asset, mode), found


def _poison(number: int) -> dict[bytes, tuple[str, ...]]:
    """Return messages that can never be applied, each another one, and how the reason for it may begin."""
    execution = {"event_type": "order_executed", "asset": "BADUSDT", "side": "Buy", "execution_price": "1"}
    made = {}
    lost = ("failed 3 times alone: WorkerLostError", "begun 3 times apart")
    for each in range(number):
        fatal = {**execution, "execution_quantity": "1", "execution_id": f"bad-{each}"}
        contents: list[tuple[Any, tuple[str, ...]]] = [
            (b'{"event_type": "order_exec' + str(each).encode(), ("not JSON",)),
            (
                b'{"event_type": "order_executed", "asset": "BADUSDT", "execution_price": NaN}%d' % each,
                ("NaN",),
            ),
            ({"event_type": "order_teleported", "number": each}, ("unknown event type",)),
            ({**execution, "execution_quantity": f"1e{30 + each}"}, ("more than 20 integer digits",)),
            (b"\xff\xfe\x00" + str(each).encode(), ("not JSON",)),
            ({**execution, "execution_quantity": "-1", "number": each}, ("must be above 0",)),
        ]
        if each < 2:
            contents.append(({**fatal, "asset": KILLER}, lost))
        if each < 1:
            contents.append(({**fatal, "asset": ASSASSIN}, lost[1:]))
        for content, reasons in contents:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            made[body] = reasons
    return made


def make(seed: int, executions: int) -> Market:
    """Return a market of so many executions, and of reports beside them, shuffled and partly doubled."""
    maker = _Maker(seed)
    one_way = [f"A{number}USDT" for number in range(60)]
    hedged = [f"H{number}USDT" for number in range(20)]
    for number in range(executions):
        if maker.random.random() < 0.2:
            maker.execution(number, maker.random.choice(hedged), "hedge")
        else:
            maker.execution(number, maker.random.choice(one_way), "one-way")
    orders = executions // 50
    ordered = [f"O{number}USDT" for number in range(15)]
    for number in range(orders):
        maker.order(number, ordered[number % len(ordered)])
    for number in range(15 + executions // 200):
        maker.told_only(f"R{number}USDT")
    for asset in (*one_way, *ordered):
        if any(key[0] == asset for key in maker.fills):
            maker.marked(asset)
    for asset in one_way[20:32]:
        if (asset, "one-way", "net") in maker.fills:
            maker.overruled(asset)
    poison = _poison(max(2, executions // 4000))
    doubled = maker.random.sample(maker.good, len(maker.good) // 20)
    messages = [*maker.good, *doubled, *(Message(EXECUTION_QUEUE, body) for body in poison)]
    maker.random.shuffle(messages)
    return Market(
        messages=messages,
        poison=poison,
        keys=maker.keys,
        positions=dict(maker.expected()),
        counts={
            "executions": executions,
            "order reports": orders * 3,
            "exchange reports": len(maker.good) - executions - orders * 3,
            "duplicates": len(doubled),
            "poison": len(poison),
        },
    )
