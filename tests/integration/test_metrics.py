"""What `/metrics` tells Prometheus, and the short JSON of it."""

from __future__ import annotations

import os
import re
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Engine, insert, update

from positions.handlers.validate_positions import Validator
from positions.metrics import PORTFOLIO_CACHE, VALIDATIONS
from positions.storage import quarantine, tables
from positions.storage.database import Retry
from positions.web import metrics
from tests.integration.api import KEY, QUEUE, Make, environ, served, store
from tests.integration.support import RULES, apply, execution
from tests.services import PostgreSQL, wait_until

WITH_KEY = {"X-API-Key": KEY}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(app: Flask) -> Samples:
    """Return what is so now, not what was some seconds ago."""
    app.extensions[metrics._NAME]._last = None
    app.extensions["positions"].checks.queues._last = None
    response = app.test_client().get("/metrics")
    assert response.status_code == 200
    assert response.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return _samples(response.text)


def _of(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((f"positions_{name}", frozenset(labels.items())))


def _requests(samples: Samples, **labels: str) -> float:
    return _of(samples, "http_request_duration_seconds_count", **labels) or 0


def _short(app: Flask) -> dict[str, Any]:
    found: dict[str, Any] = (
        app.test_client().get("/metrics", headers={"Accept": "application/json"}).get_json()
    )
    return found


def test_requests_are_counted_by_route_and_not_by_path(make_app: Make, database_url: str) -> None:
    app = make_app(database_url)
    client = app.test_client()
    route = "/api/v1/positions/<asset>"
    before = _scrape(app)
    for asset in ("BTCUSDT", "ETHUSDT", "SOLUSDT"):
        assert client.get(f"/api/v1/positions/{asset}", headers=WITH_KEY).status_code == 404
    client.get("/api/v1/positions/BTCUSDT")
    for path in ("/made-up-1", "/made-up-2"):
        client.get(path, headers=WITH_KEY)
    client.open("/made-up-3", method="MADEUP", headers=WITH_KEY)
    after = _scrape(app)

    def more(**labels: str) -> float:
        return _requests(after, **labels) - _requests(before, **labels)

    seen = {labels.get("route") for _, labels in ((name, dict(pairs)) for name, pairs in after)}
    (pattern,) = (each for each in seen if each and re.fullmatch(route.replace("<asset>", "<.*asset>"), each))
    assert more(method="GET", route=pattern, status="404") == 3
    assert more(method="GET", route=pattern, status="401") == 1
    assert more(method="GET", route="unknown", status="404") == 2
    assert (
        more(method="other", route="unknown", status="404")
        + more(method="other", route="unknown", status="403")
        == 1
    )
    assert "made-up" not in str(after).lower()
    assert "MADEUP" not in str(after)
    assert more(method="GET", route="/metrics", status="200") == 1


def test_gauges_tell_what_database_and_broker_know(
    make_app: Make, database_url: str, broker_url: str, redis_url: str, engine: Engine
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    now = datetime.now(UTC)
    fresh = _scrape(app)
    assert _of(fresh, "last_event_age_seconds") is None
    assert _of(fresh, "outbox_oldest_age_seconds") == 0
    open_ = {"mode": "one-way", "last_updated": now - timedelta(seconds=40), "current_price_at": now}
    store(
        database_url,
        {"asset": "BTCUSDT", "size": 2, "long_size": 2, "current_price": 100, **open_},
        {"asset": "ETHUSDT", "size": -3, "short_size": -3, "current_price": 10, **open_},
        {"asset": "SOLUSDT", "mode": "one-way", "closed_at": now, "last_updated": open_["last_updated"]},
    )
    with engine.begin() as connection:
        for age in (90, 10):
            connection.execute(
                insert(tables.outbox).values(
                    event_type="e", trace_id="t", body="{}", created_at=now - timedelta(seconds=age)
                )
            )
        refused = quarantine.Refused(queue=QUEUE, body=b"{", headers={}, properties={}, reason="no JSON")
        quarantine.add(connection, [refused], now=now)
    samples = _scrape(app)
    assert _of(samples, "database_up") == _of(samples, "broker_up") == 1
    assert (_of(samples, "stored"), _of(samples, "open")) == (3, 2)
    assert (_of(samples, "gross_exposure_usdt"), _of(samples, "net_exposure_usdt")) == (230, 170)
    assert _of(samples, "outbox_messages") == 2
    assert 90 <= (_of(samples, "outbox_oldest_age_seconds") or 0) < 150
    assert 40 <= (_of(samples, "last_event_age_seconds") or 0) < 100
    assert _of(samples, "quarantine_messages") == 1
    assert _of(samples, "queue_messages", queue=QUEUE) == 0
    assert _of(samples, "queue_consumers", queue=QUEUE) == 0


def test_lookups_and_validations_are_counted(make_app: Make, database_url: str) -> None:
    app = make_app(database_url)
    before = _scrape(app)
    for outcome in ("hit", "hit", "miss", "unavailable"):
        PORTFOLIO_CACHE.inc(outcome)
    VALIDATIONS.inc("valid")
    after = _scrape(app)
    for name, outcome, more in (
        ("portfolio_cache_total", "hit", 2),
        ("portfolio_cache_total", "miss", 1),
        ("portfolio_cache_total", "unavailable", 1),
        ("validations_total", "valid", 1),
    ):
        assert (_of(after, name, outcome=outcome) or 0) - (_of(before, name, outcome=outcome) or 0) == more
    short = _short(app)
    lookups = [
        _of(after, "portfolio_cache_total", outcome=each) or 0 for each in ("hit", "miss", "unavailable")
    ]
    assert short["portfolio_cache_hit_rate"] == pytest.approx(lookups[0] / sum(lookups))
    assert short["validation_statistics"]["valid"] >= 1
    assert short["validation_statistics"]["total"] >= short["validation_statistics"]["valid"]


def test_requests_for_the_portfolio_count_as_lookups(
    make_app: Make, database_url: str, redis_url: str
) -> None:
    app = make_app(database_url, redis=redis_url)
    client = app.test_client()
    before = _scrape(app)
    for _ in range(5):
        assert client.get("/api/v1/portfolio", headers=WITH_KEY).status_code == 200
    after = _scrape(app)

    def lookups(samples: Samples, *outcomes: str) -> float:
        return sum(_of(samples, "portfolio_cache_total", outcome=each) or 0 for each in outcomes)

    every = ("hit", "miss", "unavailable")
    assert lookups(after, *every) - lookups(before, *every) == 5
    assert lookups(after, "hit") - lookups(before, "hit") == 4
    assert _short(app)["portfolio_cache_hit_rate"] == pytest.approx(
        lookups(after, "hit") / lookups(after, *every)
    )


def test_requests_that_were_refused_are_counted_by_whose_limit_it_was(
    make_app: Make, database_url: str, redis_url: str
) -> None:
    app = make_app(database_url, redis=redis_url, POSITION_MANAGER_RATE_LIMIT_DEFAULT="3")
    client = app.test_client()
    before = _scrape(app)
    right = [client.get("/api/v1/positions", headers=WITH_KEY).status_code for _ in range(5)]
    wrong = [client.get("/api/v1/positions", headers={"X-API-Key": "no"}).status_code for _ in range(23)]
    after = _scrape(app)
    assert (right.count(429), wrong.count(429)) == (2, 3)
    for whose, more in (("key", 2), ("address", 3)):
        name = "http_limited_requests_total"
        assert (_of(after, name, whose=whose) or 0) - (_of(before, name, whose=whose) or 0) == more


def test_requests_to_validate_are_counted_by_what_they_found(
    make_app: Make, database_url: str, engine: Engine
) -> None:
    app = make_app(database_url)
    before = _short(app)["validation_statistics"]
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])

    def validate(fix: str) -> None:
        path = f"/api/v1/positions/BTCUSDT/validate?fix_discrepancies={fix}"
        assert app.test_client().post(path, headers=WITH_KEY).status_code == 200

    validate("true")
    with engine.begin() as connection:
        connection.execute(update(tables.positions).values(realized_pnl=7))
    for fix in ("false", "false", "true"):
        validate(fix)
    after = _short(app)["validation_statistics"]
    assert {name: after[name] - before.get(name, 0) for name in after} == {
        "total": 4,
        "valid": 1,
        "invalid": 2,
        "repaired": 1,
        "open_breaks": 0,
    }


