"""What the parts cost alone: the floors under the figures of the intake."""

from __future__ import annotations

import json
import tempfile
import time
from collections import deque
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg2
from celery import Celery
from kombu import Connection, Consumer, Queue
from sqlalchemy import event

from beat_schedule import TASK_QUEUE
from benchmarks import load
from benchmarks.intake import await_empty
from benchmarks.machine import Machine, Place, used_s
from positions.handlers.apply_events import apply_events
from positions.messages.inbound import Delivery, decode
from positions.settings import Settings
from positions.storage.database import connect, transaction
from positions.tasks.lanes import Lanes
from tests.integration.processes import worker
from tests.integration.support import EXECUTION_QUEUE, POSITION_QUEUE, RULES, channel_of


def batches(kind: load.Kind, events: int, assets: int, *, first: int = 0) -> list[list[Delivery]]:
    """Return the batches that a worker of two processes makes of a backlog."""
    now, settings = datetime.now(UTC), Settings()
    lanes = Lanes(turns=2, batch_size=settings.batch_size, wait_s=0)
    for queue, message in load.messages(kind, events, assets, first=first):
        lanes.put(Delivery(queue, json.dumps(message).encode(), {}, {}, now), None)
    made = []
    while served := lanes.serve(()):
        made.append(served.messages)
    return made


def same_sql(machine: Machine, kind: load.Kind, *, events: int, assets: int) -> dict[str, float]:
    """Return the pace of the very statements of a worker, from memory through psycopg2, a commit a batch.

    They are written down while the handler applies the events to one database, and then sent to its twin.
    """
    with machine.place() as place:
        engine = connect(place.database)

        def applied(messages: list[Delivery]) -> None:
            decoded = [each for one in messages for each in decode(one, max_bytes=100_000).events]
            with transaction(engine) as connection:
                apply_events(connection, decoded, [], rules=RULES, now=datetime.now(UTC))

        # So many that no asset is new later: its position's id would be another in the twin.
        warm = max(20 * assets, 2000)
        for batch in batches(kind, warm, assets):
            applied(batch)
        engine.dispose()
        twin = f"{place.name}_twin"
        with closing(psycopg2.connect(machine.postgres.url.replace("+psycopg2", ""))) as admin:
            admin.autocommit = True
            admin.cursor().execute(f"CREATE DATABASE {twin} TEMPLATE {place.name}")
        written: list[list[tuple[str, Any]]] = []

        @event.listens_for(engine, "before_cursor_execute")
        def _written(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
            written[-1].append((statement, parameters))

        for batch in batches(kind, events, assets, first=warm):
            written.append([])
            applied(batch)
        engine.dispose()
        with closing(
            psycopg2.connect(f"{machine.postgres.url.rpartition('/')[0]}/{twin}".replace("+psycopg2", ""))
        ) as own:
            own.cursor().execute("SET jit = off")
            own.commit()
            before, python, started = used_s(machine.postgres.pid), time.process_time(), time.perf_counter()
            with own.cursor() as cursor:
                for statements in written:
                    for statement, parameters in statements:
                        cursor.execute(statement, parameters)
                        if cursor.description is not None:
                            cursor.fetchall()
                    own.commit()
            seconds = time.perf_counter() - started
            python = time.process_time() - python
            postgres = used_s(machine.postgres.pid) - before
        with closing(psycopg2.connect(machine.postgres.url.replace("+psycopg2", ""))) as admin:
            admin.autocommit = True
            admin.cursor().execute(f"DROP DATABASE {twin} WITH (FORCE)")
    return {
        "events/s": events / seconds,
        "postgres us": postgres / events * 1e6,
        "client us": python / events * 1e6,
        "all us": (postgres + python) / events * 1e6,
    }


def consumed(machine: Machine, *, events: int, assets: int) -> dict[str, float]:
    """Return the pace of a plain kombu consumer that acknowledges each message and does nothing with it."""
    with machine.place() as place:
        load.published(place.broker, load.messages("executions", events, assets))
        left = [events]

        def acknowledge(message: Any) -> None:
            message.ack()
            left[0] -= 1

        with Connection(place.broker) as connection:
            queues = [Queue(name, no_declare=True) for name in (EXECUTION_QUEUE, POSITION_QUEUE)]
            before, python = used_s(machine.rabbitmq.pid), time.process_time()
            started = time.perf_counter()
            with Consumer(connection, queues, on_message=acknowledge, prefetch_count=6000):
                while left[0]:
                    connection.drain_events(timeout=10)
            seconds = time.perf_counter() - started
            python = time.process_time() - python
        await_empty(machine, place)
        broker = used_s(machine.rabbitmq.pid) - before
    return {
        "events/s": events / seconds,
        "broker us": broker / events * 1e6,
        "client us": python / events * 1e6,
        "all us": (broker + python) / events * 1e6,
    }


def one_task_an_event(machine: Machine, *, events: int, assets: int) -> dict[str, float]:
    """Return the pace of events that are published as Celery tasks, each its own transaction."""
    with machine.place() as place, tempfile.TemporaryDirectory() as folder:
        _published_as_tasks(place, load.messages("executions", events, assets))
        engine = connect(place.database)

        def committed() -> int:
            with engine.connect() as connection:
                return int(connection.exec_driver_sql("SELECT count(*) FROM ledger").scalar_one())

        with worker(place.env, Path(folder), app="benchmarks.one_task_an_event"):
            while not (first := committed()):
                time.sleep(0.01)
            started = time.perf_counter()
            while (now := committed()) < events:
                time.sleep(0.1)
            seconds = time.perf_counter() - started
        engine.dispose()
    return {"events/s": (now - first) / seconds}


def _published_as_tasks(place: Place, messages: Any) -> None:
    with closing(channel_of(place.broker)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
    celery = Celery(broker=place.broker)
    with celery.producer_pool.acquire(block=True) as producer:
        deque(
            (
                celery.send_task(
                    "benchmark.apply_one", args=[json.dumps(message)], queue=TASK_QUEUE, producer=producer
                )
                for _, message in messages
            ),
            maxlen=0,
        )
    celery.close()
