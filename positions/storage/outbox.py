"""The outbox: messages for the neighbours, written in the transaction that made them true."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection

_INSERT = """
    INSERT INTO outbox (event_type, trace_id, body)
    SELECT v.event_type, v.trace_id, v.body
    FROM unnest(%(event_type)s::text[], %(trace_id)s::text[], %(body)s::text[])
        WITH ORDINALITY AS v (event_type, trace_id, body, position)
    ORDER BY v.position
"""


@dataclass(frozen=True, slots=True)
class Message:
    """One message to publish. `event_type` is its routing key too."""

    event_type: str
    trace_id: str
    body: str


def add(connection: Connection, messages: Sequence[Message]) -> None:
    """Write ``messages``; they are published in this order once the transaction is committed."""
    if messages:
        connection.exec_driver_sql(
            _INSERT,
            {name: [getattr(each, name) for each in messages] for name in ("event_type", "trace_id", "body")},
        )


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
