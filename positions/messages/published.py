"""The messages neighbours receive, as contract.md has them."""

from datetime import datetime
from json.encoder import encode_basestring_ascii

from positions.domain.times import utc_text
from positions.messages.outbound import (
    PortfolioView,
    PositionView,
    SnapshotView,
    object_of,
    texts_of,
    to_json,
)

EXCHANGE = "position-manager"
POSITION_UPDATED = "position_updated"
PORTFOLIO_UPDATED = "portfolio_updated"
SNAPSHOT_CREATED = "position_snapshot_created"
EVENT_TYPES = (POSITION_UPDATED, PORTFOLIO_UPDATED, SNAPSHOT_CREATED)
"""Types of event, each its own routing key on the exchange."""


def queue_of(event_type: str) -> str:
    """Return the name of the queue in which consumers of the older service expect ``event_type``."""
    return f"{EXCHANGE}.{event_type}"


def position_updated(
    view: PositionView, *, update_source: str, events_covered: int, trace_id: str, now: datetime
) -> str:
    """Return the body of a `position_updated` event."""
    texts = texts_of(view)
    members = ",".join([f'"{name}":{text}' for name, text in texts.items()])
    return (
        f'{{"event_type":"{POSITION_UPDATED}","trace_id":{encode_basestring_ascii(trace_id)},'
        f'"timestamp":"{utc_text(now)}",{members},"position_id":{texts["id"]},'
        f'"avg_price":{texts["average_entry_price"]},"update_source":{encode_basestring_ascii(update_source)},'
        f'"events_covered":{events_covered},"position":{{{members}}}}}'
    )


def portfolio_updated(view: PortfolioView, *, trace_id: str, now: datetime) -> str:
    """Return the body of a `portfolio_updated` event."""
    return _body(PORTFOLIO_UPDATED, trace_id, now, object_of(view))


def position_snapshot_created(
    view: SnapshotView, position: PositionView, *, trace_id: str, now: datetime
) -> str:
    """Return the body of a `position_snapshot_created` event; ``position`` is what the snapshot is of."""
    snapshot = object_of(view)
    return _body(
        SNAPSHOT_CREATED,
        trace_id,
        now,
        {
            **object_of(position),
            **snapshot,
            "snapshot_id": view.id,
            "snapshot_timestamp": snapshot["created_at"],
            "snapshot": snapshot,
        },
    )


def _body(event_type: str, trace_id: str, now: datetime, figures: dict[str, object]) -> str:
    message = {"event_type": event_type, "trace_id": trace_id, "timestamp": utc_text(now), **figures}
    return to_json(message)
