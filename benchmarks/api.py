"""Requests a second and latency of what is asked most, beside a constant Flask view, in one run.

Run as `python -m benchmarks.api`; it needs `wrk`. Starts a PostgreSQL and a Redis of its own, fills in
positions through the handler that the worker uses, and asks the API as it is deployed, with keys and limits
on. How many connections each worker gets is up to chance, and one that has them all halves the rate: the
processor time that the web's workers take for a request does not depend on it, and is what is compared.
`--changing` commits a change every so many milliseconds meanwhile, so that no answer holds for long.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psycopg2
import structlog

from positions.storage import migrate
from positions.storage.database import connect
from tests.integration.api import KEY, Served, served
from tests.integration.processes import environment
from tests.integration.support import apply, execution
from tests.services import PostgreSQL, Redis

NOWHERE = "amqp://127.0.0.1:1//"
ROUTES = {
    "GET /api/v1/portfolio": "/api/v1/portfolio",
    "GET /api/v1/positions/{asset}": "/api/v1/positions/A7USDT",
    "GET /api/v1/positions": "/api/v1/positions",
}
CEILING = "a constant view"


@dataclass(frozen=True)
class Measured:
    """What wrk saw."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    """Processor time of all the workers a request, in microseconds."""


def worked_s(server: Served) -> float:
    """Return the processor time that the workers of ``server`` have used, those gone too, in seconds."""

    def figures(pid: int) -> list[int]:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return [int(each) for each in told[11:15]]

    ticks = sum(sum(figures(pid)[:2]) for pid in server.workers)
    # A worker is replaced after so many requests, and what it used is its parent's then.
    ticks += sum(figures(server.process.pid)[2:])
    return ticks / os.sysconf("SC_CLK_TCK")


def load(server: Served, path: str, *, seconds: int, connections: int) -> Measured:
    """Return how an address does under load; anything but 2xx ends the benchmark."""
    before, url = worked_s(server), f"http://127.0.0.1:{server.port}{path}"
    done = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-H", f"X-API-Key: {KEY}", url],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if "Non-2xx" in done or "Socket errors" in done:
        raise SystemExit(f"{url}:\n{done}")
    found = dict(re.findall(r"(50%|99%|Requests/sec:)\s+([\d.]+(?:us|ms|s)?)", done))
    requests = int(re.findall(r"(\d+) requests in", done)[0])
    cpu_us = (worked_s(server) - before) / requests * 1e6
    return Measured(float(found["Requests/sec:"]), _ms(found["50%"]), _ms(found["99%"]), cpu_us)


def _ms(text: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


def filled(url: str, assets: int) -> None:
    """Make positions: executions, and a price for each."""
    random = Random(1)
    engine = connect(url)
    for number in range(assets):
        asset = f"A{number}USDT"
        trades = [
            execution(asset, random.choice(["Buy", "Sell"]), f"{random.random():.4f}", "100.25", number=each)
            for each in range(3)
        ]
        price = {"event_type": "position", "data": {"symbol": asset, "markPrice": f"{random.random():.5f}"}}
        apply(engine, [*trades, price])
    engine.dispose()


@contextmanager
def changing(url: str, every_ms: int) -> Iterator[None]:
    """Commit a fill of a random position every so often."""
    stopped = threading.Event()

    def run() -> None:
        engine, number = connect(url), 1000
        while not stopped.wait(every_ms / 1000):
            number += 1
            apply(
                engine,
                [execution(f"A{Random(number).randrange(500)}USDT", "Buy", "0.1", "99", number=number)],
            )
        engine.dispose()

    thread = threading.Thread(target=run)
    if every_ms:
        thread.start()
    yield
    stopped.set()
    if every_ms:
        thread.join()


def main() -> None:
    """Print one table: medians, and each rate as a share of the constant view's."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--positions", type=int, default=500)
    arguments.add_argument("--seconds", type=int, default=5)
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--connections", type=int, default=16)
    arguments.add_argument("--changing", type=int, default=0, metavar="MS")
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("warning"))
    with ExitStack() as stack:
        postgres, redis = stack.enter_context(PostgreSQL()), stack.enter_context(Redis())
        with closing(psycopg2.connect(postgres.url.replace("+psycopg2", ""))) as connection:
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE benchmark")
        url = f"{postgres.url.rpartition('/')[0]}/benchmark"
        migrate.upgrade(url)
        filled(url, given.positions)
        env = environment(url, NOWHERE, redis.url, rate_limit_default="1000000", log_level="INFO")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("api", "constant"):
            (folder / name).mkdir()
        api = stack.enter_context(served(folder / "api", env))
        constant = stack.enter_context(served(folder / "constant", env, app="benchmarks.constant:app"))
        addresses = {CEILING: (constant, "/")} | {name: (api, path) for name, path in ROUTES.items()}
        for address in addresses.values():
            load(*address, seconds=1, connections=given.connections)
        stack.enter_context(changing(url, given.changing))
        # Alternating, so that a slow minute of the machine is everybody's.
        runs = [
            {
                name: load(*address, seconds=given.seconds, connections=given.connections)
                for name, address in addresses.items()
            }
            for _ in range(given.runs)
        ]
    changes = f", a change every {given.changing} ms" if given.changing else ""
    print(
        f"{given.positions} positions, {given.connections} connections, median of {given.runs} runs{changes}"
    )
    ceiling = statistics.median(run[CEILING].cpu_us for run in runs)
    for name in addresses:
        rate, p50, p99, cpu = (
            statistics.median(getattr(run[name], figure) for run in runs)
            for figure in ("rate", "p50_ms", "p99_ms", "cpu_us")
        )
        print(
            f"{name:30} {rate:6.0f} requests/s  p50 {p50:6.2f} ms  p99 {p99:7.2f} ms"
            f"  {cpu:5.0f} us of processor time, {ceiling / cpu:4.0%} of the ceiling"
        )


if __name__ == "__main__":
    main()
