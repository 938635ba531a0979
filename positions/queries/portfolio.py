"""The portfolio: what all positions add up to."""

from datetime import datetime, timedelta
from decimal import Decimal

from sqlalchemy import Connection

from positions.messages.outbound import PortfolioSums, PortfolioView
from positions.storage.portfolio import Sums


def portfolio(
    connection: Connection,
    sums: Sums[PortfolioSums],
    *,
    now: datetime,
    stale_after: timedelta,
    max_exposure: Decimal | None,
    asset: str | None = None,
) -> PortfolioView:
    """Return the figures of the portfolio, or of its positions in one asset; zeros where there is none."""
    return PortfolioView.of(
        sums.read(connection), max_exposure=max_exposure, now=now, stale_after=stale_after, asset=asset
    )
