"""The portfolio's figures as processes share them, and as one keeps them: always of the newest version."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from random import Random
from typing import Any

import pytest
import redis
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import Connection, Engine, create_engine
from structlog.testing import capture_logs

from positions.errors import Unavailable
from positions.queries.portfolio import portfolio
from positions.storage import metrics_cache
from positions.storage.database import transaction
from positions.storage.metrics_cache import MetricsCache
from positions.storage.portfolio import Versions, VersionsAside
from positions.web import QUERY_MAX_BYTES, memory
from positions.web import portfolio as routes
from positions.web.memory import Answer, LastAnswers
from tests.integration.api import KEY, ROOT, Make
from tests.integration.support import apply, changed, execution
from tests.services import PostgreSQL, Redis, wait_until

PREFIX = "test"
KINDS = ("portfolio", "exposure", "pnl")
pytestmark = pytest.mark.usefixtures("redis_server")


def together(*works: Callable[[], None]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def finish(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def made(version: int) -> dict[str, bytes]:
    """Return figures that tell what they are of."""
    return {name: f"{name} at {version} ".encode() * 500 for name in KINDS}


# --- the cache that processes share


class Caches:
    """The caches of several processes on one Redis, and how often their figures were made."""

    def __init__(self, url: str, *, ttl_s: int = 10) -> None:
        self._url, self._ttl_s = url, ttl_s
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.client = self._stack.enter_context(redis.Redis.from_url(url))
        self.computed: list[int] = []

    def new(self, *, url: str | None = None, connections: int = 1) -> MetricsCache:
        made = MetricsCache(url or self._url, prefix=PREFIX, ttl_s=self._ttl_s, connections=connections)
        self._stack.callback(made._redis.connection_pool.disconnect)
        return made

    def make(self, version: int) -> metrics_cache.Made:
        with self._lock:
            self.computed.append(version)
        return version, made(version)

    def ask(self, cache: MetricsCache, version: int, name: str = "portfolio") -> str:
        """Return where the figures came from; they are right."""
        at, [figures], outcome = cache.get(version, [name], lambda: self.make(version))
        assert (at, figures) == (version, made(version)[name])
        return outcome

    def key(self, version: int) -> str:
        return f"{PREFIX}:portfolio::{version}"

    def asked(self) -> int:
        """Return how often Redis was asked for figures."""
        found: int = self.client.info("commandstats").get("cmdstat_hmget", {"calls": 0})["calls"]
        return found

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def caches(redis_url: str) -> Iterator[Caches]:
    with closing(Caches(redis_url)) as made:
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up waiting: what is counted does not depend on how busy the machine is."""
    monkeypatch.setattr(metrics_cache, "WAIT_S", 60)
    monkeypatch.setattr(metrics_cache, "COMPUTE_S", 60)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("made_at", [7, 9])
def test_one_process_computes_and_the_others_take_what_it_stored(caches: Caches, made_at: int) -> None:
    """Also where its figures are already of a later version than was asked for."""
    computing, finished = threading.Event(), threading.Event()

    def make() -> metrics_cache.Made:
        computing.set()
        assert finished.wait(60)
        return caches.make(made_at)

    found: list[tuple[bytes, str]] = []

    def ask(name: str) -> None:
        at, [figures], outcome = caches.new().get(7, [name], make)
        assert 7 <= at <= made_at
        found.append((figures, outcome))

    first = together(lambda: ask("portfolio"))
    assert computing.wait(60)
    before = caches.asked()
    others = together(*(lambda name=name: ask(name) for name in KINDS * 3))
    # All of them have looked, and most of them more than once.
    assert wait_until(lambda: caches.asked() > before + 3 * len(others), limit_s=30)
    finished.set()
    finish(first + others)
    assert caches.computed == [made_at]
    assert sorted(found) == sorted(
        [(made(made_at)["portfolio"], "miss"), *((made(made_at)[name], "hit") for name in KINDS * 3)]
    )


