"""Lists as CSV: the same rows as in JSON, to the last digit, with a way to the next page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urljoin

import pytest
from flask.testing import FlaskClient
from requests.utils import parse_header_links
from sqlalchemy import Engine, text
from werkzeug.test import TestResponse

from tests.integration.api import KEY, Make, problem
from tests.integration.support import apply, execution

POSITIONS = "/api/v1/positions"
EXECUTIONS = "/api/v1/positions/BTCUSDT/executions"
SNAPSHOTS = "/api/v1/positions/BTCUSDT/snapshots"
HISTORY = "/api/v1/portfolio/history"
LISTS = {POSITIONS: "positions", EXECUTIONS: "executions", SNAPSHOTS: "snapshots", HISTORY: "points"}


@pytest.fixture
def client(make_app: Make, database_url: str) -> FlaskClient:
    client = make_app(database_url).test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    return client


@pytest.fixture
def filled(client: FlaskClient, engine: Engine) -> FlaskClient:
    """A client of an API with three positions, seven ledger entries of the one, and five snapshots."""
    fills = [
        execution("BTCUSDT", "Sell", "0.1", "100.000000000000000001", number=number) for number in range(7)
    ]
    apply(engine, [*fills, *(execution(asset, "Buy", "1", "2") for asset in ("ETHUSDT", "XRPUSDT"))])
    for _ in range(5):
        assert client.post("/api/v1/positions/BTCUSDT/snapshot").status_code == 201
    return client


def rows(response: TestResponse) -> list[dict[str, str]]:
    assert response.status_code == 200, response.data
    assert response.content_type == "text/csv; charset=utf-8; header=present"
    assert response.text.count("\r\n") == response.text.count("\n") > 0
    return list(csv.DictReader(io.StringIO(response.text, newline="")))


def cell(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def as_csv(client: FlaskClient, address: str, **query: str) -> TestResponse:
    return client.get(address, query_string=query, headers={"Accept": "text/csv"})


def following(response: TestResponse) -> str | None:
    """Return where the next page is, as a client resolves it."""
    if "Link" not in response.headers:
        return None
    (link,) = parse_header_links(response.headers["Link"])
    assert link["rel"] == "next"
    return urljoin(f"http://localhost{response.request.path}", link["url"]).removeprefix("http://localhost")


@pytest.mark.parametrize("address", [POSITIONS, EXECUTIONS])
def test_csv_has_what_json_has(filled: FlaskClient, address: str) -> None:
    listed = filled.get(address).get_json()[LISTS[address]]
    assert [list(row.items()) for row in rows(as_csv(filled, address))] == [
        [(name, cell(value)) for name, value in each.items()] for each in listed
    ]
    assert len(listed) in {3, 7}
    assert "-" in "".join(map(str, listed[0].values()))


def test_a_curve_as_csv_is_the_same_curve(filled: FlaskClient) -> None:
    end = datetime.fromisoformat(filled.get(SNAPSHOTS).get_json()["snapshots"][0]["created_at"])
    query = {"to": end.isoformat(), "from": (end - timedelta(hours=1)).isoformat(), "interval": "600"}
    points = filled.get(HISTORY, query_string=query).get_json()["points"]
    assert len(points) == 1
    assert rows(as_csv(filled, HISTORY, **query)) == [
        {name: cell(value) for name, value in point.items()} for point in points
    ]


def test_a_snapshot_is_a_row_of_its_figures(filled: FlaskClient, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text("""
                INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
                SELECT id, asset, mode, '2020-01-01Z', '{"size": 0.1234567890123456789, "legs": [1]}'
                FROM positions WHERE asset = 'BTCUSDT'
            """)
        )
    *own, older = filled.get(SNAPSHOTS).get_json()["snapshots"]
    *found, oldest = rows(as_csv(filled, SNAPSHOTS))
    for row, each in zip(found, own, strict=True):
        data = each["snapshot_data"]
        told = {name: value for name, value in data.items() if name not in {"id", "created_at", "state"}}
        of_snapshot = {name: value for name, value in each.items() if name != "snapshot_data"}
        assert row == {name: cell(value) for name, value in {**told, **of_snapshot}.items()}
    assert found[0]["size"] == "-0.7"
    assert {name: value for name, value in oldest.items() if value} == {
        **{name: older[name] for name in ("id", "position_id", "asset", "mode", "created_at")},
        "size": "0.1234567890123456789",
    }


@pytest.mark.parametrize("accept", ["application/json", "text/csv"])
@pytest.mark.parametrize(
    ("address", "key", "count"), [(POSITIONS, "id", 3), (EXECUTIONS, "key", 7), (SNAPSHOTS, "id", 5)]
)
def test_link_leads_through_all_pages(
    filled: FlaskClient, accept: str, address: str, key: str, count: int
) -> None:
    """Also where the answer is one that was kept, and where something new is listed meanwhile."""
    whole = [each[key] for each in filled.get(address).get_json()[LISTS[address]]]
    assert len(whole) == count
    found, lengths = [], []
    asked: str | None = f"{address}?limit=2&mode=one-way"
    while asked:
        for _ in range(2):
            response = filled.get(asked, headers={"Accept": accept})
        page = rows(response) if accept == "text/csv" else response.get_json()[LISTS[address]]
        found += [each[key] for each in page]
        lengths.append(len(page))
        if address == SNAPSHOTS:
            assert filled.post("/api/v1/positions/BTCUSDT/snapshot").status_code == 201
        asked = following(response)
        assert asked is None or "limit=2" in asked
    assert (found, lengths) == (whole, [2] * (count // 2) + [1] * (count % 2))


def test_a_page_of_snapshots_behind_an_offset_leads_on_from_there(filled: FlaskClient) -> None:
    whole = [each["id"] for each in filled.get(SNAPSHOTS).get_json()["snapshots"]]
    first = filled.get(f"{SNAPSHOTS}?limit=2&offset=1")
    asked = following(first)
    assert asked
    second = filled.get(asked)
    assert [each["id"] for page in (first, second) for each in page.get_json()["snapshots"]] == whole[1:]
    assert following(second) is None


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/json"),
        ("*/*", "application/json"),
        ("text/*", "text/csv"),
        ("TEXT/CSV; charset=utf-8", "text/csv"),
        ("text/csv, */*", "text/csv"),
        ("text/csv, application/json", "application/json"),
        ("text/csv;q=0.5, application/json;q=0.4", "text/csv"),
        ("text/csv;q=0.5, application/json", "application/json"),
        ("text/csv;q=0, application/*", "application/json"),
        ("application/json;q=0, */*;q=0.1", "text/csv"),
        ("text/html, application/xhtml+xml, application/xml;q=0.9, */*;q=0.8", "application/json"),
        ("image/png", "application/json"),
        ("text/csv;q=0", "application/json"),
        (",;=q", "application/json"),
    ],
)
@pytest.mark.parametrize("address", LISTS)
def test_who_prefers_csv_gets_it_and_nobody_is_refused(
    filled: FlaskClient, address: str, accept: str | None, kind: str
) -> None:
    # What was kept of the other is not given.
    for each in ("text/csv", "application/json"):
        filled.get(address, headers={"Accept": each})
    response = filled.get(address, headers={"Accept": accept} if accept else {})
    assert (response.status_code, response.mimetype) == (200, kind)
    assert "Accept" in response.vary


def test_tag_of_the_json_says_nothing_of_the_csv(filled: FlaskClient) -> None:
    tag = filled.get(POSITIONS).headers["ETag"]
    again = filled.get(POSITIONS, headers={"If-None-Match": tag})
    assert (again.status_code, "Accept" in again.vary) == (304, True)
    assert rows(filled.get(POSITIONS, headers={"If-None-Match": tag, "Accept": "text/csv"}))


def test_texts_of_others_are_no_formulas_and_keep_their_place(client: FlaskClient, engine: Engine) -> None:
    ids = ["=1+1", "+1", "@x", "-x", 'a,"b";=c', "-5.5", "plain"]
    apply(
        engine,
        [
            execution("BTCUSDT", "Buy", "1", "100", number=number, order_id=order_id)
            for number, order_id in enumerate(ids)
        ],
    )
    told = [each["order_id"] for each in client.get(EXECUTIONS).get_json()["executions"]]
    found = csv.DictReader(io.StringIO(as_csv(client, EXECUTIONS).text, newline=""))
    shown = [row["order_id"] for row in found]
    assert shown == [text if text[0] not in "=+@-" or text == "-5.5" else f"'{text}" for text in told]
    assert sum(text.startswith("'") for text in shown) == 4


def test_what_is_wrong_is_told_as_ever(filled: FlaskClient) -> None:
    def refused(address: str, **query: str) -> Mapping[str, Any]:
        status = 400 if query else 404
        return problem(as_csv(filled, address, **query), status, "bad_parameters" if query else "not_found")

    assert list(refused(POSITIONS, limit="0")["details"]) == ["limit"]
    refused("/api/v1/positions/SOLUSDT/executions")


def test_description_tells_of_csv_and_links(client: FlaskClient) -> None:
    paths = client.get("/openapi.json").get_json()["paths"]
    csvs = {
        path
        for path, operations in paths.items()
        for operation in operations.values()
        if "text/csv" in operation["responses"].get("200", {}).get("content", {})
    }
    assert csvs == {address.replace("BTCUSDT", "{asset}") for address in LISTS}
    for path in csvs:
        answer = paths[path]["get"]["responses"]["200"]
        assert {"Link", "Vary"} <= answer["headers"].keys()
        assert answer["content"].keys() == {"application/json", "text/csv"}
