"""What servers do to a worker short of dying: it goes on, or takes up its work again by itself."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from celery import Celery
from sqlalchemy import Engine, select, text

from beat_schedule import TASK_QUEUE
from positions.storage.tables import attempts, ledger, outbox, quarantine
from tests.chaos.proxy import Proxy
from tests.integration.api import Make
from tests.integration.processes import Process, environment, relay, worker
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
from tests.integration.test_crash_points import count, outcomes, waiting
from tests.services import PostgreSQL, RabbitMQ, wait_until

ALARM = "{{resource_limit, memory, node()}, []}"


@pytest.fixture
def queues(broker_url: str) -> str:
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        for queue in (POSITION_QUEUE, EXECUTION_QUEUE, ORDER_QUEUE):
            channel.queue_declare(queue, durable=True, auto_delete=False)
    return broker_url


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, broker_url, redis_url)


@pytest.fixture
def impatient() -> Iterator[RabbitMQ]:
    """A broker that closes the channel of who does not acknowledge within three seconds."""
    with RabbitMQ({"consumer_timeout": "3000"}) as server:
        # It looks once a minute.
        server.evaluate("application:set_env(rabbit, channel_tick_interval, 1000)")
        yield server


def publish_executions(url: str, number: int, seed: int = 1) -> None:
    publish(url, [(EXECUTION_QUEUE, each) for each in executions(number, seed=seed)])


def await_ledger(engine: Engine, entries: int) -> None:
    assert wait_until(lambda: count(engine, ledger) >= entries, limit_s=120, interval_s=0.1)


def assert_all_is_applied(engine: Engine, url: str, entries: int) -> None:
    assert count(engine, ledger) == entries
    assert count(engine, quarantine) == count(engine, attempts) == 0
    assert waiting(url, EXECUTION_QUEUE) == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_memory_alarm_of_the_broker_stops_publishing_and_not_consuming(
    engine: Engine, rabbitmq: RabbitMQ, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    publish_executions(queues, 1500)
    with relay(env, tmp_path), worker(env, tmp_path) as running:
        rabbitmq.evaluate(f"rabbit_alarm:set_alarm({ALARM})")
        try:
            before = count(engine, ledger)
            await_ledger(engine, 1500)
            assert before < 1500
            assert wait_until(lambda: waiting(queues, EXECUTION_QUEUE) == 0, limit_s=30)
            assert not wait_until(lambda: count(engine, outbox) == 0, limit_s=3)
        finally:
            rabbitmq.evaluate("rabbit_alarm:clear_alarm({resource_limit, memory, node()})")
        assert wait_until(lambda: count(engine, outbox) == 0, limit_s=90)
        assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 1500)


def test_consumption_resumes_after_a_consumer_timeout(
    engine: Engine, database_url: str, redis_url: str, impatient: RabbitMQ, tmp_path: Path
) -> None:
    with closing(channel_of(impatient.url)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
    with worker(environment(database_url, impatient.url, redis_url), tmp_path) as running:
        with engine.connect() as holder:
            # Whoever writes waits: the batch is held for longer than the broker does.
            holder.execute(text("LOCK TABLE ledger IN EXCLUSIVE MODE"))
            publish_executions(impatient.url, 300)
            running.await_log("intake_started", times=2)
            holder.rollback()
        await_ledger(engine, 300)
        assert wait_until(lambda: count(engine, attempts) == 0, limit_s=60)
        assert running.terminate() == 0
    assert_all_is_applied(engine, impatient.url, 300)


def test_a_queue_of_ours_that_somebody_declared_otherwise_is_used_once_it_is_gone(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    with closing(channel_of(queues)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(
            "positions.tasks", durable=True, auto_delete=False, arguments={"x-max-length": 1}
        )
        publish_executions(queues, 200)
        process = Process(["celery", "-A", "celery_app", "worker"], env, tmp_path / "worker.log")
        try:
            refused = "PRECONDITION_FAILED"
            assert wait_until(lambda: refused in process.log.read_text(), limit_s=60)
            channel.queue_delete("positions.tasks")
            await_ledger(engine, 200)
            assert process.terminate() == 0
        finally:
            process.kill()
    assert_all_is_applied(engine, queues, 200)


def test_a_foreign_queue_that_is_deleted_is_consumed_when_it_is_back(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    with worker(env, tmp_path) as running:
        publish_executions(queues, 100)
        await_ledger(engine, 100)
        with closing(channel_of(queues)) as connection, closing(connection.channel()) as channel:
            channel.queue_delete(EXECUTION_QUEUE)
            channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
        publish_executions(queues, 200)
        await_ledger(engine, 200)
        assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 200)


def test_who_loses_the_broker_again_and_again_blames_no_message_for_it(
    engine: Engine, database_url: str, rabbitmq: RabbitMQ, queues: str, redis_url: str, tmp_path: Path
) -> None:
    with closing(Proxy(rabbitmq.port)) as proxy:
        through = queues.replace(f":{rabbitmq.port}", f":{proxy.port}")
        with worker(environment(database_url, through, redis_url), tmp_path) as running:
            with engine.connect() as holder:
                holder.execute(text("LOCK TABLE ledger IN EXCLUSIVE MODE"))
                publish_executions(queues, 1)
                seen: set[int] = set()
                for times in range(2, 9):
                    # Those of before may not know yet that nobody listens.
                    assert wait_until(lambda: bool(stuck(engine) - seen), limit_s=60)  # noqa: B023
                    seen |= stuck(engine)
                    proxy.cut()
                    running.await_log("intake_started", times=times)
                holder.rollback()
            await_ledger(engine, 1)
            assert wait_until(lambda: count(engine, attempts) == 0, limit_s=60)
            assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 1)


def sleeping(engine: Engine, seconds: float, keys: str = "%") -> None:
    """Let who writes entries with such ``keys`` to the ledger sleep before each."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"""
            CREATE OR REPLACE FUNCTION sleeping() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                PERFORM pg_sleep({seconds}) WHERE NEW.key LIKE '{keys}';
                RETURN NEW;
            END $$;
            CREATE OR REPLACE TRIGGER sleeping BEFORE INSERT ON ledger
            FOR EACH ROW EXECUTE FUNCTION sleeping()
            """.replace("%", "%%")
        )


def test_who_loses_the_database_again_and_again_blames_no_message_for_it(
    engine: Engine,
    postgres: PostgreSQL,
    database_url: str,
    rabbitmq: RabbitMQ,
    queues: str,
    redis_url: str,
    tmp_path: Path,
) -> None:
    sleeping(engine, 5)
    with closing(Proxy(rabbitmq.port)) as proxy:
        through = queues.replace(f":{rabbitmq.port}", f":{proxy.port}")
        with worker(environment(database_url, through, redis_url), tmp_path) as running:
            publish_executions(queues, 1)
            assert wait_until(lambda: bool(stuck(engine)), limit_s=60)
            # From here on it is one that was delivered before.
            proxy.cut()
            running.await_log("intake_started", times=2)
            for _ in range(6):
                assert wait_until(lambda: count(engine, attempts) == 1 and bool(stuck(engine)), limit_s=60)
                held = running.logged("batch_held")
                postgres.kill()
                running.await_log("batch_held", times=held + 1)
                postgres.start()
            sleeping(engine, 0)
            await_ledger(engine, 1)
            assert wait_until(lambda: count(engine, attempts) == 0, limit_s=60)
            assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 1)


def test_a_database_too_slow_for_the_time_limit_is_no_fault_of_the_message_it_works_on(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    sleeping(engine, 3)
    publish_executions(queues, 1)
    with worker(env, tmp_path, app="tests.integration.hurried_app") as running:
        running.await_log("batch_held", times=5)
        sleeping(engine, 0)
        await_ledger(engine, 1)
        assert running.terminate() == 0
    assert "SoftTimeLimitExceeded" in running.log.read_text()
    assert_all_is_applied(engine, queues, 1)


def test_what_is_too_much_at_once_for_a_slow_database_is_applied_in_parts(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    # One statement of seven seconds, which only the hard limit ends.
    sleeping(engine, 0.7)
    publish_executions(queues, 10)
    with worker(env, tmp_path, app="tests.integration.hurried_app") as running:
        await_ledger(engine, 10)
        assert running.terminate() == 0
    log = running.log.read_text()
    assert "TimeLimitExceeded(5" in log
    held = [json.loads(line) for line in log.splitlines() if '"event": "batch_held"' in line]
    assert all(each["messages"] == 1 for each in held)
    assert_all_is_applied(engine, queues, 10)


def test_a_message_that_is_too_slow_while_others_are_applied_is_parked(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    sleeping(engine, 3, keys="exec:SLOW-%")
    messages = [execution("SLOW", "Buy", "1", "1"), *executions(400)]
    published = 0
    with worker(env, tmp_path, app="tests.integration.hurried_app") as running:

        def parked() -> bool:
            nonlocal published
            part = messages[published : published + 10]
            publish(queues, [(EXECUTION_QUEUE, each) for each in part])
            published += len(part)
            return count(engine, quarantine) == 1

        assert wait_until(parked, limit_s=120, interval_s=1)
        await_ledger(engine, published - 1)
        assert running.logged("batch_held") == 1
        assert running.terminate() == 0
    with engine.connect() as connection:
        reason = connection.execute(select(quarantine.c.reason)).scalar_one()
    assert reason.startswith("failed 3 times alone: SoftTimeLimitExceeded")
    assert count(engine, attempts) == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_a_full_disk_of_the_database_holds_events_until_there_is_room(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("""
            CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                RAISE EXCEPTION 'could not extend file "base/1/2": No space left on device'
                    USING ERRCODE = 'disk_full';
            END $$""")
        connection.exec_driver_sql(
            "CREATE TRIGGER full_disk BEFORE INSERT ON ledger EXECUTE FUNCTION full_disk()"
        )
    publish_executions(queues, 300)
    with worker(env, tmp_path) as running:
        running.await_log("batch_held", times=3)
        assert count(engine, ledger) == 0
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TRIGGER full_disk ON ledger")
        await_ledger(engine, 300)
        assert running.logged("batch_isolated") == 0
        assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 300)


def test_an_exhausted_connection_pool_holds_events_until_one_is_free(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    # Eight threads, and two connections.
    settings = {**env, "POSITION_MANAGER_WORKER_CONCURRENCY": "2", "POSITION_MANAGER_BATCH_SIZE": "20"}
    with worker(settings, tmp_path, "--pool", "threads", "-c", "8") as running:
        with engine.connect() as holder:
            holder.execute(text("LOCK TABLE ledger IN EXCLUSIVE MODE"))
            publish_executions(queues, 400)
            assert wait_until(lambda: "QueuePool limit" in running.log.read_text(), limit_s=60)
            holder.rollback()
        await_ledger(engine, 400)
        assert running.logged("batch_isolated") == 0
        assert running.terminate() == 0
    assert_all_is_applied(engine, queues, 400)


def test_a_backlog_is_worked_off_while_more_arrives(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    # Twenty minutes without a worker, at ten events a second.
    publish_executions(queues, 12_000)
    with worker(env, tmp_path) as running:
        more = threading.Thread(
            target=publish,
            args=(queues, [(EXECUTION_QUEUE, each) for each in executions(13_000)[12_000:]]),
        )
        more.start()
        await_ledger(engine, 13_000)
        more.join()
        assert running.terminate() == 0
    assert outcomes(running, "duplicate") == 0
    assert_all_is_applied(engine, queues, 13_000)


def test_a_clean_stop_waits_for_a_batch_that_waits_for_a_process(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("-c", "1", "-Q", TASK_QUEUE)
    with worker(env, tmp_path, *arguments, app="tests.integration.slow_app") as running:
        app = Celery(broker=queues)
        app.send_task("tests.hold", args=[12], queue=TASK_QUEUE)
        running.await_log("held")
        publish_executions(queues, 50)

        def handed_over() -> bool:
            reserved = app.control.inspect(timeout=1).reserved() or {}
            return any(
                each["name"] == "positions.apply_events" for those in reserved.values() for each in those
            )

        assert wait_until(handed_over, limit_s=11)
        assert running.terminate() == 0
        (drained,) = [line for line in running.log.read_text().splitlines() if "intake_drained" in line]
    found = json.loads(drained)
    assert found["batches"] >= 1
    assert found["left"] == 0
    # What it did not begin went back.
    assert waiting(queues, EXECUTION_QUEUE) == 50 - count(engine, ledger)
    assert outcomes(running, "applied") == count(engine, ledger) > 0


def test_a_rolling_restart_under_load_loses_and_doubles_nothing(
    engine: Engine, queues: str, env: dict[str, str], tmp_path: Path
) -> None:
    messages = executions(6000)
    processes = [
        Process(["celery", "-A", "celery_app", "worker", "-n", f"{name}@test"], env, tmp_path / f"{name}.log")
        for name in ("one", "two")
    ]
    try:
        for process in processes:
            process.await_log("intake_started")

        def neighbour() -> None:
            for start in range(0, len(messages), 100):
                publish(queues, [(EXECUTION_QUEUE, each) for each in messages[start : start + 100]])

        load = threading.Thread(target=neighbour)
        load.start()
        for number, process in enumerate(processes):
            await_ledger(engine, 1000 * (number + 1))
            assert process.terminate() == 0
            process.start()
            process.await_log("intake_started", times=2)
        load.join()
        await_ledger(engine, len(messages))
        for process in processes:
            assert process.terminate() == 0
    finally:
        for process in processes:
            process.kill()
    # What was handed back had not been begun.
    assert sum(outcomes(process, "duplicate") for process in processes) == 0
    assert sum(outcomes(process, "applied") for process in processes) == len(messages)
    assert_all_is_applied(engine, queues, len(messages))


def test_health_tells_of_a_broker_that_goes_and_comes_back(
    make_app: Make, database_url: str, rabbitmq: RabbitMQ, queues: str, redis_url: str
) -> None:
    client = make_app(database_url, queues, redis_url).test_client()

    def told() -> tuple[str, bool]:
        health = json.loads(client.get("/health").data)
        return health["status"], health["queue_connected"]

    assert told() == ("healthy", True)
    rabbitmq.sync_definitions()
    os.kill(rabbitmq.pid, signal.SIGSTOP)
    try:
        assert wait_until(lambda: told() == ("degraded", False), limit_s=20)
    finally:
        os.kill(rabbitmq.pid, signal.SIGCONT)
    assert wait_until(lambda: told() == ("healthy", True), limit_s=20)
    rabbitmq.kill()
    assert wait_until(lambda: told() == ("degraded", False), limit_s=20)
    rabbitmq.start()
    assert wait_until(lambda: told() == ("healthy", True), limit_s=20)
