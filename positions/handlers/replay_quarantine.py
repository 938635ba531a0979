"""Apply a message out of quarantine, after what made it wrong was mended."""

from datetime import datetime

from sqlalchemy import Connection

from positions.handlers.apply_events import Outcome, apply_events
from positions.handlers.write_changes import Rules
from positions.messages.inbound import Delivery, decode
from positions.storage import quarantine


def replay_quarantine(
    connection: Connection, id_: int, *, rules: Rules, max_bytes: int, now: datetime
) -> Outcome:
    """Apply message ``id_`` as if it were delivered again, and say so on it.

    What was applied already, by a redelivery or an earlier replay, is a duplicate and changes nothing. A
    message without a time of its own keeps the one at which it was first stored.

    Raises:
        NotFound: there is no such message.
        InvalidEvent: it still cannot be applied.
    """
    kept = quarantine.find(connection, id_)
    refused = kept.refused
    delivery = Delivery(
        queue=refused.queue,
        body=refused.body,
        headers=refused.headers,
        properties=refused.properties,
        received_at=kept.first_seen_at,
    )
    decoded = decode(delivery, max_bytes=max_bytes, now=now)
    if decoded.refused:
        raise decoded.refused
    outcome = apply_events(connection, decoded.events, [], rules=rules, now=now, patient=True)
    if decoded.ignored:
        outcome.counts["ignored"] += 1
    quarantine.mark_replayed(connection, id_, now=now)
    return outcome
