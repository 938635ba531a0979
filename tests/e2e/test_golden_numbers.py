"""The worked numbers of the domain rules, through the queue and the API, to the last digit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest

from tests.e2e.conftest import Service
from tests.integration.support import EXECUTION_QUEUE, ORDER_QUEUE, POSITION_QUEUE, execution, publish

START = datetime(2025, 1, 15, 10, tzinfo=UTC)


def fills(asset: str, *texts: str, **fields: Any) -> list[dict[str, Any]]:
    """Return messages from texts like ``"B .5@5000 f1.375"``."""
    made = []
    for number, text in enumerate(texts):
        side, rest, *fee = text.split()
        quantity, price = rest.split("@")
        fees = fee[0][1:] if fee else "0"
        place = {name: values[number] for name, values in fields.items()}
        made.append(
            execution(
                asset,
                {"B": "Buy", "S": "Sell"}[side],
                quantity,
                price,
                execution_fees=fees,
                number=number,
                **place,
            )
        )
    return made


def mark(asset: str, price: str, **place: Any) -> dict[str, Any]:
    at = (START + timedelta(days=1)).isoformat()
    return {"event_type": "position", "data": {"symbol": asset, "markPrice": price, "timestamp": at, **place}}


ONE = ("B .5@5000 f1.375", "B .3@6000 f.99")
TWO = (*ONE, "S .2@7000 f.77")
THREE = (*TWO, "S .6@5200 f1.716")


@pytest.mark.parametrize(
    ("number", "texts", "price", "size", "average", "net", "unrealized"),
    [
        (1, ONE, "7500", "0.8", "5375", "-2.365", "1700"),
        (2, TWO, "7500", "0.6", "5375", "321.865", "1275"),
        (3, THREE, "7500", "0", None, "215.149", "0"),
        (4, ("B 1@100 f.055", "S 1.5@110 f.09075"), "105", "-0.5", "110", "9.85425", "2.5"),
        (5, ("S .1@50000 f5", "B .2@40000 f10"), "41000", "0.1", "40000", "985", "100"),
        (6, ("B .1@50000 f5", "S .05@60000 f2.5"), "60000", "0.05", "50000", "492.5", "500"),
        (7, ("B 1@10000 f-1", "S 1@10000 f5.5"), "10000", "0", None, "-4.5", "0"),
        (8, ("S 1@100", "S 1@110"), "100", "-2", "105", "0", "10"),
        (12, ("B 1@48000", "B .5@50000"), "48000", "1.5", "48666.666666666666666667", "0", "-1000"),
        (13, ("B 2@50000", "S .5@51000 f25.5"), "51000", "1.5", "50000", "474.5", "1500"),
    ],
)
def test_one_way(
    service: Service,
    number: int,
    texts: tuple[str, ...],
    price: str,
    size: str,
    average: str | None,
    net: str,
    unrealized: str,
) -> None:
    asset = f"GOLD{number}USDT"
    messages = [(EXECUTION_QUEUE, each) for each in fills(asset, *texts)]
    publish(service.broker, [*messages, (POSITION_QUEUE, mark(asset, price))])
    found = service.position(asset, size=size, realized_pnl=net, current_price=price)
    assert (found["average_entry_price"], found["unrealized_pnl"]) == (average, unrealized)


def test_9_funding_is_no_trade(service: Service) -> None:
    funding = {
        "topic": "execution",
        "data": [
            {
                "symbol": "GOLD9USDT",
                "side": "Sell",
                "execType": "Funding",
                "execFee": "2.10",
                "execQty": "0.4",
                "execPrice": "5500",
                "execId": "gold-9-funding",
                "execTime": "1736935201000",
            }
        ],
    }
    trades = fills("GOLD9USDT", "S .4@6000 f1.32", "B .4@5000 f1.10")
    publish(service.broker, [(EXECUTION_QUEUE, each) for each in [*trades, funding]])
    service.position("GOLD9USDT", size="0", realized_pnl="395.48")


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_10_any_arrival_order(service: Service, order: tuple[int, ...]) -> None:
    asset = f"GOLD10-{''.join(map(str, order))}"
    arrived = fills(asset, "B 1@100", "S 1@110", "B 1@120")
    for each in order:
        publish(service.broker, [(EXECUTION_QUEUE, arrived[each])] * 2)
    publish(service.broker, [(POSITION_QUEUE, mark(asset, "120"))])
    found = service.position(asset, size="1", realized_pnl="10", current_price="120")
    assert (found["average_entry_price"], found["unrealized_pnl"]) == ("120", "0")


def test_11_hedge(service: Service) -> None:
    legs = fills(
        "GOLD11USDT",
        "B 100@50",
        "S 100@55",
        "S 50@54",
        "B 50@52",
        position_idx=[1, 1, 2, 2],
        mode=["hedge"] * 4,
    )
    publish(service.broker, [(EXECUTION_QUEUE, each) for each in legs])
    found = service.position("GOLD11USDT?mode=hedge", realized_pnl="600")
    assert (found["long_size"], found["short_size"], found["size"]) == ("0", "0", "0")


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0, 1, 1), (1, 1, 0)])
def test_cumulative_order_reports(service: Service, order: tuple[int, ...]) -> None:
    asset = f"GOLDA{''.join(map(str, order))}"
    reports: list[dict[str, Any]] = []
    for kind, filled, average, fees in [
        ("partially_filled", "0.3", "100", "0.03"),
        ("filled", "1.0", "107", "0.10"),
    ]:
        at = (START + timedelta(seconds=len(reports))).isoformat()
        body = {"id": asset, "order_id": asset, "asset": asset, "side": "Buy", "executed_at": at}
        figures = {"filled_quantity": filled, "average_price": average, "fees": fees, "is_dry_run": False}
        reports.append({"event_type": kind, "event_id": f"{asset}-{kind}", "order": {**body, **figures}})
    publish(service.broker, [(ORDER_QUEUE, reports[each]) for each in order])
    found = service.position(asset, size="1", realized_pnl="-0.1")
    assert found["average_entry_price"] == "107"
