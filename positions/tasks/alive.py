"""A worker that says of itself that it gets on: see `positions.liveness`."""

import time
from typing import Any

from celery import bootsteps

from positions.liveness import EVERY_S, touching
from positions.tasks import resources

STUCK_S = 120.0
"""No batch takes as long: the hard limit of its task is 30 s. What does was lost between worker and pool."""


class Alive(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Touches the file from the worker's own loop, unless a batch is stuck.

    While the broker or the database is away the worker waits, and a new one would wait as well: batches that
    are held count as being got on with. While it reconnects to the broker the loop stands still, so that
    probes should have the patience of a broker's restart.
    """

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **_: Any) -> None:
        del worker
        self._touch = touching(resources.current().settings.alive_file)
        self._since: dict[str, float] = {}

    def start(self, w: Any) -> None:
        """Begin."""
        w.timer.call_repeatedly(EVERY_S, self.tick, (w,))

    def tick(self, w: Any) -> None:
        """Touch the file, unless a batch is in the pool's hands for too long."""
        intake = getattr(w.consumer, "intake", None)
        in_flight: frozenset[str] = intake.in_flight if intake else frozenset()
        now = time.monotonic()
        self._since = {id_: self._since.get(id_, now) for id_ in in_flight}
        if all(now - since < STUCK_S for since in self._since.values()):
            self._touch()
