"""The task that publishes the portfolio."""

from datetime import UTC, datetime, timedelta

from celery import shared_task

from positions.errors import Unavailable
from positions.handlers.publish_portfolio import publish_portfolio
from positions.storage.database import transaction
from positions.tasks import resources


@shared_task(name="positions.publish_portfolio", throws=(Unavailable,))
def publish() -> dict[str, bool]:
    """Publish `portfolio_updated` when a position changed; a tick that fails is made up for by the next."""
    own = resources.current()
    settings = own.settings
    with transaction(own.engine) as connection:
        published = publish_portfolio(
            connection,
            own.sums,
            now=datetime.now(UTC),
            interval=timedelta(seconds=float(settings.portfolio_update_interval)),
            stale_after=timedelta(seconds=settings.price_staleness_threshold),
            max_exposure=settings.portfolio_max_exposure_usdt,
        )
    return {"published": published}
