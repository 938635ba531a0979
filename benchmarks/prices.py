"""What pricing 500 stale positions costs, and what an event waits for it, in one run.

Run as `python -m benchmarks.prices`. Starts a PostgreSQL and a server that plays the exchange. Prices are
written by the job's own handler, in transactions of different sizes; beside it one writer applies
events one by one to random ones of the same positions, and notes how long each took. Every commit is durable.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from random import Random

import structlog
from sqlalchemy import Engine

from positions.handlers import refresh_prices as module
from positions.handlers.refresh_prices import refresh_prices
from positions.storage import migrate
from positions.storage.database import Retry, connect
from positions.venue.bybit import Bybit
from tests.integration.support import RULES, apply, execution
from tests.services import PostgreSQL
from tests.venue import Venue

SIZES = (1, 10, 20, 50, 500)


class Writer:
    """Applies events without a pause, each a transaction."""

    def __init__(self, engine: Engine, assets: list[str]) -> None:
        self._engine, self._assets = engine, assets
        self._random, self._number = Random(1), len(assets)
        self.took_ms: list[float] = []

    def once(self) -> None:
        self._number += 1
        event = execution(
            self._random.choice(self._assets),
            "Buy",
            "1",
            "10",
            number=self._number,
            execution_id=f"b-{self._number}",
            executed_at=datetime.now(UTC).isoformat(),
        )
        started = time.perf_counter()
        apply(self._engine, [event])
        self.took_ms.append((time.perf_counter() - started) * 1000)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Apply events while the block runs."""
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                self.once()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def main() -> None:
    """Print one table: medians over all runs."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--positions", type=int, default=500)
    arguments.add_argument("--runs", type=int, default=5)
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    assets = [f"A{number:03}USDT" for number in range(given.positions)]
    with PostgreSQL() as postgres, Venue() as venue:
        migrate.upgrade(postgres.url)
        engine = connect(postgres.url)
        venue.prices.update(dict.fromkeys(assets, "10.5"))
        apply(engine, [execution(each, "Buy", "1", "10", number=n) for n, each in enumerate(assets)])
        writer = Writer(engine, assets)
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        events: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
        with closing(Bybit(venue.url)) as client:
            for _ in range(given.runs):
                writer.took_ms = []
                for _ in range(100):
                    writer.once()
                events[0] += writer.took_ms
                for size in SIZES:
                    module.BATCH = size
                    writer.took_ms = []
                    started = time.perf_counter()
                    with writer.beside():
                        counts = refresh_prices(
                            engine, client, rules=RULES, retry=Retry(), due_before=datetime.now(UTC)
                        )
                    seconds[size].append(time.perf_counter() - started)
                    events[size] += writer.took_ms
                    if counts["priced"] != len(assets):
                        raise SystemExit(f"only {counts}")
        engine.dispose()
    alone = statistics.median(events[0])
    slowest = statistics.quantiles(events[0], n=100)[98]
    print(f"{given.positions} positions, {given.runs} runs")
    print(f"an event alone: {alone:.1f} ms, p99 {slowest:.1f} ms")
    floor = statistics.median(seconds[1])
    for size in SIZES:
        took, p99 = statistics.median(seconds[size]), statistics.quantiles(events[size], n=100)[98]
        beside = statistics.median(events[size])
        print(
            f"{size:4} a transaction: {took:6.2f} s   {floor / took:5.1f} x faster than one each;"
            f" an event beside it {beside / alone:4.1f} x, p99 {p99 / slowest:4.1f} x"
        )


if __name__ == "__main__":
    main()
