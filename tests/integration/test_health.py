"""What `/health` and its probes say, on real servers that come and go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from kombu import Connection
from sqlalchemy import Engine, delete, insert, select, update

from positions.storage import attempts, migrate, tables
from positions.storage.database import transaction
from positions.web import resources
from tests.integration.api import KEY, NOWHERE, QUEUE, Make, store
from tests.integration.processes import environment, worker
from tests.services import PostgreSQL, RabbitMQ, wait_until

EXECUTIONS, ORDERS = "order-manager.order_executed", "order-manager.order_events"


def _health(app: Flask, status: int = 200) -> dict[str, Any]:
    """Return what is so now, not what was a moment ago."""
    checks = app.extensions[resources.NAME].checks
    checks.queues._last = checks.cache._last = None
    response = app.test_client().get("/health")
    assert response.status_code == status
    body: dict[str, Any] = response.get_json()
    return body


def _event_was(engine: Engine, ago: timedelta) -> None:
    """Let the last event be one of some time ago."""
    at = datetime.now(UTC) - ago
    with engine.begin() as connection:
        connection.execute(delete(tables.positions))
        connection.execute(
            insert(tables.positions).values(asset="BTCUSDT", mode="one-way", last_updated=at, closed_at=at)
        )


def test_service_that_has_everything_is_healthy(
    make_app: Make, database_url: str, broker_url: str, redis_url: str, engine: Engine
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    updated_at = datetime(2025, 1, 15, 10, 0, tzinfo=UTC)
    closed = {"mode": "one-way", "last_updated": updated_at, "closed_at": updated_at}
    store(database_url, {"asset": "BTCUSDT", **closed}, {"asset": "ETHUSDT", **closed})
    with engine.begin() as connection:
        connection.execute(
            insert(tables.outbox).values(event_type="position_updated", trace_id="t", body="{}")
        )
    health = _health(app)
    assert health.pop("timestamp").endswith("Z")
    age = (datetime.now(UTC) - updated_at).total_seconds()
    assert health.pop("last_event_age_seconds") == pytest.approx(age, abs=60)
    nothing = {"messages": 0, "consumers": 0, "our_consumers": 0}
    assert health == {
        "status": "healthy",
        "service": "position-manager",
        "database_connected": True,
        "queue_connected": True,
        "cache_connected": True,
        "positions_count": 2,
        "last_event_at": "2025-01-15T10:00:00Z",
        "backlog": 1,
        "outbox": 1,
        "queues": {QUEUE: nothing, EXECUTIONS: nothing, ORDERS: nothing},
        "warnings": [],
    }
    with engine.begin() as connection:
        connection.execute(
            insert(tables.ledger).values(
                position_id=select(tables.positions.c.id).limit(1).scalar_subquery(),
                key="k",
                kind="trade",
                leg="net",
                quantity=1,
                price=1,
                fee=0,
                executed_at=updated_at,
                time_source="event",
                exec_type="Trade",
                trace_id="t",
                recorded_at=updated_at + timedelta(seconds=1),
            )
        )
    assert _health(app)["last_event_at"] == "2025-01-15T10:00:01Z"


def test_backlog_that_nobody_works_on_is_said(
    make_app: Make, database_url: str, broker_url: str, redis_url: str, engine: Engine
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    _event_was(engine, timedelta(seconds=5))
    with Connection(broker_url) as broker:
        channel = broker.channel()
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        for _ in range(3):
            broker.Producer(channel).publish({}, routing_key=QUEUE)
        assert wait_until(lambda: _health(app)["backlog"] == 3, limit_s=5)
        health = _health(app)
        assert health["status"] == "degraded"
        nobody = f"{QUEUE}: 3 messages wait and nobody consumes them; does a worker run?"
        assert health["warnings"] == [nobody]

        _event_was(engine, timedelta(seconds=90))
        first, second = _health(app)["warnings"]
        assert first == nobody
        assert second.startswith("3 messages wait in the queues, and no event was applied for 9")
        with engine.begin() as connection:
            connection.execute(delete(tables.positions))
        assert _health(app)["warnings"][1].endswith("no event was applied ever.")

        channel.queue_purge(QUEUE)
        assert wait_until(lambda: _health(app)["status"] == "healthy", limit_s=5)


def test_outbox_that_is_not_published_is_said(
    make_app: Make, database_url: str, broker_url: str, redis_url: str, engine: Engine
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    with engine.begin() as connection:
        for age in (90, 1):
            connection.execute(
                insert(tables.outbox).values(
                    event_type="position_updated",
                    trace_id="t",
                    body="{}",
                    created_at=datetime.now(UTC) - timedelta(seconds=age),
                )
            )
    health = _health(app)
    assert health["status"] == "degraded"
    (warning,) = health["warnings"]
    assert warning.startswith("The oldest message to publish waits for 9")
    with engine.begin() as connection:
        connection.execute(update(tables.outbox).values(created_at=datetime.now(UTC)))
    assert _health(app)["status"] == "healthy"


def test_message_that_ends_its_worker_is_said(
    make_app: Make, database_url: str, broker_url: str, redis_url: str, engine: Engine
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    now = datetime.now(UTC)
    with transaction(engine) as connection:
        attempts.begun(connection, {"a": QUEUE, "b": QUEUE}, alone=False, now=now)
    assert _health(app)["status"] == "healthy"
    with transaction(engine) as connection:
        attempts.begun(connection, {"a": QUEUE}, alone=True, now=now)
    health = _health(app)
    assert health["status"] == "degraded"
    assert health["warnings"][0].startswith("1 messages seem to end the worker that applies them")
    assert "positions_suspected_messages 1.0" in app.test_client().get("/metrics").text
    with transaction(engine) as connection:
        attempts.done(connection, ["a"])
    assert _health(app)["status"] == "healthy"


@pytest.mark.usefixtures("rabbitmq")
def test_strange_consumer_of_a_foreign_queue_is_said(
    make_app: Make,
    database_url: str,
    broker_url: str,
    redis_url: str,
    tmp_path: Path,
) -> None:
    app = make_app(database_url, broker_url, redis_url)
    env = environment(database_url, broker_url, redis_url)
    with worker(env, tmp_path, "-n", "one@test"):
        assert wait_until(lambda: _health(app)["queues"][QUEUE]["consumers"] == 1, limit_s=10)
        health = _health(app)
        assert health["warnings"] == []
        assert health["queues"][QUEUE]["our_consumers"] == 1
        with Connection(broker_url) as broker, broker.channel() as channel:
            channel.basic_consume(QUEUE, no_ack=False)
            assert wait_until(lambda: _health(app)["queues"][QUEUE]["consumers"] == 2, limit_s=10)
            health = _health(app)
            assert health["status"] == "degraded"
            assert health["warnings"] == [
                f"{QUEUE}: 2 consumers, of which 1 are ours; the others take messages that we never see."
            ]
            second = tmp_path / "second"
            second.mkdir()
            with worker(env, second, "-n", "two@test"):
                assert wait_until(lambda: _health(app)["queues"][QUEUE]["our_consumers"] == 2, limit_s=10)
                assert len(_health(app)["warnings"]) == 1
        assert wait_until(lambda: _health(app)["status"] == "healthy", limit_s=10)
    assert wait_until(lambda: _health(app)["queues"][QUEUE]["our_consumers"] == 0, limit_s=10)


def test_health_on_the_redis_transport(
    make_app: Make, database_url: str, redis_url: str, engine: Engine
) -> None:
    _event_was(engine, timedelta(seconds=1))
    with Connection(redis_url) as broker:
        for _ in range(2):
            broker.Producer().publish({}, routing_key=QUEUE)
    health = _health(make_app(database_url, redis_url, redis_url))
    # Nobody knows how many consume.
    assert (health["status"], health["warnings"]) == ("healthy", [])
    assert health["backlog"] == 2
    assert health["queues"][QUEUE] == {"messages": 2, "consumers": None, "our_consumers": None}
    assert health["queues"][EXECUTIONS] == {"messages": 0, "consumers": None, "our_consumers": None}


@pytest.mark.parametrize("scheme", ["amqp", "redis"])
def test_without_broker_and_cache_service_is_degraded_and_serves(
    make_app: Make, database_url: str, scheme: str
) -> None:
    app = make_app(database_url, broker=f"{scheme}://{NOWHERE}/0")
    body = _health(app)
    assert (body["status"], body["database_connected"]) == ("degraded", True)
    assert (body["queue_connected"], body["cache_connected"]) == (False, False)
    assert (body["backlog"], body["queues"], body["outbox"], body["last_event_at"]) == (None, None, 0, None)
    assert len(body["warnings"]) == 2
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    assert client.get("/health/ready").status_code == 200
    assert client.get("/api/v1/portfolio").status_code == 200
    assert client.get("/api/v1/positions").get_json() == {"positions": [], "count": 0, "next_cursor": None}


def test_wrong_credentials_of_the_broker_are_no_connection(
    make_app: Make, database_url: str, rabbitmq: RabbitMQ
) -> None:
    app = make_app(database_url, broker=rabbitmq.url.replace("guest:guest", "guest:wrong"))
    assert _health(app)["queue_connected"] is False


def test_without_its_database_service_is_unhealthy_and_comes_back(
    make_app: Make, database_url: str, postgres: PostgreSQL
) -> None:
    app = make_app(database_url)
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    assert client.get("/api/v1/portfolio").status_code == 200
    postgres.kill()
    for path in ("/api/v1/positions", "/api/v1/positions/BTCUSDT", "/api/v1/portfolio", "/health/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.get_json()["error_code"] == "unavailable"
        assert int(response.headers["Retry-After"]) > 0
        assert str(postgres.port) not in response.text
        assert "psycopg" not in response.text
    body = _health(app, 503)
    assert (body["status"], body["database_connected"]) == ("unhealthy", False)
    assert (body["positions_count"], body["last_event_at"], body["backlog"]) == (None, None, None)
    assert body["warnings"][0] == "The database cannot be used: nothing can be served."
    assert client.get("/health/live").status_code == 200
    postgres.start()
    assert _health(app)["database_connected"] is True
    assert client.get("/api/v1/portfolio").status_code == 200


def test_database_that_is_not_migrated_is_not_ready(make_app: Make, new_empty_database: str) -> None:
    app = make_app(new_empty_database)
    client = app.test_client()
    client.environ_base["HTTP_X_API_KEY"] = KEY
    assert _health(app, 503)["status"] == "unhealthy"
    assert client.get("/health/ready").status_code == 503
    assert client.get("/api/v1/portfolio").get_json()["error_code"] == "unavailable"
    migrate.upgrade(new_empty_database, "0002")
    assert client.get("/health/ready").status_code == 503
    migrate.upgrade(new_empty_database)
    assert client.get("/health/ready").status_code == 200


def test_database_that_is_ahead_of_the_code_is_ready(
    make_app: Make, database_url: str, engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'of-the-next-release'")
    assert make_app(database_url).test_client().get("/health/ready").status_code == 200
