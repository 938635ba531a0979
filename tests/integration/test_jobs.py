"""Jobs with real workers and beats: who does them, and that no event waits for one."""

from __future__ import annotations

import socket
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
from sqlalchemy import Engine, func, select, text

from beat_schedule import JOBS_QUEUE, TASK_QUEUE
from positions.storage.tables import ledger
from tests.integration.processes import beat, environment, jobs, worker
from tests.integration.support import EXECUTION_QUEUE, apply, channel_of, execution, executions, publish
from tests.services import wait_until


@pytest.fixture
def env(database_url: str, broker_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, broker_url, redis_url)


def slots(engine: Engine) -> list[tuple[datetime, int]]:
    """Return the moments of all snapshots, and how many each has."""
    statement = "SELECT created_at, count(*) FROM position_snapshots GROUP BY 1 ORDER BY 1"
    with engine.connect() as connection:
        return [(at, count) for at, count in connection.execute(text(statement))]


def slots_since(engine: Engine) -> int:
    """Return how many slots of a second there have been from the first to the last that was taken."""
    taken = slots(engine)
    return round((taken[-1][0] - taken[0][0]).total_seconds()) + 1


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


def test_a_worker_that_starts_makes_room_while_it_waits_for_the_gateway(
    engine: Engine, env: dict[str, str], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    env = {**env, "WS_GATEWAY_URL": nowhere, "WS_GATEWAY_API_KEY": "a-key-nobody-may-see"}
    with jobs(env, tmp_path) as running:
        running.await_log("gateway_not_subscribed", times=2)
        running.await_log("room_made")
        assert "a-key-nobody-may-see" not in running.log.read_text()
        assert running.terminate() == 0
    statement = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'position_snapshots'::regclass"
    with engine.connect() as connection:
        assert connection.execute(text(statement)).scalar_one() == 4  # three months, and the rest


def test_beats_that_are_killed_doubled_or_lost_their_file_leave_one_snapshot_a_slot(
    engine: Engine, env: dict[str, str], tmp_path: Path
) -> None:
    apply(engine, [execution(asset, "Buy", "1", "100") for asset in ("BTCUSDT", "ETHUSDT")])
    env = {**env, "POSITION_MANAGER_SNAPSHOT_INTERVAL": "1"}
    with jobs(env, tmp_path):
        with beat(env, tmp_path / "first"):
            assert wait_until(lambda: len(slots(engine)) >= 2, limit_s=30)
        before = slots(engine)[-1][0]
        with beat(env, tmp_path / "first"), beat(env, tmp_path / "second"):
            assert wait_until(lambda: (slots(engine)[-1][0] - before).total_seconds() >= 6, limit_s=60)
            assert wait_until(lambda: len(slots(engine)) == slots_since(engine), limit_s=30)
    assert {count for _, count in slots(engine)} == {2}