def test_process_that_dies_while_it_computes_holds_nobody_up_for_long(caches: Caches, redis_url: str) -> None:
    program = (
        "import sys, time\n"
        "from positions.storage.metrics_cache import MetricsCache\n"
        f"cache = MetricsCache(sys.argv[1], prefix={PREFIX!r}, ttl_s=10, connections=1)\n"
        "cache.get(7, ['portfolio'], lambda: print('computing', flush=True) or time.sleep(600))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, redis_url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "computing\n"
        process.kill()
    assert caches.client.exists(f"{caches.key(7)}:lock")
    outcomes: list[str] = []
    finish(together(*[lambda: outcomes.append(caches.ask(caches.new(), 7))] * 4))
    assert "miss" in outcomes
    assert caches.ask(caches.new(), 7) == "hit"


def test_lock_of_one_that_computes_ends_by_itself(caches: Caches) -> None:
    left_s: list[int] = []

    def make() -> metrics_cache.Made:
        left_s.append(caches.client.ttl(f"{caches.key(7)}:lock"))
        return caches.make(7)

    caches.new().get(7, ["portfolio"], make)
    assert 0 < left_s[0] <= metrics_cache.COMPUTE_S
    assert not caches.client.exists(f"{caches.key(7)}:lock")


def test_figures_of_another_version_are_not_served(caches: Caches) -> None:
    for version in (7, 8, 6):
        assert caches.ask(caches.new(), version) == "miss"
        assert caches.ask(caches.new(), version, "pnl") == "hit"
    assert caches.new().get(7, ["pnl"], lambda: caches.make(7), era="other")[2] == "miss"
    # Not even under the very key.
    caches.client.rename(caches.key(8), caches.key(9))
    for version in (9, 8):
        assert caches.ask(caches.new(), version) == "miss"
        assert caches.ask(caches.new(), version) == "hit"


RUBBISH: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"rubbish",
    "no text": lambda _: bytes(range(256)),
    "without a seal": lambda entry: entry[metrics_cache.SEAL_BYTES :],
    "cut off": lambda entry: entry[:-1],
    "changed": lambda entry: entry[:-2] + b"9 ",
}


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=list(RUBBISH))
def test_rubbish_under_the_present_key_is_not_served(
    caches: Caches, rubbish: Callable[[bytes], bytes]
) -> None:
    cache = caches.new()
    caches.ask(cache, 7)
    entry = caches.client.hget(caches.key(7), "portfolio")
    assert isinstance(entry, bytes)
    caches.client.hset(caches.key(7), "portfolio", rubbish(entry))
    assert caches.ask(cache, 7, "pnl") == "hit"
    assert caches.ask(cache, 7) == "miss"
    assert caches.ask(cache, 7) == "hit"


def test_figures_that_belong_together_are_served_together_or_not_at_all(caches: Caches) -> None:
    cache = caches.new()

    def both() -> str:
        at, figures, outcome = cache.get(7, ("pnl", "exposure"), lambda: caches.make(7))
        assert (at, figures) == (7, [made(7)["pnl"], made(7)["exposure"]])
        return outcome

    assert [both(), both()] == ["miss", "hit"]
    for name in ("pnl", "exposure"):
        caches.client.hdel(caches.key(7), name)
        assert [both(), both()] == ["miss", "hit"]
        caches.client.hset(caches.key(7), name, caches.client.hget(caches.key(7), "portfolio") or b"")
        assert [both(), both()] == ["miss", "hit"]


def test_key_of_another_type_is_no_reason_to_fail(caches: Caches) -> None:
    caches.client.set(caches.key(7), "rubbish")
    with capture_logs():
        assert caches.ask(caches.new(), 7) == "unavailable"


def test_entry_lives_as_long_as_is_set(redis_url: str) -> None:
    with closing(Caches(redis_url, ttl_s=1)) as caches:
        cache = caches.new()
        assert caches.ask(cache, 7) == "miss"
        assert 0 < caches.client.pttl(caches.key(7)) <= 1000
        assert wait_until(lambda: not caches.client.exists(caches.key(7)), limit_s=30)
        assert caches.ask(cache, 7) == "miss"
        assert caches.computed == [7, 7]


