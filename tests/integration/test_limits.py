"""How often who may ask, on a real Redis: also one that is killed, frozen, full or a replica."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from flask import Flask, g
from flask.testing import FlaskClient
from limits import RateLimitItemPerSecond
from limits.strategies import MovingWindowRateLimiter
from structlog.testing import capture_logs
from werkzeug.test import TestResponse

from positions.web import limits
from tests.integration.api import KEY, NOWHERE, Make, environ, served
from tests.services import Redis, wait_until

DATABASE = f"postgresql+psycopg2://{NOWHERE}/none"
# With a right key 404, and nothing but keys and limits is asked.
PATH = "/api/v1/nothing"
NAMES = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "Retry-After")


def limited(make_app: Make, url: str, limit: int, **more: str) -> FlaskClient:
    app = make_app(DATABASE, redis=url, POSITION_MANAGER_RATE_LIMIT_DEFAULT=str(limit), **more)
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    return client


def statuses(client: FlaskClient, count: int, **more: Any) -> Counter[int]:
    return Counter(client.get(PATH, **more).status_code for _ in range(count))


def headers(response: TestResponse) -> tuple[str | None, ...]:
    return tuple(response.headers.get(name) for name in NAMES)


# --- limits of keys


def test_a_key_may_ask_as_often_as_its_limit_says(make_app: Make, redis_url: str) -> None:
    client = limited(make_app, redis_url, 3)
    began = time.time()
    for remaining in "210":
        response = client.get(PATH)
        assert response.status_code == 404
        *shown, reset, retry_after = headers(response)
        assert (shown, retry_after) == (["3", remaining], None)
        assert reset is not None
        assert 60 - (time.time() - began) <= int(reset) <= 60
    with capture_logs() as lines:
        response = client.get(PATH, headers={"X-Trace-Id": "t-429"})
    assert response.status_code == 429
    assert response.content_type == "application/problem+json"
    *shown, reset, retry_after = headers(response)
    assert shown == ["3", "0"]
    assert retry_after == reset
    assert retry_after is not None
    assert 60 - (time.time() - began) <= int(retry_after) <= 60
    assert json.loads(response.data) == {
        "type": "about:blank",
        "title": "Too Many Requests",
        "status": 429,
        "detail": "The key default may make 3 requests a minute.",
        "instance": PATH,
        "error_code": "rate_limited",
        "message": "The key default may make 3 requests a minute.",
        "trace_id": "t-429",
        "details": {},
    }
    [line] = [each for each in lines if each["event"] == "request_served"]
    assert (line["status"], line["key_name"]) == (429, "default")


def test_processes_share_a_limit(make_app: Make, redis_url: str) -> None:
    one, other = limited(make_app, redis_url, 10), limited(make_app, redis_url, 10)
    assert statuses(one, 6) == {404: 6}
    assert other.get(PATH).headers["RateLimit-Remaining"] == "3"
    assert statuses(other, 5) == {404: 3, 429: 2}
    assert statuses(one, 1) == {429: 1}


def test_each_key_has_a_limit_of_its_own(make_app: Make, redis_url: str) -> None:
    tiers = {"model": None, "risk": 4, "other": 4, "ui": 4}
    entries = [
        {"name": name, "hash": hashlib.sha256(name.encode()).hexdigest(), "tier": tier}
        for name, tier in tiers.items()
    ]
    more = {
        "POSITION_MANAGER_API_KEYS": json.dumps(entries),
        "POSITION_MANAGER_RATE_LIMIT_OVERRIDES": f"{KEY}:5,ui:6",
    }
    client = limited(make_app, redis_url, 3, **more)
    for key, limit in ((KEY, 5), ("model", 3), ("risk", 4), ("other", 4), ("ui", 6)):
        assert statuses(client, 8, headers={"X-API-Key": key}) == {404: limit, 429: 8 - limit}


def test_public_addresses_are_not_limited(make_app: Make, redis_url: str) -> None:
    client = limited(make_app, redis_url, 1)
    assert statuses(client, 2) == {404: 1, 429: 1}
    for _ in range(30):
        response = client.get("/health/live")
        assert response.status_code == 200
        assert headers(response) == (None,) * 4


def test_limits_can_be_switched_off(make_app: Make, redis_url: str) -> None:
    client = limited(make_app, redis_url, 1, POSITION_MANAGER_RATE_LIMIT_ENABLED="false")
    assert statuses(client, 30) == {404: 30}
    assert headers(client.get(PATH)) == (None,) * 4
    assert client.get(PATH, headers={"X-API-Key": ""}).status_code in (401, 503)


# --- limits of addresses


def test_wrong_keys_are_limited_for_each_address_and_right_ones_are_not_held_back(
    make_app: Make, database_url: str, redis_url: str
) -> None:
    client = make_app(database_url, redis=redis_url).test_client()

    def ask(key: str | None, address: str) -> TestResponse:
        given = {} if key is None else {"X-API-Key": key}
        return client.get(PATH, headers=given, environ_base={"REMOTE_ADDR": address})

    most = limits.WRONG_KEYS_PER_MINUTE
    for number in range(most):
        response = ask(f"guess {number}", "2001:db8::1")
        assert response.status_code == 401
        assert response.headers["RateLimit-Remaining"] == str(most - number - 1)
        assert response.headers["WWW-Authenticate"].startswith("Apikey ")
    response = ask("guess", "2001:db8::ffff:1")
    assert response.status_code == 429
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    assert json.loads(response.data)["error_code"] == "rate_limited"
    assert ask("guess", "2001:db8:0:1::1").status_code == 401
    assert ask("guess", "192.0.2.1").status_code == 401
    # No key is no guess.
    assert ask(None, "2001:db8::1").status_code == 401
    response = ask(KEY, "2001:db8::1")
    assert (response.status_code, response.headers["RateLimit-Limit"]) == (404, "100")


def test_the_address_is_the_one_that_trusted_proxies_wrote(
    make_app: Make, database_url: str, redis_url: str
) -> None:
    behind = make_app(database_url, redis=redis_url, POSITION_MANAGER_TRUSTED_PROXIES="2").test_client()
    direct = make_app(database_url, redis=redis_url).test_client()

    def remaining(client: FlaskClient, forwarded: str) -> int:
        given = {"X-API-Key": "wrong", "X-Forwarded-For": forwarded}
        return int(client.get(PATH, headers=given).headers["RateLimit-Remaining"])

    most = limits.WRONG_KEYS_PER_MINUTE
    assert remaining(behind, "192.0.2.1, 10.0.0.1") == most - 1
    # What the client itself wrote counts for nothing.
    assert remaining(behind, "203.0.113.9, 192.0.2.1, 10.0.0.1") == most - 2
    assert remaining(behind, "192.0.2.2, 10.0.0.1") == most - 1
    assert [remaining(direct, f"192.0.2.{number}") for number in range(3)] == [most - 1, most - 2, most - 3]


# --- the window


@contextmanager
def window(url: str) -> Iterator[MovingWindowRateLimiter]:
    storage = limits._OneCall(f"positions+{url}", key_prefix="test", on_error=lambda _: None)
    yield MovingWindowRateLimiter(storage)
    storage.storage.connection_pool.disconnect()


def test_window_slides(redis_url: str) -> None:
    """No second, wherever it begins, has more than the limit, and none is refused without need."""
    limit = RateLimitItemPerSecond(40)
    with window(redis_url) as limiter:
        seen: list[tuple[float, float, bool]] = []

        def hit() -> None:
            before = time.monotonic()
            passed = limiter.hit(limit, "a")
            seen.append((before, time.monotonic(), passed))

        # Unevenly: most of the first window late in it, which a window that does not slide forgets.
        hit()
        began = seen[0][1]
        assert wait_until(lambda: time.monotonic() > began + 0.8, limit_s=5)
        enough = threading.Event()

        def ask() -> None:
            while not enough.is_set():
                hit()

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            assert wait_until(lambda: sum(ok for _, _, ok in seen) > 3 * limit.amount, limit_s=60)
        finally:
            enough.set()
            for thread in threads:
                thread.join()
    passed = sorted((before, after) for before, after, ok in seen if ok)
    for (before, _), (_, after) in zip(passed, passed[limit.amount :], strict=False):
        assert after - before >= 1
    for before, after, ok in seen:
        if not ok:
            assert sum(a >= before - 1 and b <= after for b, a in passed) >= limit.amount


def test_what_has_left_the_window_goes_however_much_it_is(redis_url: str) -> None:
    limit = RateLimitItemPerSecond(5000, 60)
    key = f"test:{limit.key_for('a')}"
    with window(redis_url) as limiter, redis.Redis.from_url(redis_url) as client:
        seconds, micros = client.time()
        now = seconds * 1_000_000 + micros
        old = [now - 60_000_000 - number for number in range(3456)]
        recent = [now - 30_000_000 - number for number in range(1234)]
        client.rpush(key, *recent, *old)
        resets_at, remaining = limiter.get_window_stats(limit, "a")
        assert remaining == 5000 - 1234
        assert client.llen(key) == 1234
        assert 28 < resets_at - time.time() < 31
        assert limiter.hit(limit, "a")
        assert limiter.get_window_stats(limit, "a")[1] == 5000 - 1235
        assert limiter.hit(limit, "a", cost=3765)
        assert not limiter.hit(limit, "a")
        ttl = client.pttl(key)
        assert 50_000 < ttl <= 60_000


def test_an_interrupted_request_leaves_its_answer_to_nobody(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(BaseException):
        pass

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted

    limit = RateLimitItemPerSecond(10, 60)
    with window(redis_url) as limiter:
        limiter.hit(limit, "a")
        with monkeypatch.context() as patch:
            patch.setattr(redis.Connection, "read_response", interrupted)
            with pytest.raises(Interrupted):
                limiter.hit(limit, "a")
        limiter.hit(limit, "a")
        assert limiter.get_window_stats(limit, "a")[1] == 7


@pytest.mark.usefixtures("redis_server")
def test_one_call_a_request(make_app: Make, redis_url: str) -> None:
    client = limited(make_app, redis_url, 10)
    client.get(PATH)
    with redis.Redis.from_url(redis_url) as monitor:
        before = monitor.info("commandstats")
        statuses(client, 12)
        after = monitor.info("commandstats")
    calls = {name: each["calls"] - before.get(name, {"calls": 0})["calls"] for name, each in after.items()}
    outside = {"cmdstat_evalsha", "cmdstat_info"} | {
        f"cmdstat_{name}" for name in ("time", "lindex", "llen", "lpush", "pexpire", "ltrim")
    }
    assert calls["cmdstat_evalsha"] == 12
    assert {name for name, count in calls.items() if count} <= outside


# --- without Redis


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys that Redis was asked for."""
    keys: list[str] = []
    hit = limits._OneCall.hit

    def counted(self: limits._OneCall, key: str, *rest: Any) -> tuple[int, int, int]:
        keys.append(key)
        return hit(self, key, *rest)

    monkeypatch.setattr(limits._OneCall, "hit", counted)
    with capture_logs():
        yield keys


