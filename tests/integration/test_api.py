"""The REST API as its clients see it, on a real database, broker and cache."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from structlog.testing import capture_logs

from positions.settings import SettingsError, load
from positions.web import create_app, resources
from positions.web import positions as positions_routes
from tests.integration.api import KEY, Make, environ, problem, store


@pytest.fixture
def app(make_app: Make, database_url: str) -> Flask:
    return make_app(database_url)


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return _with_key(app)


def _with_key(app: Flask) -> FlaskClient:
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    return client


def _long(asset: str, size: str, price: str | None, **more: Any) -> dict[str, Any]:
    return {
        "asset": asset,
        "mode": "one-way",
        "size": Decimal(size),
        "long_size": Decimal(size),
        "average_entry_price": Decimal(1),
        "current_price": None if price is None else Decimal(price),
        "current_price_at": datetime.now(UTC),
        **more,
    }


def _short(asset: str, size: str, price: str, **more: Any) -> dict[str, Any]:
    return _long(asset, size, price, **{"long_size": Decimal(0), "short_size": Decimal(size), **more})


def _flat(asset: str, **more: Any) -> dict[str, Any]:
    return {"asset": asset, "mode": "one-way", "closed_at": datetime.now(UTC), **more}


# --- positions


def test_position_is_given_to_the_last_digit(client: FlaskClient, database_url: str) -> None:
    opened_at = datetime.now(UTC) - timedelta(minutes=90, seconds=30)
    store(
        database_url,
        _long(
            "BTCUSDT",
            "1.5",
            "50000.123456789012345678",
            current_price_source="report",
            id="0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
            average_entry_price=Decimal("48666.666666666666666667"),
            long_avg_price=Decimal("48666.666666666666666667"),
            unrealized_pnl=Decimal("2000.185185183518518517"),
            realized_pnl=Decimal("-0.000000000000000001"),
            opened_at=opened_at,
            last_updated=datetime(2025, 1, 15, 10, 0, 0, 120000, tzinfo=UTC),
            created_at=datetime(2025, 1, 15, 10, 0, tzinfo=UTC),
            version=7,
        ),
        _short("ETHUSDT", "-10", "5000.0123456789012345678"),
    )
    response = client.get("/api/v1/positions/btcusdt")
    assert response.status_code == 200
    assert response.content_type == "application/json"
    body = response.get_json()
    assert body.pop("current_price_at").endswith("Z")
    assert body.pop("opened_at") == opened_at.isoformat().replace("+00:00", "Z")
    assert body == {
        "id": "0b0e7e4c-3c43-4b55-9c5a-0c4a3f1f6a01",
        "asset": "BTCUSDT",
        "mode": "one-way",
        "size": "1.5",
        "average_entry_price": "48666.666666666666666667",
        "current_price": "50000.123456789012345678",
        "current_price_source": "report",
        "price_is_stale": False,
        "unrealized_pnl": "2000.185185183518518517",
        "realized_pnl": "-0.000000000000000001",
        "long_size": "1.5",
        "short_size": "0",
        "long_avg_price": "48666.666666666666666667",
        "short_avg_price": None,
        "unrealized_pnl_pct": "2.739979705730847286",
        "time_held_minutes": 90,
        "position_size_norm": "0.6",
        "version": 7,
        "last_updated": "2025-01-15T10:00:00.120000Z",
        "last_snapshot_at": None,
        "closed_at": None,
        "created_at": "2025-01-15T10:00:00Z",
    }


def test_position_is_looked_up_by_asset_and_mode(client: FlaskClient, database_url: str) -> None:
    hedge = _long("BTCUSDT", "2", "1", mode="hedge")
    store(database_url, _long("BTCUSDT", "1", "1"), hedge, _long("ETHUSDT", "3", "1", mode="hedge"))
    assert client.get("/api/v1/positions/BTCUSDT").get_json()["size"] == "1"
    assert client.get("/api/v1/positions/BtcUsdt/?mode=hedge").get_json()["size"] == "2"
    body = problem(client.get("/api/v1/positions/ETHUSDT"), 404, "not_found")
    assert body["detail"] == "There is no one-way position in ETHUSDT."


def test_list_can_be_narrowed_down(client: FlaskClient, database_url: str) -> None:
    level = _long("AVAX", "0", "1", mode="hedge", long_size=Decimal(1), short_size=Decimal(-1))
    store(
        database_url,
        _short("SOLUSDT", "-2", "1"),
        _long("BTCUSDT", "1.5", "1"),
        level,
        _flat("ETHUSDT"),
        _long("BTCUSDT", "0.5", None, mode="hedge"),
    )

    def found(query: str) -> list[tuple[str, str]]:
        body = client.get(f"/api/v1/positions?{query}").get_json()
        assert body["next_cursor"] is None
        assert body["count"] == len(body["positions"])
        return [(each["asset"], each["mode"]) for each in body["positions"]]

    avax, btc, btc_hedge = ("AVAX", "hedge"), ("BTCUSDT", "one-way"), ("BTCUSDT", "hedge")
    eth, sol = ("ETHUSDT", "one-way"), ("SOLUSDT", "one-way")
    assert found("") == [avax, btc_hedge, btc, eth, sol]
    assert found("asset=btcusdt") == [btc_hedge, btc]
    assert found("mode=hedge") == [avax, btc_hedge]
    assert found("size_min=0.5") == [btc_hedge, btc]
    assert found("size_min=0.500000000000000001&size_max=1.5") == [btc]
    assert found("size_max=-1") == [sol]
    assert found("status=open") == [avax, btc_hedge, btc, sol]
    assert found("status=closed") == [eth]
    assert found("status=closed&asset=BTCUSDT") == []


def test_pages_follow_each_other_without_gap_or_overlap(client: FlaskClient, database_url: str) -> None:
    names = [f"COIN-{number:02}" for number in range(5)]
    store(
        database_url, *(_long(name, "1", "2", mode=mode) for name in names for mode in ("one-way", "hedge"))
    )
    everything = client.get("/api/v1/positions").get_json()
    seen: list[str] = []
    cursor: str | None = ""
    pages = 0
    while cursor is not None:
        page = client.get(f"/api/v1/positions?limit=3&status=open{cursor and f'&cursor={cursor}'}").get_json()
        seen += [each["id"] for each in page["positions"]]
        cursor = page["next_cursor"]
        pages += 1
        if pages == 1:
            # What comes in behind the page turns up, what comes in before it does not repeat anything.
            store(database_url, _long("AAA", "1", "2"), _long("ZZZ", "1", "2"))
    assert pages == 4
    assert seen[:10] == [each["id"] for each in everything["positions"]]
    assert len(seen) == len(set(seen)) == 11


def test_list_without_limit_has_a_thousand_at_most(client: FlaskClient, database_url: str) -> None:
    store(database_url, *(_long(f"C{number:04}", "1", "2") for number in range(1000)))
    body = client.get("/api/v1/positions").get_json()
    assert (body["count"], body["next_cursor"]) == (1000, None)
    assert {each["position_size_norm"] for each in body["positions"]} == {"0.001"}
    store(database_url, _flat("D0000"))
    body = client.get("/api/v1/positions").get_json()
    assert body["count"] == 1000
    rest = client.get(f"/api/v1/positions?cursor={body['next_cursor']}").get_json()
    assert [each["asset"] for each in rest["positions"]] == ["D0000"]
    assert rest["next_cursor"] is None


# --- portfolio


def test_portfolio_with_more_positions_than_a_page_says_where_the_list_goes_on(
    client: FlaskClient, database_url: str
) -> None:
    store(database_url, *(_long(f"C{number:04}", "1", "2") for number in range(1001)))
    body = client.get("/api/v1/portfolio?include_positions=true").get_json()
    assert (body["open_positions_count"], len(body["positions"])) == (1001, 1000)
    rest = client.get(f"/api/v1/positions?cursor={body['next_cursor']}").get_json()
    assert [each["asset"] for each in rest["positions"]] == ["C1000"]
    assert rest["next_cursor"] is None


def test_portfolio_adds_up_exactly(make_app: Make, database_url: str) -> None:
    app = make_app(database_url, POSITION_MANAGER_PORTFOLIO_MAX_EXPOSURE_USDT="75396.8")
    client = _with_key(app)
    large = "12345678901234567890.123456789012345678"
    parts = {"realized_gross": 5, "fees_paid": 2, "funding_received": -1, "realized_adjustment": 3}
    store(
        database_url,
        _long("BTCUSDT", "1.5", "50100", unrealized_pnl=150, realized_pnl=5, **parts),
        _long("AVAX", "1", "10", mode="hedge", long_size=3, short_size=-2, unrealized_pnl=Decimal("-0.1")),
        _short("DOGEUSDT", "-2000", "0.1234", current_price_at=datetime.now(UTC) - timedelta(seconds=301)),
        _long("PEPE", "7", None, unrealized_pnl=Decimal("0.000000000000000001")),
        _flat("XRP", realized_pnl=Decimal("0.1")),
    )
    body = client.get("/api/v1/portfolio").get_json()
    assert body.pop("calculated_at").endswith("Z")
    assert body == {
        "total_exposure_usdt": "75446.8",
        "net_exposure_usdt": "74913.2",
        "portfolio_value_usdt": "74913.2",
        "total_unrealized_pnl_usdt": "149.900000000000000001",
        "total_realized_pnl_usdt": "5.1",
        "total_pnl_usdt": "155.000000000000000001",
        "total_realized_gross_usdt": "5",
        "total_fees_usdt": "2",
        "total_funding_usdt": "-1",
        "total_realized_adjustment_usdt": "3",
        "open_positions_count": 4,
        "long_positions_count": 3,
        "short_positions_count": 1,
        "by_asset": {
            "AVAX": _asset("50", "-0.1", "0", "1"),
            "BTCUSDT": _asset("75150", "150", "5", "1.5"),
            "DOGEUSDT": _asset("246.8", "0", "0", "-2000"),
            "PEPE": _asset(None, "0.000000000000000001", "0", "7"),
            "XRP": _asset("0", "0", "0.1", "0"),
        },
        "limit_exceeded": True,
        "unpriced_assets": ["PEPE"],
        "stale_assets": ["DOGEUSDT"],
    }
    store(database_url, _long("HUGE", large, large))
    assert client.get("/api/v1/portfolio?asset=huge").get_json()["total_exposure_usdt"] == (
        "152415787532388367504953515625666819427.831123554031397676527968299765279684"
    )


def _asset(exposure: str | None, unrealized: str, realized: str, size: str) -> dict[str, str | None]:
    return {
        "exposure": exposure,
        "unrealized": unrealized,
        "realized": realized,
        "exposure_usdt": exposure,
        "unrealized_pnl_usdt": unrealized,
        "realized_pnl_usdt": realized,
        "size": size,
    }


def test_portfolio_of_nothing_is_zeros(client: FlaskClient) -> None:
    body = client.get("/api/v1/portfolio?include_positions=true").get_json()
    assert body["total_exposure_usdt"] == body["total_pnl_usdt"] == body["net_exposure_usdt"] == "0"
    assert body["open_positions_count"] == 0
    assert body["by_asset"] == {}
    assert body["positions"] == body["unpriced_assets"] == body["stale_assets"] == []
    assert body["limit_exceeded"] is False


def test_portfolio_of_one_asset_with_its_positions(client: FlaskClient, database_url: str) -> None:
    store(database_url, _long("BTCUSDT", "1", "30"), _short("ETHUSDT", "-1", "10"))
    body = client.get("/api/v1/portfolio?include_positions=1&asset=ethusdt").get_json()
    assert body["net_exposure_usdt"] == "-10"
    assert list(body["by_asset"]) == ["ETHUSDT"]
    assert [(each["asset"], each["position_size_norm"]) for each in body["positions"]] == [
        ("ETHUSDT", "0.25")
    ]
    assert "positions" not in client.get("/api/v1/portfolio").get_json()


# --- who may ask, and for what


@pytest.mark.parametrize(
    "path", ["/api/v1/positions", "/api/v1/positions/BTCUSDT", "/api/v1/portfolio", "/api/v1/nothing", "/x"]
)
@pytest.mark.parametrize("key", [None, "", "open-sesam", "open-sesame ", "OPEN-SESAME", "öpen"])
def test_without_the_key_nothing_is_told(app: Flask, path: str, key: str | None) -> None:
    headers = {} if key is None else {"X-API-Key": key}
    response = app.test_client().get(path, headers=headers)
    problem(response, 401, "unauthorized")
    assert response.headers["WWW-Authenticate"].lower().startswith("apikey ")


def test_key_may_hold_any_character(make_app: Make, database_url: str) -> None:
    client = make_app(database_url, POSITION_MANAGER_API_KEY="schlüssel").test_client()
    # As a client sends it that writes UTF-8; a header is bytes.
    given = {"HTTP_X_API_KEY": "schlüssel".encode().decode("latin-1")}
    assert client.get("/api/v1/portfolio", environ_overrides=given).status_code == 200


def test_application_without_a_key_does_not_start(database_url: str) -> None:
    without = environ(database_url, "", "")
    del without["POSITION_MANAGER_API_KEY"]
    with pytest.raises(SettingsError, match=r"^POSITION_MANAGER_API_KEY: required"):
        create_app(load(without))


@pytest.mark.parametrize(
    ("path", "names"),
    [
        (
            "/api/v1/positions?limit=0&size_min=NaN&size_max=1e400&colour=red",
            "limit size_min size_max colour",
        ),
        ("/api/v1/positions?cursor=AAAA", "cursor"),
        ("/api/v1/positions/BTC_USDT", "asset"),
        ("/api/v1/positions/BTCUSDT?mode=Hedge&asset=ETHUSDT", "mode asset"),
        ("/api/v1/positions/%00", "asset"),
        ("/api/v1/positions?asset=%00", "asset"),
        ("/api/v1/positions?asset=%ff", "asset"),
        ("/api/v1/portfolio?include_positions=maybe&x", "include_positions x"),
    ],
)
def test_bad_parameters_are_each_named(client: FlaskClient, path: str, names: str) -> None:
    response = client.get(path)
    body = problem(response, 400, "bad_parameters")
    assert sorted(body["details"]) == sorted(names.split())
    assert all(name in body["detail"] for name in names.split())


def test_what_is_not_there_or_not_allowed_says_so(client: FlaskClient) -> None:
    problem(client.get("/api/v1/nothing"), 404, "not_found")
    problem(client.get("/api//v1/positions"), 404, "not_found")
    response = client.post("/api/v1/positions")
    problem(response, 405, "method_not_allowed")
    assert "GET" in response.headers["Allow"]


def test_oversized_requests_are_refused(client: FlaskClient) -> None:
    problem(client.post("/api/v1/positions", data=b"x" * 65_537), 413, "request_entity_too_large")
    body = problem(client.get("/api/v1/positions?" + "x" * 2049), 400, "bad_parameters")
    assert list(body["details"]) == ["query"]


def test_fault_of_ours_tells_nothing_of_the_inside(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the inside")

    monkeypatch.setattr(positions_routes, "positions", fail)
    with capture_logs() as lines:
        response = client.get("/api/v1/positions", headers={"X-Trace-Id": "t-500"})
    body = problem(response, 500, "internal_error")
    assert body["trace_id"] == "t-500"
    assert b"inside" not in response.data
    assert b"Traceback" not in response.data
    [failed] = [line for line in lines if line["event"] == "request_failed"]
    assert isinstance(failed["exc_info"], RuntimeError)


# --- what every answer carries


def test_answers_may_not_be_kept_framed_or_guessed_at(client: FlaskClient) -> None:
    for path in ("/health", "/api/v1/portfolio", "/api/v1/nothing"):
        headers = client.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"


def test_trace_id_is_taken_over_and_returned(client: FlaskClient) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = f"00-{trace}-00f067aa0ba902b7-01"
    assert client.get("/health", headers={"X-Trace-Id": "test-1"}).headers["X-Trace-Id"] == "test-1"
    assert client.get("/health", headers={"traceparent": parent}).headers["X-Trace-Id"] == trace
    made = client.get("/health", headers={"X-Trace-Id": "not a trace id"}).headers["X-Trace-Id"]
    assert len(made) == 32


def test_each_request_has_one_line_without_secrets(app: Flask) -> None:
    with capture_logs() as lines:
        answer = _with_key(app).get("/api/v1/positions/BTCUSDT?mode=hedge")
        app.test_client().get("/nothing?secret=hunter2", headers={"X-API-Key": "hunter2"})
    found, refused = [line for line in lines if line["event"] == "request_served"]
    assert found.pop("duration_ms") > 0
    assert found == {
        "event": "request_served",
        "log_level": "info",
        "method": "GET",
        "route": "/api/v1/positions/<asset>",
        "status": 404,
        "key_name": "default",
        "client": "127.0.0.1",
        "trace_id": answer.headers["X-Trace-Id"],
    }
    assert (refused["status"], refused["route"], refused["key_name"]) == (401, None, None)
    assert "hunter2" not in str(lines)
    assert KEY not in str(lines)


def test_requests_read_only(app: Flask) -> None:
    with app.app_context(), resources.resources().reads.connect() as connection:
        assert connection.exec_driver_sql("SHOW transaction_read_only").scalar_one() == "on"
        assert connection.exec_driver_sql("SHOW transaction_isolation").scalar_one() == "repeatable read"
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() != "0"
