"""The servers of the suite, and a fresh database, virtual host and Redis database for each test.

The servers start when a test first asks for one, so that unit tests start none. The environment
variables ``POSITIONS_TEST_DATABASE_URL``, ``POSITIONS_TEST_BROKER_URL`` and ``POSITIONS_TEST_REDIS_URL``
name servers to use instead: scratch ones, as their queues and Redis database are emptied. A test that also
asks for ``postgres``, ``rabbitmq`` or ``redis_server``, as one that kills a server must, is always given
the suite's own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress

import amqp
import psycopg2
import pytest
import redis
from hypothesis import HealthCheck, settings
from kombu.utils.url import parse_url
from psycopg2 import sql
from sqlalchemy.engine import URL, make_url

from tests.services import PostgreSQL, RabbitMQ, Redis, Server

# How long an example takes says nothing on a machine that others use too.
settings.register_profile("positions", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("positions")

_serial = itertools.count(1)

CONTRACT_QUEUES = (
    "ws-gateway.position",
    "order-manager.order_executed",
    "order-manager.order_events",
    "position_updated",
    "portfolio_updated",
    "position_snapshot_created",
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgreSQL]:
    with PostgreSQL() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Redis]:
    with Redis() as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> Iterator[RabbitMQ]:
    with RabbitMQ() as server:
        yield server


class Databases:
    """Databases of one PostgreSQL server, cloned from a template that is migrated once."""

    def __init__(self, server: PostgreSQL | str) -> None:
        self._server = server if isinstance(server, PostgreSQL) else None
        self._url = make_url(server.url if isinstance(server, PostgreSQL) else server)
        self._template: URL | None = None

    def close(self) -> None:
        if self._template:
            self._drop(self._template)

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """Create a migrated database, yield its URL and drop it, whoever is still connected."""
        if self._template is None:
            from positions.storage import migrate

            template = self._create()
            migrate.upgrade(template.render_as_string(hide_password=False))
            self._template = template
        clone = self._create(template=self._template)
        try:
            yield clone.render_as_string(hide_password=False)
        finally:
            self._drop(clone)

    def _create(self, template: URL | None = None) -> URL:
        # The process's id: runs of the suite may share an explicit server.
        url = self._url.set(database=f"positions_test_{os.getpid()}_{next(_serial)}")
        source = template.database if template else "template0"
        self._execute("CREATE DATABASE {} TEMPLATE {}", url.database, source)
        return url

    def _drop(self, url: URL) -> None:
        self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", url.database)

    def _execute(self, statement: str, *names: str | None) -> None:
        if self._server:
            _revive(self._server)
        dsn = self._url.set(drivername="postgresql").render_as_string(hide_password=False)
        with closing(psycopg2.connect(dsn)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql.SQL(statement).format(*map(sql.Identifier, map(str, names))))


@pytest.fixture(scope="session")
def _own_databases(postgres: PostgreSQL) -> Iterator[Databases]:
    with closing(Databases(postgres)) as databases:
        yield databases


@pytest.fixture(scope="session")
def _given_databases() -> Iterator[Databases]:
    with closing(Databases(os.environ["POSITIONS_TEST_DATABASE_URL"])) as databases:
        yield databases


@pytest.fixture(scope="session")
def new_database(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[str]]:
    """Context manager of a fresh migrated database, for fixtures of a wider scope than a test."""
    given = "POSITIONS_TEST_DATABASE_URL" in os.environ
    databases: Databases = request.getfixturevalue("_given_databases" if given else "_own_databases")
    return databases.fresh


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """SQLAlchemy URL of a fresh migrated database."""
    given = "POSITIONS_TEST_DATABASE_URL" in os.environ and "postgres" not in request.fixturenames
    databases: Databases = request.getfixturevalue("_given_databases" if given else "_own_databases")
    with databases.fresh() as url:
        yield url


@pytest.fixture
def broker_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a fresh virtual host; of an explicit broker, its own, without the contract's queues."""
    given = os.environ.get("POSITIONS_TEST_BROKER_URL")
    if given and "rabbitmq" not in request.fixturenames:
        _clear(given)
        yield given
        return
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    _revive(rabbitmq)
    name = f"test-{next(_serial)}"
    yield rabbitmq.add_vhost(name)
    _revive(rabbitmq)
    rabbitmq.delete_vhost(name)


@pytest.fixture
def redis_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty Redis database, another one than the last test's."""
    url = os.environ.get("POSITIONS_TEST_REDIS_URL")
    if not url or "redis_server" in request.fixturenames:
        server: Redis = request.getfixturevalue("redis_server")
        _revive(server)
        url = server.database_url(next(_serial) % server.for_each_test)
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def _revive(server: Server) -> None:
    # A test that failed between kill and start must not take the rest of the suite with it.
    if not server.running:
        server.start()


def _clear(url: str) -> None:
    parts = parse_url(url)
    host = f"{parts['hostname']}:{parts['port'] or 5672}"
    with amqp.Connection(
        host, userid=parts["userid"], password=parts["password"], virtual_host=parts["virtual_host"] or "/"
    ) as connection:
        for queue in CONTRACT_QUEUES:
            with suppress(amqp.NotFound):
                connection.channel().queue_delete(queue)