def held(url: str) -> int:
    """Return how many requests of the one key Redis has counted."""
    with redis.Redis.from_url(url) as client:
        return sum(client.llen(key) for key in client.scan_iter("*key:default*"))


def recovered(client: FlaskClient, url: str) -> bool:
    """Tell whether Redis counts again, once asked."""
    before = held(url)
    client.get(PATH)
    return held(url) > before


def test_with_redis_killed_the_same_limit_holds_and_it_is_used_again_once_back(
    make_app: Make, redis_server: Redis, redis_url: str, asked: list[str]
) -> None:
    client = limited(make_app, redis_url, 50)
    assert statuses(client, 20) == {404: 20}
    redis_server.kill()
    del asked[:]
    response = client.get(PATH)
    assert response.status_code == 404
    *shown, reset, retry_after = headers(response)
    assert (shown, retry_after) == (["50", "49"], None)
    assert reset is not None
    assert 1 <= int(reset) <= 60
    assert statuses(client, 59) == {404: 49, 429: 10}
    response = client.get(PATH)
    assert response.status_code == 429
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    # One failed, and one or a few more were to see whether it is back: not one for each request.
    assert len(asked) < 10
    redis_server.start()
    assert wait_until(lambda: recovered(client, redis_url), limit_s=20, interval_s=0.1)
    assert client.get(PATH).status_code == 404


