"""What the neighbours publish: executions, exchange reports, and both, over some assets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any, Literal
from uuid import UUID

import amqp

from tests.integration.support import EXECUTION_QUEUE, POSITION_QUEUE, channel_of, execution

Kind = Literal["executions", "reports", "mix"]
KINDS: tuple[Kind, ...] = ("executions", "reports", "mix")
Message = tuple[str, dict[str, Any]]
_FROM = datetime(2025, 1, 15, 10, tzinfo=UTC)


def picker(random: Random, assets: int, *, skewed: bool) -> Callable[[], str]:
    """Return what names the next asset: each as often, or one in a few far more often than the rest."""
    if not skewed:
        return lambda: f"A{random.randrange(assets)}USDT"
    # Half of all events are for a fiftieth of the assets.
    hot = max(1, assets // 50)
    return lambda: f"A{random.randrange(hot if random.random() < 0.5 else assets)}USDT"


def messages(
    kind: Kind, number: int, assets: int, *, skewed: bool = False, first: int = 0
) -> Iterator[Message]:
    """Yield messages in the order of their times; 90 of 100 of a mix are reports, as from a live venue.

    A report says what the fills before it add up to, as long as ``first`` is 0.
    """
    random = Random(first + 1)
    pick = picker(random, assets, skewed=skewed)
    sizes: defaultdict[str, Decimal] = defaultdict(Decimal)
    for each in range(first, first + number):
        asset, price = pick(), random.randint(1000, 9000)
        at = _FROM + timedelta(milliseconds=each)
        if kind == "executions" or (kind == "mix" and random.random() < 0.1):
            quantity = random.randint(1, 900)
            side = random.choice(["Buy", "Sell"])
            sizes[asset] += Decimal(quantity if side == "Buy" else -quantity) / 1000
            yield (
                EXECUTION_QUEUE,
                execution(
                    asset,
                    side,
                    f"0.{quantity:03d}",
                    f"{price / 100}",
                    number=each,
                    executed_at=at.isoformat(),
                    execution_fees=f"0.00{random.randint(1, 99)}",
                    # Random, as the exchange's are: a ledger of many finds no two in one place.
                    execution_id=str(UUID(int=random.getrandbits(128))),
                    order_id=str(UUID(int=random.getrandbits(128))),
                ),
            )
        else:
            size = sizes[asset] if kind == "mix" else Decimal(random.randint(-900, 900)) / 1000
            yield POSITION_QUEUE, report(asset, size, price / 100, at, number=each)


def report(asset: str, size: Decimal, price: float, at: datetime, *, number: int) -> dict[str, Any]:
    """Return an exchange report as the gateway sends it."""
    return {
        "event_type": "position",
        "channel": "position",
        "data": {
            "symbol": asset,
            "side": "Buy" if size > 0 else "Sell" if size else "",
            "size": str(abs(size)),
            "avgPrice": None,
            "unrealisedPnl": f"{number % 1000 / 100}",
            "markPrice": f"{price}",
            "mode": "one-way",
            "timestamp": at.isoformat(),
        },
        "trace_id": f"trace-{asset}-{number}",
    }


def published(url: str, of: Iterator[Message]) -> int:
    """Publish messages, persistent, and return how many once the broker has confirmed them."""
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        for queue in (POSITION_QUEUE, EXECUTION_QUEUE):
            channel.queue_declare(queue, durable=True, auto_delete=False)
        channel.confirm_select()
        confirmed = [0]
        channel.events["basic_ack"].add(lambda tag, _multiple: confirmed.append(tag))
        number = 0
        for queue, message in of:
            number += 1
            channel.basic_publish(
                amqp.Message(json.dumps(message).encode(), content_type="application/json", delivery_mode=2),
                routing_key=queue,
            )
        while max(confirmed) < number:
            connection.drain_events(timeout=30)
    return number
