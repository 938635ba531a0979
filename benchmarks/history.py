"""How long questions about the past take, on a year of hourly snapshots, over the API in this process.

Run as `python -m benchmarks.history`; under `nice` it fills its PostgreSQL as slowly as it then measures.
Trades are applied by the handler that the worker uses, week by week. At each week's end a snapshot of every
position is taken, and copied to the hours of the week after with other sums. Warm is what is asked time and
again, of other moments each; cold what is asked first after a restart of PostgreSQL, with none of its files
in the kernel's memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from urllib.parse import urlencode

import psycopg2
import structlog
from flask.testing import FlaskClient
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url

from positions.handlers.take_snapshots import take_snapshots
from positions.storage import migrate
from positions.storage.database import connect, transaction
from positions.storage.snapshots import make_partition, month_of
from tests.integration.api import KEY, applications
from tests.integration.support import RULES, apply, execution
from tests.services import PostgreSQL

HOUR, WEEK = timedelta(hours=1), timedelta(weeks=1)
WEEKS = 53
BATCH = 1000
# The same figures up to a percent, so that the curve moves.
COPY = """
    INSERT INTO position_snapshots (position_id, asset, mode, created_at, exposure, net_exposure,
        unrealized_pnl, realized_pnl, snapshot_data)
    SELECT position_id, asset, mode, created_at + n * interval '1 hour', round(exposure * noise, 18),
        round(net_exposure * noise, 18), round(unrealized_pnl * noise, 18), realized_pnl, snapshot_data
    FROM position_snapshots, generate_series(1, 167) AS n,
        LATERAL (SELECT (0.99 + 0.02 * random())::numeric AS noise WHERE n > 0) AS noises
    WHERE created_at = :at AND created_at + n * interval '1 hour' <= :now
    ORDER BY n, position_id