def test_what_the_schedule_validated_counts_too_and_breaks_that_stand_by_cause(
    make_app: Make, database_url: str, engine: Engine
) -> None:
    app = make_app(database_url)
    long = [execution("BTCUSDT", "Sell", "2", "100", position_idx=1)]
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100"), *long])
    validator = Validator(engine=engine, rules=RULES, retry=Retry(), venue=None, fix=True)
    before = _short(make_app(database_url))["validation_statistics"]
    assert len(list(validator.run())) == 2
    after = _short(app)["validation_statistics"]
    assert {name: after[name] - before[name] for name in after} == {
        "total": 2,
        "valid": 1,
        "invalid": 1,
        "repaired": 0,
        "open_breaks": 0,
    }
    assert after["open_breaks"] == 1
    assert _of(_scrape(app), "open_breaks", cause="missing_fill") == 1


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain", "text/plain"),
        ("application/json", "application/json"),
        ("application/json, */*;q=0.1", "application/json"),
        ("text/html,application/xhtml+xml,*/*;q=0.8", "text/plain"),
        (
            "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "text/plain",
        ),
    ],
)
def test_form_is_the_one_that_is_asked_for(
    accept: str | None, kind: str, make_app: Make, database_url: str
) -> None:
    client: FlaskClient = make_app(database_url).test_client()
    response = client.get("/metrics", headers={"Accept": accept} if accept else {})
    assert response.mimetype == kind
    assert "Accept" in response.headers.get("Vary", "")
    if kind == "application/json":
        body = response.get_json()
        assert list(body) == [
            "database_connected",
            "queue_connected",
            "portfolio_cache_hit_rate",
            "validation_statistics",
            "timestamp",
        ]
        assert (body["database_connected"], body["queue_connected"]) == (True, False)


