"""What integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import psycopg2
import pytest
import redis
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from tests.integration.api import Make, applications
from tests.integration.support import connected
from tests.services import PostgreSQL


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """Connections to a fresh migrated database, enough for a handful of concurrent writers."""
    with connected(database_url, 8) as made:
        yield made


@pytest.fixture
def new_empty_database(postgres: PostgreSQL) -> Iterator[str]:
    """URL of a database without any table."""
    url = make_url(postgres.url).set(database=f"empty_{uuid4().hex[:8]}")
    admin = make_url(postgres.url).set(drivername="postgresql").render_as_string(hide_password=False)
    with closing(psycopg2.connect(admin)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {url.database}")
            yield url.render_as_string(hide_password=False)
            cursor.execute(f"DROP DATABASE {url.database} WITH (FORCE)")


@pytest.fixture
def make_app() -> Iterator[Make]:
    """Applications on the servers given, on none where none is given."""
    with applications() as make:
        yield make


@pytest.fixture
def redis_waits(monkeypatch: pytest.MonkeyPatch) -> list[redis.TimeoutError]:
    """Each wait for Redis that was in vain, as it comes."""
    waits: list[redis.TimeoutError] = []
    read: Any = redis.Connection.read_response

    def counted(self: redis.Connection, *given: Any, **more: Any) -> Any:
        try:
            return read(self, *given, **more)
        except redis.TimeoutError as error:
            waits.append(error)
            raise

    monkeypatch.setattr(redis.Connection, "read_response", counted)
    return waits
