"""The relay: everything in the outbox reaches the broker, in order, at least once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import redis
from sqlalchemy import Engine, func, select

from positions.handlers import relay_outbox as relaying
from positions.storage import outbox
from positions.storage.database import connect, transaction
from positions.storage.tables import outbox as outbox_table
from tests.integration.support import channel_of
from tests.services import RabbitMQ, wait_until

QUEUE = "position-manager.position_updated"


@contextmanager
def relay(database_url: str, broker_url: str) -> Iterator[threading.Thread]:
    stopped = threading.Event()
    engine = connect(database_url, pool_size=1)
    thread = threading.Thread(
        target=relaying.relay_outbox, args=(engine, broker_url), kwargs={"stopping": stopped.is_set}
    )
    thread.start()
    try:
        yield thread
    finally:
        stopped.set()
        thread.join()
        engine.dispose()


def write(engine: Engine, first: int, last: int) -> None:
    for start in range(first, last, 100):
        numbers = range(start, min(start + 100, last))
        with transaction(engine) as connection:
            outbox.add(
                connection,
                [outbox.Message("position_updated", f"trace-{number}", str(number)) for number in numbers],
            )


def left(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(outbox_table)).scalar_one()


def waiting(engine: Engine, event_type: str) -> list[int]:
    with engine.connect() as connection:
        wanted = select(outbox_table.c.id).where(outbox_table.c.event_type == event_type)
        return list(connection.execute(wanted).scalars())


def taken(url: str) -> list[Any]:
    messages = []
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        while (message := channel.basic_get(QUEUE, no_ack=True)) is not None:
            messages.append(message)
    return messages


def test_messages_arrive_in_order_and_leave_the_outbox(
    engine: Engine, database_url: str, broker_url: str
) -> None:
    write(engine, 0, 1200)
    with relay(database_url, broker_url):
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
    messages = taken(broker_url)
    assert [int(message.body) for message in messages] == list(range(1200))
    assert len({message.properties["message_id"] for message in messages}) == 1200
    first = messages[0].properties
    assert (first["type"], first["content_type"], first["delivery_mode"]) == (
        "position_updated",
        "application/json",
        2,
    )
    assert first["application_headers"]["trace_id"] == "trace-0"
    assert first["timestamp"]


def test_a_broker_that_dies_receives_everything_after_all(
    engine: Engine, database_url: str, rabbitmq: RabbitMQ, broker_url: str
) -> None:
    with relay(database_url, broker_url):
        write(engine, 0, 300)
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
        rabbitmq.sync_definitions()
        rabbitmq.kill()
        write(engine, 300, 900)
        rabbitmq.start()
        assert wait_until(lambda: left(engine) == 0, limit_s=60)
    numbers = [int(message.body) for message in taken(broker_url)]
    # A message may come twice; what is new comes in order.
    assert list(dict.fromkeys(numbers)) == list(range(900))


def test_a_message_no_queue_takes_is_not_lost(engine: Engine, database_url: str, broker_url: str) -> None:
    with relay(database_url, broker_url):
        write(engine, 0, 1)
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
        with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
            channel.queue_delete(QUEUE)
        write(engine, 1, 50)
        # It is refused, the queue declared anew, and everything published again.
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
    assert [int(message.body) for message in taken(broker_url)] == list(range(1, 50))


def test_a_full_queue_does_not_hold_up_the_others(
    engine: Engine, database_url: str, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "WINDOW", 20)
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        channel.exchange_declare("position-manager", "topic", durable=True, auto_delete=False)
        channel.queue_declare("full", durable=True, auto_delete=False, arguments=full)
        channel.queue_bind("full", "position-manager", "portfolio_updated")
    with transaction(engine) as session:
        outbox.add(session, [outbox.Message("portfolio_updated", "t", "{}")] * 60)
    write(engine, 0, 100)
    with relay(database_url, broker_url):
        assert wait_until(lambda: len(waiting(engine, "position_updated")) == 0, limit_s=30)
    assert waiting(engine, "portfolio_updated")
    assert [int(message.body) for message in taken(broker_url)] == list(range(100))


def test_a_second_relay_takes_over(engine: Engine, database_url: str, broker_url: str) -> None:
    with relay(database_url, broker_url):
        write(engine, 0, 10)
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
        with relay(database_url, broker_url):
            with engine.connect() as connection:
                session = (
                    "SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database"
                    " WHERE locktype = 'advisory' AND granted AND datname = current_database()"
                )
                working = connection.exec_driver_sql(session).scalar_one()
                connection.exec_driver_sql("SELECT pg_terminate_backend(%(pid)s)", {"pid": working})
            write(engine, 10, 500)
            assert wait_until(lambda: left(engine) == 0, limit_s=30)
    numbers = [int(message.body) for message in taken(broker_url)]
    assert list(dict.fromkeys(numbers)) == list(range(500))


def test_on_redis_the_newest_are_kept(
    engine: Engine, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relaying, "KEPT_ON_REDIS", 40)
    write(engine, 0, 700)
    with relay(database_url, redis_url):
        assert wait_until(lambda: left(engine) == 0, limit_s=30)
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(QUEUE) == 40


def test_queues_that_an_operator_declared_with_arguments_are_taken_as_they_are(
    engine: Engine, database_url: str, broker_url: str
) -> None:
    with closing(channel_of(broker_url)) as broker, closing(broker.channel()) as channel:
        arguments = {"x-queue-type": "quorum", "x-max-length": 1000}
        channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
    write(engine, 0, 300)
    with relay(database_url, broker_url):
        assert wait_until(lambda: left(engine) == 0, limit_s=60)
    with closing(channel_of(broker_url)) as broker, closing(broker.channel()) as channel:
        assert wait_until(lambda: channel.queue_declare(QUEUE, passive=True).message_count == 300, limit_s=60)
