"""What it takes to end old snapshots: our job beside one plain DELETE, each on a copy of the same rows.

Run as `python -m benchmarks.retention`. Of hourly snapshots of 500 positions the older half and more go.
Meanwhile one connection reads snapshots, one writes them, and one looks at pg_locks again and again. Sizes
are of all partitions with their indexes, right after, and after the VACUUM that autovacuum would do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from threading import Event, Thread

from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.engine import make_url

from positions.settings import load
from positions.storage import migrate
from positions.storage.snapshots import make_partition, month_of, next_month
from positions.tasks.resources import Resources
from positions.tasks.retention import tidy
from tests.services import PostgreSQL

POSITIONS = 500
NOW = datetime(2026, 1, 20, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
FILL = """
    INSERT INTO position_snapshots (position_id, asset, mode, created_at, exposure, net_exposure,
        unrealized_pnl, realized_pnl, snapshot_data)
    SELECT md5(n::text)::uuid, 'A' || n || 'USDT', 'one-way', at, 100.5 * n, 100.5 * n, n, 2 * n,
        jsonb_build_object('size', n::text, 'current_price', '100.5', 'version', n, 'more', repeat('x', 100))
    FROM generate_series(CAST(:since AS timestamptz), :until, '1 hour') at, generate_series(1, :positions) n
"""
READ = "SELECT count(*) FROM position_snapshots WHERE position_id = md5('7')::uuid"
WRITE = """
    INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
    VALUES (md5('7')::uuid, 'A7USDT', 'one-way', clock_timestamp(), '{}')
"""
# Others' statements that wait for a lock on a table of snapshots, and since when.
WAITING = """
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0) * 1000
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE NOT granted AND application_name = 'neighbour'
"""
EXCLUSIVE = """
    SELECT count(*) FROM pg_locks
    WHERE granted AND mode = 'AccessExclusiveLock' AND database = (
        SELECT oid FROM pg_database WHERE datname = current_database()
    ) AND relation IN (SELECT oid FROM pg_class WHERE relname LIKE 'position_snapshots%')
"""
SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0)
    FROM pg_class c WHERE c.relname LIKE 'position_snapshots%' AND c.relkind = 'r'
"""


@contextmanager
def again_and_again(engine: Engine, what: Callable[[Connection], float]) -> Iterator[list[float]]:
    """Do ``what`` in a thread while the block runs; yields the list of what it returned."""
    found: list[float] = []
    ended = Event()

    def run() -> None:
        with engine.connect() as connection:
            while not ended.is_set():
                found.append(what(connection))

    thread = Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def timed(statement: str) -> Callable[[Connection], float]:
    """Return what runs ``statement`` and returns the milliseconds that it took, a few of them a second."""

    def run(connection: Connection) -> float:
        started = time.perf_counter()
        connection.execute(
            text(statement), {"since": NOW - timedelta(days=30)} if ":since" in statement else {}
        )
        took = (time.perf_counter() - started) * 1000
        time.sleep(0.01)
        return took

    return run


def scalar(engine: Engine, statement: str) -> float:
    with engine.connect() as connection:
        return float(connection.execute(text(statement)).scalar_one())