"""


def filled(url: str, positions: int, fills: int, now: datetime) -> None:
    """Fill in a year up to ``now``: so many positions, each with so many fills and a price a week."""
    random = Random(1)
    start = now - (WEEKS - 1) * WEEK
    engine = connect(url, lock_timeout="60s")
    plain = create_engine(url)
    for week in range(WEEKS):
        at = start + (week - 1) * WEEK
        messages = []
        for number in range(positions):
            asset = f"A{number}USDT"
            # A tenth is not traded any more in the second half of the year.
            share = fills / WEEKS if number % 10 or week < WEEKS // 2 else 0
            for each in range(int(share * (week + 1)) - int(share * week)):
                second = week * 604_800 + random.randrange(604_800)
                messages.append(
                    execution(
                        asset,
                        random.choice(["Buy", "Sell"]),
                        f"{random.randint(1, 9000) / 1000}",
                        f"{random.randint(9000, 11000) / 100}",
                        execution_fees="0.0125",
                        executed_at=(start - WEEK + timedelta(seconds=second)).isoformat(),
                        execution_id=f"{asset}-{week}-{each}",
                    )
                )
            price = {"symbol": asset, "markPrice": str(random.randint(9000, 11000) / 100)}
            messages.append(
                {"event_type": "position", "data": {**price, "timestamp": (at + WEEK).isoformat()}}
            )
        messages.sort(key=lambda message: message.get("executed_at", "9"))
        for first in range(0, len(messages), BATCH):
            apply(engine, messages[first : first + BATCH])
        snapshots_of(engine, plain, at + WEEK, now)
    with plain.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
    plain.dispose()
    engine.dispose()


def snapshots_of(engine: Engine, plain: Engine, at: datetime, now: datetime) -> None:
    """Take a snapshot of all positions, and copy it to the hours of the week after."""
    with transaction(engine) as connection:
        for month in {month_of(at), month_of(at + WEEK)}:
            make_partition(connection, month)
    with transaction(engine) as connection:
        take_snapshots(connection, None, at=at, stale_after=RULES.price_stale_after)
        connection.execute(text("TRUNCATE outbox"))
    with plain.begin() as connection:
        connection.execute(text("SET LOCAL synchronous_commit = off"))
        connection.execute(text(COPY), {"at": at, "now": now})


Ask = Callable[[Random], str]


def questions(positions: int, now: datetime) -> dict[str, Ask]:
    """Return what is asked, each as what makes an address of a moment of the year and an asset by chance."""
    year = timedelta(days=364)

    def moment(random: Random) -> datetime:
        return now - year * random.random()

    def address(path: str, **query: object) -> str:
        told = {
            name.rstrip("_"): value.isoformat() if isinstance(value, datetime) else value
            for name, value in query.items()
        }
        return f"/api/v1/{path}?{urlencode(told)}"

    def asset(random: Random) -> str:
        return f"A{random.randrange(positions)}USDT"

    def curve(length: timedelta, interval: timedelta) -> Ask:
        def ask(random: Random) -> str:
            to = now - (year - length) * random.random()
            seconds = int(interval.total_seconds())
            return address("portfolio/history", from_=to - length, to=to, interval=seconds)

        return ask

    return {
        "a position as of a moment": lambda r: address(f"positions/{asset(r)}", as_of=moment(r)),
        "the portfolio as of a moment": lambda r: address("portfolio", as_of=moment(r)),
        "the same with its positions": lambda r: address(
            "portfolio", as_of=moment(r), include_positions="true"
        ),
        "100 snapshots up to a moment": lambda r: address(f"positions/{asset(r)}/snapshots", to=moment(r)),
        "1000 snapshots from offset 7000 on": lambda r: address(
            f"positions/{asset(r)}/snapshots", limit=1000, offset=7000
        ),
        "100 ledger entries up to a moment": lambda r: address(
            f"positions/{asset(r)}/executions", to=moment(r)
        ),
        "the curve, daily over a year": curve(year, timedelta(days=1)),
        "the curve, hourly over a week": curve(WEEK, HOUR),
        "the curve, hourly over a year (coarser)": curve(year, HOUR),
    }


def asked(client: FlaskClient, address: str) -> float:
    """Return the seconds that an answer takes; anything but 200 ends the benchmark."""
    started = time.perf_counter()
    response = client.get(address, headers={"X-API-Key": KEY})
    data = response.data
    seconds = time.perf_counter() - started
    if response.status_code != 200:
        raise SystemExit(f"{address}: {data.decode()}")
    return seconds


def forgotten(server: PostgreSQL) -> None:
    """Restart the server, with none of its files in the kernel's memory."""
    server.stop()
    os.sync()
    for path in Path(server.folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    server.start()


def main() -> None:
    """Print one table: median and slowest of each question, warm and cold."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--positions", type=int, default=500)
    arguments.add_argument("--fills", type=int, default=400, help="of each position in the year")
    arguments.add_argument("--warm", type=int, default=15, help="times that each question is asked")
    arguments.add_argument("--cold", type=int, default=3)
    given = arguments.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    with PostgreSQL() as server, applications() as make:
        url = make_url(server.url).set(database="benchmark").render_as_string(hide_password=False)
        with closing(psycopg2.connect(server.url.replace("+psycopg2", ""))) as connection:
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE benchmark")
        migrate.upgrade(url)
        started = time.perf_counter()
        filled(url, given.positions, given.fills, now)
        counted = create_engine(url)
        with counted.connect() as connection:
            snapshots, entries, size = connection.execute(
                text(
                    "SELECT (SELECT count(*) FROM position_snapshots), (SELECT count(*) FROM ledger),"
                    " pg_size_pretty(pg_database_size(current_database()))"
                )
            ).one()
        counted.dispose()
        print(
            f"{given.positions} positions, {snapshots} snapshots, {entries} ledger entries, {size};"
            f" filled in {time.perf_counter() - started:.0f} s"
        )
        client = make(url, POSITION_MANAGER_RATE_LIMIT_ENABLED="false").test_client()
        random = Random(2)
        print(f"{'':45} {'warm p50':>9} {'max':>9} {'cold p50':>9} {'max':>9}")
        for name, ask in questions(given.positions, now).items():
            cold = []
            for _ in range(given.cold):
                forgotten(server)
                client.get("/health/ready")  # connects again
                cold.append(asked(client, ask(random)))
            warm = [asked(client, ask(random)) for _ in range(given.warm)]
            figures = (statistics.median(warm), max(warm), statistics.median(cold), max(cold))
            print(f"{name:45} " + " ".join(f"{seconds:7.3f} s" for seconds in figures), flush=True)


if __name__ == "__main__":
    main()
