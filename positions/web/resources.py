"""What the application opens once and every request uses."""

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from hashlib import blake2b
from typing import cast

from flask import current_app
from sqlalchemy import Engine, make_url

from positions.handlers.write_changes import Rules
from positions.settings import Settings
from positions.storage.database import Retry, connect
from positions.storage.metrics_cache import MetricsCache
from positions.storage.portfolio import Versions
from positions.web.checks import Checks
from positions.web.memory import LastAnswers

NAME = "positions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Nothing is connected before its first use, so that it may be made before a fork."""

    service_name: str
    settings: Settings
    rules: Rules
    retry: Retry
    """Of what writes."""
    stale_after: timedelta
    max_exposure: Decimal | None
    engine: Engine
    reads: Engine
    """The same pool; what one request reads is of one moment, and it writes nothing."""
    version: Versions
    """Called, it returns the portfolio's version."""
    answers: LastAnswers
    metrics: MetricsCache
    checks: Checks


def made_from(settings: Settings) -> Resources:
    """Return the resources that the settings describe."""
    engine = connect(
        settings.database, pool_size=settings.web_threads, application=f"{settings.service_name}-web"
    )
    return Resources(
        service_name=settings.service_name,
        settings=settings,
        rules=Rules.of(settings),
        retry=Retry(retries=settings.optimistic_lock_retries, base_ms=settings.optimistic_lock_backoff_base),
        stale_after=timedelta(seconds=settings.price_staleness_threshold),
        max_exposure=settings.portfolio_max_exposure_usdt,
        engine=engine,
        reads=engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
        version=Versions(engine),
        answers=LastAnswers(),
        metrics=MetricsCache(
            settings.redis,
            prefix=f"{settings.service_name}:{_digest(settings.database)}",
            ttl_s=settings.metrics_cache_ttl,
            connections=settings.web_threads,
        ),
        checks=Checks(broker=settings.broker, queues=settings.queues, cache=settings.redis),
    )


def _digest(url: str) -> str:
    """Return what tells databases apart, and nothing of the password."""
    where = make_url(url).set(password=None).render_as_string()
    return blake2b(where.encode(), digest_size=4).hexdigest()


def resources() -> Resources:
    """Return the resources of the present application."""
    return cast(Resources, current_app.extensions[NAME])
