"""Messages that could not be applied, kept whole with the reason until somebody replays them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

_INSERT = """
    INSERT INTO quarantine
        (digest, queue, reason, field, trace_id, headers, properties, body, first_seen_at, last_seen_at)
    SELECT v.digest, v.queue, v.reason, v.field, v.trace_id, v.headers, v.properties, v.body, %(now)s, %(now)s
    FROM unnest(
        %(digest)s::text[], %(queue)s::text[], %(reason)s::text[], %(field)s::text[], %(trace_id)s::text[],
        %(headers)s::jsonb[], %(properties)s::jsonb[], %(body)s::bytea[]
    ) AS v (digest, queue, reason, field, trace_id, headers, properties, body)
    ORDER BY v.digest
    ON CONFLICT (digest) DO UPDATE
    SET times_seen = quarantine.times_seen + 1, last_seen_at = excluded.last_seen_at,
        reason = excluded.reason, field = excluded.field
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A message and why it was refused."""

    queue: str
    body: bytes
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    reason: str
    field: str | None = None
    trace_id: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of queue and body: the same message again is the same row."""
        return hashlib.sha256(self.queue.encode() + b"\0" + self.body).hexdigest()


def add(connection: Connection, refused: Sequence[Refused], *, now: datetime) -> None:
    """Keep ``refused``; one that is there already is counted."""
    unique = {each.digest: each for each in refused}
    if not unique:
        return
    rows = list(unique.values())
    connection.exec_driver_sql(
        _INSERT,
        {
            "now": now,
            "digest": list(unique),
            "headers": [_json(each.headers) for each in rows],
            "properties": [_json(each.properties) for each in rows],
            **{
                name: [getattr(each, name) for each in rows]
                for name in ("queue", "reason", "field", "trace_id", "body")
            },
        },
    )


def _json(data: Mapping[str, Any]) -> str:
    # Headers are the publisher's: any type AMQP knows, and PostgreSQL takes no NUL in JSON.
    return json.dumps(data, default=str).replace("\\u0000", "")