def test_database_that_is_away_is_one_of_the_figures(
    make_app: Make, database_url: str, postgres: PostgreSQL
) -> None:
    app = make_app(database_url)
    assert _of(_scrape(app), "database_up") == 1
    postgres.kill()
    samples = _scrape(app)
    assert _of(samples, "database_up") == 0
    assert _of(samples, "stored") is None
    assert _requests(samples, method="GET", route="/metrics", status="200") > 0
    postgres.start()
    assert _of(_scrape(app), "database_up") == 1


def test_processes_count_together_and_a_new_one_counts_on(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    (folder / "histogram_7.db").write_bytes(b"of the last run")
    settings = {**environ(database_url, broker_url, redis_url), "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    with served(tmp_path, settings) as api:

        def counted() -> float:
            samples = _samples(api.get("/metrics")[2].decode())
            return _requests(samples, method="GET", route="unknown", status="401")

        for number in range(20):
            assert api.get(f"/nothing/{number}")[0] == 401
        # Whichever answers tells of both.
        assert [counted() for _ in range(8)] == [20] * 8
        for _ in range(3):
            old = api.workers
            os.kill(old[0], signal.SIGKILL)
            assert wait_until(lambda old=old: len(set(api.workers) - set(old[:1])) == 2, limit_s=30)  # type: ignore[misc]
            assert api.get("/nothing")[0] == 401
        assert wait_until(lambda: counted() == 23, limit_s=10)
        # Two workers at a time, so two sets of files, whoever came and went.
        assert wait_until(
            lambda: {each.stem.rpartition("_")[2] for each in folder.iterdir()} == {"0", "1"}, limit_s=10
        )
