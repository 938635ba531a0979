"""What an event, a read and the portfolio cost as positions and ledger grow."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from sqlalchemy import Engine

from benchmarks.floors import batches
from benchmarks.load import report
from benchmarks.machine import Machine, Place, used_s
from positions.domain.events import Mode, PositionKey
from positions.handlers.apply_events import apply_events
from positions.messages.inbound import Delivery, decode
from positions.queries import positions as queries
from positions.storage.database import connect, transaction
from tests.integration.api import KEY, applications
from tests.integration.support import EXECUTION_QUEUE, POSITION_QUEUE, RULES, apply, execution

_LEDGER = """
    INSERT INTO ledger (position_id, key, kind, leg, quantity, price, fee, executed_at, time_source, order_id,
        exec_type, trace_id)
    SELECT p.id, 'exec:' || gen_random_uuid(), 'trade', 'net', 0.5 * (1 - 2 * (n %% 2)), 100, 0.01,
        timestamptz '2024-01-01' + n * interval '0.1 s', 'event', gen_random_uuid(), 'Trade', 'trace-' || n
    FROM generate_series(1, %(rows)s::bigint) n
    JOIN (SELECT id, row_number() OVER (ORDER BY asset) - 1 AS place FROM positions LIMIT 500) p
        ON p.place = n %% 500
"""
# An index that is built at once takes a fraction of the time, as do entries whose position is not looked up.
_INDEXES_READY = "UPDATE pg_index SET indisready = %(ready)s WHERE indrelid = 'ledger'::regclass"
STALE = timedelta(seconds=300)
OPENED_AT_ONCE = 5000


def _cost(machine: Machine, work: Callable[[], object], times: int) -> tuple[float, float]:
    """Return processor time (Python and PostgreSQL) and time of one call, in ms; the first is not counted."""
    work()
    python, postgres, started = time.process_time(), used_s(machine.postgres.pid), time.perf_counter()
    for _ in range(times):
        work()
    used = time.process_time() - python + used_s(machine.postgres.pid) - postgres
    return used / times * 1000, (time.perf_counter() - started) / times * 1000


def _applied(engine: Engine, messages: list[Delivery]) -> None:
    decoded = [each for one in messages for each in decode(one, max_bytes=100_000).events]
    with transaction(engine) as connection:
        apply_events(connection, decoded, [], rules=RULES, now=datetime.now(UTC))


def measured(
    machine: Machine, *, positions: int, traded: int = 500, ledger_rows: int = 0, events: int = 20_000
) -> dict[str, float]:
    """Return the costs with so many positions, some of them traded, and so many older ledger rows."""
    with machine.place() as place:
        engine = connect(place.database)
        # None is a new one later.
        for batch in _opening(positions):
            _applied(engine, batch)
        _fill_ledger(engine, ledger_rows)
        with engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(
                "SET statement_timeout = 0; ANALYZE"
            )
        for batch in batches("executions", 4000, traded, first=positions):
            _applied(engine, batch)
        later = batches("executions", events, traded, first=positions + 4000)
        rest = iter(later)
        cpu_ms, _ = _cost(machine, lambda: _applied(engine, next(rest)), len(later) - 1)
        now = datetime.now(UTC)

        def single() -> None:
            with transaction(engine) as connection:
                queries.position(connection, PositionKey("A7USDT", Mode.ONE_WAY), now=now, stale_after=STALE)

        def page() -> None:
            with transaction(engine) as connection:
                queries.positions(connection, now=now, stale_after=STALE, limit=100)

        single_ms, _ = _cost(machine, single, 50)
        page_ms, _ = _cost(machine, page, 20)
        first_ms, again_ms = _portfolio(machine, place, engine)
        engine.dispose()
    return {
        "positions a batch": statistics.mean(len({_asset(each) for each in batch}) for batch in later),
        "event us": cpu_ms * 1000 / statistics.mean(map(len, later[1:])),
        "single read ms": single_ms,
        "page of 100 ms": page_ms,
        "portfolio ms": again_ms,
        "portfolio, all read ms": first_ms,
    }


def _fill_ledger(engine: Engine, rows: int) -> None:
    """Write so many entries of last year; their ids are as random as those of the exchange."""
    with engine.begin() as connection:
        connection.exec_driver_sql(_INDEXES_READY, {"ready": False})
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
        connection.exec_driver_sql(_LEDGER, {"rows": rows})
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL maintenance_work_mem = '1GB'")
        connection.exec_driver_sql(_INDEXES_READY, {"ready": True})
        connection.exec_driver_sql("REINDEX TABLE ledger")


def _asset(message: Delivery) -> str:
    found: str = json.loads(message.body)["asset"]
    return found


def _portfolio(machine: Machine, place: Place, engine: Engine) -> tuple[float, float]:
    """Return how long `GET /portfolio` takes a process that has read nothing yet, and after one fill each."""
    took_ms = []
    with applications() as make:
        app = make(place.database, redis=machine.redis.url, POSITION_MANAGER_RATE_LIMIT_ENABLED="false")
        client = app.test_client()
        client.get("/health/ready")  # connects
        for number in range(10):
            apply(
                engine, [execution("A7USDT", "Buy", "0.25", "100", number=number, execution_id=uuid4().hex)]
            )
            started = time.perf_counter()
            answer = client.get("/api/v1/portfolio", headers={"X-API-Key": KEY})
            took_ms.append((time.perf_counter() - started) * 1000)
            if answer.status_code != 200:
                raise SystemExit(answer.get_data(as_text=True))
    return took_ms[0], statistics.median(took_ms[1:])


def _opening(positions: int) -> Iterator[list[Delivery]]:
    """Yield batches that open every position, with a price."""
    at = datetime(2025, 1, 15, 9, tzinfo=UTC)
    batch: list[Delivery] = []
    for number in range(positions):
        asset = f"A{number}USDT"
        fill = execution(asset, "Buy", "1", "100", number=number, executed_at=at.isoformat())
        mark = report(asset, Decimal(1), 101.5, at + timedelta(seconds=1), number=number)
        batch += [
            Delivery(queue, json.dumps(message).encode(), {}, {}, at)
            for queue, message in ((EXECUTION_QUEUE, fill), (POSITION_QUEUE, mark))
        ]
        if len(batch) >= OPENED_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
