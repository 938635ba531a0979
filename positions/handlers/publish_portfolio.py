"""Publish the portfolio's figures, when they have changed since they were last published."""

from datetime import datetime, timedelta
from decimal import Decimal
from uuid import uuid4

from sqlalchemy import Connection

from positions.messages.outbound import PortfolioSums, PortfolioView
from positions.messages.published import PORTFOLIO_UPDATED, portfolio_updated
from positions.storage import outbox, portfolio


def publish_portfolio(
    connection: Connection,
    sums: portfolio.Sums[PortfolioSums],
    *,
    now: datetime,
    interval: timedelta,
    stale_after: timedelta,
    max_exposure: Decimal | None,
) -> bool:
    """Write one `portfolio_updated` to the outbox and return True, unless there is nothing new to say.

    However many beats tick, one is published in an ``interval`` at most: the row that says when it was last
    done is taken first.
    """
    if not portfolio.claim_publication(connection, now=now, interval=interval):
        return False
    view = PortfolioView.of(
        sums.read(connection), max_exposure=max_exposure, now=now, stale_after=stale_after
    )
    trace_id = uuid4().hex
    body = portfolio_updated(view, trace_id=trace_id, now=now)
    outbox.add(connection, [outbox.Message(PORTFOLIO_UPDATED, trace_id, body)])
    return True
