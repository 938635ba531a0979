"""The job that takes snapshots of all positions for each slot, and makes up for slots that were missed."""

from datetime import UTC, datetime, timedelta
from functools import partial

import structlog

from positions.handlers.take_snapshots import take_slot
from positions.handlers.write_changes import Rules
from positions.storage import slots
from positions.storage.database import in_transaction, transaction
from positions.storage.past import cut_at
from positions.tasks import resources
from positions.tasks.jobs import job

log = structlog.get_logger(__name__)

ON_TIME = timedelta(seconds=60)
"""So long after a slot what positions are is kept for it, prices of the moment and all. Later it is what they
were, by all that is known: fills to the digit, and the last prices that are still known of then."""
MISSED_FOR = timedelta(days=7)
"""Slots that were missed longer ago are not made up for."""
SLOTS_PER_RUN = 24
"""The next run goes on from there: one must not take all of a worker's time."""


@job(name="positions.take_snapshots")
def take_snapshots() -> dict[str, int]:
    """Take the snapshots that are due and return how many, of how many slots."""
    return take_due(resources.current(), now=datetime.now(UTC))


def take_due(own: resources.Resources, *, now: datetime) -> dict[str, int]:
    """Take the snapshots that are due at ``now``; any number of processes may, each slot is one's.

    Raises:
        Unavailable: the slots that were done are; the others stay due.
    """
    rules = Rules.of(own.settings)
    interval = timedelta(seconds=own.settings.snapshot_interval)
    since = now - min(MISSED_FOR, timedelta(days=own.settings.snapshot_retention_days))
    done = {"slots": 0, "snapshots": 0}
    for _ in range(SLOTS_PER_RUN):
        with transaction(own.engine) as connection:
            slot = slots.due(connection, now=now, interval=interval, since=since)
        if slot is None:
            break
        rows = None
        if late := now - slot > ON_TIME:
            with transaction(own.engine.execution_options(isolation_level="REPEATABLE READ")) as connection:
                rows = cut_at(connection, slot, rules.policy)
        take = partial(
            take_slot,
            slot=slot,
            rows=rows,
            now=now,
            interval=interval,
            since=since,
            stale_after=rules.price_stale_after,
        )
        taken = in_transaction(own.engine, take, retry=own.retry)
        if taken is not None:
            done = {"slots": done["slots"] + 1, "snapshots": done["snapshots"] + len(taken)}
            log.info("snapshots_taken", slot=slot.isoformat(), snapshots=len(taken), late=late)
    return done
