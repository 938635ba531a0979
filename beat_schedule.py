"""What happens on a schedule: data only. The cadence is a setting's name, or seconds."""

from typing import NotRequired, TypedDict


class Job(TypedDict):
    """One job: which task, how often, on which queue, and whether a worker that begins asks for it too."""

    task: str
    every: str | float
    queue: str
    at_start: NotRequired[bool]


TASK_QUEUE = "positions.tasks"
"""What waits for nothing but the database, and not for long: on the workers that apply events."""
JOBS_QUEUE = "positions.jobs"
"""What takes its time or asks other hosts: on workers of its own, so that no event waits for it."""

SCHEDULE: dict[str, Job] = {
    "publish the portfolio": {
        "task": "positions.publish_portfolio",
        "every": "portfolio_update_interval",
        "queue": TASK_QUEUE,
    },
    "take snapshots": {
        "task": "positions.take_snapshots",
        "every": "snapshot_tick",
        "queue": JOBS_QUEUE,
    },
    "refresh stale prices": {
        "task": "positions.refresh_prices",
        "every": "price_refresh_interval",
        "queue": JOBS_QUEUE,
    },
    "make room": {
        "task": "positions.make_room",
        "every": 86_400,
        "queue": JOBS_QUEUE,
        "at_start": True,
    },
    "validate positions": {
        "task": "positions.validate",
        "every": "validation_interval",
        "queue": JOBS_QUEUE,
    },
}
