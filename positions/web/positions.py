"""`/positions`: what is held, as a list and one by one."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from flask import Response, jsonify
from pydantic import BaseModel, Field, RootModel
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Connection

from positions import metrics
from positions.domain.events import Mode, PositionKey
from positions.handlers.validate_positions import Validator
from positions.messages.outbound import (
    BreakView,
    ExecutionView,
    PositionView,
    object_of,
)
from positions.queries.as_of import position_as_of
from positions.queries.executions import Place, executions
from positions.queries.positions import PAGE_MAX, Status, position, positions
from positions.storage.database import transaction
from positions.web.answers import kept
from positions.web.listings import columns, link_to, listing, wants_csv
from positions.web.openapi import LISTED, OF_BODY, TAGGED, api
from positions.web.parameters import (
    Asset,
    Flag,
    KeyCursor,
    Limit,
    Moment,
    Number,
    OfAsset,
    OfMode,
    Parameters,
    checked,
    cursor,
    cursor_of,
)
from positions.web.resources import resources

blueprint = api("positions")


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def _place(microseconds: str, id_: str) -> Place:
    return Place(_EPOCH + int(microseconds) * _MICROSECOND, int(id_))


PlaceCursor = Annotated[Place, *cursor(r"(-?[0-9]{1,16})\.([0-9]{1,18})", _place)]


class Listed(Parameters):
    """What a list may be narrowed down to; the sizes are signed and inclusive."""

    asset: Asset | SkipJsonSchema[None] = None
    mode: Mode | SkipJsonSchema[None] = None
    size_min: Number | SkipJsonSchema[None] = None
    """Smallest signed size."""
    size_max: Number | SkipJsonSchema[None] = None
    """Largest signed size."""
    status: Status | SkipJsonSchema[None] = None
    """`open`: any leg is not flat."""
    limit: Limit = PAGE_MAX
    """Most positions on a page."""
    cursor: KeyCursor | SkipJsonSchema[None] = None


class One(OfMode):
    """Which of an asset's positions, and when."""

    as_of: Moment | SkipJsonSchema[None] = None
    """A moment of events' own times; one to come is now."""


class Executed(OfMode):
    """Which entries of a position's ledger."""

    limit: Limit = 100
    """Most entries on a page."""
    cursor: PlaceCursor | SkipJsonSchema[None] = None
    from_: Moment | SkipJsonSchema[None] = Field(None, alias="from")
    """Only of this time and later."""
    to: Moment | SkipJsonSchema[None] = None
    """Only of this time and earlier."""


class Validated(OfMode):
    """Which position, and whether what differs from the ledger is to be set right."""

    fix_discrepancies: Flag = True
    """Write what the ledger folds to where something else is stored. A difference to the venue is only told:
    what its reports may overrule, they have overruled already."""


class Position(RootModel[PositionView]):
    """One position."""


class Positions(BaseModel):
    """Positions in order of asset and mode."""

    positions: list[PositionView]
    count: int
    next_cursor: str | None
    """Leads to the next page; null on the last."""


class Executions(BaseModel):
    """Entries of a position's ledger, the newest first."""

    executions: list[ExecutionView]
    count: int
    next_cursor: str | None
    """Leads to the next page; null on the last."""


class Validation(BaseModel):
    """What a validation found."""

    is_valid: bool
    """Whether nothing differed when it began."""
    error_message: str | None
    """What differed, in words."""
    updated_position: PositionView | None
    """The position, where it was set right."""
    breaks: list[BreakView]


@blueprint.get("/positions", responses={200: Positions}, openapi_extensions=TAGGED | LISTED)
@checked
def listed(query: Listed) -> Response:
    """List positions in order of asset and mode, a page at a time."""

    def make(connection: Connection) -> dict[str, object]:
        page = positions(
            connection,
            now=datetime.now(UTC),
            stale_after=resources().stale_after,
            after=query.cursor,
            **query.model_dump(exclude={"cursor"}),
        )
        return {
            "positions": [object_of(view) for view in page.positions],
            "count": len(page.positions),
            "next_cursor": page.next and cursor_of(*page.next),
        }

    if not wants_csv():
        return kept(make, _link, vary="Accept")
    with transaction(resources().reads) as connection:
        data = make(connection)
    return listing(data, "positions", columns(PositionView), link=_link(data))


def _link(data: Mapping[str, Any]) -> str | None:
    return data["next_cursor"] and link_to(cursor=data["next_cursor"])


@blueprint.get("/positions/<asset>", responses={200: Position}, openapi_extensions=TAGGED)
@checked
def one(path: OfAsset, query: One) -> Response:
    """Return one position, as it is, or as it was by all that is known now.

    Raises:
        NotFound: there is none, or there was none then.
    """
    own, key = resources(), PositionKey(path.asset, query.mode)

    def make(connection: Connection) -> dict[str, object]:
        now = datetime.now(UTC)
        if query.as_of is None:
            return object_of(position(connection, key, now=now, stale_after=own.stale_after))
        policy = own.rules.policy
        return object_of(
            position_as_of(connection, key, query.as_of, policy=policy, now=now, stale_after=own.stale_after)
        )

    return kept(make)


@blueprint.get("/positions/<asset>/executions", responses={200: Executions}, openapi_extensions=LISTED)
@checked
def made_by(path: OfAsset, query: Executed) -> Response:
    """List what made a position's numbers: executions, order reports, funding and adjustments.

    Raises:
        NotFound: there is no such position.
    """
    with transaction(resources().reads) as connection:
        page = executions(
            connection,
            PositionKey(path.asset, query.mode),
            limit=query.limit,
            after=query.cursor,
            from_=query.from_,
            to=query.to,
        )
    behind = page.next and cursor_of((page.next.executed_at - _EPOCH) // _MICROSECOND, page.next.id)
    data = {
        "executions": [object_of(each) for each in page.executions],
        "count": len(page.executions),
        "next_cursor": behind,
    }
    return listing(data, "executions", columns(ExecutionView), link=_link(data))


@blueprint.post("/positions/<asset>/validate", responses={200: Validation}, openapi_extensions=OF_BODY)
@checked
def validate(path: OfAsset, query: Validated) -> Response:
    """Compare a position with the fold of its ledger, with the newest report of the venue, and with its API.

    The exchange's API is asked where its key is set; an exchange that does not answer is no break.

    Raises:
        NotFound: there is no such position.
    """
    own, key = resources(), PositionKey(path.asset, query.mode)
    validator = Validator(
        engine=own.engine,
        rules=own.rules,
        retry=own.retry,
        venue=own.venue,
        fix=query.fix_discrepancies,
    )
    found = validator.one(key)
    metrics.VALIDATIONS.inc(found.outcome)
    updated = None
    if found.updated:
        with transaction(own.reads) as connection:
            view = position(connection, key, now=datetime.now(UTC), stale_after=own.stale_after)
            updated = object_of(view)
    return jsonify(
        is_valid=found.is_valid,
        error_message=found.error_message,
        updated_position=updated,
        breaks=[object_of(each) for each in found.breaks],
    )