def test_redis_that_freezes_while_many_ask_answers_nobody_with_an_error(
    make_app: Make, redis_server: Redis, redis_url: str, asked: list[str]
) -> None:
    limit, count = 60, 8
    clients = [limited(make_app, redis_url, limit)]
    app = clients[0].application
    assert statuses(clients[0], 5) == {404: 5}
    pid = redis_server.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        found: Counter[int] = Counter()
        together = threading.Barrier(count)

        def ask() -> None:
            client = app.test_client()
            client.environ_base["HTTP_X_API_KEY"] = KEY
            together.wait()
            found.update(statuses(client, 20))

        del asked[:]
        threads = [threading.Thread(target=ask) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {404: limit, 429: 20 * count - limit}
        # Each thread waited for it once or twice, and for no more of its requests.
        assert len(asked) <= 2 * count + 5
    finally:
        os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: recovered(clients[0], redis_url), limit_s=20, interval_s=0.1)


@pytest.mark.usefixtures("redis_server")
@pytest.mark.parametrize("refusal", ["full", "replica"])
def test_redis_that_takes_no_writes_is_as_good_as_none(
    make_app: Make, redis_url: str, asked: list[str], refusal: str
) -> None:
    client = limited(make_app, redis_url, 30)
    assert statuses(client, 5) == {404: 5}
    with redis.Redis.from_url(redis_url) as admin:
        if refusal == "full":
            admin.config_set("maxmemory", 1)
        else:
            admin.replicaof("127.0.0.1", 1)
        try:
            del asked[:]
            assert statuses(client, 40) == {404: 30, 429: 10}
            assert len(asked) < 10
            # That it answers is not enough to be used again.
            [limiter] = client.application.extensions["limiter"]
            assert not limiter.storage.check()
        finally:
            admin.config_set("maxmemory", 0)
            admin.replicaof("NO", "ONE")
    assert wait_until(lambda: recovered(client, redis_url), limit_s=20, interval_s=0.1)


