"""`/portfolio`: what all positions add up to."""

from dataclasses import dataclass
from datetime import UTC, datetime

from flask import Response
from pydantic import RootModel
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Connection

from positions.messages.outbound import (
    ExposureView,
    PnLView,
    PortfolioView,
    PositionView,
    object_of,
    part_of,
)
from positions.queries.as_of import portfolio_as_of
from positions.queries.portfolio import portfolio
from positions.queries.positions import positions
from positions.web.answers import kept, kept_by_all
from positions.web.openapi import TAGGED, api
from positions.web.parameters import Asset, Flag, Moment, Parameters, checked, cursor_of
from positions.web.resources import resources

blueprint = api("portfolio")


class Wanted(Parameters):
    """Of which assets, and whether with the positions that make the figures."""

    include_positions: Flag = False
    asset: Asset | SkipJsonSchema[None] = None
    """Only the positions in this asset; `limit_exceeded` is the whole portfolio's all the same."""
    as_of: Moment | SkipJsonSchema[None] = None
    """A moment of events' own times; one to come is now."""


@dataclass(frozen=True, kw_only=True)
class _WithPositions(PortfolioView):
    """What all positions add up to; exposures over the priced ones only."""

    positions: list[PositionView] | SkipJsonSchema[None] = None
    """Only with `include_positions`: the first page of `/positions`; with `as_of`, all there were."""
    next_cursor: str | None = None
    """Only with `include_positions`: where `/positions` goes on; null when these are all."""


class Portfolio(RootModel[_WithPositions]):
    """The portfolio."""


class Exposure(RootModel[ExposureView]):
    """The portfolio's exposure."""


class PnL(RootModel[PnLView]):
    """The portfolio's PnL."""


@blueprint.get("/portfolio", responses={200: Portfolio}, openapi_extensions=TAGGED)
@checked
def figures(query: Wanted) -> Response:
    """Return what all positions, or those in one asset, add up to; zeros where there is none."""
    if query == Wanted():
        return kept_by_all("portfolio", _figures)

    def make(connection: Connection) -> dict[str, object]:
        own, now = resources(), datetime.now(UTC)
        if query.as_of is None:
            answer = _portfolio(connection, query.asset)
            if query.include_positions:
                page = positions(connection, now=now, stale_after=own.stale_after, asset=query.asset)
                answer["positions"] = [object_of(each) for each in page.positions]
                answer["next_cursor"] = page.next and cursor_of(*page.next)
            return answer
        view, past = portfolio_as_of(
            connection,
            query.as_of,
            policy=own.rules.policy,
            now=now,
            stale_after=own.stale_after,
            max_exposure=own.max_exposure,
            asset=query.asset,
        )
        answer = object_of(view)
        if query.include_positions:
            answer["positions"] = [object_of(each) for each in past]
            answer["next_cursor"] = None
        return answer

    return kept(make)


@blueprint.get("/portfolio/exposure", responses={200: Exposure}, openapi_extensions=TAGGED)
@checked
def exposure() -> Response:
    """Return how much is at stake, in all and by asset."""
    return kept_by_all("exposure", _figures)


@blueprint.get("/portfolio/pnl", responses={200: PnL}, openapi_extensions=TAGGED)
@checked
def pnl() -> Response:
    """Return what was won and lost, in all and by asset."""
    return kept_by_all("pnl", _figures)


def _figures(connection: Connection) -> dict[str, dict[str, object]]:
    """Return all that is shown of the portfolio: who computes one of them stores the others too."""
    whole = _portfolio(connection)
    return {"portfolio": whole, "exposure": part_of(whole, ExposureView), "pnl": part_of(whole, PnLView)}


def _portfolio(connection: Connection, asset: str | None = None) -> dict[str, object]:
    own = resources()
    view = portfolio(
        connection,
        own.sums,
        now=datetime.now(UTC),
        stale_after=own.stale_after,
        max_exposure=own.max_exposure,
        asset=asset,
    )
    return object_of(view)
