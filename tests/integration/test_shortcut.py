"""Answers that are given again without Flask: as they would be with it, to whom they would be."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import redis
from flask import Flask, Response
from flask.testing import FlaskClient
from sqlalchemy import Engine
from structlog.testing import capture_logs
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, TestResponse

from positions.storage import api_keys
from positions.storage.database import transaction
from positions.storage.portfolio import VersionsAside
from positions.web import BODY_MAX_BYTES, auth, memory, shortcut
from positions.web.answers import kept
from positions.web.auth import needs_operate
from positions.web.limits import Limiter, Window
from positions.web.shortcut import ShortWay
from tests.integration.api import KEY, Make, problem
from tests.integration.support import apply, execution
from tests.services import PostgreSQL, Redis, wait_until

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

PATHS = (
    "/api/v1/portfolio",
    "/api/v1/portfolio?include_positions=true",
    "/api/v1/portfolio/exposure",
    "/api/v1/portfolio/pnl",
    "/api/v1/positions",
    "/api/v1/positions?limit=1",
    "/api/v1/positions/BTCUSDT",
    "/api/v1/positions/btcusdt?mode=one-way",
)
PATH = PATHS[0]
POSITION = "/api/v1/positions/BTCUSDT"
pytestmark = pytest.mark.usefixtures("redis_server")


@pytest.fixture(autouse=True)
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let answers not grow too old while a test is at it."""
    monkeypatch.setattr(memory, "KEPT_S", 600.0)


class Asked:
    """A client, and how many of its requests went through Flask; the short way first, as in the worker."""

    def __init__(self, app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
        self.app = app
        self.short_way: ShortWay = app.extensions[shortcut.NAME]
        self.through_flask = 0
        dispatch, long_way = app.full_dispatch_request, app.wsgi_app
        one_thread = threading.Lock()

        def either_way(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
            with one_thread:
                if asked := self.short_way.begin(environ):
                    self.short_way.ask([asked])
                    if answer := self.short_way.answer(asked):
                        status, headers, body = answer
                        start_response(status, headers)
                        return [body]
                    environ.update(asked.found_out)
            return long_way(environ, start_response)

        monkeypatch.setattr(app, "wsgi_app", either_way)

        def counted(*given: Any) -> Response:
            self.through_flask += 1
            return dispatch(*given)

        monkeypatch.setattr(app, "full_dispatch_request", counted)

    def __call__(self, path: str = PATH, *, key: str | None = KEY, **more: Any) -> TestResponse:
        headers = more.pop("headers", {}) | ({} if key is None else {"X-API-Key": key})
        return self.app.test_client().open(path, headers=headers, **more)

    def connected(self) -> Asked:
        """Open the short way."""
        with self.short_way._connecting:
            pass
        assert self.short_way._connecting.acquire()
        self.short_way._connect()
        assert self.short_way.connected
        return self

    def short(self, path: str = PATH, **more: Any) -> TestResponse:
        """Ask, which must not go through Flask."""
        before = self.through_flask
        response = self(path, **more)
        assert self.through_flask == before
        return response

    def went_through_flask(self) -> bool:
        """Ask, and tell whether that went through Flask."""
        before = self.through_flask
        assert self().status_code == 200
        return self.through_flask > before

    def long(self, path: str = PATH, **more: Any) -> TestResponse:
        """Ask, which must go through Flask."""
        before = self.through_flask
        response = self(path, **more)
        assert self.through_flask == before + 1
        return response


@pytest.fixture
def make(
    make_app: Make, database_url: str, redis_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Asked]:
    def made(**more: str) -> Asked:
        return Asked(make_app(database_url, redis=redis_url, **more), monkeypatch).connected()

    buy(engine, 1)
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100")])
    return made


def buy(engine: Engine, number: int) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number)])


def requests_of(client: FlaskClient) -> dict[str, float]:
    """Return what is counted of requests and lookups."""
    lines = client.get("/metrics").text.splitlines()
    names = ("positions_http_request_duration_seconds_count{", "positions_portfolio_cache_total{")
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(names) and "/metrics" not in line)
    return {name: float(value) for name, value in pairs}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("known", [False, True], ids=["200", "304"])
