"""Real processes touch the file that probes look at, for as long as they run."""

from __future__ import annotations

from pathlib import Path

from tests.integration import processes
from tests.services import wait_until


def test_worker_and_relay_go_on_touching_their_file(
    database_url: str, broker_url: str, redis_url: str, tmp_path: Path
) -> None:
    env = processes.environment(database_url, broker_url, redis_url)
    files = {name: tmp_path / name for name in ("worker-alive", "relay-alive")}
    worker_env, relay_env = (env | {"POSITION_MANAGER_ALIVE_FILE": str(file)} for file in files.values())
    with processes.worker(worker_env, tmp_path), processes.relay(relay_env, tmp_path):
        for _ in range(2):
            # Gone, it comes back only by a touch.
            for file in files.values():
                file.unlink()
            assert wait_until(lambda: all(file.exists() for file in files.values()), limit_s=60)
