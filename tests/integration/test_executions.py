"""The ledger behind a position, page by page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from sqlalchemy import Engine, text

from positions.domain.events import Mode, PositionKey
from positions.errors import NotFound
from positions.messages.outbound import ExecutionView, object_of
from positions.queries.executions import executions
from positions.storage import ledger
from tests.integration.support import apply, execution

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
START = datetime(2025, 1, 15, 10, tzinfo=UTC)


def paged(engine: Engine, key: PositionKey = BTC, **asked: Any) -> list[list[ExecutionView]]:
    """Return all pages."""
    pages, after = [], None
    while True:
        with engine.connect() as connection:
            page = executions(connection, key, **{"limit": 100, **asked, "after": after})
        pages.append(list(page.executions))
        after = page.next
        if after is None:
            return pages


def test_pages_hold_every_entry_once_the_newest_first(engine: Engine) -> None:
    random = Random(1)
    # Many of one time, so that pages end among them; stored in another order than they happened.
    messages = [
        execution("BTCUSDT", "Buy", "1", "10", number=each, executed_at=_at(each // 5)) for each in range(40)
    ]
    random.shuffle(messages)
    apply(engine, [*messages, execution("ETHUSDT", "Buy", "1", "10")])
    pages = paged(engine, limit=7)
    assert [len(page) for page in pages] == [7, 7, 7, 7, 7, 5]
    found = [entry for page in pages for entry in page]
    assert [entry.executed_at for entry in found] == sorted(
        (entry.executed_at for entry in found), reverse=True
    )
    assert {entry.key for entry in found} == {f"exec:BTCUSDT-{each}" for each in range(40)}
    assert len(paged(engine, limit=40)) == 1


def test_a_range_includes_both_of_its_ends(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "10", number=each) for each in range(10)])
    bounds: dict[str, Any] = {"from_": START + timedelta(seconds=3), "to": START + timedelta(seconds=6)}
    pages = paged(engine, limit=3, **bounds)
    assert [[(entry.executed_at - START).seconds for entry in page] for page in pages] == [[6, 5, 4], [3]]


def test_every_kind_of_entry_is_shown_with_all_that_is_known_of_it(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Sell", "0.50", "100.10", execution_fees="0.01", seq=7)])
    report = {"symbol": "BTCUSDT", "side": "Sell", "size": "2", "avgPrice": "105", "timestamp": _at(1)}
    apply(engine, [{"event_type": "position", "data": report}])
    ((adjustment, trade),) = paged(engine)
    assert (adjustment.kind, adjustment.size_after, adjustment.quantity) == (
        "adjustment",
        -2,
        Decimal("-1.5"),
    )
    shown = object_of(trade)
    assert shown.pop("id") != adjustment.id
    assert str(shown.pop("recorded_at")).endswith("Z")
    assert shown == {
        "key": "exec:BTCUSDT-0",
        "kind": "trade",
        "leg": "net",
        "quantity": "-0.5",
        "price": "100.1",
        "fee": "0.01",
        "executed_at": "2025-01-15T10:00:00Z",
        "time_source": "event",
        "venue_seq": 7,
        "order_id": "order-BTCUSDT-0",
        "exec_type": "Trade",
        "trace_id": "trace-BTCUSDT-0",
        "size_after": None,
    }


def test_a_report_without_a_time_of_its_own_is_shown_as_such(engine: Engine) -> None:
    data = {"symbol": "BTCUSDT", "side": "Buy", "size": "2", "avgPrice": "105"}
    apply(engine, [{"event_type": "position", "data": data, "trace_id": "t-1"}])
    assert {entry.trace_id for (*page,) in paged(engine) for entry in page} == {"t-1"}
    assert {(entry.kind, entry.time_source) for (*page,) in paged(engine) for entry in page} == {
        ("report", "arrival"),
        ("adjustment", "arrival"),
    }


def test_an_unknown_position_has_no_ledger(engine: Engine) -> None:
    with pytest.raises(NotFound, match="BTCUSDT"):
        paged(engine)


def test_a_page_deep_in_a_long_ledger_is_found_by_the_index(engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "10"), execution("ETHUSDT", "Buy", "1", "10")])
    with engine.begin() as connection:
        connection.execute(
            text("""
                INSERT INTO ledger (position_id, key, kind, leg, quantity, price, fee, executed_at,
                    time_source, exec_type, trace_id)
                SELECT p.id, p.asset || n, 'trade', 'net', 1, 1, 0,
                    '2025-01-15Z'::timestamptz + n * interval '1s', 'event', 'Trade', ''
                FROM positions p, generate_series(1, 20000) n
            """)
        )
        connection.execute(text("ANALYZE ledger"))
        found = connection.execute(text("SELECT id FROM positions WHERE asset = 'BTCUSDT'")).scalar_one()
        plan = connection.exec_driver_sql(
            "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + ledger._PAGE,
            {
                "position_id": found,
                "from": ledger.FIRST,
                "to": START,
                "until": START,
                "id": 5,
                "limit": 100,
            },
        ).scalar_one()
    top = plan[0]["Plan"]
    assert "ledger_position_id_executed_at_idx" in str(top)
    assert top["Actual Rows"] == 100
    assert top["Shared Hit Blocks"] + top["Shared Read Blocks"] < 100


def _at(second: int) -> str:
    return (START + timedelta(seconds=second)).isoformat()
