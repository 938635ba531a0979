"""How Celery's processes count and are scraped: workers, with the processes of their pool, and beat."""

import time
from typing import Any

from billiard.process import current_process
from celery import signals

from positions import metrics
from positions.settings import Settings


def measure(settings: Settings) -> None:
    """Serve the figures of the process that runs, whichever of Celery's it is."""

    @signals.celeryd_after_setup.connect(weak=False)
    def begin_worker(sender: str, **_: Any) -> None:
        # After logging is set up, and before the pool, whose processes inherit where the figures are kept.
        node = sender.partition("@")[0]
        metrics.serve("jobs" if node == "jobs" else "worker", settings, forks=True)

    @signals.beat_init.connect(weak=False)
    def begin_beat(**_: Any) -> None:
        metrics.serve("beat", settings)
        signals.after_task_publish.connect(_sent, weak=False)

    signals.worker_process_init.connect(_begin_child, weak=False)
    signals.worker_shutdown.connect(_end_worker, weak=False)
    signals.task_prerun.connect(_began, weak=False)
    signals.task_postrun.connect(_ended, weak=False)


def _begin_child(**_: Any) -> None:
    # A process's place in the pool: the one that replaces it is given the same.
    place = getattr(current_process(), "index", None)
    if place is not None:
        metrics.forked(str(place))


def _end_worker(**_: Any) -> None:
    metrics.leave_nothing()


def _sent(sender: str, **_: Any) -> None:
    metrics.SCHEDULED.inc(sender)


def _began(task: Any, **_: Any) -> None:
    task.request.began_at = time.perf_counter()


def _ended(task: Any, state: str | None, **_: Any) -> None:
    began_at = getattr(task.request, "began_at", None)
    if began_at is not None:
        metrics.TASKS.observe(time.perf_counter() - began_at, task.name, (state or "unknown").lower())
