"""`/health`: how the service is, for people and monitors; `/live` and `/ready` for probes. No key."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict
from sqlalchemy.exc import SQLAlchemyError

from positions.domain.times import utc_text
from positions.errors import Unavailable
from positions.messages.outbound import Time
from positions.queries.health import Activity, activity, require_migrated
from positions.storage import portfolio
from positions.storage.database import answered_within, transaction
from positions.web.auth import public
from positions.web.checks import Queue
from positions.web.metrics import seconds_since
from positions.web.openapi import PROBLEM, api
from positions.web.resources import resources

log = structlog.get_logger(__name__)
blueprint = api("health", prefix="")

DATABASE_S = 1.5
"""How long the database may take to answer, well below the patience of probes."""
STALLED_S = 60.0
"""What waits for so long waits for something that does not happen by itself."""


class QueueState(BaseModel):
    """How a foreign queue stands."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    messages: int
    consumers: int | None
    """Null where the broker cannot tell."""
    our_consumers: int | None


class Health(BaseModel):
    """How the service is."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["healthy", "degraded", "unhealthy"]
    """Unhealthy without its database, degraded when anything else is amiss."""
    service: str
    database_connected: bool
    queue_connected: bool
    cache_connected: bool
    positions_count: int | None
    last_event_at: Time | None
    """When an event was last recorded or moved a position."""
    last_event_age_seconds: float | None
    backlog: int | None
    """What waits to be applied and to be published; null while one of the two is unknown."""
    outbox: int | None
    """Messages not published yet."""
    queues: dict[str, QueueState] | None
    warnings: list[str]
    """What is amiss, in words."""
    timestamp: Time


class Alive(BaseModel):
    """The process answers."""

    status: Literal["alive"]


class Ready(BaseModel):
    """Requests can be served."""

    status: Literal["ready"]


@blueprint.get("/health", responses={200: Health, 503: Health})
@public
def health() -> tuple[dict[str, object], int]:
    """Return how the service is: unhealthy without its database, degraded when anything else is amiss.

    `backlog` is what waits to be applied and to be published: messages in the foreign queues, and rows
    of the outbox. It is null while one of the two is unknown. `warnings` says in words what is amiss.
    """
    stored = _stored()
    queues, cache = resources().checks.queues(), resources().checks.cache()
    now = datetime.now(UTC)
    backlog = None
    if stored is not None and queues is not None:
        backlog = stored.outbox + sum(queue.messages for queue in queues)
    warnings = list(_warnings(stored, queues, cache=cache, now=now))
    last_event_age = seconds_since(stored.last_event_at, now) if stored else None
    return {
        "status": "unhealthy" if stored is None else "degraded" if warnings else "healthy",
        "service": resources().service_name,
        "database_connected": stored is not None,
        "queue_connected": queues is not None,
        "cache_connected": cache,
        "positions_count": stored and stored.positions_count,
        "last_event_at": utc_text(stored.last_event_at) if stored and stored.last_event_at else None,
        "last_event_age_seconds": None if last_event_age is None else round(last_event_age, 3),
        "backlog": backlog,
        "outbox": stored and stored.outbox,
        "queues": queues
        and {
            queue.name: {
                "messages": queue.messages,
                "consumers": queue.consumers,
                "our_consumers": queue.ours,
            }
            for queue in queues
        },
        "warnings": warnings,
        "timestamp": utc_text(now),
    }, 503 if stored is None else 200


@blueprint.get("/health/live", responses={200: Alive})
@public
def live() -> dict[str, str]:
    """Answer as long as the process can answer at all."""
    return {"status": "alive"}


@blueprint.get("/health/ready", responses={200: Ready, 503: PROBLEM})
@public
def ready() -> dict[str, str]:
    """Answer when requests can be served: broker and cache are not needed for that.

    Raises:
        Unavailable: the database cannot be reached, does not answer, or is not migrated.
    """
    with answered_within(DATABASE_S), transaction(resources().reads) as connection:
        require_migrated(connection)
        # What every request asks for first.
        portfolio.version(connection)
    return {"status": "ready"}


def _warnings(
    stored: Activity | None, queues: Sequence[Queue] | None, *, cache: bool, now: datetime
) -> Iterator[str]:
    """Yield what is amiss, a sentence each."""
    if stored is None:
        yield "The database cannot be used: nothing can be served."
    if queues is None:
        yield "The broker cannot be reached: no event comes in, and none is published."
    if not cache:
        yield "The cache cannot be reached: answers are right, but slower."
    for queue in queues or ():
        # None: on Redis nobody knows.
        if queue.consumers == 0 and queue.messages:
            yield f"{queue.name}: {queue.messages} messages wait and nobody consumes them; does a worker run?"
        if queue.consumers is not None and queue.ours is not None and queue.consumers > queue.ours:
            yield (
                f"{queue.name}: {queue.consumers} consumers, of which {queue.ours} are ours;"
                " the others take messages that we never see."
            )
    if stored is None:
        return
    waiting = sum(queue.messages for queue in queues or ())
    idle = seconds_since(stored.last_event_at, now)
    if waiting and (idle is None or idle > STALLED_S):
        since = "ever" if idle is None else f"for {idle:.0f} s"
        yield f"{waiting} messages wait in the queues, and no event was applied {since}."
    if stored.suspected:
        yield (
            f"{stored.suspected} messages seem to end the worker that applies them; each is tried alone,"
            " and put into quarantine if it goes on."
        )
    unpublished = seconds_since(stored.outbox_oldest_at, now)
    if unpublished is not None and unpublished > STALLED_S:
        yield f"The oldest message to publish waits for {unpublished:.0f} s; does the relay run?"


def _stored() -> Activity | None:
    try:
        with answered_within(DATABASE_S), transaction(resources().reads) as connection:
            return activity(connection)
    except (Unavailable, SQLAlchemyError) as error:
        # A database without our tables is as good as none.
        log.warning("database_unusable", reason=str(error).partition("\n")[0])
        return None
