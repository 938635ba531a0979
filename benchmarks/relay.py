"""Messages a second from the outbox to the broker, each confirmed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.machine import Machine, used_s
from positions.storage.database import connect
from tests.integration import processes

_FILL = """
    INSERT INTO outbox (event_type, trace_id, body)
    SELECT 'position_updated', 'trace-' || n, repeat('x', 1200) FROM generate_series(1, %(events)s) n
"""


def measured(machine: Machine, *, events: int) -> dict[str, float]:
    """Return the figures of one run: bodies as long as those of a `position_updated`."""
    with machine.place() as place, tempfile.TemporaryDirectory() as folder:
        engine = connect(place.database)

        def waiting() -> bool:
            with engine.connect() as connection:
                return bool(connection.exec_driver_sql("SELECT EXISTS (SELECT FROM outbox)").scalar_one())

        with processes.relay(place.env, Path(folder)) as running:
            with engine.begin() as connection:
                connection.exec_driver_sql(_FILL, {"events": events})
            before, started = (
                {
                    "broker": used_s(machine.rabbitmq.pid),
                    "postgres": used_s(machine.postgres.pid),
                    "relay": used_s(running.pid),
                },
                time.perf_counter(),
            )
            while waiting():
                time.sleep(0.02)
            seconds = time.perf_counter() - started
            now = {
                "broker": used_s(machine.rabbitmq.pid),
                "postgres": used_s(machine.postgres.pid),
                "relay": used_s(running.pid),
            }
        engine.dispose()
    us = {f"{name} us": (now[name] - before[name]) / events * 1e6 for name in now}
    return {"events/s": events / seconds, **us, "all us": sum(us.values())}
