"""One crash at each point between a message's arrival and its being told of: what is there afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, func, select

from positions.storage.tables import attempts, ledger, outbox, quarantine
from tests.integration.processes import Process, environment
from tests.integration.support import (
    EXECUTION_QUEUE,
    apply,
    assert_positions_are_the_fold_of_the_ledger,
    channel_of,
    executions,
    publish,
)
from tests.services import wait_until

NUMBER = 40
APP = "tests.integration.crashing_app"
PUBLISHED = "position-manager.position_updated"


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        channel.queue_declare(EXECUTION_QUEUE, durable=True, auto_delete=False)
    mark = {"CRASH_MARK": str(tmp_path / "crashed")}
    return {**environment(database_url, broker_url, redis_url), **mark}


def count(engine: Engine, table: Any) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


def outcomes(process: Process, name: str) -> int:
    """Return the sum of one outcome over all batches that were applied."""
    lines = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
    return sum(line.get(name, 0) for line in lines if line["event"] == "events_applied")


@contextmanager
def supervised(process: Process) -> Iterator[Process]:
    try:
        yield process
    finally:
        process.kill()


def waiting(url: str, queue: str) -> int:
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        return int(channel.queue_declare(queue, passive=True).message_count)


@pytest.mark.parametrize("whole", [False, True], ids=["process", "worker"])
@pytest.mark.parametrize(
    ("point", "stored", "doubled"),
    [
        # What was not committed is gone with the process, and applied once when it comes again.
        ("after the ledger insert", 0, 0),
        ("before the commit", 0, 0),
        # What was committed and not acknowledged comes again, and is known.
        ("after the commit", NUMBER, NUMBER),
        ("before the acknowledgement", NUMBER, NUMBER),
    ],
)
def test_worker_that_dies_at_a_point(
    engine: Engine,
    broker_url: str,
    env: dict[str, str],
    tmp_path: Path,
    *,
    point: str,
    stored: int,
    doubled: int,
    whole: bool,
) -> None:
    crashed = Path(env["CRASH_MARK"])
    publish(broker_url, [(EXECUTION_QUEUE, each) for each in executions(NUMBER, assets=1)])
    env = {**env, "CRASH_AT": point, **({"CRASH_WHOLE": "1"} if whole else {})}
    arguments = ["celery", "-A", APP, "worker"]
    with supervised(Process(arguments, env, tmp_path / "worker.log")) as running:
        assert wait_until(crashed.exists, limit_s=60)
        if whole or point == "before the acknowledgement":
            # Where only the main process dies, its children notice and go.
            assert wait_until(lambda: running.ended, limit_s=30)
            assert count(engine, ledger) == stored
            running.start()
        assert wait_until(
            lambda: count(engine, ledger) == NUMBER and outcomes(running, "duplicate") >= doubled, limit_s=60
        )
        assert running.terminate() == 0
        assert outcomes(running, "duplicate") == doubled
    assert waiting(broker_url, EXECUTION_QUEUE) == 0
    assert count(engine, quarantine) == count(engine, attempts) == 0
    assert_positions_are_the_fold_of_the_ledger(engine)


def test_worker_that_dies_after_the_acknowledgement_has_done_its_work(
    engine: Engine, broker_url: str, env: dict[str, str], tmp_path: Path
) -> None:
    publish(broker_url, [(EXECUTION_QUEUE, each) for each in executions(NUMBER, assets=1)])
    env["CRASH_AT"] = "after the acknowledgement"
    with supervised(Process(["celery", "-A", APP, "worker"], env, tmp_path / "worker.log")) as running:
        assert wait_until(lambda: running.ended, limit_s=60)
    assert count(engine, ledger) == NUMBER
    assert_positions_are_the_fold_of_the_ledger(engine)


@pytest.mark.parametrize(
    ("point", "again"),
    [
        # Confirmed, and still in the outbox: published again.
        ("after publishing", 1),
        ("before the outbox delete", 1),
        # Deleted, but the transaction died with the process.
        ("after the outbox delete", 1),
    ],
)
def test_relay_that_dies_at_a_point(
    engine: Engine, broker_url: str, env: dict[str, str], tmp_path: Path, point: str, again: int
) -> None:
    env["CRASH_AT"] = point
    for each in executions(NUMBER, assets=3):
        apply(engine, [each])
    assert count(engine, outbox) == NUMBER
    with supervised(Process([APP, "relay"], env, tmp_path / "relay.log")) as running:
        assert wait_until(lambda: running.ended, limit_s=60)
        assert count(engine, outbox) == NUMBER
        running.start()
        assert wait_until(lambda: count(engine, outbox) == 0, limit_s=60)
        assert running.terminate() == 0
    bodies = []
    with closing(channel_of(broker_url)) as connection, closing(connection.channel()) as channel:
        while (message := channel.basic_get(PUBLISHED, no_ack=True)) is not None:
            bodies.append(json.loads(message.body))
    assert len(bodies) == NUMBER * (1 + again)
    for asset in {body["asset"] for body in bodies}:
        versions = [body["version"] for body in bodies if body["asset"] == asset]
        assert list(dict.fromkeys(versions)) == list(range(1, max(versions) + 1))
