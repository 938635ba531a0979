"""What the application opens once and every request uses."""

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import cast

from flask import current_app
from sqlalchemy import Engine, make_url

from positions import __version__
from positions.handlers.write_changes import Rules
from positions.messages.outbound import PortfolioSums
from positions.settings import Settings
from positions.storage.database import Retry, connect
from positions.storage.metrics_cache import MetricsCache
from positions.storage.portfolio import Sums, Versions
from positions.venue.bybit import Bybit
from positions.web.checks import Checks
from positions.web.memory import LastAnswers

NAME = "positions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Nothing is connected before its first use, so that it may be made before a fork."""

    service_name: str
    rules: Rules
    message_max_bytes: int
    """Of a message that is replayed."""
    retry: Retry
    """Of what writes."""
    stale_after: timedelta
    max_exposure: Decimal | None
    engine: Engine
    reads: Engine
    """The same pool; what one request reads is of one moment, and it writes nothing."""
    version: Versions
    """Called, it returns the portfolio's version."""
    sums: Sums[PortfolioSums]
    """What the portfolio is made of, as this process read it last."""
    answers: LastAnswers
    metrics: MetricsCache
    checks: Checks
    venue: Bybit | None
    """None where there is no key of it."""


def made_from(settings: Settings) -> Resources:
    """Return the resources that the settings describe."""
    engine = connect(
        settings.database,
        # Each thread's, and one for the keys and for who connects anew to read the version.
        pool_size=settings.web_threads + 2,
        # Only a change of the schema keeps a reader out; a thread that waits for it serves nobody else.
        lock_timeout="1s",
        application=f"{settings.service_name}-web",
    )
    # Who validates waits for one try: the next validation may find more.
    venue = Bybit.of(settings, retries=0)
    return Resources(
        service_name=settings.service_name,
        rules=Rules.of(settings),
        message_max_bytes=settings.message_max_bytes,
        retry=Retry(retries=settings.optimistic_lock_retries, base_ms=settings.optimistic_lock_backoff_base),
        stale_after=timedelta(seconds=settings.price_staleness_threshold),
        max_exposure=settings.portfolio_max_exposure_usdt,
        engine=engine,
        reads=engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
        version=Versions(engine),
        sums=Sums(PortfolioSums()),
        answers=LastAnswers(),
        metrics=MetricsCache(
            settings.redis,
            prefix=f"{settings.service_name}:{_digest(settings)}",
            ttl_s=settings.metrics_cache_ttl,
            connections=settings.web_threads,
        ),
        checks=Checks(broker=settings.broker, queues=settings.queues, cache=settings.redis),
        venue=venue if venue.signs else None,
    )


def _digest(settings: Settings) -> str:
    """Return what tells apart whose figures may differ: by database, settings or release."""
    told = (
        make_url(settings.database).set(password=None).render_as_string(),
        settings.portfolio_max_exposure_usdt,
        settings.price_staleness_threshold,
        __version__,
    )
    return blake2b(repr(told).encode(), digest_size=8).hexdigest()


def resources() -> Resources:
    """Return the resources of the present application."""
    return cast(Resources, current_app.extensions[NAME])
