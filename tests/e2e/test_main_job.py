"""The main job, from a neighbour's message to what the API answers and what other neighbours receive."""

from __future__ import annotations

import json
from typing import Any

import requests

from tests.e2e.conftest import Service
from tests.integration.support import EXECUTION_QUEUE, ORDER_QUEUE, POSITION_QUEUE, execution, publish

# As the contract prints it.
POSITION_MESSAGE: dict[str, Any] = {
    "event_type": "position",
    "channel": "position",
    "data": {
        "symbol": "BTCUSDT",
        "side": "Buy",
        "size": "1.5",
        "avgPrice": "50000.00",
        "unrealisedPnl": "150.00",
        "realisedPnl": "50.00",
        "markPrice": "50100.00",
        "mode": "one-way",
        "timestamp": "2025-01-15T10:00:00Z",
    },
    "trace_id": "test-trace-001",
}


def test_an_exchange_report_becomes_a_position_and_an_event(service: Service) -> None:
    publish(service.broker, [(POSITION_QUEUE, POSITION_MESSAGE)])
    found = service.position("BTCUSDT", size="1.5")
    assert found["average_entry_price"] == "50000"
    assert found["unrealized_pnl"] == "150"
    assert found["realized_pnl"] == "50"
    assert found["current_price"] == "50100"
    assert found["mode"] == "one-way"
    assert found["unrealized_pnl_pct"] == "0.2"
    assert found["version"] == 1
    message = service.received("position-manager.position_updated", "test-trace-001")
    body = json.loads(message.body)
    assert body["event_type"] == message.properties["type"] == "position_updated"
    assert body["trace_id"] == message.properties["application_headers"]["trace_id"] == "test-trace-001"
    assert message.properties["content_type"] == "application/json"
    assert message.properties["delivery_mode"] == 2
    assert message.properties["message_id"]
    assert body["position_id"] == found["id"]
    assert (body["size"], body["avg_price"], body["average_entry_price"]) == ("1.5", "50000", "50000")
    assert (body["update_source"], body["events_covered"]) == ("websocket", 1)
    assert float(body["unrealized_pnl_pct"]) == 0.2
    assert body["position"]["size"] == "1.5"


def test_executions_in_both_spellings_are_folded(service: Service) -> None:
    first = execution("ETHUSDT", "buy", "0.5", "5000", execution_fees="1.375", number=1)
    raw = {
        "topic": "execution",
        "data": [
            {
                "execId": "raw-1",
                "symbol": "ETHUSDT",
                "side": "Buy",
                "execQty": "0.3",
                "execPrice": "6000",
                "execFee": "0.99",
                "execType": "Trade",
                "closedSize": "0",
                "execTime": "1736935202000",
                "seq": 7,
            }
        ],
    }
    publish(service.broker, [(EXECUTION_QUEUE, first), (EXECUTION_QUEUE, raw), (EXECUTION_QUEUE, first)])
    found = service.position("ETHUSDT", size="0.8")
    assert found["average_entry_price"] == "5375"
    assert found["realized_pnl"] == "-2.365"


def test_order_reports_are_cumulative(service: Service) -> None:
    def report(kind: str, filled: str, average: str, fees: str, second: int) -> dict[str, Any]:
        at = f"2025-01-15T10:00:0{second}"
        order = {
            "id": "A",
            "order_id": "A",
            "asset": "SOLUSDT",
            "side": "Buy",
            "quantity": "1.0",
            "price": None,
            "status": kind,
            "filled_quantity": filled,
            "average_price": average,
            "fees": fees,
            "executed_at": at,
            "is_dry_run": False,
        }
        return {"event_id": f"{kind}-1", "event_type": kind, "timestamp": at, "trace_id": "A", "order": order}

    last, first = (
        report("filled", "1.0", "107", "0.10", 2),
        report("partially_filled", "0.3", "100", "0.03", 1),
    )
    dry = report("filled", "9", "1", "0", 3)
    dry["order"] |= {"is_dry_run": True, "order_id": "B"}
    publish(service.broker, [(ORDER_QUEUE, each) for each in (last, first, last, dry)])
    found = service.position("SOLUSDT", size="1", realized_pnl="-0.1")
    assert found["average_entry_price"] == "107"


def test_the_portfolio_adds_up(service: Service) -> None:
    publish(service.broker, [(POSITION_QUEUE, POSITION_MESSAGE)])
    service.position("BTCUSDT", size="1.5")
    figures = service.get("/api/v1/portfolio").json()
    assert figures["by_asset"]["BTCUSDT"]["exposure"] == "75150"
    assert figures["total_realized_pnl_usdt"]
    assert service.get("/health").json()["status"] == "healthy"


def test_without_the_key_there_is_no_answer(service: Service) -> None:
    answer = requests.get(f"{service.address}/api/v1/positions", timeout=10)
    assert answer.status_code == 401
    assert answer.headers["Content-Type"] == "application/problem+json"
