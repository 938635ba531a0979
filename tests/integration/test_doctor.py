"""`positions doctor` on a set-up that is well, and on others each broken in its own way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from sqlalchemy import Engine, insert
from sqlalchemy.engine import make_url

from positions.doctor import Finding, examine
from positions.storage import api_keys
from positions.storage.database import transaction
from positions.storage.tables import outbox
from tests.integration.api import KEY, NOWHERE, ROOT
from tests.integration.processes import environment, relay, worker
from tests.integration.support import EXECUTION_QUEUE, channel_of, execution, publish
from tests.services import Redis


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, broker_url, redis_url, price_api_url="https://api.bybit.com")


def problems(environ: Mapping[str, str], **more: str) -> list[Finding]:
    """Return the problems; each says how to mend it, and no secret."""
    every = list(examine({**environ, **more}))
    for found in every:
        assert (found.mend is None) is (found.status == "ok"), found
        for name, value in environ.items():
            if value and name.endswith(("API_KEY", "PASSWORD")):
                assert value not in str(found)
            if name.endswith("_URL") and (password := make_url(value).password):
                assert str(password) not in f"{found.said} {found.mend}" or password == "guest"
    return [found for found in every if found.status == "problem"]


def run(env: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "positions.cli", "doctor", *arguments],
        env=dict(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_service_that_is_well(env: dict[str, str], tmp_path: Path) -> None:
    with worker(env, tmp_path), relay(env, tmp_path):
        done = run(env, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        *findings, summary = map(json.loads, done.stdout.splitlines())
        assert summary["healthy"] is True
        assert summary["problem"] == 0
        well = {found["what"] for found in findings if found["status"] == "ok"}
        assert well >= {
            "settings",
            "database",
            "migrations",
            "clock",
            "API keys",
            "broker",
            "Redis",
            "relay",
            "exchange position-manager",
            "queue positions.tasks",
            "queue positions.jobs",
            f"queue {EXECUTION_QUEUE}",
        }
        text = run(env)
        assert text.returncode == 0
        assert f"ok       queue {EXECUTION_QUEUE}: 0 messages wait, 1 consumers" in text.stdout
        assert KEY not in done.stdout + text.stdout + text.stderr


def test_a_wrong_setting_is_named(env: dict[str, str]) -> None:
    done = run({**env, "POSITION_MANAGER_BATCH_SIZE": "many"})
    assert done.returncode == 1
    assert "problem  settings: POSITION_MANAGER_BATCH_SIZE: " in done.stdout
    done = run({**env, "POSITION_MANAGER_BATCHSIZE": "200"})
    assert "is POSITION_MANAGER_BATCH_SIZE meant?" in done.stdout


def test_a_wrong_password_of_the_database(env: dict[str, str], database_url: str) -> None:
    url = make_url(database_url).set(password="no-such-password").render_as_string(hide_password=False)
    (found,) = problems(env, POSITION_MANAGER_DATABASE_URL=url)
    assert found.what == "database"
    assert found.mend == "correct POSTGRES_USER and POSTGRES_PASSWORD"
    assert "no-such-password" not in str(found)


def test_servers_that_are_not_there(env: dict[str, str]) -> None:
    nowhere = {
        "POSITION_MANAGER_DATABASE_URL": f"postgresql://positions@{NOWHERE}/positions",
        "POSITION_MANAGER_BROKER_URL": f"amqp://{NOWHERE}//",
        "POSITION_MANAGER_REDIS_URL": f"redis://{NOWHERE}/0",
    }
    found = {each.what: each.mend or "" for each in problems(env, **nowhere)}
    assert found.keys() == {"database", "broker", "Redis"}
    assert found["database"].startswith("start PostgreSQL")
    assert found["broker"].startswith("start RabbitMQ")
    assert found["Redis"].startswith("start it")


def test_a_database_that_is_not_migrated(env: dict[str, str], new_empty_database: str) -> None:
    (found,) = problems(env, POSITION_MANAGER_DATABASE_URL=new_empty_database)
    assert (found.what, found.mend) == ("migrations", "run `positions migrate`")


def test_a_role_that_may_not_write(env: dict[str, str], engine: Engine, database_url: str) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE onlooker LOGIN PASSWORD 'onlooks'")
        connection.exec_driver_sql("GRANT pg_read_all_data TO onlooker")
    try:
        url = make_url(database_url).set(username="onlooker", password="onlooks")
        (found,) = problems(env, POSITION_MANAGER_DATABASE_URL=url.render_as_string(hide_password=False))
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP ROLE onlooker")
    assert found.what == "database role"
    assert "INSERT on " in found.said
    assert "positions migrate" in (found.mend or "")


def test_clocks_that_differ(env: dict[str, str]) -> None:
    late = [
        each
        for each in examine(env, clock=lambda: datetime.now(UTC) - timedelta(minutes=5))
        if each.what == "clock"
    ]
    (found,) = late
    assert found.status == "problem"
    assert found.said.startswith("the database's is 30")
    assert "ahead of" in found.said
    assert found.mend == "let both hosts follow NTP"


def test_a_broker_that_refuses_us(env: dict[str, str], broker_url: str) -> None:
    (found,) = problems(env, POSITION_MANAGER_BROKER_URL=broker_url.replace("guest:guest", "guest:wrong"))
    assert (found.what, found.mend) == ("broker", "correct RABBITMQ_USER and RABBITMQ_PASSWORD")
    vhost = broker_url.rpartition("/")[2]
    (found,) = problems(env, POSITION_MANAGER_BROKER_URL=broker_url.replace(vhost, "no-such-vhost"))
    assert found.what == "broker"
    assert "RABBITMQ_VHOST" in (found.mend or "")


def test_a_stranger_who_takes_our_messages(env: dict[str, str], broker_url: str, tmp_path: Path) -> None:
    with worker(env, tmp_path), closing(channel_of(broker_url)) as connection:
        connection.channel().basic_consume(EXECUTION_QUEUE, callback=lambda _: None)
        (found,) = problems(env)
    assert found.what == f"queue {EXECUTION_QUEUE}"
    assert found.said.startswith("2 consume it, 1 of them ours")


def test_messages_that_nobody_takes(env: dict[str, str], broker_url: str) -> None:
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
    publish(broker_url, [(EXECUTION_QUEUE, execution("BTCUSDT", "Buy", "1", "100"))])
    (found,) = problems(env)
    assert (found.what, found.said) == ("workers", "none takes events in; 1 messages wait")


def test_a_queue_of_ours_with_other_arguments(env: dict[str, str], broker_url: str) -> None:
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        other = {"x-max-length": 10}
        channel.queue_declare("positions.tasks", durable=True, auto_delete=False, arguments=other)
        channel.basic_consume("positions.tasks", callback=lambda _: None)
        (found,) = problems(env)
    assert found.what == "queue positions.tasks"
    assert "x-max-length" in found.said


def test_an_outbox_that_nobody_publishes(env: dict[str, str], engine: Engine) -> None:
    with engine.begin() as connection:
        before = datetime.now(UTC) - timedelta(seconds=90)
        connection.execute(insert(outbox).values(event_type="e", trace_id="t", body="{}", created_at=before))
    (found,) = problems(env)
    assert (found.what, found.mend) == ("outbox", "run a relay: `positions relay`")


def test_keys_that_end_or_are_not_there(env: dict[str, str], engine: Engine) -> None:
    own = {**env, "POSITION_MANAGER_API_KEY": "", "POSITION_MANAGER_API_KEYS": "[]"}
    (found,) = problems(own)
    assert (found.what, found.mend) == ("API keys", "`positions keys create NAME`")
    with transaction(engine) as connection:
        soon = datetime.now(UTC) + timedelta(days=3)
        api_keys.create(
            connection, name="risk", digest="0" * 64, role="read", requests_per_minute=None, expires_at=soon
        )
    assert problems(own) == []
    assert any(each.said.startswith("risk expires on ") for each in examine(own))


def test_a_redis_that_evicts_or_is_full(env: dict[str, str]) -> None:
    with Redis() as server, redis.Redis.from_url(server.url) as client:
        own = {**env, "POSITION_MANAGER_REDIS_URL": server.url}
        assert problems(own) == []
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        (found,) = problems(own)
        assert found.what == "Redis eviction"
        assert "noeviction" in (found.mend or "")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        (found,) = problems(own)
        assert (found.what, found.mend) == ("Redis", "raise maxmemory, or find what fills it")
