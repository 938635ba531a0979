"""What the tests of our promises rely on: the servers keep their word over kill -9 and restart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import amqp
import psycopg2
import pytest
import redis

from tests.services import PostgreSQL, RabbitMQ, Redis, Server, ServiceError, wait_until


def _kill_and_start(server: Server) -> None:
    server.kill()
    server.start()


either = pytest.mark.parametrize("disturb", [_kill_and_start, Server.restart], ids=["kill", "restart"])


def _sql(server: PostgreSQL, statement: str) -> list[tuple[object, ...]]:
    dsn = server.url.replace("+psycopg2", "")
    with closing(psycopg2.connect(dsn)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []


@either
def test_postgres_keeps_what_was_committed_and_nothing_else(
    postgres: PostgreSQL, disturb: Callable[[Server], None]
) -> None:
    _sql(postgres, "CREATE TABLE kept (n int)")
    _sql(postgres, "INSERT INTO kept SELECT generate_series(1, 1000)")
    with closing(psycopg2.connect(postgres.url.replace("+psycopg2", ""))) as unfinished:
        with unfinished.cursor() as cursor:
            cursor.execute("INSERT INTO kept VALUES (0)")
        disturb(postgres)
        with pytest.raises(psycopg2.OperationalError):
            unfinished.commit()

    assert _sql(postgres, "SELECT count(*), min(n) FROM kept") == [(1000, 1)]
    _sql(postgres, "DROP TABLE kept")


def test_postgres_syncs_its_commits(postgres: PostgreSQL) -> None:
    assert _sql(postgres, "SHOW fsync") == [("on",)]
    assert _sql(postgres, "SHOW synchronous_commit") == [("on",)]


@either
def test_rabbitmq_keeps_persistent_messages_of_durable_queues(
    rabbitmq: RabbitMQ, broker_url: str, disturb: Callable[[Server], None]
) -> None:
    vhost = broker_url.rpartition("/")[2]
    host = f"127.0.0.1:{rabbitmq.port}"
    with amqp.Connection(host, virtual_host=vhost, confirm_publish=True) as connection:
        channel = connection.channel()
        channel.queue_declare("kept", durable=True, auto_delete=False)
        rabbitmq.sync_definitions()
        for n in range(100):
            message = amqp.Message(str(n), delivery_mode=2)
            channel.basic_publish_confirm(message, routing_key="kept", mandatory=True)

    disturb(rabbitmq)

    with amqp.Connection(host, virtual_host=vhost) as connection:
        channel = connection.channel()
        assert channel.queue_declare("kept", passive=True).message_count == 100
        bodies = [channel.basic_get("kept", no_ack=True).body for _ in range(100)]
        assert bodies == [str(n) for n in range(100)]


def test_each_test_has_a_virtual_host_of_its_own(rabbitmq: RabbitMQ, broker_url: str) -> None:
    name = broker_url.rpartition("/")[2]
    assert name in rabbitmq.evaluate("[binary_to_list(V) || V <- rabbit_vhost:list_names()]")
    rabbitmq.delete_vhost(name)
    rabbitmq.add_vhost(name)  # the fixture's to delete


@either
def test_redis_comes_back(redis_server: Redis, redis_url: str, disturb: Callable[[Server], None]) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set("kept", "1")
        disturb(redis_server)
        assert client.get("kept") == b"1"


def test_killed_redis_refuses_clients(redis_server: Redis, redis_url: str) -> None:
    redis_server.kill()
    with redis.Redis.from_url(redis_url) as client, pytest.raises(redis.ConnectionError):
        client.ping()
    redis_server.start()


def test_killed_server_leaves_no_process(postgres: PostgreSQL) -> None:
    with closing(psycopg2.connect(postgres.url.replace("+psycopg2", ""))) as connection:
        backend = connection.info.backend_pid
        postgres.kill()
        assert not _runs(backend)
    assert not postgres.running
    postgres.start()


def test_server_outlives_the_thread_that_started_it(redis_server: Redis) -> None:
    thread = threading.Thread(target=redis_server.restart)
    thread.start()
    thread.join()
    with redis.Redis.from_url(redis_server.url) as client:
        assert client.ping()
    assert redis_server.running


def test_server_dies_with_a_killed_owner() -> None:
    program = (
        "import signal, sys, time\n"
        "from tests.services import Redis\n"
        "server = Redis()\n"
        "server.start()\n"
        "print(server.pid, server.folder, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout
        pid, folder = owner.stdout.readline().split()
        assert _runs(int(pid))
        owner.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not _runs(int(pid)), limit_s=5)
    shutil.rmtree(folder)


def test_failure_to_start_shows_the_log() -> None:
    server = Redis()
    with closing(server), socket.create_server(("127.0.0.1", server.port)):
        with pytest.raises(ServiceError, match="Address already in use"):
            server.start()
        assert not server.running


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
