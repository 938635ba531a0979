"""Time travel: what positions and portfolio were at a moment, as their readers see it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.figures import position_exposure, total
from positions.domain.numbers import exact
from positions.domain.position import Policy
from positions.errors import NotFound
from positions.messages.outbound import PortfolioSums, PortfolioView, PositionView
from positions.storage import positions
from positions.storage.past import Past, gross_exposure, positions_at
from positions.storage.portfolio import SUMMED

_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def position_as_of(
    connection: Connection,
    key: PositionKey,
    at: datetime,
    *,
    policy: Policy,
    now: datetime,
    stale_after: timedelta,
) -> PositionView:
    """Return what the position was at the moment ``at``; its version is that of what is known now.

    Args:
        connection: only read from, and of one moment (REPEATABLE READ).
        key: which position.
        at: of events' own times, itself included; one later than ``now`` is now.
        policy: who wins when sources disagree.
        now: the present.
        stale_after: age from which a price was stale.

    Raises:
        NotFound: there was no such position then.
    """
    at = min(at, now)
    keys = positions.keys(connection)
    past = positions_at(connection, keys, at, policy) if key in keys else {}
    if key not in past:
        raise NotFound(f"There was no {key.mode} position in {key.asset}.")
    return _view(key, past[key], gross_exposure(past.values()), at, stale_after)


def _view(
    key: PositionKey, own: Past, portfolio_exposure: Decimal, at: datetime, stale_after: timedelta
) -> PositionView:
    return PositionView.of_figures(
        own.figures,
        id=own.stored.id,
        key=key,
        version=own.stored.version,
        last_updated=own.last_updated,
        last_snapshot_at=own.last_snapshot_at,
        created_at=own.stored.created_at,
        portfolio_exposure=portfolio_exposure,
        now=at,
        stale_after=stale_after,
    )


def portfolio_as_of(
    connection: Connection,
    at: datetime,
    *,
    policy: Policy,
    now: datetime,
    stale_after: timedelta,
    max_exposure: Decimal | None,
    asset: str | None = None,
) -> tuple[PortfolioView, tuple[PositionView, ...]]:
    """Return what positions, all or those in one asset, added up to at the moment ``at``, and themselves.

    Args as of :func:`position_as_of` and :func:`positions.queries.portfolio.portfolio`; the positions come in
    order of their keys.
    """
    at = min(at, now)
    past = positions_at(connection, positions.keys(connection), at, policy)
    by_asset: defaultdict[str, list[Past]] = defaultdict(list)
    for key, each in past.items():
        by_asset[key.asset].append(each)
    with exact():
        sums = PortfolioSums().with_rows(_sums(name, own) for name, own in by_asset.items())
    gross = gross_exposure(past.values())
    views = tuple(
        _view(key, past[key], gross, at, stale_after) for key in sorted(past) if asset in {None, key.asset}
    )
    view = PortfolioView.of(sums, max_exposure=max_exposure, now=at, stale_after=stale_after, asset=asset)
    return view, views


def _sums(asset: str, own: Sequence[Past]) -> Mapping[str, object]:
    """Return what :class:`positions.storage.portfolio.Sums` does of an asset's positions at present."""
    each_figures = [each.figures for each in own]
    open_ones = [each for each in each_figures if each.long_size or each.short_size]
    priced = [each for each in own if each.exposure is not None]
    return {
        "asset": asset,
        "ids": 0,
        "exposure": total(each.exposure for each in priced) if priced else None,
        "net_exposure": total(
            position_exposure(each.figures.size, each.figures.current_price) for each in priced
        )
        if priced
        else None,
        **{name: total(getattr(each, name) for each in each_figures) for name in SUMMED},
        "open_count": len(open_ones),
        "long_count": sum(each.size > 0 for each in each_figures),
        "short_count": sum(each.size < 0 for each in each_figures),
        "unpriced": any(each.current_price is None for each in open_ones),
        "oldest_price_at": min(
            (each.current_price_at or _LONG_AGO for each in open_ones if each.current_price is not None),
            default=None,
        ),
    }
