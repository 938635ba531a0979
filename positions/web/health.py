"""`/health`: how the service is, for people and monitors; `/live` and `/ready` for probes. No key."""

from datetime import UTC, datetime

import structlog
from flask import Blueprint
from sqlalchemy.exc import SQLAlchemyError

from positions.errors import Unavailable
from positions.messages.outbound import utc_text
from positions.queries.health import Activity, activity
from positions.storage.database import transaction
from positions.web.auth import public
from positions.web.resources import resources

log = structlog.get_logger(__name__)
blueprint = Blueprint("health", __name__)


@blueprint.get("/health")
@public
def health() -> tuple[dict[str, object], int]:
    """Return how the service is: unhealthy without its database, degraded without broker or cache.

    `backlog` is what waits to be applied and to be published: messages in the foreign queues, and rows
    of the outbox. It is null while one of the two is unknown.
    """
    stored = _stored()
    queues, cache = resources().checks.queues(), resources().checks.cache()
    backlog = None
    if stored is not None and queues is not None:
        backlog = stored.outbox + sum(queue.messages for queue in queues)
    healthy = "healthy" if queues is not None and cache else "degraded"
    return {
        "status": "unhealthy" if stored is None else healthy,
        "service": resources().service_name,
        "database_connected": stored is not None,
        "queue_connected": queues is not None,
        "cache_connected": cache,
        "positions_count": stored and stored.positions_count,
        "last_event_at": utc_text(stored.last_event_at) if stored and stored.last_event_at else None,
        "backlog": backlog,
        "outbox": stored and stored.outbox,
        "queues": queues
        and {queue.name: {"messages": queue.messages, "consumers": queue.consumers} for queue in queues},
        "timestamp": utc_text(datetime.now(UTC)),
    }, 503 if stored is None else 200


@blueprint.get("/health/live")
@public
def live() -> dict[str, str]:
    """Answer as long as the process can answer at all."""
    return {"status": "alive"}


@blueprint.get("/health/ready")
@public
def ready() -> dict[str, str]:
    """Answer when requests can be served: broker and cache are not needed for that.

    Raises:
        Unavailable: the database cannot be reached.
    """
    with transaction(resources().reads) as connection:
        connection.exec_driver_sql("SELECT 1")
    return {"status": "ready"}


def _stored() -> Activity | None:
    try:
        with transaction(resources().reads) as connection:
            return activity(connection)
    except (Unavailable, SQLAlchemyError) as error:
        # A database without our tables is as good as none.
        log.warning("database_unusable", reason=str(error).partition("\n")[0])
        return None
