"""What stands behind a position, over REST: its ledger, its past, snapshots, validation, quarantine."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from flask.testing import FlaskClient
from sqlalchemy import Connection, Engine, update

from positions.errors import ConcurrencyConflict
from positions.handlers.validate_positions import Validator
from positions.queries import history
from positions.storage import quarantine, tables
from positions.storage.database import transaction
from positions.storage.quarantine import Refused
from positions.web import quarantine as quarantine_routes
from tests.integration.api import KEY, Make, problem
from tests.integration.support import EXECUTION_QUEUE, apply, execution

READ_KEY = "may-only-read"
START = datetime(2025, 1, 15, 10, tzinfo=UTC)


@pytest.fixture
def client(make_app: Make, database_url: str) -> FlaskClient:
    reader = {"name": "reader", "hash": sha256(READ_KEY.encode()).hexdigest(), "role": "read"}
    app = make_app(database_url, POSITION_MANAGER_API_KEYS=json.dumps([reader]))
    made = app.test_client()
    made.environ_base["HTTP_X_API_KEY"] = KEY
    return made


def test_ledger_tells_what_made_the_number(client: FlaskClient, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "0.5", "100", number=each) for each in range(5)])
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100", number=1)])
    seen: list[dict[str, str]] = []
    address = "/api/v1/positions/btcusdt/executions?limit=2"
    more = ""
    while True:
        page = client.get(address + more).get_json()
        assert page["count"] == len(page["executions"])
        seen += page["executions"]
        if page["next_cursor"] is None:
            break
        more = f"&cursor={page['next_cursor']}"
    assert [each["key"] for each in seen] == [f"exec:BTCUSDT-{number}" for number in (4, 3, 2, 1, 0)]
    assert seen[0]["quantity"] == "0.5"
    assert seen[0]["executed_at"] == "2025-01-15T10:00:04Z"
    between = client.get(
        "/api/v1/positions/BTCUSDT/executions",
        query_string={"from": "2025-01-15T10:00:01Z", "to": "2025-01-15T10:00:02Z"},
    ).get_json()
    assert [each["key"] for each in between["executions"]] == ["exec:BTCUSDT-2", "exec:BTCUSDT-1"]
    problem(client.get("/api/v1/positions/SOLUSDT/executions"), 404, "not_found")
    problem(client.get("/api/v1/positions/BTCUSDT/executions?cursor=1"), 400, "bad_parameters")


def test_position_and_portfolio_as_they_were(client: FlaskClient, engine: Engine) -> None:
    fills = [execution("BTCUSDT", "Buy", "1", str(100 + each), number=60 * each) for each in range(3)]
    apply(engine, fills)
    for minutes, size, average in ((0, "1", "100"), (1, "2", "100.5"), (9, "3", "101")):
        at = (START + timedelta(minutes=minutes, seconds=30)).isoformat()
        body = client.get("/api/v1/positions/BTCUSDT", query_string={"as_of": at}).get_json()
        assert (body["size"], body["average_entry_price"]) == (size, average)
        whole = client.get("/api/v1/portfolio", query_string={"as_of": at}).get_json()
        assert whole["by_asset"]["BTCUSDT"]["size"] == size
        wanted = {"as_of": at, "include_positions": "true"}
        with_positions = client.get("/api/v1/portfolio", query_string=wanted).get_json()
        assert with_positions["positions"] == [body]
    before = client.get("/api/v1/positions/BTCUSDT?as_of=2025-01-15T09:59:59")
    assert problem(before, 404, "not_found")["detail"] == "There was no one-way position in BTCUSDT."


def test_snapshot_is_taken_and_listed(client: FlaskClient, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", mode="hedge")])
    taken = client.post("/api/v1/positions/btcusdt/snapshot?mode=hedge", headers={"X-Trace-Id": "t-1"})
    assert taken.status_code == 201
    second = client.post("/api/v1/positions/BTCUSDT/snapshot", json={"mode": "hedge"})
    assert second.status_code == 201
    listed = client.get("/api/v1/positions/BTCUSDT/snapshots?mode=hedge").get_json()
    assert listed == {"snapshots": [second.get_json(), taken.get_json()], "count": 2}
    assert taken.get_json()["snapshot_data"]["long_size"] == "1"
    page = client.get("/api/v1/positions/BTCUSDT/snapshots?mode=hedge&limit=1&offset=1").get_json()
    assert page == {"snapshots": [taken.get_json()], "count": 1}
    position = client.get("/api/v1/positions/BTCUSDT?mode=hedge").get_json()
    assert position["last_snapshot_at"] == second.get_json()["created_at"]
    assert position["version"] == 1
    with transaction(engine) as connection:
        told = connection.execute(
            tables.outbox.select().where(tables.outbox.c.event_type == "position_snapshot_created")
        ).all()
    assert next(each.trace_id for each in told) == "t-1"
    problem(client.post("/api/v1/positions/BTCUSDT/snapshot"), 404, "not_found")


def test_history_adds_up_what_snapshots_tell(client: FlaskClient, engine: Engine) -> None:
    address = "/api/v1/portfolio/history"
    assert client.get(address).get_json() == {"points": [], "count": 0, "interval_seconds": 3600}
    price = {"event_type": "position", "data": {"symbol": "BTCUSDT", "markPrice": "110"}}
    apply(engine, [execution("BTCUSDT", "Buy", "2", "100"), execution("ETHUSDT", "Sell", "1", "50"), price])
    for asset in ("BTCUSDT", "ETHUSDT"):
        assert client.post(f"/api/v1/positions/{asset}/snapshot").status_code == 201
    now = datetime.now(UTC)
    # The last point is of now, also where more was asked for, and before the snapshots there is nothing.
    wanted = {"from": (now - timedelta(minutes=3)).isoformat(), "to": "2100-01-01", "interval": "60"}
    body = client.get(address, query_string=wanted).get_json()
    assert (body["count"], body["interval_seconds"]) == (1, 60)
    assert body["points"][0]["at"] >= now.isoformat()[:23]
    assert {name: each for name, each in body["points"][0].items() if name != "at"} == {
        "total_exposure_usdt": "220",
        "net_exposure_usdt": "220",
        "total_unrealized_pnl_usdt": "20",
        "total_realized_pnl_usdt": "0",
        "total_pnl_usdt": "20",
        "drawdown_usdt": "0",
        "positions_count": 2,
        "unpriced_positions_count": 1,
    }
    assert client.get(address, query_string={"interval": "1"}).get_json()["count"] == 1
    year = {"from": (now - timedelta(days=365)).isoformat(), "to": now.isoformat(), "interval": "1"}
    assert client.get(address, query_string=year).get_json()["interval_seconds"] == 31568
    backwards = {"from": now.isoformat(), "to": (now - timedelta(1)).isoformat()}
    assert client.get(address, query_string=backwards).get_json()["points"] == []
    assert client.get(address, query_string={"to": "0001-01-02T00:00:00Z"}).status_code == 200
    assert client.get(address, query_string={"to": "9999-12-31T23:59:59Z"}).status_code == 200


def test_history_of_many_positions_has_fewer_points(
    client: FlaskClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "LOOKUPS_MAX", 21)
    apply(engine, [execution(f"A{number}USDT", "Buy", "1", "1") for number in range(4)])
    for number in range(4):
        assert client.post(f"/api/v1/positions/A{number}USDT/snapshot").status_code == 201
    now = datetime.now(UTC)
    wanted = {"from": now.isoformat(), "to": (now + timedelta(hours=1)).isoformat(), "interval": "1"}
    body = client.get("/api/v1/portfolio/history", query_string=wanted).get_json()
    assert (body["count"], body["points"][-1]["positions_count"]) == (1, 4)
    year = {"from": (now - timedelta(seconds=400)).isoformat(), "to": now.isoformat(), "interval": "1"}
    assert client.get("/api/v1/portfolio/history", query_string=year).get_json()["interval_seconds"] == 100


def test_validation_tells_and_mends(client: FlaskClient, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    address = "/api/v1/positions/BTCUSDT/validate"
    assert client.post(address).get_json() == {
        "is_valid": True,
        "error_message": None,
        "updated_position": None,
        "breaks": [],
    }
    with transaction(engine) as connection:
        connection.execute(update(tables.positions).values(realized_pnl=7))
    found = client.post(address, json={"fix_discrepancies": False}).get_json()
    assert (found["is_valid"], found["updated_position"]) == (False, None)
    assert "realized_pnl: stored 7, the ledger folds to 0" in found["error_message"]
    mended = client.post(f"{address}?fix_discrepancies=true").get_json()
    assert mended["updated_position"]["realized_pnl"] == "0"
    assert [(each["kind"], each["ours"], each["theirs"]) for each in mended["breaks"]] == [
        ("stored_realized_pnl", "0", "7")
    ]
    assert client.get("/api/v1/positions/BTCUSDT").get_json()["realized_pnl"] == "0"
    assert client.post(address).get_json()["is_valid"] is True


def test_quarantine_is_read_and_replayed(client: FlaskClient, engine: Engine) -> None:
    good = json.dumps(execution("BTCUSDT", "Buy", "1", "100")).encode()
    with transaction(engine) as connection:
        for body in (b"no JSON \xff", good):
            refused = Refused(
                queue=EXECUTION_QUEUE, body=body, headers={}, properties={}, reason="at that time"
            )
            quarantine.add(connection, [refused], now=START)
    page = client.get("/api/v1/events/quarantine?limit=1").get_json()
    [message] = page["messages"]
    assert json.loads(message["body"])["asset"] == "BTCUSDT"
    rest = client.get(f"/api/v1/events/quarantine?cursor={page['next_cursor']}").get_json()
    assert (rest["messages"][0]["body"], rest["next_cursor"]) == ("no JSON \\xff", None)
    replayed = client.post(f"/api/v1/events/quarantine/{message['id']}/replay").get_json()
    assert replayed == {"id": message["id"], "outcome": {"applied": 1}}
    assert client.get("/api/v1/positions/BTCUSDT").get_json()["size"] == "1"
    again = client.post(f"/api/v1/events/quarantine/{rest['messages'][0]['id']}/replay")
    problem(again, 409, "still_refused")
    assert client.get("/api/v1/events/quarantine").get_json()["count"] == 1
    assert client.get("/api/v1/events/quarantine?replayed=true").get_json()["count"] == 2
    problem(client.post("/api/v1/events/quarantine/999/replay"), 404, "not_found")
    problem(client.post("/api/v1/events/quarantine/0/replay"), 400, "bad_parameters")


def test_conflict_that_outlived_its_retries_may_be_tried_again(
    client: FlaskClient, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: object, **__: object) -> None:
        raise ConcurrencyConflict

    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    monkeypatch.setattr(Validator, "one", lose)
    response = client.post("/api/v1/positions/BTCUSDT/validate")
    problem(response, 409, "conflict")
    assert int(response.headers["Retry-After"]) > 0


def test_message_whose_value_the_database_refuses_is_still_refused(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def divide(connection: Connection, *_: object, **__: object) -> None:
        connection.exec_driver_sql("SELECT 1 / 0")

    monkeypatch.setattr(quarantine_routes, "replay_quarantine", divide)
    problem(client.post("/api/v1/events/quarantine/1/replay"), 409, "still_refused")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/v1/positions/BTCUSDT/validate"),
        ("POST", "/api/v1/positions/BTCUSDT/snapshot"),
        ("GET", "/api/v1/events/quarantine"),
        ("POST", "/api/v1/events/quarantine/1/replay"),
    ],
)
def test_key_that_may_read_changes_nothing(client: FlaskClient, method: str, path: str) -> None:
    response = client.open(path, method=method, headers={"X-API-Key": READ_KEY})
    problem(response, 403, "forbidden")
    assert client.get("/api/v1/positions", headers={"X-API-Key": READ_KEY}).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"mode": 1, "colour": "red"}', "application/json", 400),
        (b"mode=hedge", "application/x-www-form-urlencoded", 415),
    ],
)
def test_body_that_is_no_parameters_is_refused(
    client: FlaskClient, body: bytes, kind: str, status: int
) -> None:
    response = client.post("/api/v1/positions/BTCUSDT/snapshot", data=body, content_type=kind)
    assert response.status_code == status
    assert response.content_type == "application/problem+json"


@pytest.mark.parametrize("body", [b"[" * 60_000, b'{"a":' * 12_000, b'{"\\ud800":1}'])
def test_body_that_is_hard_to_read_is_refused(client: FlaskClient, body: bytes) -> None:
    address = "/api/v1/positions/BTCUSDT/validate"
    problem(client.post(address, data=body, content_type="application/json"), 400, "bad_parameters")
    # Where a body means nothing, it is not read.
    assert client.head("/api/v1/portfolio", data=body, content_type="application/json").status_code == 200


def test_body_in_chunks_is_refused(client: FlaskClient) -> None:
    headers = {"Transfer-Encoding": "chunked"}
    response = client.post("/api/v1/positions/BTCUSDT/validate", headers=headers)
    problem(response, 411, "length_required")


def test_body_counts_before_the_query_and_both_must_be_right(client: FlaskClient, engine: Engine) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", mode="hedge")])
    address = "/api/v1/positions/BTCUSDT/snapshot"
    assert client.post(f"{address}?mode=one-way", json={"mode": "hedge"}).get_json()["mode"] == "hedge"
    body = problem(client.post(f"{address}?mode=x", json={"mode": "hedge"}), 400, "bad_parameters")
    assert list(body["details"]) == ["mode"]


def test_description_covers_every_address_of_the_contract(client: FlaskClient) -> None:
    response = client.get("/openapi.json", headers={"X-API-Key": ""})
    assert response.status_code == 200
    document = response.get_json()
    assert document["openapi"].startswith("3.1")
    assert "Raises" not in response.text
    described = {
        f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods
    }
    assert described == {
        f"GET {path}" for path in ("/health", "/health/live", "/health/ready", "/metrics")
    } | {
        f"{method} /api/v1{path}"
        for method, path in (
            ("GET", "/positions"),
            ("GET", "/positions/{asset}"),
            ("POST", "/positions/{asset}/validate"),
            ("POST", "/positions/{asset}/snapshot"),
            ("GET", "/positions/{asset}/snapshots"),
            ("GET", "/positions/{asset}/executions"),
            ("GET", "/portfolio"),
            ("GET", "/portfolio/exposure"),
            ("GET", "/portfolio/pnl"),
            ("GET", "/portfolio/history"),
            ("GET", "/events/quarantine"),
            ("POST", "/events/quarantine/{id}/replay"),
        )
    }


def test_page_about_the_api_loads_only_what_we_serve(client: FlaskClient) -> None:
    page = client.get("/docs", headers={"X-API-Key": ""})
    assert page.status_code == 200
    assert "script-src 'self'" in page.headers["Content-Security-Policy"]
    for name in ("swagger-ui.css", "swagger-ui-bundle.js", "start.js"):
        assert f'"/docs/{name}"' in page.get_data(as_text=True)
        assert client.get(f"/docs/{name}", headers={"X-API-Key": ""}).status_code == 200
    assert "http" not in page.get_data(as_text=True)
    problem(client.get("/docs/other.js"), 404, "not_found")
