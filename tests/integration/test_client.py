"""The client and the service, on a real database: each reads what the other says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import requests
from flask import Flask
from sqlalchemy import Engine
from werkzeug.serving import make_server

from positions.client import (
    ApiError,
    AssetTotals,
    Client,
    NotFound,
    Portfolio,
    Position,
    Unauthorized,
    Unavailable,
)
from positions.storage import quarantine
from positions.storage.database import transaction
from positions.storage.quarantine import Refused
from tests.integration.api import Make
from tests.integration.support import EXECUTION_QUEUE, apply, execution, executions, stored
from tests.services import PostgreSQL

KEY = "schlüssel"


@contextmanager
def _served(app: Flask) -> Iterator[str]:
    """Serve the API, and yield its address."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def address(make_app: Make, database_url: str) -> Iterator[str]:
    with _served(make_app(database_url, POSITION_MANAGER_API_KEY=KEY)) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, KEY) as client:
        yield client


def test_positions_are_those_that_are_stored(client: Client, engine: Engine) -> None:
    apply(engine, executions(60, assets=7))
    rows = sorted(stored(engine).items())
    for limit in (None, 3, 7):
        found = list(client.positions(limit=limit))
        assert [(each.asset, each.mode) for each in found] == [tuple(map(str, key)) for key, _ in rows]
        for each, (_, row) in zip(found, rows, strict=True):
            for name in ("id", "size", "average_entry_price", "realized_pnl", "version", "opened_at"):
                assert getattr(each, name) == row[name], name
    open_ones = {each.asset for each in client.positions(status="open")}
    assert open_ones == {key.asset for key, row in rows if row["size"]}
    longs = client.positions(size_min=Decimal("1e-18"))
    assert {each.asset for each in longs} == {key.asset for key, row in rows if row["size"] > 0}


def test_position_is_found_by_asset_and_mode_or_is_none(client: Client, engine: Engine) -> None:
    hedge = execution("BTCUSDT", "Sell", "2", "3.000000000000000001", mode="hedge", position_idx=2)
    apply(engine, [execution("ETHUSDT", "Buy", "1", "2"), hedge])
    found = client.position("btcusdt", "hedge")
    assert found is not None
    assert (found.size, found.short_avg_price) == (Decimal(-2), Decimal("3.000000000000000001"))
    assert found.created_at.utcoffset() is not None
    assert client.position("BTCUSDT") is None
    assert client.position("NOSUCH") is None


def test_portfolio_adds_up_what_the_positions_are(client: Client, engine: Engine) -> None:
    apply(engine, executions(60, assets=7))
    found = client.portfolio(include_positions=True)
    assert found.positions is not None
    assert found.total_realized_pnl_usdt == sum(each.realized_pnl for each in found.positions)
    assert {asset: each.size for asset, each in found.by_asset.items()} == {
        each.asset: each.size for each in found.positions
    }
    assert found.total_pnl_usdt == found.total_unrealized_pnl_usdt + found.total_realized_pnl_usdt
    one = client.portfolio("A1USDT")
    assert (list(one.by_asset), one.positions) == (["A1USDT"], None)


def test_exposure_and_pnl_are_the_portfolio_s(client: Client, engine: Engine) -> None:
    apply(engine, executions(60, assets=7))
    whole, exposure, pnl = client.portfolio(), client.exposure(), client.pnl()
    for part in (exposure, pnl):
        for each in fields(part):
            if each.name != "calculated_at":
                assert getattr(part, each.name) == getattr(whole, each.name), each.name
    assert pnl.total_realized_pnl_usdt != 0


def test_portfolio_of_nothing_is_zeros(client: Client) -> None:
    found = client.portfolio()
    assert (found.total_exposure_usdt, found.by_asset, found.stale_assets) == (0, {}, ())
    assert list(client.positions()) == []