def test_second_answer_is_as_the_first(make: Callable[..., Asked], path: str, known: bool) -> None:
    ask = make()
    tag = ask(path).headers["ETag"]
    headers = {"If-None-Match": tag} if known else {}
    # As another process would find it.
    ask.app.extensions["positions"].answers._kept.clear()
    client = ask.app.test_client()
    seen = []
    for way in (ask.long, ask.short):
        before = requests_of(client)
        with capture_logs() as lines:
            response = way(path, headers=headers | {"X-Trace-Id": "t-1"})
        [line] = [each for each in lines if each["event"] == "request_served"]
        assert line.pop("duration_ms") >= 0
        counted = {name: value - before.get(name, 0) for name, value in requests_of(client).items()}
        told = response.headers.to_wsgi_list()
        assert len(dict(told)) == len(told)
        remaining = int(response.headers.pop("RateLimit-Remaining"))
        assert 1 <= int(response.headers.pop("RateLimit-Reset")) <= 60
        changed = {name: value for name, value in counted.items() if value}
        seen.append((response.status, dict(response.headers), response.data, line, changed, remaining))
    *long, remaining = seen[0]
    *short, remaining_then = seen[1]
    assert short == long
    assert long[0] == ("304 NOT MODIFIED" if known else "200 OK")
    assert remaining_then == remaining - 1
    assert long[1]["X-Trace-Id"] == "t-1"


def test_who_prefers_csv_gets_it(make: Callable[..., Asked]) -> None:
    ask = make()
    listed = "/api/v1/positions"
    ask(listed)
    assert ask.short(listed, headers={"Accept": "application/json"}).is_json
    assert ask.short(listed, headers={"Accept": "*/*"}).is_json
    for prefers in ("text/csv", "text/csv, */*;q=0.1"):
        assert ask.long(listed, headers={"Accept": prefers}).mimetype == "text/csv"


def test_a_change_is_in_the_next_answer_and_the_request_counts_once(
    make: Callable[..., Asked], engine: Engine
) -> None:
    ask = make()
    ask(POSITION)
    for number in range(2, 8):
        before = int(ask.short(POSITION).headers["RateLimit-Remaining"])
        buy(engine, number)
        response = ask.long(POSITION)
        assert response.get_json()["size"] == str(number)
        assert int(response.headers["RateLimit-Remaining"]) == before - 1


@pytest.mark.parametrize(
    ("status", "more"),
    [
        (401, {"key": None}),
        (401, {"key": "wrong"}),
        (401, {"key": KEY.upper()}),
        (401, {"key": ""}),
        (400, {"path": f"{PATH}?unknown=1"}),
        (405, {"method": "POST"}),
        (411, {"headers": {"Transfer-Encoding": "chunked"}}),
        (413, {"data": b"x" * (BODY_MAX_BYTES + 1)}),
        (200, {"method": "HEAD"}),
        (200, {"method": "OPTIONS"}),
    ],
)
def test_what_is_not_plain_is_judged_as_ever(
    make: Callable[..., Asked], status: int, more: dict[str, Any]
) -> None:
    ask = make()
    ask()
    ask.short()
    response = ask.long(**more)
    assert response.status_code == status
    if status != 200:
        assert response.content_type == "application/problem+json"


def test_key_that_expires_or_is_revoked_gets_no_more_answers(
    make: Callable[..., Asked], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "READ_AGAIN_S", 0.2)
    monkeypatch.setattr(auth, "TRUSTED_S", 0.2)
    monkeypatch.setattr(auth, "PAUSE_S", 0)
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("lasting", "ending")}
    with transaction(engine) as connection:
        api_keys.create(
            connection,
            name="lasting",
            digest=digests["lasting"],
            role="read",
            requests_per_minute=None,
            expires_at=None,
        )
    soon = datetime.now(UTC) + timedelta(seconds=5)
    ending = {"name": "ending", "hash": digests["ending"], "role": "read", "expires": soon.isoformat()}
    ask = make(POSITION_MANAGER_RATE_LIMIT_DEFAULT="1000000", POSITION_MANAGER_API_KEYS=json.dumps([ending]))
    for name in ("lasting", "ending"):
        assert wait_until(lambda name=name: ask(key=name).status_code == 200, limit_s=4)  # type: ignore[misc]
    assert ask.short(key="ending").status_code == 200
    assert wait_until(lambda: ask(key="ending").status_code == 401, limit_s=20)
    with transaction(engine) as connection:
        api_keys.revoke(connection, "lasting", now=datetime.now(UTC))
    assert wait_until(lambda: ask(key="lasting").status_code == 401, limit_s=20)
    assert ask.short().status_code == 200


