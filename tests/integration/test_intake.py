"""The event path with real workers: what is acknowledged is committed, whatever happens on the way."""

from __future__ import annotations

import calendar
import os
import signal
import threading
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import amqp
import pytest
import redis
from celery import Celery
from sqlalchemy import Engine, func, select, text

from positions.queries.health import activity
from positions.storage import broker, migrate
from positions.storage.database import connect
from positions.storage.tables import attempts, ledger, quarantine
from tests.integration.processes import environment, worker
from tests.integration.support import (
    EXECUTION_QUEUE,
    ORDER_QUEUE,
    POSITION_QUEUE,
    assert_positions_are_the_fold_of_the_ledger,
    channel_of,
    execution,
    executions,
    publish,
    stuck,
)
from tests.services import PostgreSQL, RabbitMQ, wait_until


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    # Several batches, where the default would take everything into one.
    return environment(database_url, broker_url, redis_url, batch_size="200")


@pytest.fixture
def queues(broker_url: str) -> str:
    """The foreign queues, as their owners declare them: the gateway with limits of its own."""
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        limits = {"x-message-ttl": 86_400_000, "x-max-length": 100_000, "x-overflow": "drop-head"}
        channel.queue_declare(POSITION_QUEUE, durable=True, auto_delete=False, arguments=limits)
        for queue in (EXECUTION_QUEUE, ORDER_QUEUE):
            channel.queue_declare(queue, durable=True, auto_delete=False)
    return broker_url


