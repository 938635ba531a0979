"""`/positions`."""

from datetime import UTC, datetime

from flask import Blueprint

from positions.domain.events import Mode, PositionKey
from positions.messages.outbound import position_object
from positions.queries.positions import PAGE_MAX, Status, position, positions
from positions.storage.database import transaction
from positions.web.parameters import Asset, Cursor, Limit, Number, Parameters, cursor_of, parameters
from positions.web.resources import resources

blueprint = Blueprint("positions", __name__)


class Listed(Parameters):
    """What a list may be narrowed down to; the sizes are signed and inclusive."""

    asset: Asset | None = None
    mode: Mode | None = None
    size_min: Number | None = None
    size_max: Number | None = None
    status: Status | None = None
    limit: Limit = PAGE_MAX
    cursor: Cursor | None = None


@blueprint.get("/positions")
def listed() -> dict[str, object]:
    """Return positions in order of asset and mode, a page at a time: `next_cursor` is null on the last."""
    wanted = parameters(Listed)
    with transaction(resources().reads) as connection:
        page = positions(
            connection,
            now=datetime.now(UTC),
            stale_after=resources().stale_after,
            after=wanted.cursor,
            **wanted.model_dump(exclude={"cursor"}),
        )
    return {
        "positions": [position_object(view) for view in page.positions],
        "count": len(page.positions),
        "next_cursor": page.next and cursor_of(page.next),
    }


class One(Parameters):
    """Which position."""

    asset: Asset
    mode: Mode = Mode.ONE_WAY


@blueprint.get("/positions/<asset>")
def one(asset: str) -> dict[str, object]:  # noqa: ARG001 - checked with the other parameters
    """Return one position.

    Raises:
        NotFound: there is none.
    """
    wanted = parameters(One)
    with transaction(resources().reads) as connection:
        view = position(
            connection,
            PositionKey(wanted.asset, wanted.mode),
            now=datetime.now(UTC),
            stale_after=resources().stale_after,
        )
    return position_object(view)