@contextmanager
def slow(port: int, delay_s: Callable[[], float]) -> Iterator[int]:
    """Yield the port of a way to ``port`` on which every answer takes longer."""
    closing_down = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as connections:

        def pass_on(source: socket.socket, target: socket.socket, wait_s: Callable[[], float]) -> None:
            with suppress(OSError):
                while data := source.recv(65536):
                    closing_down.wait(wait_s())
                    target.sendall(data)
            with suppress(OSError):
                target.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client = connections.enter_context(listener.accept()[0])
                    server = connections.enter_context(socket.create_connection(("127.0.0.1", port)))
                    sockets.extend((client, server))
                    threads.extend(
                        together(
                            lambda a=client, b=server: pass_on(a, b, lambda: 0),  # type: ignore[misc]
                            lambda a=client, b=server: pass_on(b, a, delay_s),  # type: ignore[misc]
                        )
                    )

        sockets: list[socket.socket] = []
        threads: list[threading.Thread] = []
        threads += together(accept)
        yield listener.getsockname()[1]
        closing_down.set()
        listener.shutdown(socket.SHUT_RDWR)
        finish(threads[:1])
        # Not closed before their threads have ended: one that is being read would not even say goodbye.
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        finish(threads)


def test_slow_redis_makes_answers_slower_never_wrong(
    caches: Caches, redis_url: str, redis_server: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Late answers, also those that nobody waits for any more, are given to no other question."""
    monkeypatch.setattr(metrics_cache, "AWAY_S", 0)
    random = Random(4)
    delays = [0.0, 0.001, 0.1, metrics_cache.TIMEOUT_S * 0.98, metrics_cache.TIMEOUT_S * 1.02, 0.3]
    with slow(redis_server.port, lambda: random.choice(delays)) as port, capture_logs():
        cache = caches.new(url=redis_url.replace(f":{redis_server.port}/", f":{port}/"), connections=4)
        outcomes: list[str] = []

        def ask(seed: int) -> None:
            mine = Random(seed)
            outcomes.extend(caches.ask(cache, mine.randrange(6), mine.choice(KINDS)) for _ in range(8))

        finish(together(*(lambda seed=seed: ask(seed) for seed in range(6))))
        cache._redis.connection_pool.disconnect()
    assert {"hit", "miss"} <= set(outcomes)


# --- the routes, in several processes


def client_of(app: Flask) -> FlaskClient:
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    return client


@pytest.fixture
def apps(make_app: Make, database_url: str, redis_url: str) -> list[Flask]:
    """What three processes run."""
    more = {"POSITION_MANAGER_RATE_LIMIT_ENABLED": "false"}
    return [make_app(database_url, redis=redis_url, **more) for _ in range(3)]


class Query:
    """Stands for the portfolio's query: counts, and is held up the first time, once it has its moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = 0
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._lock = threading.Lock()
        monkeypatch.setattr(routes, "portfolio", self)

    def __call__(self, connection: Connection, sums: Any, **wanted: Any) -> Any:
        with self._lock:
            self.asked += 1
            first = self.asked == 1
        if first:
            self.begun.set()
            assert self.go_on.wait(60)
        return portfolio(connection, sums, **wanted)


def buy(engine: Engine, number: int) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number)])


def size(client: FlaskClient, path: str = "/api/v1/portfolio") -> str:
    found: str = client.get(path).get_json()["by_asset"]["BTCUSDT"]["size"]
    return found


def test_frozen_redis_makes_a_request_wait_once_whoever_asks_it(
    make_app: Make,
    engine: Engine,
    database_url: str,
    redis_url: str,
    redis_server: Redis,
    redis_waits: list[redis.TimeoutError],
) -> None:
    """For its limit or for what is cached, and not for both."""
    client = make_app(database_url, redis=redis_url).test_client()

    def wait() -> bool:
        number = next(numbers)
        apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number)])
        del redis_waits[:]
        response = client.get("/api/v1/portfolio", headers={"X-API-Key": KEY})
        assert response.get_json()["by_asset"]["BTCUSDT"]["size"] == str(number)
        found.append(len(redis_waits))
        return sum(found) >= 3

    numbers = itertools.count(1)
    found: list[int] = []
    wait()
    assert found == [0]
    with redis_server.frozen(), capture_logs():
        assert wait_until(wait, limit_s=60)
    assert found[1] == 1
    assert max(found) == 1


