"""How many executions a second are applied, as batches and as one task an event, in one run.

Run as `python -m benchmarks.intake`. Starts a PostgreSQL, a RabbitMQ and a Redis of its own; every commit
is durable. The queue holds everything when the worker starts; timed is from its first commit to its last.
Each run ends with the check that every position is the fold of the ledger.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg2
from celery import Celery
from sqlalchemy import func, select

from beat_schedule import TASK_QUEUE
from positions.storage import migrate
from positions.storage.database import connect
from positions.storage.tables import ledger
from tests.integration.processes import environment, worker
from tests.integration.support import (
    EXECUTION_QUEUE,
    assert_positions_are_the_fold_of_the_ledger,
    channel_of,
    executions,
    publish,
)
from tests.services import PostgreSQL, RabbitMQ, Redis, wait_until


def as_raw_messages(url: str, messages: list[dict[str, Any]]) -> None:
    """Publish each event as plain JSON, as the order manager does."""
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
    publish(url, [(EXECUTION_QUEUE, message) for message in messages])


def as_tasks(url: str, messages: list[dict[str, Any]]) -> None:
    """Publish each event as a Celery task, as a second hop would."""
    celery = Celery(broker=url)
    with celery.producer_pool.acquire(block=True) as producer:
        for message in messages:
            celery.send_task(
                "benchmark.apply_one", args=[json.dumps(message)], queue=TASK_QUEUE, producer=producer
            )
    celery.close()


VARIANTS: dict[str, tuple[Callable[[str, list[dict[str, Any]]], None], str, dict[str, str]]] = {
    "batches of 200": (as_raw_messages, "celery_app", {}),
    "batches of 1 (direct hand-over)": (as_raw_messages, "celery_app", {"batch_size": "1"}),
    "one task an event (published as tasks)": (as_tasks, "benchmarks.one_task_an_event", {}),
}


def rate(servers: tuple[PostgreSQL, RabbitMQ, Redis], variant: str, messages: list[dict[str, Any]]) -> float:
    """Return the executions a second of one run."""
    postgres, rabbitmq, redis = servers
    publish_all, root, settings = VARIANTS[variant]
    name = f"benchmark_{uuid4().hex[:12]}"
    database = postgres.url.rpartition("/")[0]
    with closing(psycopg2.connect(postgres.url.replace("+psycopg2", ""))) as connection:
        connection.autocommit = True
        connection.cursor().execute(f"CREATE DATABASE {name}")
    migrate.upgrade(f"{database}/{name}")
    broker = rabbitmq.add_vhost(name)
    env = environment(f"{database}/{name}", broker, redis.url, **settings)
    publish_all(broker, messages)
    engine = connect(f"{database}/{name}")

    def committed() -> int:
        with engine.connect() as session:
            return session.execute(select(func.count()).select_from(ledger)).scalar_one()

    with tempfile.TemporaryDirectory() as folder, worker(env, Path(folder), app=root):
        if not wait_until(lambda: committed() > 0, limit_s=60, interval_s=0.01):
            raise SystemExit(f"{variant}: nothing was applied")
        started, before = time.perf_counter(), committed()
        if not wait_until(lambda: committed() >= len(messages), limit_s=900, interval_s=0.1):
            raise SystemExit(f"{variant}: {committed()} of {len(messages)} applied")
        seconds = time.perf_counter() - started
    assert_positions_are_the_fold_of_the_ledger(engine)
    engine.dispose()
    rabbitmq.delete_vhost(name)
    return (len(messages) - before) / seconds


def main() -> None:
    """Print one table: medians, and each as a ratio to one task an event."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events", type=int, default=20_000)
    arguments.add_argument("--assets", type=int, default=500)
    arguments.add_argument("--runs", type=int, default=3)
    given = arguments.parse_args()
    messages = executions(given.events, given.assets)
    with PostgreSQL() as postgres, RabbitMQ() as rabbitmq, Redis() as redis:
        # Alternating, so that a slow minute of the machine is everybody's.
        rates = [
            {variant: rate((postgres, rabbitmq, redis), variant, messages) for variant in VARIANTS}
            for _ in range(given.runs)
        ]
    medians = {variant: statistics.median(run[variant] for run in rates) for variant in VARIANTS}
    floor = medians["one task an event (published as tasks)"]
    print(f"{given.events} executions over {given.assets} assets, median of {given.runs} runs")
    for variant, median in medians.items():
        print(f"{variant:42} {median:8.0f} events/s   {median / floor:5.1f} x")


if __name__ == "__main__":
    main()
