"""`positions up` on a machine that names no server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from positions.embedded import children
from tests.services import Port, wait_until

START_LIMIT_S = 120


class Product:
    """One `positions up` after the other on the same folder and port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._port = Port()
        self.port = self._port.number
        self.output = folder / "output"
        # No server that this machine's environment may name.
        prefixes = ("POSITION_MANAGER_", "POSTGRES_", "RABBITMQ_", "REDIS_", "WS_GATEWAY_")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        self.environ["POSITION_MANAGER_DATA_DIR"] = str(folder / "data")
        self.environ["POSITION_MANAGER_PORT"] = str(self.port)
        self._up: subprocess.Popen[bytes] | None = None

    def start(self, **more: str) -> None:
        with self.output.open("wb") as output:
            self._up = subprocess.Popen(
                self.command,
                env=self.environ | more,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        assert wait_until(self._ready_or_ended, limit_s=START_LIMIT_S), self.output.read_text()
        assert self._up.poll() is None, self.output.read_text()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "positions.cli", "up"]

    def stop(self) -> int:
        assert self._up
        self._up.terminate()
        return self._up.wait(90)

    def pids(self) -> dict[str, int]:
        """Return every process by the name it is recorded under, and `up` itself."""
        assert self._up
        records = (self.folder / "data" / "run").glob("*.pid")
        return {record.stem: int(record.read_text().split()[0]) for record in records} | {"up": self._up.pid}

    def kill_everything(self) -> None:
        pids = self.pids()
        # From the top, so that nobody heals what is killed.
        for name in sorted(pids, key=lambda name: name not in {"up", "supervisord"}):
            with suppress(ProcessLookupError):
                os.killpg(pids[name], signal.SIGKILL)
        assert self._up
        self._up.wait()

    def get(self, path: str) -> tuple[int, Any]:
        key = json.loads((self.folder / "data" / "secrets.json").read_text())["api-key"]
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers={"X-API-Key": key})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except OSError as error:
            return 0, error
        finally:
            connection.close()

    def assets(self) -> set[str]:
        _, answer = self.get("/api/v1/positions")
        return {position["asset"] for position in answer["positions"]}

    def healthy(self) -> bool:
        status, answer = self.get("/health")
        return status == 200 and answer["status"] == "healthy"

    def close(self) -> None:
        """End whatever still runs, and remove everything."""
        with suppress(AssertionError):
            self.kill_everything()
        children.reap(self.folder / "data" / "run", "supervisord", grace_s=10)
        self._port.close()
        shutil.rmtree(self.folder)

    def _ready_or_ended(self) -> bool:
        assert self._up
        return "] ready\n" in self.output.read_text() or self._up.poll() is not None


@pytest.fixture
def product() -> Iterator[Product]:
    folder = Path(tempfile.mkdtemp(prefix="positions-e2e-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as a user who must reach its data
    with closing(Product(folder)) as product:
        yield product


def test_killed_children_come_back_and_a_stop_leaves_nothing(product: Product) -> None:
    product.start()
    assert wait_until(product.healthy, limit_s=30), product.get("/health")
    assert wait_until(lambda: bool(product.assets()), limit_s=30), "the simulator fed nothing"

    second = subprocess.run(product.command, env=product.environ, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert "already" in second.stderr

    before = product.pids()
    for name in ("web", "jobs"):  # neither asks the real exchange about the invented market
        environ = Path(f"/proc/{before[name]}/environ").read_bytes().split(b"\0")
        assert b"POSITION_MANAGER_SIMULATOR=on" in environ
    killed = ("postgres", "valkey", "web", "worker", "jobs")
    for name in killed:
        os.kill(before[name], signal.SIGKILL)
    assert wait_until(
        lambda: all(product.pids()[name] != before[name] for name in killed),
        limit_s=30,
    )
    assert wait_until(product.healthy, limit_s=60), product.get("/health")

    pids = product.pids()
    assert product.stop() == 0
    assert not [name for name, pid in pids.items() if children.started(pid)]
    assert "last run left behind" not in product.output.read_text()


def test_data_outlive_the_death_of_every_process(product: Product) -> None:
    product.start()
    assert wait_until(lambda: bool(product.assets()), limit_s=30), "the simulator fed nothing"
    assets = product.assets()
    product.kill_everything()

    product.start(POSITION_MANAGER_SIMULATOR="off")
    assert wait_until(product.healthy, limit_s=30), product.get("/health")
    assert product.assets() >= assets
    assert "simulator" not in product.pids()
    assert product.stop() == 0


def test_taken_port_is_named(product: Product) -> None:
    with socket.create_server(("0.0.0.0", product.port)):
        up = subprocess.run(product.command, env=product.environ, capture_output=True, text=True, check=False)
    assert up.returncode == 1
    assert f"port {product.port}" in up.stderr
    assert "POSITION_MANAGER_PORT" in up.stderr
