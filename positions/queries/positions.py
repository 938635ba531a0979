"""Positions as their readers ask for them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum

from sqlalchemy import Connection, select, tuple_

from positions.domain.events import Mode, PositionKey
from positions.errors import NotFound
from positions.messages.outbound import STORED, PositionView
from positions.storage import tables
from positions.storage.portfolio import GROSS_EXPOSURE, is_open

PAGE_MAX = 1000

_columns = tables.positions.c
_key = tuple_(_columns.asset, _columns.mode)
# In the same statement, so that shares and their whole are of one moment.
_POSITIONS = select(
    *(_columns[name] for name in STORED),
    GROSS_EXPOSURE.correlate(None).scalar_subquery().label("portfolio_exposure"),
)


class Status(StrEnum):
    """Whether a position has any leg that is not flat."""

    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Some positions in order of asset and mode."""

    positions: tuple[PositionView, ...]
    next: PositionKey | None
    """The last one's key where more follow."""


def positions(
    connection: Connection,
    *,
    now: datetime,
    stale_after: timedelta,
    asset: str | None = None,
    mode: Mode | None = None,
    size_min: Decimal | None = None,
    size_max: Decimal | None = None,
    status: Status | None = None,
    limit: int = PAGE_MAX,
    after: PositionKey | None = None,
) -> Page:
    """Return the positions that meet every condition given; the sizes are signed and inclusive.

    Args:
        connection: only read from.
        now: the moment the views are taken.
        stale_after: age from which a price is stale.
        asset: only this asset.
        mode: only this mode.
        size_min: smallest signed size.
        size_max: largest signed size.
        status: only open or only closed ones.
        limit: most to return, at most `PAGE_MAX`.
        after: the page begins behind this key.
    """
    limit = min(limit, PAGE_MAX)
    # By the columns and not by the pair of them, which no index serves.
    statement = _POSITIONS.order_by(_columns.asset, _columns.mode).limit(limit + 1)
    if asset is not None:
        statement = statement.where(_columns.asset == asset)
    if mode is not None:
        statement = statement.where(_columns.mode == mode)
    if size_min is not None:
        statement = statement.where(_columns.size >= size_min)
    if size_max is not None:
        statement = statement.where(_columns.size <= size_max)
    if status is not None:
        statement = statement.where(is_open if status is Status.OPEN else ~is_open)
    if after is not None:
        statement = statement.where(_key > after)
    rows = connection.execute(statement).mappings().all()
    views = tuple(
        PositionView.of(row, portfolio_exposure=row["portfolio_exposure"], now=now, stale_after=stale_after)
        for row in rows[:limit]
    )
    last = PositionKey.of(views[-1].asset, views[-1].mode) if len(rows) > limit else None
    return Page(positions=views, next=last)


def position(
    connection: Connection, key: PositionKey, *, now: datetime, stale_after: timedelta
) -> PositionView:
    """Return one position.

    Raises:
        NotFound: nothing was ever recorded of it.
    """
    page = positions(connection, now=now, stale_after=stale_after, asset=key.asset, mode=key.mode, limit=1)
    if not page.positions:
        raise NotFound(f"There is no {key.mode} position in {key.asset}.")
    return page.positions[0]