def test_client_knows_every_field_of_the_answers(client: Client, address: str, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "2")])

    def answer(path: str) -> dict[str, Any]:
        got = requests.get(f"{address}/api/v1{path}", headers={"X-API-Key": KEY.encode()}, timeout=10)
        body: dict[str, Any] = got.json()
        return body

    def known(kind: Any) -> set[str]:
        return {each.name for each in fields(kind)}

    assert known(Position) == answer("/positions/BTCUSDT").keys()
    portfolio = answer("/portfolio?include_positions=true")
    assert known(Portfolio) == portfolio.keys()
    # The others are the same under the names of the older service.
    assert known(AssetTotals) < portfolio["by_asset"]["BTCUSDT"].keys()
    assert client.portfolio(include_positions=True).positions == tuple(client.positions())


def test_quarantined_message_is_read_and_replayed(client: Client, engine: Engine) -> None:
    bodies = [json.dumps(execution("BTCUSDT", "Buy", "1", "2", number=each)).encode() for each in range(3)]
    with transaction(engine) as connection:
        for body in bodies:
            refused = Refused(
                queue=EXECUTION_QUEUE, body=body, headers={"a": 1}, properties={}, reason="was not known"
            )
            quarantine.add(connection, [refused], now=datetime.now(UTC))
    found = list(client.quarantine(limit=2))
    assert [each.body.encode() for each in found] == bodies[::-1]
    assert (found[0].headers, found[0].times_seen, found[0].replayed_at) == ({"a": 1}, 1, None)
    assert client.replay(found[0].id).outcome == {"applied": 1}
    position = client.position("BTCUSDT")
    assert position is not None
    assert position.size == 1
    assert len(list(client.quarantine())) == 2
    assert next(client.quarantine(replayed=True)).replayed_at is not None
    with pytest.raises(NotFound):
        client.replay(2**40)


def test_what_stands_behind_a_position_is_read(client: Client, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "0.5", "100", number=60 * each) for each in range(5)])
    ledger = list(client.executions("BTCUSDT", limit=2))
    assert [(each.quantity, each.price) for each in ledger] == [(Decimal("0.5"), 100)] * 5
    past = client.position("BTCUSDT", as_of=ledger[-1].executed_at)
    assert past is not None
    assert past.size == Decimal("0.5")
    assert client.position("BTCUSDT", as_of=datetime(2020, 1, 1, tzinfo=UTC)) is None
    taken = client.take_snapshot("BTCUSDT")
    assert client.snapshots("BTCUSDT", to=taken.created_at) == [taken]
    validation = client.validate("BTCUSDT", fix_discrepancies=False)
    assert (validation.is_valid, validation.breaks) == (True, ())
    curve = client.history(taken.created_at - timedelta(minutes=1), interval=30)
    assert [each.total_realized_pnl_usdt for each in curve.points] == [0]
    assert curve.interval_seconds == 30


def test_health_needs_nothing_but_the_service(client: Client) -> None:
    found = client.health()
    assert (found["status"], found["database_connected"], found["queue_connected"]) == (
        "degraded",
        True,
        False,
    )


def test_wrong_key_is_unauthorized(address: str) -> None:
    with (
        Client(address, "guess") as client,
        pytest.raises(Unauthorized, match=r"^401 unauthorized: The API key is not known here"),
    ):
        client.portfolio()


def test_refusal_names_what_is_wrong_and_the_call(client: Client) -> None:
    with pytest.raises(ApiError) as caught:
        list(client.traced("where-to-look").positions(limit=0, mode="long"))
    error = caught.value
    assert (error.status, error.code, error.trace_id) == (400, "bad_parameters", "where-to-look")
    assert sorted(error.details) == ["limit", "mode"]
    with pytest.raises(ApiError, match="asset: must be a symbol"):
        client.position("X")


def test_service_without_its_database_is_unavailable_until_it_is_back(
    address: str, postgres: PostgreSQL
) -> None:
    # It says to come back in five seconds: longer than this client waits.
    with Client(address, KEY, max_wait_s=1) as client:
        assert client.position("BTCUSDT") is None
        postgres.kill()
        with pytest.raises(Unavailable) as caught:
            client.position("BTCUSDT")
        assert (caught.value.status, caught.value.code) == (503, "unavailable")
        assert caught.value.retry_after_s is not None
        assert client.health()["status"] == "unhealthy"
        postgres.start()
        assert client.position("BTCUSDT") is None