def test_missing_key_is_not_an_empty_one(
    make: Callable[..., Asked], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the database has an empty one, which nothing of ours stores."""
    monkeypatch.setattr(auth, "READ_AGAIN_S", 600.0)
    with transaction(engine) as connection:
        api_keys.create(
            connection,
            name="empty",
            digest=hashlib.sha256(b"").hexdigest(),
            role="read",
            requests_per_minute=None,
            expires_at=None,
        )
    ask = make()
    assert ask(key="").status_code == 200
    assert ask.short(key="").status_code == 200
    response = ask.long(key=None)
    assert (response.status_code, response.get_json()["detail"]) == (401, "The header X-API-Key is missing.")


def test_view_that_asks_for_more_than_a_key_is_always_asked(make: Callable[..., Asked]) -> None:
    reader = {"name": "reader", "hash": hashlib.sha256(b"reader").hexdigest(), "role": "read"}
    ask = make(POSITION_MANAGER_API_KEYS=json.dumps([reader]))
    view = needs_operate(lambda: kept(lambda _: {"secret": "1"}))
    ask.app.add_url_rule("/secret", "secret", view)
    for _ in range(2):
        assert ask.long("/secret").get_json() == {"secret": "1"}
        assert ask.long("/secret", key="reader").status_code == 403
    # The same key gets what any key gets.
    ask()
    assert ask.short(key="reader").status_code == 200


def test_beyond_the_limit_it_is_refused_as_ever(make: Callable[..., Asked]) -> None:
    ask = make(POSITION_MANAGER_RATE_LIMIT_DEFAULT="3")
    assert [way().headers["RateLimit-Remaining"] for way in (ask.long, ask.short, ask.short)] == list("210")
    for _ in range(2):
        with capture_logs() as lines:
            response = ask.long()
        assert (response.status_code, response.get_json()["error_code"]) == (429, "rate_limited")
        assert response.headers["RateLimit-Remaining"] == "0"
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        [line] = [each for each in lines if each["event"] == "request_served"]
        assert (line["status"], line["key_name"]) == (429, "default")


def test_limits_are_exact_however_many_are_counted_together(make: Callable[..., Asked]) -> None:
    limits, random = {"small": 25, "large": 55, "ample": 1000}, Random(3)
    entries = [
        {"name": name, "hash": hashlib.sha256(name.encode()).hexdigest(), "tier": tier}
        for name, tier in limits.items()
    ]
    ask = make(POSITION_MANAGER_API_KEYS=json.dumps(entries))
    ask()
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in limits}
    total = 0
    while total < 60 * len(limits):
        together = []
        for name in random.choices(list(limits), k=random.randrange(1, 30)):
            headers = Headers({"X-API-Key": name})
            asked = ask.short_way.begin(EnvironBuilder(PATH, headers=headers).get_environ())
            assert asked
            together.append(asked)
        ask.short_way.ask(together)
        for asked in together:
            answer, window = ask.short_way.answer(asked), asked.window
            assert isinstance(window, Window)
            assert bool(answer) == window.passed
            found[asked.key.name].append((200 if answer else 429, window.remaining))
        total += len(together)
    for name, limit in limits.items():
        passed = min(limit, len(found[name]))
        # In the order in which they came, each as if it had come by itself.
        expected = [(200, limit - number) for number in range(1, passed + 1)]
        assert found[name] == expected + [(429, 0)] * (len(found[name]) - passed)


def test_without_redis_it_counts_in_memory_and_answers(
    make: Callable[..., Asked], redis_server: Redis
) -> None:
    ask = make(POSITION_MANAGER_RATE_LIMIT_DEFAULT="20")
    ask()
    ask.short()
    redis_server.kill()
    try:
        with capture_logs():
            found = Counter(ask.long().status_code for _ in range(25))
        assert found == {200: 20, 429: 5}
    finally:
        redis_server.start()


def test_without_postgresql_it_says_so_and_counts(
    make: Callable[..., Asked], postgres: PostgreSQL, engine: Engine
) -> None:
    ask = make()
    before = int(ask().headers["RateLimit-Remaining"])
    postgres.kill()
    try:
        with capture_logs() as lines:
            response = ask.long()
    finally:
        postgres.start()
    assert (response.status_code, response.get_json()["error_code"]) == (503, "unavailable")
    assert int(response.headers["Retry-After"]) > 0
    assert int(response.headers["RateLimit-Remaining"]) == before - 1
    [line] = [each for each in lines if each["event"] == "request_served"]
    assert (line["status"], line["key_name"]) == (503, "default")
    engine.dispose()
    assert wait_until(lambda: ask().status_code == 200, limit_s=30)
    assert ask.connected().short().status_code == 200


def test_database_that_is_slow_is_left_to_the_long_way_and_the_request_counts_once(
    make: Callable[..., Asked], postgres: PostgreSQL
) -> None:
    ask = make()
    ask()
    before = int(ask.short().headers["RateLimit-Remaining"])
    found: list[TestResponse] = []
    thread = threading.Thread(target=lambda: found.append(ask.long()))
    with postgres.frozen():
        thread.start()
        # It is asked, and not waited for.
        assert wait_until(lambda: ask.through_flask > 1, limit_s=60)
    thread.join(60)
    assert found[0].status_code == 200
    assert int(found[0].headers["RateLimit-Remaining"]) == before - 1
    # For a while nothing is asked at all, and then the first to come finds the old question answered.
    assert ask.long().status_code == 200
    assert wait_until(lambda: not ask.went_through_flask(), limit_s=60)
    assert int(ask.short().headers["RateLimit-Remaining"]) < before - 2


def test_connection_that_redis_closed_is_opened_again_and_the_request_counts_once(
    make: Callable[..., Asked], redis_url: str
) -> None:
    ask = make()
    ask()
    before = int(ask.short().headers["RateLimit-Remaining"])
    with redis.Redis.from_url(redis_url) as admin:
        admin.client_kill_filter(_type="normal", skipme=True)
    assert int(ask.long().headers["RateLimit-Remaining"]) == before - 1
    assert wait_until(lambda: not ask.went_through_flask(), limit_s=60)


def test_frozen_redis_makes_it_wait_once(
    make: Callable[..., Asked], redis_server: Redis, redis_waits: list[redis.TimeoutError]
) -> None:
    ask = make()
    ask()
    ask.short()
    with redis_server.frozen(), capture_logs():
        assert ask.long().status_code == 200
        assert len(redis_waits) == 1
        assert ask.long().status_code == 200
        assert len(redis_waits) == 1


def test_client_behind_proxies_is_who_they_say(make: Callable[..., Asked]) -> None:
    ask = make(POSITION_MANAGER_TRUSTED_PROXIES="1")
    ask()
    with capture_logs() as lines:
        ask.short(headers={"X-Forwarded-For": "192.0.2.1, 192.0.2.2"})
    [line] = [each for each in lines if each["event"] == "request_served"]
    assert line["client"] == "192.0.2.2"


def test_unforeseen_error_is_answered_and_logged_as_any(
    make: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = make()
    ask()

    def failing(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(Limiter, "take", failing)
        response = ask(headers={"X-Trace-Id": "t-500"})
        made_up = ask.connected()()
    assert problem(response, 500, "internal_error")["trace_id"] == "t-500"
    assert problem(made_up, 500, "internal_error")["trace_id"] not in {"t-500", ""}
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    failed, served = lines[:2]
    assert (failed["event"], failed["log_level"], str(failed["exc_info"])) == (
        "request_failed",
        "error",
        "a fault of ours",
    )
    assert (served["event"], served["status"], served["trace_id"]) == ("request_served", 500, "t-500")
    assert ask.connected().short().status_code == 200


@pytest.mark.parametrize(("of", "name"), [(threading.Thread, "start"), (VersionsAside, "connect")])
def test_short_way_that_cannot_be_opened_is_tried_again(
    make: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, of: type, name: str
) -> None:
    ask = make()
    ask()
    ask.short_way.connected = False
    failed = threading.Event()

    def failing(*_: object) -> None:
        failed.set()
        raise RuntimeError("not now")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(of, name, failing)
        assert ask.went_through_flask()
        assert failed.wait(60)
    assert wait_until(lambda: not ask.went_through_flask(), limit_s=60)
    assert not [each for each in lines if each["event"] == "request_failed"]
