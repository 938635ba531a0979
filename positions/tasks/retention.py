"""The job that makes room: partitions of the months to come, an end for what is not kept for ever."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlalchemy import Engine

from positions.storage import attempts, retention, slots, snapshots
from positions.storage.database import Result, Retry, in_transaction
from positions.tasks import resources
from positions.tasks.jobs import job

log = structlog.get_logger(__name__)

MONTHS_AHEAD = 2
SETTLED_KEPT_FOR = timedelta(days=365)
"""So long are replayed messages and resolved breaks kept. One that was not replayed or resolved stays."""
SLOTS_KEPT_FOR = timedelta(days=30)
"""Longer than a slot that was missed may still be taken."""
ATTEMPTS_KEPT_FOR = timedelta(days=1)
"""So long is a message known to have been begun and not to have ended; its queue may be purged since."""
# A statement that reads snapshots takes 8 s at most: one of the tries meets none.
_RETRY = Retry(retries=8, base_ms=50)


@job(name="positions.make_room")
def make_room() -> dict[str, int]:
    """Make partitions ahead, and end what is too old; return how much of it."""
    return tidy(resources.current(), now=datetime.now(UTC))


def tidy(own: resources.Resources, *, now: datetime) -> dict[str, int]:
    """Do what the job does, at ``now``. Any number may at once, and where one ends the next goes on.

    Raises:
        Unavailable: the database is away, or snapshots are read without a pause; the next run goes on.
    """
    engine, before = own.engine, now - timedelta(days=own.settings.snapshot_retention_days)
    _do(engine, slots.forget, before=now - SLOTS_KEPT_FOR)
    settled = now - SETTLED_KEPT_FOR
    _do(engine, attempts.forget, before=now - ATTEMPTS_KEPT_FOR)
    done = {
        "replayed_deleted": _delete_settled(engine, retention.delete_replayed, settled),
        "breaks_deleted": _delete_settled(engine, retention.delete_resolved, settled),
    }
    months = [month for month in _do(engine, retention.months) if month.begins < before]
    ended = [month for month in months if snapshots.next_month(month.begins) <= before]
    parts = [retention.DEFAULT, *(month.name for month in months if month not in ended)]
    done["snapshots_deleted"] = sum(_delete_snapshots(engine, part, before) for part in parts)
    # From here on it takes locks that others may be in the way of.
    done["partitions_made"] = _make_ahead(engine, now)
    for month in ended:
        if month.attached:
            _do(engine, retention.detach, month=month)
    done["months_dropped"] = len(ended)
    for month in _do(engine, retention.months):
        if not month.attached:
            _do(engine, retention.drop, month=month)
    log.info("room_made", snapshots_before=before.isoformat(), **done)
    return done


def _make_ahead(engine: Engine, now: datetime) -> int:
    made, month = 0, snapshots.month_of(now)
    for _ in range(MONTHS_AHEAD + 1):
        made += _do(engine, retention.make, month=month)
        month = snapshots.next_month(month)
    return made


def _delete_snapshots(engine: Engine, part: str, before: datetime) -> int:
    pages = _do(engine, retention.pages, part=part)
    return sum(
        _do(engine, retention.delete_snapshots, part=part, before=before, first=first)
        for first in range(0, pages, retention.CHUNK_PAGES)
    )


def _delete_settled(engine: Engine, delete: Callable[..., int], before: datetime) -> int:
    total = 0
    while deleted := _do(engine, delete, before=before):
        total += deleted
    return total


def _do(engine: Engine, what: Callable[..., Result], **arguments: Any) -> Result:
    """Return what a step returned, in a transaction of its own."""
    return in_transaction(engine, partial(what, **arguments), retry=_RETRY)
