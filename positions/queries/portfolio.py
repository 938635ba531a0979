"""The portfolio: what all positions add up to."""

from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection

from positions.messages.outbound import PortfolioView
from positions.storage.portfolio import sums_by_asset


def portfolio(
    connection: Connection,
    *,
    now: datetime,
    stale_after: timedelta,
    max_exposure: Decimal | None,
    asset: str | None = None,
) -> PortfolioView:
    """Return the figures of the portfolio, or of its positions in one asset; zeros where there is none."""
    sums = sums_by_asset(connection, stale_before=now - stale_after)
    return PortfolioView.of(sums, max_exposure=max_exposure, now=now, asset=asset)
