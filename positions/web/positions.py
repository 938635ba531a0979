"""`/positions`: what is held, as a list and one by one."""

from datetime import UTC, datetime

from flask import Response
from pydantic import BaseModel, RootModel
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Connection

from positions.domain.events import Mode, PositionKey
from positions.messages.outbound import PositionView, position_object
from positions.queries.positions import PAGE_MAX, Status, position, positions
from positions.web.answers import kept
from positions.web.openapi import TAGGED, api
from positions.web.parameters import (
    Asset,
    KeyCursor,
    Limit,
    Moment,
    Number,
    OfAsset,
    OfMode,
    Parameters,
    checked,
    cursor_of,
)
from positions.web.resources import resources

blueprint = api("positions")


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
    """What it was at that moment, by all that is known now."""


class Position(RootModel[PositionView]):
    """One position."""


class Positions(BaseModel):
    """Positions in order of asset and mode."""

    positions: list[PositionView]
    count: int
    next_cursor: str | None
    """Leads to the next page; null on the last."""


@blueprint.get("/positions", responses={200: Positions})
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
            "positions": [position_object(view) for view in page.positions],
            "count": len(page.positions),
            "next_cursor": page.next and cursor_of(*page.next),
        }

    return kept(make)


@blueprint.get("/positions/<asset>", responses={200: Position}, openapi_extensions=TAGGED)
@checked
def one(path: OfAsset, query: One) -> Response:
    """Return one position.

    Raises:
        NotFound: there is none.
    """

    def make(connection: Connection) -> dict[str, object]:
        return position_object(
            position(
                connection,
                PositionKey(path.asset, query.mode),
                now=datetime.now(UTC),
                stale_after=resources().stale_after,
            )
        )

    return kept(make)
