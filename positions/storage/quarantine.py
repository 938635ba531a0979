"""Messages that could not be applied, kept whole with the reason until somebody replays them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from positions.errors import NotFound

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


NESTED_MAX = 8
"""Headers nested deeper are kept by their type only."""


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
        return digest_of(self.queue, self.body)


def digest_of(queue: str, body: bytes) -> str:
    """Return by what a message is known: SHA-256 of its queue and body."""
    return hashlib.sha256(queue.encode() + b"\0" + body).hexdigest()


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
            "body": [each.body for each in rows],
            **{
                name: [json.dumps(_storable(getattr(each, name))) for each in rows]
                for name in ("headers", "properties")
            },
            **{
                name: [_storable(getattr(each, name)) for each in rows]
                for name in ("queue", "reason", "field", "trace_id")
            },
        },
    )


def _storable(value: Any, depth: int = 0) -> Any:
    """Return ``value`` as JSON and PostgreSQL take it: headers are the publisher's, of any type and text."""
    if value is None or isinstance(value, bool | int):
        return value
    if depth < NESTED_MAX and isinstance(value, Mapping):
        return {str(_storable(str(key))): _storable(each, depth + 1) for key, each in value.items()}
    if depth < NESTED_MAX and isinstance(value, list | tuple):
        return [_storable(each, depth + 1) for each in value]
    text = (
        value
        if isinstance(value, str)
        else f"<nested {type(value).__name__}>"
        if depth >= NESTED_MAX
        else str(value)
    )
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """A message in quarantine."""

    id: int
    refused: Refused
    times_seen: int
    first_seen_at: datetime
    last_seen_at: datetime
    replayed_at: datetime | None


def newest(
    connection: Connection, *, limit: int, before: int | None = None, replayed: bool = False
) -> list[Kept]:
    """Return the newest messages, the newest first.

    Args:
        connection: only read from.
        limit: so many at most.
        before: only those with a smaller id: the next page.
        replayed: those that were replayed too.
    """
    rows = connection.exec_driver_sql(
        "SELECT * FROM quarantine WHERE id < %(before)s AND (%(replayed)s OR replayed_at IS NULL)"
        " ORDER BY id DESC LIMIT %(limit)s",
        {"before": before or 2**62, "replayed": replayed, "limit": limit},
    )
    return [_kept(row) for row in rows]


def waiting(connection: Connection) -> list[int]:
    """Return the ids of all messages that were not replayed yet, the oldest first."""
    return list(
        connection.exec_driver_sql(
            "SELECT id FROM quarantine WHERE replayed_at IS NULL ORDER BY id"
        ).scalars()
    )


def find(connection: Connection, id_: int) -> Kept:
    """Return one message, locked: it is replayed once at a time.

    Raises:
        NotFound: there is none of this id.
    """
    statement = "SELECT * FROM quarantine WHERE id = %(id)s FOR UPDATE"
    row = connection.exec_driver_sql(statement, {"id": id_}).one_or_none()
    if row is None:
        raise NotFound(f"no message {id_} in quarantine")
    return _kept(row)


def mark_replayed(connection: Connection, id_: int, *, now: datetime) -> None:
    """Say that a message was replayed."""
    connection.exec_driver_sql(
        "UPDATE quarantine SET replayed_at = %(now)s WHERE id = %(id)s", {"id": id_, "now": now}
    )


def _kept(row: Any) -> Kept:
    refused = Refused(
        queue=row.queue,
        body=bytes(row.body),
        headers=row.headers,
        properties=row.properties,
        reason=row.reason,
        field=row.field,
        trace_id=row.trace_id or "",
    )
    names = ("id", "times_seen", "first_seen_at", "last_seen_at", "replayed_at")
    return Kept(refused=refused, **{name: getattr(row, name) for name in names})
