"""What the worker's processes hold of memory after more and more events."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks import load
from benchmarks.intake import PART_OF_A_STOP, await_empty
from benchmarks.machine import Machine, children_of, resident_mb
from tests.integration.processes import worker


def measured(machine: Machine, *, events: int, assets: int) -> dict[str, float]:
    """Return the memory of the main process and of the pool's largest, in MB, and their growth."""
    with (
        machine.place() as place,
        tempfile.TemporaryDirectory() as folder,
        worker(place.env, Path(folder)) as running,
    ):

        def sizes() -> tuple[float, float]:
            return resident_mb(running.pid), max(map(resident_mb, children_of(running.pid)))

        done, found = 0, []
        while done < events:
            done += load.published(
                place.broker, load.messages("mix", min(PART_OF_A_STOP, events - done), assets, first=done)
            )
            await_empty(machine, place)
            time.sleep(1)
            found.append(sizes())
    third = found[len(found) // 3]
    return {
        "main MB": found[-1][0],
        "pool process MB": found[-1][1],
        "main growth": found[-1][0] / third[0],
        "pool growth": found[-1][1] / third[1],
    }
