"""Events a second through a real worker, and what each costs in processor time, by part.

The worker has been at work and knows the assets; then it stands still while the queues are filled. Timed is
from when it goes on until the last message is acknowledged, which is after its commit.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks import load
from benchmarks.machine import Machine, Place, children_of, standing_still, used_s
from positions.storage.database import connect
from tests.integration.processes import Process, worker
from tests.integration.support import (
    EXECUTION_QUEUE,
    POSITION_QUEUE,
    assert_positions_are_the_fold_of_the_ledger,
    channel_of,
)

PART_OF_A_STOP = 50_000
"""So many messages are published while the worker stands still: longer, and the broker gives it up."""


def parts(machine: Machine, running: Process) -> dict[str, float]:
    """Return the processor time that each part has used, in seconds."""
    return {
        "broker": used_s(machine.rabbitmq.pid),
        "postgres": used_s(machine.postgres.pid),
        "main": used_s(running.pid, below=False),
        "pool": sum(used_s(pid, below=False) for pid in children_of(running.pid)),
    }


def await_empty(machine: Machine, place: Place) -> None:
    """Wait until every message is acknowledged."""
    with closing(channel_of(place.broker)) as connection, closing(connection.channel()) as channel:
        queues = (EXECUTION_QUEUE, POSITION_QUEUE)
        while sum(channel.queue_declare(queue, passive=True).message_count for queue in queues):
            time.sleep(0.05)
    while machine.messages(place):
        time.sleep(0.02)


def measured(
    machine: Machine,
    kind: load.Kind,
    *,
    events: int,
    assets: int,
    skewed: bool = False,
    app: str = "celery_app",
) -> dict[str, float]:
    """Return the figures of one run."""
    with (
        machine.place() as place,
        tempfile.TemporaryDirectory() as folder,
        worker(place.env, Path(folder), app=app) as running,
    ):
        warm = max(2 * assets, 2000)
        load.published(place.broker, load.messages(kind, warm, assets))
        await_empty(machine, place)
        seconds, used = 0.0, dict.fromkeys(("broker", "postgres", "main", "pool"), 0.0)
        for first in range(warm, warm + events, PART_OF_A_STOP):
            number = min(PART_OF_A_STOP, warm + events - first)
            with standing_still(running.pid):
                load.published(place.broker, load.messages(kind, number, assets, skewed=skewed, first=first))
                time.sleep(0.5)  # the broker brings messages to disk
                before, started = parts(machine, running), time.perf_counter()
            await_empty(machine, place)
            seconds += time.perf_counter() - started
            for name, now in parts(machine, running).items():
                used[name] += now - before[name]
        if kind == "executions":
            engine = connect(place.database)
            assert_positions_are_the_fold_of_the_ledger(engine)
            engine.dispose()
    us = {f"{name} us": spent / events * 1e6 for name, spent in used.items()}
    return {"events/s": events / seconds, **us, "all us": sum(us.values())}
