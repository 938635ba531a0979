"""The outbox: messages for the neighbours, written in the transaction that made them true."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection

from positions.domain.values import value_class
from positions.storage import arrays

_KINDS = {"event_type": "text", "trace_id": "text", "body": "json"}
_INSERT = f"""
    INSERT INTO outbox (event_type, trace_id, body)
    SELECT v.event_type, v.trace_id, v.body
    FROM {arrays.unnest(_KINDS)} WITH ORDINALITY AS v (event_type, trace_id, body, position)
    ORDER BY v.position
"""


@value_class(frozen=True, slots=True)
class Message:
    """One message to publish. `event_type` is its routing key too."""

    event_type: str
    trace_id: str
    body: str


def add(connection: Connection, messages: Sequence[Message]) -> None:
    """Write ``messages``; they are published in this order once the transaction is committed."""
    if messages:
        columns = {name: map(attrgetter(name), messages) for name in _KINDS}
        connection.exec_driver_sql(_INSERT, arrays.literals(_KINDS, columns))


def pending(connection: Connection, limit: int, *, after: int = 0) -> list[Any]:
    """Return the oldest messages that are not published yet, with ids beyond ``after``, as rows."""
    return list(
        connection.exec_driver_sql(
            "SELECT id, message_id, event_type, trace_id, body, created_at FROM outbox"
            " WHERE id > %(after)s ORDER BY id LIMIT %(limit)s",
            {"limit": limit, "after": after},
        )
    )


def delete(connection: Connection, ids: Sequence[int]) -> None:
    """Forget messages that the broker confirmed."""
    connection.exec_driver_sql("DELETE FROM outbox WHERE id = ANY(%(ids)s::bigint[])", {"ids": list(ids)})