def shuffled_with_duplicates(
    messages: list[dict[str, Any]], seed: int = 2
) -> list[tuple[str, dict[str, Any]]]:
    random = Random(seed)
    arrived = messages + random.sample(messages, len(messages) // 20)
    random.shuffle(arrived)
    return [(EXECUTION_QUEUE, message) for message in arrived]


def count(engine: Engine, table: Any) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def await_ledger(engine: Engine, entries: int) -> None:
    assert wait_until(lambda: count(engine, ledger) >= entries, limit_s=120, interval_s=0.1), count(
        engine, ledger
    )


def waiting(url: str) -> int:
    """Return how many messages are in the foreign queues, delivered but unacknowledged ones not counted."""
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        return sum(
            channel.queue_declare(queue, passive=True).message_count
            for queue in (POSITION_QUEUE, EXECUTION_QUEUE, ORDER_QUEUE)
        )


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_every_pool_drains_the_queues_and_acknowledges(
    pool: str, engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(600)
    publish(queues, shuffled_with_duplicates(messages))
    with worker(env, tmp_path, "--pool", pool) as running:
        await_ledger(engine, len(messages))
        assert running.terminate() == 0
    # All was acknowledged: with its consumer gone, nothing came back to the queue.
    assert waiting(queues) == 0
    assert count(engine, ledger) == len(messages)
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_events_are_tasks_to_whoever_watches_celery(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    app = Celery(broker=queues)
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": seen.append})
        watcher = threading.Thread(target=receiver.capture, kwargs={"wakeup": False})
        watcher.start()
        try:
            with worker(env, tmp_path):
                publish(queues, [(EXECUTION_QUEUE, message) for message in executions(30)])
                await_ledger(engine, 30)
                assert wait_until(lambda: any(each["type"] == "task-succeeded" for each in seen), limit_s=10)
        finally:
            receiver.should_stop = True
            watcher.join()
    # Jobs that run at the start are tasks too.
    received = next(each for each in seen if each.get("name") == "positions.apply_events")
    assert received["type"] == "task-received"
    assert received["args"].endswith(f"{EXECUTION_QUEUE}>")
    assert any("'applied':" in each.get("result", "") for each in seen)
    assert not any("execution_price" in str(each) for each in seen)


def test_bad_messages_are_quarantined_and_their_neighbours_applied(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    good = executions(20)
    bad: list[dict[str, Any] | bytes] = [
        b'{"event_type": "order_exec',
        execution("BTCUSDT", "Buy", "1", "NaN", number=1000),
        b'{"event_type": "order_executed", "asset": "BTCUSDT", "side": "Buy", "execution_price": NaN}',
        execution("BTCUSDT", "Buy", "1e40", "1", number=1001),
        b"x" * 1_000_000,
        {"event_type": "order_teleported", "asset": "BTCUSDT"},
        b"\xff\xfe\x00",
        b"[" * 50_000,
    ]
    mixed = [*good[:10], *bad, *good[10:]]
    publish(
        queues, [(EXECUTION_QUEUE, message) for message in mixed], application_headers={"task": "os.system"}
    )
    with worker(env, tmp_path) as running:
        await_ledger(engine, len(good))
        assert wait_until(lambda: count(engine, quarantine) == len(bad), limit_s=30)
        assert running.terminate() == 0
    assert waiting(queues) == 0
    with engine.connect() as connection:
        kept = connection.execute(select(quarantine.c.reason, quarantine.c.body)).all()
    assert all(row.reason for row in kept)
    assert b"x" * 1_000_000 in {bytes(row.body) for row in kept}
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_killed_pool_process_loses_and_doubles_nothing(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(3000)
    with worker(env, tmp_path) as running:
        with engine.connect() as holder:
            # So that each of these has a batch under way.
            holder.execute(text("LOCK TABLE ledger IN EXCLUSIVE MODE"))
            publish(queues, shuffled_with_duplicates(messages))
            assert wait_until(lambda: bool(stuck(engine)), limit_s=60)
            for child in running.children:
                os.kill(child, signal.SIGKILL)
        for entries in (300, 900, 1800):
            await_ledger(engine, entries)
            for child in running.children[:1]:
                os.kill(child, signal.SIGKILL)
        await_ledger(engine, len(messages))
        assert running.logged("batch_isolated") >= 1
    assert count(engine, ledger) == len(messages)
    assert count(engine, quarantine) == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_killed_worker_loses_and_doubles_nothing(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(2000)
    publish(queues, shuffled_with_duplicates(messages))
    with worker(env, tmp_path) as running:
        await_ledger(engine, 400)
        running.kill()
    with worker(env, tmp_path):
        await_ledger(engine, len(messages))
    assert count(engine, ledger) == len(messages)
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_broker_that_dies_loses_and_doubles_nothing(
    engine: Engine, rabbitmq: RabbitMQ, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(2000)
    rabbitmq.sync_definitions()
    publish(queues, shuffled_with_duplicates(messages))
    with worker(env, tmp_path) as running:
        await_ledger(engine, 300)
        rabbitmq.kill()
        rabbitmq.start()
        running.await_log("intake_started", times=2)
        await_ledger(engine, len(messages))
        assert running.terminate() == 0
    assert waiting(queues) == 0
    assert count(engine, ledger) == len(messages)
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_redis_as_the_broker_of_the_embedded_default(
    engine: Engine, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    messages = executions(300)
    with broker.connect(redis_url) as connection, connection.Producer() as producer:
        for _, message in shuffled_with_duplicates(messages):
            producer.publish(message, serializer="json", routing_key=EXECUTION_QUEUE)
    with worker(environment(database_url, redis_url, redis_url), tmp_path) as running:
        await_ledger(engine, len(messages))
        assert running.terminate() == 0
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(EXECUTION_QUEUE) == client.hlen("unacked") == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_clean_stop_under_load_hands_back_what_it_has_not_begun(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(3000)
    publish(queues, [(EXECUTION_QUEUE, message) for message in messages])
    with worker(env, tmp_path) as running:
        await_ledger(engine, 500)
        assert running.terminate() == 0
        assert running.logged("intake_drained") == 1
    done = count(engine, ledger)
    # Everything that was committed was acknowledged too: the rest, exactly, is in the queue.
    assert waiting(queues) == len(messages) - done
    with worker(env, tmp_path):
        await_ledger(engine, len(messages))
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_batch_is_held_while_the_database_is_away(
    engine: Engine, postgres: PostgreSQL, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(300)
    with worker(env, tmp_path) as running:
        postgres.kill()
        publish(queues, [(EXECUTION_QUEUE, message) for message in messages])
        running.await_log("batch_held", times=2)
        postgres.start()
        await_ledger(engine, len(messages))
        assert running.logged("batch_isolated") == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_database_that_is_not_migrated_yet_is_no_fault_of_the_events(
    new_empty_database: str, queues: str, redis_url: str, tmp_path: Path
) -> None:
    messages = executions(50)
    publish(queues, [(EXECUTION_QUEUE, message) for message in messages])
    engine = connect(new_empty_database)
    with worker(environment(new_empty_database, queues, redis_url), tmp_path) as running:
        running.await_log("batch_held", times=2)
        migrate.upgrade(new_empty_database)
        await_ledger(engine, len(messages))
        assert running.logged("batch_isolated") == 0
    assert count(engine, quarantine) == 0
    engine.dispose()


def test_properties_that_cannot_be_read_do_not_end_the_worker(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A publisher that writes milliseconds where AMQP has seconds.
    monkeypatch.setattr(calendar, "timegm", lambda _: 1_736_935_200_000)
    publish(queues, [(EXECUTION_QUEUE, executions(1)[0])], application_headers={"sent": datetime.now(UTC)})
    monkeypatch.undo()
    publish(queues, [(EXECUTION_QUEUE, executions(2)[1])])
    with worker(env, tmp_path) as running:
        await_ledger(engine, 2)
        assert running.logged("properties_unreadable") == 1
        assert running.terminate() == 0
    assert waiting(queues) == 0


def test_poison_is_isolated_and_parked(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(400)
    killer = execution("KILLER", "Buy", "1", "1")
    publish(queues, [(EXECUTION_QUEUE, each) for each in [*messages[:200], killer, *messages[200:]]])
    with worker(env, tmp_path, app="tests.integration.poisoned_app") as running:
        await_ledger(engine, len(messages))
        assert wait_until(lambda: count(engine, quarantine) == 1, limit_s=30)
        assert running.terminate() == 0
    assert waiting(queues) == 0
    with engine.connect() as connection:
        row = connection.execute(select(quarantine.c.reason, quarantine.c.body)).one()
    assert row.reason.startswith("failed 3 times alone: WorkerLostError")
    assert b"KILLER" in bytes(row.body)
    assert_positions_are_the_fold_of_the_ledger(engine)


@pytest.mark.parametrize("pool", ["prefork", "solo"])
def test_poison_that_ends_the_whole_worker_is_parked_after_so_many_workers(
    pool: str, engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(400)
    poison = execution("ASSASSIN", "Buy", "1", "1")
    publish(queues, [(EXECUTION_QUEUE, each) for each in [*messages[:200], poison, *messages[200:]]])
    lost = 0

    def suspected() -> int:
        with engine.connect() as connection:
            return activity(connection).suspected

    while True:
        with worker(env, tmp_path, "--pool", pool, app="tests.integration.poisoned_app") as running:
            assert wait_until(lambda: running.ended or count(engine, quarantine) > 0, limit_s=60)
            if not running.ended:
                await_ledger(engine, len(messages))
                assert running.terminate() == 0
                break
        lost += 1
        # Its second delivery is in a batch, the third with a few others, then it is alone.
        assert lost <= 5
        assert (suspected() > 0) == (lost > 2)
    assert lost >= 4
    assert waiting(queues) == 0
    assert suspected() == count(engine, attempts) == 0
    with engine.connect() as connection:
        row = connection.execute(select(quarantine.c.reason, quarantine.c.body)).one()
    assert row.reason.startswith("begun 3 times apart and never ended")
    assert b"ASSASSIN" in bytes(row.body)
    assert running.logged("event_suspected") >= 3
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_foreign_queues_keep_their_owners_arguments(queues: str, env: dict[str, str], tmp_path: Path) -> None:
    with worker(env, tmp_path):
        pass
    with (
        closing(channel_of(queues)) as connection,
        closing(connection.channel()) as channel,
        pytest.raises(amqp.PreconditionFailed),
    ):
        channel.queue_declare(POSITION_QUEUE, durable=True, auto_delete=False)
