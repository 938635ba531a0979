"""Snapshots of positions: taken now, listed, and as a curve of the portfolio."""

import math
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Annotated

from flask import Response, g, jsonify
from pydantic import BaseModel, Field, RootModel
from pydantic.json_schema import SkipJsonSchema

from positions.domain.events import PositionKey
from positions.domain.times import utc_text
from positions.handlers.take_snapshots import take_snapshots
from positions.messages.outbound import (
    FLAT_SNAPSHOT,
    EquityPoint,
    SnapshotView,
    flat_snapshot,
    object_of,
)
from positions.queries.history import equity_curve, points_max
from positions.queries.snapshots import snapshots
from positions.storage.database import in_transaction, transaction
from positions.web.listings import columns, link_to, listing, wants_csv
from positions.web.openapi import LISTED, OF_BODY, api
from positions.web.parameters import Limit, Moment, OfAsset, OfMode, Parameters, between, checked
from positions.web.resources import resources

blueprint = api("snapshots")

OFFSET_MAX = 1_000_000
INTERVAL_MAX_S = 366 * 24 * 3600
WEEK = timedelta(days=7)
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
_BEGINNING = datetime.min.replace(tzinfo=UTC)


class Wanted(OfMode):
    """Which snapshots of a position."""

    limit: Limit = 100
    """Most snapshots to return."""
    offset: Annotated[int, *between(0, OFFSET_MAX)] = 0
    """So many of the newest are left out."""
    from_: Moment | SkipJsonSchema[None] = Field(None, alias="from")
    """Only of this moment and later."""
    to: Moment | SkipJsonSchema[None] = None
    """Only of this moment and earlier."""


class Curve(Parameters):
    """From when to when, and how fine."""

    from_: Moment | SkipJsonSchema[None] = Field(None, alias="from")
    """No point is before it; a week before `to` if not given."""
    to: Moment | SkipJsonSchema[None] = None
    """The last point; now if not given, or if it is still to come."""
    interval: Annotated[int, *between(1, INTERVAL_MAX_S)] = 3600
    """Seconds between two points, or as many more as it takes to have no more than a thousand, or fewer where
    there are more than 400 positions."""


class Snapshot(RootModel[SnapshotView]):
    """One snapshot."""


class Snapshots(BaseModel):
    """Snapshots of a position, the newest first."""

    snapshots: list[SnapshotView]
    count: int


class History(BaseModel):
    """The equity curve, the oldest point first, from the first one that any snapshot tells of."""

    points: list[EquityPoint]
    count: int
    interval_seconds: int
    """Between two points, as it was chosen in the end."""


@blueprint.post("/positions/<asset>/snapshot", responses={201: Snapshot}, openapi_extensions=OF_BODY)
@checked
def take(path: OfAsset, query: OfMode) -> tuple[Response, HTTPStatus]:
    """Take a snapshot of a position now; it is published as one that was taken on schedule.

    Raises:
        NotFound: there is no such position.
    """
    own, trace_id = resources(), g.trace_id
    [view] = in_transaction(
        own.engine,
        lambda connection: take_snapshots(
            connection,
            [PositionKey(path.asset, query.mode)],
            at=datetime.now(UTC),
            stale_after=own.stale_after,
            trace_id=trace_id,
        ),
        retry=own.retry,
    )
    return jsonify(object_of(view)), HTTPStatus.CREATED


@blueprint.get("/positions/<asset>/snapshots", responses={200: Snapshots}, openapi_extensions=LISTED)
@checked
def listed(path: OfAsset, query: Wanted) -> Response:
    """List the snapshots of a position, the newest first.

    Raises:
        NotFound: there is no such position.
    """
    with transaction(resources().reads) as connection:
        found = snapshots(
            connection,
            PositionKey(path.asset, query.mode),
            limit=query.limit + 1,
            offset=query.offset,
            from_=query.from_,
            to=query.to,
        )
    found, more = found[: query.limit], len(found) > query.limit
    # By time: what is taken meanwhile moves nothing, and nothing is counted off again.
    link = link_to(without="offset", to=utc_text(found[-1].created_at - MICROSECOND)) if more else None
    show = flat_snapshot if wants_csv() else object_of
    data = {"snapshots": [show(each) for each in found], "count": len(found)}
    return listing(data, "snapshots", FLAT_SNAPSHOT, link=link)


@blueprint.get("/portfolio/history", responses={200: History}, openapi_extensions=LISTED)
@checked
def history(query: Curve) -> Response:
    """Tell what the portfolio was worth, point by point: the newest snapshot of each position until then.

    A position that is closed by now counts as it is since it was. The point that is now, where `to` is not
    earlier, is what the positions are, as `/portfolio` has it.
    """
    now = datetime.now(UTC)
    to = min(query.to or now, now)
    from_ = query.from_ or max(to, _BEGINNING + WEEK) - WEEK
    points: tuple[EquityPoint, ...] = ()
    interval = query.interval
    if from_ <= to:
        with transaction(resources().reads) as connection:
            most = points_max(connection)
            interval = max(interval, math.ceil((to - from_) / SECOND / (most - 1)))
            # The last point is the newest, whatever the interval.
            first = to - (to - from_) // (interval * SECOND) * interval * SECOND
            points = equity_curve(
                connection, from_=first, to=to, interval=interval * SECOND, ends_now=to == now
            )
    data = {
        "points": [object_of(each) for each in points],
        "count": len(points),
        "interval_seconds": interval,
    }
    return listing(data, "points", columns(EquityPoint))
