"""The service's own processes, started as an operator starts them, for tests that look from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from beat_schedule import JOBS_QUEUE
from tests.integration.api import ROOT, environ, served
from tests.services import wait_until


def environment(database_url: str, broker_url: str, redis_url: str, **settings: str) -> dict[str, str]:
    """Return the environment of a process of the service."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("POSITION_MANAGER_")
    }
    return {
        **inherited,
        **environ(database_url, broker_url, redis_url),
        "POSITION_MANAGER_LOG_FORMAT": "json",
        # Of several at a time only one could have the port.
        "POSITION_MANAGER_METRICS_PORT": "0",
        "PYTHONPATH": str(ROOT),
        **{f"POSITION_MANAGER_{name.upper()}": value for name, value in settings.items()},
    }


class Process:
    """A process of the service and its log."""

    def __init__(self, arguments: Iterable[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._arguments, self._env = [sys.executable, "-m", *arguments], dict(env)
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._arguments,
                env=self._env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def children(self) -> list[int]:
        """Process ids of the children, the pool's for a worker."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def logged(self, event: str) -> int:
        """Return how often ``event`` stands in the log."""
        return self.log.read_text().count(f'"event": "{event}')

    def await_log(self, event: str, times: int = 1) -> None:
        if (
            not wait_until(
                lambda: self.logged(event) >= times or self._process.poll() is not None, limit_s=60
            )
            or self.logged(event) < times
        ):
            raise AssertionError(f"no {event!r} in the log:\n{self.log.read_text()[-4000:]}")

    def wait(self, limit_s: float = 60) -> int:
        """Wait for its end, and return its exit code."""
        return self._process.wait(limit_s)

    def terminate(self, limit_s: float = 60) -> int:
        """Stop it as a supervisor does, and return its exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(limit_s)

    def kill(self) -> None:
        """Kill it and all its children at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(10)


@contextmanager
def worker(
    env: Mapping[str, str], folder: Path, *arguments: str, app: str = "celery_app"
) -> Iterator[Process]:
    """Run a Celery worker that has begun to consume."""
    process = Process(["celery", "-A", app, "worker", *arguments], env, folder / "worker.log")
    try:
        process.await_log("intake_started")
        yield process
    finally:
        process.kill()


@contextmanager
def jobs(env: Mapping[str, str], folder: Path) -> Iterator[Process]:
    """Run a worker of jobs that is ready for them."""
    arguments = ["celery", "-A", "celery_app", "worker", "-Q", JOBS_QUEUE, "-n", "jobs@test"]
    process = Process(arguments, env, folder / "jobs.log")
    try:
        process.await_log("jobs@test ready")
        yield process
    finally:
        process.kill()


@contextmanager
def beat(env: Mapping[str, str], schedule: Path) -> Iterator[Process]:
    """Run a beat with its file at ``schedule``; that it has begun is seen by what it asks for."""
    arguments = ["celery", "-A", "celery_app", "beat", "--schedule", str(schedule), "--pidfile="]
    process = Process(arguments, env, schedule.with_suffix(".log"))
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def relay(env: Mapping[str, str], folder: Path) -> Iterator[Process]:
    """Run a relay."""
    process = Process(["positions.cli", "relay"], env, folder / "relay.log")
    try:
        process.await_log("relay_started")
        yield process
    finally:
        process.kill()


@contextmanager
def web(env: Mapping[str, str], folder: Path) -> Iterator[str]:
    """Run the REST API, and yield its address."""
    with served(folder, env) as api:
        yield f"http://127.0.0.1:{api.port}"
