"""What the application opens once and every request uses."""

from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import cast

from flask import current_app
from sqlalchemy import Engine

from positions.settings import Settings
from positions.storage.database import connect
from positions.web.checks import Checks

NAME = "positions"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """Nothing is connected before its first use, so that it may be made before a fork."""

    service_name: str
    stale_after: timedelta
    max_exposure: Decimal | None
    engine: Engine
    reads: Engine
    """The same pool; what one request reads is of one moment, and it writes nothing."""
    checks: Checks


def made_from(settings: Settings) -> Resources:
    """Return the resources that the settings describe."""
    engine = connect(
        settings.database, pool_size=settings.web_threads, application=f"{settings.service_name}-web"
    )
    return Resources(
        service_name=settings.service_name,
        stale_after=timedelta(seconds=settings.price_staleness_threshold),
        max_exposure=settings.portfolio_max_exposure_usdt,
        engine=engine,
        reads=engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True),
        checks=Checks(broker=settings.broker, queues=settings.queues, cache=settings.redis),
    )


def resources() -> Resources:
    """Return the resources of the present application."""
    return cast(Resources, current_app.extensions[NAME])