def test_restarted_redis_is_not_missed(
    make_app: Make, redis_server: Redis, redis_url: str, asked: list[str]
) -> None:
    client = limited(make_app, redis_url, 30)
    assert statuses(client, 5) == {404: 5}
    # Neither the connection nor the script is known to it any more.
    redis_server.kill()
    redis_server.start()
    with redis.Redis.from_url(redis_url) as admin:
        admin.flushdb()
        admin.script_flush()
    assert statuses(client, 5) == {404: 5}
    assert held(redis_url) == 5
    assert len(asked) == 10


def test_redis_killed_while_a_request_is_served_does_not_spoil_its_answer(
    make_app: Make, redis_server: Redis, redis_url: str
) -> None:
    client = limited(make_app, redis_url, 30)
    app: Flask = client.application

    def view() -> dict[str, str]:
        redis_server.kill()
        return {"name": g.key.name}

    app.add_url_rule("/kill", view_func=view)
    response = client.get("/kill")
    assert (response.status_code, response.get_json()) == (200, {"name": "default"})
    *shown, reset, retry_after = headers(response)
    assert (shown, retry_after) == (["30", "29"], None)
    assert reset is not None
    assert 1 <= int(reset) <= 60
    redis_server.start()


def test_gunicorns_processes_share_a_limit(database_url: str, redis_url: str, tmp_path: Path) -> None:
    settings = environ(
        database_url, f"amqp://{NOWHERE}//", redis_url, POSITION_MANAGER_RATE_LIMIT_DEFAULT="9"
    )
    with served(tmp_path, settings) as api:
        assert wait_until(lambda: len(api.workers) == 2, limit_s=30)
        found = Counter(api.get(PATH, {"X-API-Key": KEY})[0] for _ in range(30))
        assert found == {404: 9, 429: 21}
        assert len(api.served(status=429, key_name="default")) == 21
