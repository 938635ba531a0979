"""What the database says of the service's health, cheap enough to be asked every few seconds."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache

from sqlalchemy import Connection, func, select

from positions.errors import Unavailable
from positions.storage.portfolio import is_open
from positions.storage.tables import attempts, ledger, outbox, positions, quarantine

COUNT_MAX = 100_000
SUSPECTED_FOR = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """How much is stored, and when something last happened."""

    positions_count: int
    open_count: int
    last_event_at: datetime | None
    """When an event was last recorded or moved a position."""
    outbox: int
    """Messages not published yet, counted up to `COUNT_MAX`."""
    outbox_oldest_at: datetime | None
    """When the oldest of them was written."""
    quarantine: int
    """Messages in quarantine that were not replayed, counted up to `COUNT_MAX`."""
    suspected: int
    """Messages that seem to end their worker: begun alone lately, and not ended."""


def activity(connection: Connection) -> Activity:
    """Return the figures that tell whether events arrive and leave."""
    # The newest id is as good as the newest time, and has an index.
    recorded_at = select(ledger.c.recorded_at).order_by(ledger.c.id.desc()).limit(1).scalar_subquery()
    unpublished = select(outbox.c.id).limit(COUNT_MAX).subquery()
    refused = select(quarantine.c.id).where(quarantine.c.replayed_at.is_(None)).limit(COUNT_MAX).subquery()
    lately = func.now() - SUSPECTED_FOR
    suspected = select(func.count()).where(attempts.c.alone > 0, attempts.c.last_begun_at > lately)
    found = connection.execute(
        select(
            func.count().label("positions_count"),
            func.count().filter(is_open).label("open_count"),
            func.greatest(func.max(positions.c.last_updated), recorded_at).label("last_event_at"),
            select(func.count()).select_from(unpublished).scalar_subquery().label("outbox"),
            select(outbox.c.created_at)
            .order_by(outbox.c.id)
            .limit(1)
            .scalar_subquery()
            .label("outbox_oldest_at"),
            select(func.count()).select_from(refused).scalar_subquery().label("quarantine"),
            suspected.scalar_subquery().label("suspected"),
        ).select_from(positions)
    )
    return Activity(**found.mappings().one())


def require_migrated(connection: Connection) -> None:
    """Make sure that the tables are as this code needs them; newer ones are: it was deployed before.

    Raises:
        Unavailable: migrations are missing.
    """
    found = set(connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars())
    if not found or found & _older_revisions():
        raise Unavailable("the database is not migrated")


@cache
def _older_revisions() -> frozenset[str]:
    # Workers import this module too, and need no Alembic.
    from alembic.script import ScriptDirectory

    from positions.storage import migrate

    script = ScriptDirectory.from_config(migrate.config(""))
    return frozenset(each.revision for each in script.walk_revisions()) - set(script.get_heads())
