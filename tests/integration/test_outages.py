"""The API as it is deployed, while its servers go away and come back: what each route answered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
import requests
from sqlalchemy import Engine

from positions.storage import api_keys, tables
from positions.storage.database import connect, transaction
from tests.conftest import Databases
from tests.integration.api import KEY, Make
from tests.integration.processes import environment, web
from tests.integration.support import apply, execution
from tests.services import PostgreSQL, RabbitMQ, Redis, Server, wait_until

NOT_FOR_EVER_S = 45
"""Above every limit there is: the database's, the worker's."""
LIMIT = 5
KEYS = {"named": "key-of-the-settings", "few": "key-with-few-requests", "stored": "key-of-the-database"}
REDIS_DATABASE = 14
BOUGHT = 2
PRICE = Decimal("50100.5")
NOW = datetime.now(UTC)
# Its one point is of now.
HISTORY = f"from={NOW:%Y-%m-%dT%H:%M:%SZ}&interval=86400"

Answers = dict[str, int]
"""The status of each route."""

POSITION = "/api/v1/positions/{asset}"
# Each route: where it is asked, and what it answers with everything up, without Redis and without PostgreSQL.
TABLE: dict[str, tuple[str, int, int, int]] = {
    "GET /api/v1/positions": ("/api/v1/positions", 200, 200, 503),
    f"GET {POSITION}": ("/api/v1/positions/btcusdt", 200, 200, 503),
    f"GET {POSITION} of none": ("/api/v1/positions/NONE", 404, 404, 503),
    f"GET {POSITION} as of": ("/api/v1/positions/BTCUSDT?as_of=2025-01-15T10:00:01.5Z", 200, 200, 503),
    f"GET {POSITION}/executions": ("/api/v1/positions/BTCUSDT/executions", 200, 200, 503),
    f"GET {POSITION}/snapshots": ("/api/v1/positions/BTCUSDT/snapshots", 200, 200, 503),
    f"POST {POSITION}/snapshot": ("/api/v1/positions/BTCUSDT/snapshot", 201, 201, 503),
    f"POST {POSITION}/validate": ("/api/v1/positions/BTCUSDT/validate", 200, 200, 503),
    "GET /api/v1/portfolio": ("/api/v1/portfolio", 200, 200, 503),
    "GET /api/v1/portfolio with positions": ("/api/v1/portfolio?include_positions=true", 200, 200, 503),
    "GET /api/v1/portfolio/exposure": ("/api/v1/portfolio/exposure", 200, 200, 503),
    "GET /api/v1/portfolio/pnl": ("/api/v1/portfolio/pnl", 200, 200, 503),
    "GET /api/v1/portfolio/history": (f"/api/v1/portfolio/history?{HISTORY}", 200, 200, 503),
    "GET /api/v1/events/quarantine": ("/api/v1/events/quarantine", 200, 200, 503),
    "POST /api/v1/events/quarantine/{id}/replay": ("/api/v1/events/quarantine/1/replay", 404, 404, 503),
    "GET /health": ("/health", 200, 200, 503),
    "GET /health/live": ("/health/live", 200, 200, 200),
    "GET /health/ready": ("/health/ready", 200, 200, 503),
    "GET /metrics": ("/metrics", 200, 200, 200),
    "GET /openapi.json": ("/openapi.json", 200, 200, 200),
    "GET /docs": ("/docs", 200, 200, 200),
}
UP: Answers = {route: up for route, (_, up, _, _) in TABLE.items()}
NO_REDIS: Answers = {route: no_redis for route, (_, _, no_redis, _) in TABLE.items()}
NO_POSTGRES: Answers = {route: no_postgres for route, (_, _, _, no_postgres) in TABLE.items()}
FIGURES = tuple(
    address
    for route, (address, status, *_) in TABLE.items()
    if route.startswith("GET /api") and status == 200
)
VARYING = {"at", "calculated_at", "time_held_minutes"}


def bought(number: int) -> dict[str, Any]:
    return execution("BTCUSDT", "Buy", "0.1", "50000.3", number=number)


class Api:
    """The API, its servers, and who asks it."""

    def __init__(self, address: str, database: Engine, cache_url: str) -> None:
        self.address, self.database, self.cache_url = address, database, cache_url
        self.fills = BOUGHT

    def ask(self, address: str, *, method: str = "GET", key: str | None = KEY) -> requests.Response:
        """Return an answer; it carries the trace id, and tells what failed as it is to be told."""
        trace_id = f"outage-{uuid4()}"
        headers = {"X-Trace-Id": trace_id} | ({} if key is None else {"X-API-Key": key})
        response = requests.request(
            method, f"{self.address}{address}", headers=headers, timeout=NOT_FOR_EVER_S
        )
        assert response.headers["X-Trace-Id"] == trace_id
        assert "Traceback" not in response.text
        if response.status_code >= 400 and address != "/health":
            assert response.headers["Content-Type"] == "application/problem+json"
            body = response.json()
            assert (body["trace_id"], body["status"]) == (trace_id, response.status_code)
            if response.status_code == 503:
                assert body["error_code"] == "unavailable"
                assert int(response.headers["Retry-After"]) > 0
        return response

    def all(self) -> Answers:
        """Return what each route answers, all of them asked at once."""

        def status(route: str) -> int:
            return self.ask(TABLE[route][0], method=route.partition(" ")[0]).status_code

        with ThreadPoolExecutor(len(TABLE)) as pool:
            return dict(zip(TABLE, pool.map(status, TABLE), strict=True))

    def figures(self) -> dict[str, Any]:
        """Return all figures there are, as they are written, without what changes with time."""
        return {address: _steady(json.loads(self.ask(address).text)) for address in FIGURES}

    def buy(self) -> str:
        """Commit a fill and return the size it leads to."""
        apply(self.database, [bought(self.fills)])
        self.fills += 1
        return f"{self.fills // 10}.{self.fills % 10}".removesuffix(".0")

    def publish(self) -> None:
        """Empty the outbox as a relay would, of which there is none: nothing else is amiss."""
        with transaction(self.database) as connection:
            connection.execute(tables.outbox.delete())

    def await_up(self, key: str = KEY) -> None:
        """Return once every process serves again."""
        assert wait_until(
            lambda: all(self.ask("/api/v1/positions", key=key).status_code == 200 for _ in range(20)),
            limit_s=NOT_FOR_EVER_S,
        )


def _steady(value: Any) -> Any:
    if isinstance(value, list):
        return [_steady(each) for each in value]
    if isinstance(value, dict):
        return {name: _steady(each) for name, each in value.items() if name not in VARYING}
    return value


def _settings_keys() -> str:
    tiers = {"named": None, "few": LIMIT}
    return json.dumps(
        [
            {"name": name, "hash": sha256(KEYS[name].encode()).hexdigest(), "role": "read", "tier": tier}
            for name, tier in tiers.items()
        ]
    )


@pytest.fixture(scope="module")
def servers(
    _own_databases: Databases, rabbitmq: RabbitMQ, redis_server: Redis
) -> Iterator[tuple[Engine, dict[str, str]]]:
    """A database with a position and a key in it, and settings of an API on servers that may be killed."""
    if not redis_server.running:
        redis_server.start()
    cache_url = redis_server.database_url(REDIS_DATABASE)
    with ExitStack() as stack:
        broker = rabbitmq.add_vhost("outages")
        stack.callback(rabbitmq.delete_vhost, "outages")
        database_url = stack.enter_context(_own_databases.fresh())
        engine = connect(database_url)
        stack.callback(engine.dispose)
        with transaction(engine) as connection:
            api_keys.create(
                connection,
                name="stored",
                digest=sha256(KEYS["stored"].encode()).hexdigest(),
                role="read",
                requests_per_minute=None,
                expires_at=None,
            )
        price = {"event_type": "position", "data": {"symbol": "BTCUSDT", "markPrice": str(PRICE)}}
        apply(engine, [*(bought(number) for number in range(BOUGHT)), price])
        settings = environment(
            database_url, broker, cache_url, rate_limit_default="1000000", api_keys=_settings_keys()
        )
        yield engine, settings


@pytest.fixture(scope="module")
def api(servers: tuple[Engine, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    engine, settings = servers
    with web(settings, tmp_path_factory.mktemp("outages")) as address:
        yield Api(address, engine, settings["POSITION_MANAGER_REDIS_URL"])


@contextmanager
def killed(*servers: Server) -> Iterator[None]:
    for server in servers:
        server.kill()
    try:
        yield
    finally:
        for server in servers:
            server.start()


def test_table_knows_every_route(make_app: Make) -> None:
    app = make_app("postgresql+psycopg2://127.0.0.1:1/none")
    told = json.loads(app.test_client().get("/openapi.json").data)["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in told.items() for method in methods}
    assert routes <= TABLE.keys()


def test_what_each_route_answers(api: Api, postgres: PostgreSQL, redis_server: Redis) -> None:
    def health_() -> dict[str, Any]:
        found: dict[str, Any] = api.ask("/health").json()
        return {name: found[name] for name in ("status", "database_connected", "cache_connected")}

    assert api.all() == UP
    api.publish()
    assert health_() == {"status": "healthy", "database_connected": True, "cache_connected": True}

    stages: tuple[tuple[str, AbstractContextManager[None], Answers, str], ...] = (
        ("Redis killed", killed(redis_server), NO_REDIS, "degraded"),
        ("Redis frozen", redis_server.frozen(), NO_REDIS, "degraded"),
        ("PostgreSQL killed", killed(postgres), NO_POSTGRES, "unhealthy"),
        ("PostgreSQL frozen", postgres.frozen(), NO_POSTGRES, "unhealthy"),
        ("both killed", killed(postgres, redis_server), NO_POSTGRES, "unhealthy"),
    )
    for stage, away, expected, status in stages:
        before = api.figures()
        with away:
            for _ in range(2):
                assert api.all() == expected, stage
            # What it told is kept for two seconds.
            assert wait_until(lambda: health_()["status"] == status, limit_s=10), stage  # noqa: B023
            for wrong in (None, "wrong", KEYS["named"].upper()):
                assert api.ask("/api/v1/portfolio", key=wrong).status_code in (401, 503), stage
        api.await_up()
        assert api.all() == UP, stage
        api.publish()
        assert wait_until(lambda: health_()["status"] == "healthy", limit_s=10), stage
        after = api.figures()
        for address in ("/api/v1/portfolio", "/api/v1/portfolio/exposure", "/api/v1/portfolio/pnl"):
            assert after[address] == before[address], stage


@pytest.mark.parametrize("away", [killed, Server.frozen], ids=["killed", "frozen"])
def test_without_redis_figures_keys_and_limits_are_the_same(
    api: Api, redis_server: Redis, away: Callable[[Server], AbstractContextManager[None]]
) -> None:
    before = api.figures()
    with away(redis_server):
        # Digit for digit.
        assert api.figures() == before
        for _ in range(6):
            size = api.buy()
            for _ in range(2):
                assert api.ask("/api/v1/positions/BTCUSDT").json()["size"] == size
                by_asset = api.ask("/api/v1/portfolio").json()["by_asset"]
                assert by_asset["BTCUSDT"]["size"] == size
                exposure = api.ask("/api/v1/portfolio/exposure").json()["by_asset"]["BTCUSDT"]["exposure"]
                assert Decimal(exposure) == Decimal(size) * PRICE
        during = api.figures()
        for key in (KEYS["named"], KEYS["stored"]):
            assert api.ask("/api/v1/portfolio", key=key).status_code == 200
        assert api.ask("/api/v1/portfolio", key="wrong").status_code in (401, 429)
        # Each of the two processes counts for itself.
        found = Counter(api.ask("/api/v1/portfolio", key=KEYS["few"]).status_code for _ in range(5 * LIMIT))
        assert set(found) <= {200, 429}
        assert found[200] <= 2 * LIMIT
    assert api.figures() == during


def test_redis_that_comes_back_empty_is_used_again(api: Api, redis_server: Redis) -> None:
    before = api.figures()
    with redis.Redis.from_url(api.cache_url) as cache:
        assert cache.keys("*:portfolio:*")
        redis_server.kill()
        assert api.figures() == before
        redis_server.start()
        cache.flushall()
        assert api.figures() == before

        def used() -> bool:
            size = api.buy()
            assert api.figures()["/api/v1/portfolio"]["by_asset"]["BTCUSDT"]["size"] == size
            return bool(cache.keys("*:portfolio:*") and cache.keys("*:limits*"))

        assert wait_until(used, limit_s=NOT_FOR_EVER_S)
        before = api.figures()
        # And emptied while it is used.
        cache.flushall()
        assert api.figures() == before


def test_started_without_any_server_it_serves_once_they_are_there(
    servers: tuple[Engine, dict[str, str]], postgres: PostgreSQL, redis_server: Redis, tmp_path: Path
) -> None:
    engine, settings = servers
    with ExitStack() as away:
        away.enter_context(killed(postgres, redis_server))
        engine.dispose()
        with web(settings, tmp_path) as address:
            api = Api(address, engine, settings["POSITION_MANAGER_REDIS_URL"])
            assert api.all() == NO_POSTGRES
            # Whether a key is in the database cannot be told.
            for key in (KEYS["stored"], "wrong"):
                assert api.ask("/api/v1/portfolio", key=key).status_code == 503
            assert api.ask("/api/v1/portfolio", key=None).status_code == 401
            away.close()
            api.await_up()
            api.await_up(KEYS["stored"])
            assert api.ask("/api/v1/portfolio", key="wrong").status_code == 401
            assert api.all() == UP
