"""What the database says of the service's health, cheap enough to be asked every second."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, func, select

from positions.storage.tables import ledger, outbox, positions

OUTBOX_COUNT_MAX = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """How much is stored, and when something last happened."""

    positions_count: int
    last_event_at: datetime | None
    """When an event was last recorded or moved a position."""
    outbox: int
    """Messages not published yet, counted up to `OUTBOX_COUNT_MAX`."""


def activity(connection: Connection) -> Activity:
    """Return the figures that tell whether events arrive and leave."""
    # The newest id is as good as the newest time, and has an index.
    recorded_at = select(ledger.c.recorded_at).order_by(ledger.c.id.desc()).limit(1).scalar_subquery()
    waiting = select(outbox.c.id).limit(OUTBOX_COUNT_MAX).subquery()
    row = connection.execute(
        select(
            func.count().label("positions"),
            func.greatest(func.max(positions.c.last_updated), recorded_at).label("last_event_at"),
            select(func.count()).select_from(waiting).scalar_subquery().label("outbox"),
        ).select_from(positions)
    ).one()
    return Activity(positions_count=row.positions, last_event_at=row.last_event_at, outbox=row.outbox)
