"""`/events/quarantine`: messages that could not be applied, for operators."""

from datetime import UTC, datetime
from typing import Annotated

from flask import Response, jsonify
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy.exc import DataError

from positions.domain.times import utc_text
from positions.errors import InvalidEvent
from positions.handlers.replay_quarantine import replay_quarantine
from positions.messages.outbound import Time
from positions.storage import quarantine as store
from positions.storage.database import in_transaction, transaction
from positions.storage.quarantine import Kept
from positions.web.auth import needs_operate
from positions.web.openapi import api
from positions.web.parameters import Flag, Parameters, between, checked, cursor, cursor_of
from positions.web.resources import resources

blueprint = api("quarantine")

PAGE_MAX = 100
ID_MAX = 2**62

Id = Annotated[int, *between(1, ID_MAX)]
IdCursor = Annotated[int, *cursor(r"([1-9][0-9]{0,17})", int)]


class Wanted(Parameters):
    """Which messages."""

    limit: Annotated[int, *between(1, PAGE_MAX)] = 50
    cursor: IdCursor | SkipJsonSchema[None] = None
    replayed: Flag = False
    """Those that were replayed too."""


class Message(BaseModel):
    """A message in quarantine."""

    id: int
    queue: str
    reason: str
    field: str | None
    """The field at fault, where there is one."""
    trace_id: str
    times_seen: int
    first_seen_at: Time
    last_seen_at: Time
    replayed_at: Time | None
    headers: dict[str, object]
    body: str
    """What was received; bytes that are no UTF-8 as `\\\\x00`."""


class Messages(BaseModel):
    """Messages in quarantine, the newest first."""

    messages: list[Message]
    count: int
    next_cursor: str | None


class Replay(BaseModel):
    """What became of a message."""

    id: int
    outcome: dict[str, int]
    """How many of its events were applied, duplicate, stale, ..."""


class OfMessage(Parameters):
    """The part of an address that names a message."""

    id: Id


@blueprint.get("/events/quarantine", responses={200: Messages})
@needs_operate
@checked
def listed(query: Wanted) -> Response:
    """List the messages that could not be applied, the newest first."""
    with transaction(resources().reads) as connection:
        found = store.newest(connection, limit=query.limit + 1, before=query.cursor, replayed=query.replayed)
    page = found[: query.limit]
    return jsonify(
        messages=[_object(each) for each in page],
        count=len(page),
        next_cursor=cursor_of(page[-1].id) if len(found) > query.limit else None,
    )


@blueprint.post("/events/quarantine/<id>/replay", responses={200: Replay})
@needs_operate
@checked
def replay(path: OfMessage) -> Response:
    """Apply a message again, after what made it wrong was mended.

    What was applied already is a duplicate and changes nothing.

    Raises:
        NotFound: there is no such message.
        InvalidEvent: it still cannot be applied.
    """
    own = resources()
    try:
        outcome = in_transaction(
            own.engine,
            lambda connection: replay_quarantine(
                connection,
                path.id,
                rules=own.rules,
                max_bytes=own.message_max_bytes,
                now=datetime.now(UTC),
            ),
            retry=own.retry,
        )
    except DataError as error:
        raise InvalidEvent("the database refuses a value of it") from error
    return jsonify(id=path.id, outcome={name: count for name, count in outcome.counts.items() if count})


def _object(kept: Kept) -> dict[str, object]:
    refused = kept.refused
    return {
        "id": kept.id,
        "queue": refused.queue,
        "reason": refused.reason,
        "field": refused.field,
        "trace_id": refused.trace_id,
        "times_seen": kept.times_seen,
        "first_seen_at": utc_text(kept.first_seen_at),
        "last_seen_at": utc_text(kept.last_seen_at),
        "replayed_at": kept.replayed_at and utc_text(kept.replayed_at),
        "headers": refused.headers,
        "body": refused.body.decode(errors="backslashreplace"),
    }