def measure(name: str, url: str, work: Callable[[Engine], object]) -> dict[str, float]:
    """Run ``work`` with neighbours, print and return what it took."""
    plain = create_engine(url, isolation_level="AUTOCOMMIT")
    neighbours = create_engine(
        url, isolation_level="AUTOCOMMIT", connect_args={"application_name": "neighbour"}
    )
    held = 0.0

    def watch(connection: Connection) -> float:
        nonlocal held
        started = time.perf_counter()
        waited = float(connection.execute(text(WAITING)).scalar_one())
        if connection.execute(text(EXCLUSIVE)).scalar_one():
            held += time.perf_counter() - started
        return waited

    before = scalar(plain, SIZE)
    rows = scalar(plain, "SELECT count(*) FROM position_snapshots")
    lsn = scalar(plain, "SELECT pg_current_wal_lsn() - '0/0'")
    started = time.perf_counter()
    with (
        again_and_again(neighbours, timed(READ)) as reads,
        again_and_again(neighbours, timed(WRITE)) as writes,
        again_and_again(plain, watch) as waits,
    ):
        work(plain)
        took = time.perf_counter() - started
    wal = scalar(plain, "SELECT pg_current_wal_lsn() - '0/0'") - lsn
    left = scalar(plain, "SELECT count(*) FROM position_snapshots")
    after = scalar(plain, SIZE)
    with plain.connect() as connection:
        connection.execute(text("VACUUM position_snapshots"))
    vacuumed = scalar(plain, SIZE)
    found = {
        "seconds": took,
        "WAL, MB": wal / 1e6,
        "longest read, ms": max(reads),
        "longest write, ms": max(writes),
        "longest wait for a lock seen, ms": max(waits),
        "AccessExclusive held, ms (sampled)": held * 1000,
        "rows ended": rows - left + len(writes),
        "size before, MB": before / 1e6,
        "size after, MB": after / 1e6,
        "and after VACUUM, MB": vacuumed / 1e6,
    }
    print(f"\n{name}")
    for what, figure in found.items():
        print(f"  {what:36} {figure:14,.1f}")
    plain.dispose()
    neighbours.dispose()
    return found


def one_delete(limit: datetime) -> Callable[[Engine], object]:
    """Return what deletes the snapshots of before ``limit``."""

    def work(plain: Engine) -> None:
        statement = text("DELETE FROM position_snapshots WHERE created_at < :limit")
        with plain.connect() as connection:
            connection.execute(statement, {"limit": limit})

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000)
    asked = parser.parse_args()
    hours = asked.rows // POSITIONS
    since = NOW - (hours - 1) * HOUR
    kept_days = hours // 24 * 3 // 7
    with PostgreSQL() as server:
        copies = {}
        url = make_url(server.url)
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text("CREATE DATABASE ours"))
            copies["ours"] = url.set(database="ours").render_as_string(hide_password=False)
            migrate.upgrade(copies["ours"])
            fill(copies["ours"], since)
            connection.execute(text("CREATE DATABASE theirs TEMPLATE ours"))
            copies["theirs"] = url.set(database="theirs").render_as_string(hide_password=False)
            connection.execute(text("CHECKPOINT"))
        own = Resources(
            load(
                {
                    "POSITION_MANAGER_DATABASE_URL": copies["ours"],
                    "POSITION_MANAGER_SNAPSHOT_RETENTION_DAYS": str(kept_days),
                }
            )
        )
        print(f"{hours * POSITIONS:,} snapshots of {POSITIONS} positions; {kept_days} days are kept")
        ours = measure("our job", copies["ours"], lambda _: print(tidy(own, now=NOW)))
        own.engine.dispose()
        theirs = measure("one DELETE", copies["theirs"], one_delete(NOW - timedelta(days=kept_days)))
        compared = ("seconds", "WAL, MB", "longest read, ms", "longest write, ms", "and after VACUUM, MB")
        times = ", ".join(f"{what} x {theirs[what] / ours[what]:.1f}" for what in compared)
        print(f"\none DELETE beside our job: {times}")
        admin.dispose()


def fill(url: str, since: datetime) -> None:
    """Write the snapshots, month by month."""
    engine = create_engine(url)
    month = month_of(since)
    while month <= NOW:
        with engine.begin() as connection:
            connection.execute(text("SET LOCAL synchronous_commit = off"))
            make_partition(connection, month)
            until = min(next_month(month) - HOUR, NOW)
            connection.execute(
                text(FILL), {"since": max(since, month), "until": until, "positions": POSITIONS}
            )
        month = next_month(month)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE position_snapshots"))
    engine.dispose()


if __name__ == "__main__":
    main()
