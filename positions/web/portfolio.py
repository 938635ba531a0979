"""`/portfolio`."""

from datetime import UTC, datetime

from flask import Blueprint

from positions.messages.outbound import portfolio_object, position_object
from positions.queries.portfolio import portfolio
from positions.queries.positions import positions
from positions.storage.database import transaction
from positions.web.parameters import Asset, Parameters, cursor_of, parameters
from positions.web.resources import resources

blueprint = Blueprint("portfolio", __name__)


class Wanted(Parameters):
    """Of which assets, and whether with the positions that make the figures."""

    include_positions: bool = False
    asset: Asset | None = None


@blueprint.get("/portfolio")
def figures() -> dict[str, object]:
    """Return what all positions, or those in one asset, add up to; zeros where there is none.

    The positions that come with it are the first page of `/positions`, where `next_cursor` leads on.
    """
    wanted = parameters(Wanted)
    now, stale_after = datetime.now(UTC), resources().stale_after
    with transaction(resources().reads) as connection:
        view = portfolio(
            connection,
            now=now,
            stale_after=stale_after,
            max_exposure=resources().max_exposure,
            asset=wanted.asset,
        )
        answer = portfolio_object(view)
        if wanted.include_positions:
            page = positions(connection, now=now, stale_after=stale_after, asset=wanted.asset)
            answer["positions"] = [position_object(each) for each in page.positions]
            answer["next_cursor"] = page.next and cursor_of(page.next)
    return answer
