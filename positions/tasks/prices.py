"""The job that keeps prices fresh."""

import time
from datetime import UTC, datetime, timedelta

import structlog

from positions import metrics
from positions.errors import Unavailable, VenueUnavailable
from positions.handlers.refresh_prices import refresh_prices
from positions.handlers.write_changes import Rules
from positions.tasks import resources
from positions.tasks.jobs import job

log = structlog.get_logger(__name__)


# The exchange may take its time for two questions; what is not done then is done a minute later.
@job(
    name="positions.refresh_prices",
    soft_time_limit=120,
    time_limit=150,
    throws=(Unavailable, VenueUnavailable),
)
def refresh() -> dict[str, int]:
    """Price what would be stale before the next tick: a price is seen to be stale only while this fails.

    Nothing while the simulator invents the market: a real price would be another market's.
    """
    started = time.perf_counter()
    own = resources.current()
    if own.settings.simulator == "on":
        return {}
    rules = Rules.of(own.settings)
    ahead = timedelta(seconds=own.settings.price_refresh_interval)
    try:
        counts = refresh_prices(
            own.engine,
            own.venue,
            rules=rules,
            retry=own.retry,
            due_before=datetime.now(UTC) + ahead - rules.price_stale_after,
        )
    except VenueUnavailable as error:
        metrics.PRICE_FETCHES.inc("failed")
        log.warning("prices_not_refreshed", reason=str(error))
        raise
    found = {name: count for name, count in sorted(counts.items()) if count}
    for outcome in found.keys() - {"due"}:
        metrics.PRICE_FETCHES.inc(outcome, by=found[outcome])
    if found:
        log.info("prices_refreshed", duration_ms=round((time.perf_counter() - started) * 1000, 1), **found)
    return found
