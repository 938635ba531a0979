"""Jobs with real workers and beats: who does them, and that no event waits for one."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select

from beat_schedule import JOBS_QUEUE, TASK_QUEUE
from positions.storage.tables import ledger
from tests.integration.processes import environment, jobs, worker
from tests.integration.support import EXECUTION_QUEUE, channel_of, executions, publish
from tests.services import wait_until


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, broker_url, redis_url)


def consumers(url: str, queue: str) -> int:
    with closing(channel_of(url)) as connection, closing(connection.channel()) as channel:
        return int(channel.queue_declare(queue, durable=True, auto_delete=False).consumer_count)


def test_a_worker_of_jobs_takes_no_events_and_one_of_events_no_jobs(
    engine: Engine, broker_url: str, env: dict[str, str], tmp_path: Path
) -> None:
    with jobs(env, tmp_path):
        assert consumers(broker_url, JOBS_QUEUE) == 1
        assert [consumers(broker_url, queue) for queue in (TASK_QUEUE, EXECUTION_QUEUE)] == [0, 0]
        with worker(env, tmp_path, "-Q", TASK_QUEUE):
            publish(broker_url, [(EXECUTION_QUEUE, message) for message in executions(30)])
            count = select(func.count()).select_from(ledger)
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                assert wait_until(lambda: connection.execute(count).scalar_one() == 30, limit_s=30)
            each = [consumers(broker_url, queue) for queue in (TASK_QUEUE, EXECUTION_QUEUE, JOBS_QUEUE)]
            assert each == [1, 1, 1]