@pytest.mark.usefixtures("patient")
def test_requests_in_all_processes_cost_one_computation(
    apps: list[Flask], engine: Engine, caches: Caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    buy(engine, 1)
    query = Query(monkeypatch)
    bodies: list[bytes] = []

    def ask(app: Flask) -> None:
        bodies.append(client_of(app).get("/api/v1/portfolio").data)

    before = caches.asked()
    threads = together(*(lambda app=app: ask(app) for app in apps for _ in range(5)))
    assert query.begun.wait(60)
    # One thread of each process, however many ask, waits for Redis.
    assert wait_until(lambda: caches.asked() > before + 10, limit_s=30)
    query.go_on.set()
    finish(threads)
    assert query.asked == 1
    assert len(bodies) == 15
    assert len(set(bodies)) == 1
    # It has stored what else there is to know, too.
    for app in apps:
        for part in ("exposure", "pnl"):
            assert client_of(app).get(f"/api/v1/portfolio/{part}").status_code == 200
    assert query.asked == 1


@pytest.mark.parametrize("path", ["/api/v1/portfolio", "/api/v1/portfolio?asset=BTCUSDT"])
def test_computation_begun_before_an_update_is_never_served_after_it(
    apps: list[Flask], engine: Engine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    one, other, _ = map(client_of, apps)
    buy(engine, 1)
    query = Query(monkeypatch)
    before: list[str] = []
    after: list[str] = []
    asking = together(lambda: before.append(size(one, path)))
    assert query.begun.wait(60)
    # The computation has its moment in time, and goes on after the update.
    buy(engine, 2)
    assert size(other, path) == "2"
    asking += together(lambda: after.append(size(client_of(apps[0]), path)))
    query.go_on.set()
    finish(asking)
    assert (before, after) == (["1"], ["2"])
    assert [size(client, path) for client in (one, other, client_of(apps[2]))] == ["2"] * 3


def test_committed_update_is_in_the_next_answer_of_every_process(apps: list[Flask], engine: Engine) -> None:
    clients = [client_of(app) for app in apps]
    paths = ("/api/v1/portfolio", "/api/v1/portfolio/exposure", "/api/v1/portfolio?include_positions=1")
    for number in range(15):
        price = {
            "event_type": "position",
            "data": {"symbol": "BTCUSDT", "markPrice": str(number + 1), "seq": number},
        }
        apply(engine, [execution("BTCUSDT", "Buy", "1", "100", number=number), price])
        for client in clients:
            for path in paths:
                found = client.get(path).get_json()
                assert found["total_exposure_usdt"] == str((number + 1) ** 2)
            assert client.get("/api/v1/positions/BTCUSDT").get_json()["size"] == str(number + 1)
            [listed] = client.get("/api/v1/positions").get_json()["positions"]
            assert listed["current_price"] == str(number + 1)


def test_change_by_hand_is_in_the_next_answer_of_every_process(apps: list[Flask], engine: Engine) -> None:
    clients = [client_of(app) for app in apps]
    buy(engine, 1)
    for number in range(1, 6):
        with engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE positions SET size = {number}, long_size = {number}")
        for client in clients:
            assert size(client) == size(client, "/api/v1/portfolio?asset=BTCUSDT") == str(number)
            assert client.get("/api/v1/positions/BTCUSDT").get_json()["size"] == str(number)
            [listed] = client.get("/api/v1/positions").get_json()["positions"]
            assert listed["size"] == str(number)


def test_emptied_table_of_versions_is_no_reason_to_fail(
    make_app: Make, database_url: str, redis_url: str, engine: Engine
) -> None:
    buy(engine, 1)
    # Versions are given twice then: figures of the first time are served for as long as entries live.
    more = {"POSITION_MANAGER_METRICS_CACHE_TTL": "1"}
    apps = [make_app(database_url, redis=redis_url, **more) for _ in range(2)]
    paths = ("/api/v1/portfolio", "/api/v1/portfolio/pnl", "/api/v1/positions", "/api/v1/positions/BTCUSDT")
    known, other = map(client_of, apps)
    for path in paths:
        assert known.get(path).status_code == 200
    with engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE portfolio_versions")
    for client in (known, other):
        for path in paths:
            assert client.get(path).status_code == 200, path
    buy(engine, 2)
    for client in (known, other):
        assert wait_until(lambda client=client: size(client) == "2", limit_s=30)  # type: ignore[misc]


def test_each_service_says_its_own_limit_is_exceeded(
    make_app: Make, database_url: str, redis_url: str, engine: Engine
) -> None:
    price = {"event_type": "position", "data": {"symbol": "BTCUSDT", "markPrice": "100"}}
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100"), price])
    limits = {None: False, "99": True, "101": False}
    clients = {}
    for limit in limits:
        more = {} if limit is None else {"POSITION_MANAGER_PORTFOLIO_MAX_EXPOSURE_USDT": limit}
        clients[limit] = client_of(make_app(database_url, redis=redis_url, **more))
    for path in ("/api/v1/portfolio", "/api/v1/portfolio/exposure", "/api/v1/portfolio?asset=BTCUSDT") * 2:
        told = {limit: client.get(path).get_json()["limit_exceeded"] for limit, client in clients.items()}
        assert told == limits, path


def test_rubbish_in_the_cache_reaches_no_client(apps: list[Flask], engine: Engine, redis_url: str) -> None:
    buy(engine, 1)
    right = client_of(apps[0]).get("/api/v1/portfolio").get_json()
    with redis.Redis.from_url(redis_url) as cache:
        [key] = cache.keys("*:portfolio:*")
        for name in KINDS:
            cache.hset(key, name, b"\xff" * 100)
    answer = client_of(apps[1]).get("/api/v1/portfolio")
    assert answer.status_code == 200
    assert {**answer.get_json(), "calculated_at": None} == {**right, "calculated_at": None}


# --- tags


TAGGED = ("/api/v1/portfolio", "/api/v1/portfolio/exposure", "/api/v1/positions/BTCUSDT", "/api/v1/positions")


@pytest.mark.parametrize("path", TAGGED)
def test_client_that_has_the_answer_is_told_so(apps: list[Flask], engine: Engine, path: str) -> None:
    buy(engine, 1)
    first, second, _ = map(client_of, apps)
    answer = first.get(path)
    tag = answer.headers["ETag"]
    assert tag.startswith('W/"')
    for given in (tag, tag.removeprefix("W/"), "*", f'"other", {tag}', f'W/"a",{tag} , "b"'):
        # In whichever process it ends up.
        for client in (first, second):
            same = client.get(path, headers={"If-None-Match": given})
            assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", tag)
    for given in ('"other"', 'W/"other"', "", "W/", tag.upper()):
        assert first.get(path, headers={"If-None-Match": given}).data == answer.data
    buy(engine, 2)
    newer = first.get(path, headers={"If-None-Match": tag})
    assert newer.status_code == 200
    assert newer.headers["ETag"] != tag
    assert newer.data != answer.data


def test_when_it_was_calculated_is_no_change(apps: list[Flask], engine: Engine) -> None:
    buy(engine, 1)
    client = client_of(apps[0])
    before = client.get("/api/v1/portfolio")
    # Something changed that the figures do not show.
    with transaction(engine) as connection:
        changed(connection)
    tag = before.headers["ETag"]
    assert client.get("/api/v1/portfolio", headers={"If-None-Match": tag}).status_code == 304
    after = client.get("/api/v1/portfolio")
    assert after.headers["ETag"] == tag
    assert after.get_json()["calculated_at"] > before.get_json()["calculated_at"]


def test_tag_is_of_all_figures() -> None:
    data = {"size": "1", "calculated_at": "2025-01-15T10:00:00Z"}
    tag = Answer.of(data).tag
    assert Answer.of({**data, "calculated_at": "2025-01-15T10:00:01Z"}).tag == tag
    assert Answer.of({**data, "size": "1.0"}).tag != tag
    assert Answer.of({"size": "1"}).tag != tag
    assert json.loads(Answer.of(data).body) == data


# --- answers kept in the process


def answer(body: bytes = b"{}") -> Answer:
    return Answer(body, "t" * memory.TAG_CHARS)


def test_kept_answer_is_given_until_the_version_changes_or_a_second_is_over() -> None:
    now = [100.0]
    kept = LastAnswers(clock=lambda: now[0])
    kept.put("a", 7, answer())
    for version, after_s, found in (
        (7, 0.0, True),
        (6, 0.0, True),
        (8, 0.0, False),
        (7, 1.0, True),
        (7, 1.01, False),
    ):
        now[0] = 100 + after_s
        assert (kept.get("a", version) is not None) is found, (version, after_s)
    assert kept.get("b", 7) is None
    kept.put("a", 8, answer(b"new"))
    assert kept.get("a", 8) == answer(b"new")


def test_kept_answers_are_bounded_in_bytes() -> None:
    kept = LastAnswers(clock=lambda: 0)
    body = b"x" * 100_000
    most = memory.KEPT_MAX_BYTES // (len(body) + memory.ENTRY_BYTES)
    for number in range(3 * most):
        kept.put(number, 7, answer(body))
        # The same again does not count twice.
        kept.put(number, 7, answer(body))
    found = [number for number in range(3 * most) if kept.get(number, 7)]
    assert found == list(range(2 * most, 3 * most))
    kept.put("too large", 7, answer(b"x" * memory.KEPT_MAX_BYTES))
    assert kept.get("too large", 7) is None
    kept.put("small", 7, answer())
    assert kept.get("small", 7) == answer()


def test_kept_answers_are_bounded_with_the_longest_questions() -> None:
    kept = LastAnswers(clock=lambda: 0)
    tracemalloc.start()
    try:
        for number in range(8000):
            query = f"{number:0{QUERY_MAX_BYTES}}".encode()
            kept.put((f"/api/v1/positions/ASSET{number}", query), 7, answer(str(number).encode()))
        assert tracemalloc.get_traced_memory()[0] < memory.KEPT_MAX_BYTES
    finally:
        tracemalloc.stop()


# --- versions


@pytest.fixture
def versions(engine: Engine) -> Iterator[Versions]:
    made = Versions(engine)
    yield made
    made._close()


class Commits:
    """Changes of the portfolio by several writers: what is committed at least, and at most."""

    def __init__(self, engine: Engine, versions: Versions) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self.base = versions()
        self.begun = self.done = 0

    def make(self) -> None:
        with self._lock:
            self.begun += 1
        with self._engine.begin() as connection:
            changed(connection)
        with self._lock:
            self.done += 1


def stress(engine: Engine, versions: Versions, *, readers: int, until: Callable[[], bool]) -> Commits:
    """Let several write and read until ``until()``; nobody is told a version older than its question."""
    commits = Commits(engine, versions)
    stop = threading.Event()
    wrong: list[object] = []

    def write() -> None:
        while not stop.is_set():
            commits.make()

    def read() -> None:
        last = 0
        try:
            while not stop.is_set():
                least = commits.base + commits.done
                found = versions()
                if not max(last, least) <= found <= commits.base + commits.begun:
                    wrong.append((last, least, found))
                last = found
        except Unavailable as error:
            wrong.append(error)

    threads = together(*[write] * 2, *[read] * readers)
    try:
        assert wait_until(lambda: bool(wrong) or until(), limit_s=60)
    finally:
        stop.set()
        finish(threads)
    assert wrong == []
    return commits


def test_nobody_is_told_a_version_older_than_its_question(engine: Engine, versions: Versions) -> None:
    end = time.monotonic() + 3
    commits = stress(engine, versions, readers=12, until=lambda: time.monotonic() > end)
    assert commits.done > 100
    assert versions() == commits.base + commits.done


def test_requests_share_the_next_reading_and_never_one_under_way(
    engine: Engine, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = versions()
    read, go_on = threading.Event(), threading.Event()
    readings: list[int] = []

    def ask() -> int:
        readings.append(real())
        if len(readings) == 1:
            read.set()
            assert go_on.wait(60)
        return readings[-1]

    real = versions._ask
    monkeypatch.setattr(versions, "_ask", ask)
    first: list[int] = []
    later: list[int] = []
    threads = together(lambda: first.append(versions()))
    assert read.wait(60)
    with transaction(engine) as connection:
        changed(connection)
    threads += together(*[lambda: later.append(versions())] * 8)

    def waiting() -> bool:
        frames = sys._current_frames()
        return all(frames[thread.ident or 0].f_code is Versions.__call__.__code__ for thread in threads[1:])

    assert wait_until(waiting, limit_s=30)
    go_on.set()
    finish(threads)
    assert (first, later) == ([before], [before + 1] * 8)
    assert readings == [before, before + 1]


def test_lost_connection_is_not_noticed(engine: Engine, versions: Versions) -> None:
    ended: set[int] = set()
    seen: dict[int, int] = {}

    def end_it() -> bool:
        begun, cursor = versions._begun, versions._cursor
        pid = cursor and cursor.connection.info.backend_pid
        # Only one that a version was read on: who loses the new connection too is told so.
        if pid and pid not in ended and begun > seen.setdefault(pid, begun):
            with engine.begin() as connection:
                connection.exec_driver_sql("SELECT pg_terminate_backend(%(pid)s)", {"pid": pid})
            ended.add(pid)
        return len(ended) == 20

    stress(engine, versions, readers=6, until=end_it)
    # Neither is one that is lost while nobody asks.
    versions()
    end_it()
    versions()
    end_it()
    assert len(ended) == 21
    assert versions() == versions()


def test_version_is_unavailable_with_the_database_and_no_longer(
    postgres: PostgreSQL, engine: Engine, versions: Versions
) -> None:
    before = versions()
    postgres.kill()
    for _ in range(3):
        with pytest.raises(Unavailable):
            versions()
    postgres.start()
    assert versions() == before
    engine.dispose()
    with transaction(engine) as connection:
        changed(connection)
    assert versions() == before + 1


def test_version_that_finds_no_connection_free_is_unavailable(database_url: str) -> None:
    engine = create_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    versions = Versions(engine)
    with engine.connect(), pytest.raises(Unavailable):
        versions()
    assert versions() >= 0
    versions._close()
    engine.dispose()


def test_late_answer_is_told_to_no_later_question(engine: Engine, postgres: PostgreSQL) -> None:
    aside = VersionsAside(engine)
    aside.connect()
    assert aside.begin()
    before = aside.end(60)
    assert before is not None
    with postgres.frozen():
        assert aside.begin()
        assert aside.end(0) is None
        # One question at a time.
        assert not aside.begin()
    assert aside._answered(60)
    with transaction(engine) as connection:
        changed(connection)
    assert aside.begin()
    assert aside.end(60) == before + 1


def test_question_whose_connection_is_lost_is_unavailable(engine: Engine) -> None:
    aside = VersionsAside(engine)
    # Where nobody has connected yet, nothing is asked.
    assert not aside.begin()
    for asked_before in (False, True):
        aside.connect()
        if asked_before:
            assert aside.begin()
            assert aside.end(60) is not None
        with engine.begin() as connection:
            pid = aside._cursor.connection.info.backend_pid
            connection.exec_driver_sql("SELECT pg_terminate_backend(%(pid)s)", {"pid": pid})
        with pytest.raises(Unavailable):  # noqa: PT012 - at the one or at the other
            aside.begin()
            aside.end(60)
        assert not aside.begin()
