"""`/metrics`: what Prometheus scrapes, and a short JSON of it for who asks for that. No key.

What the web processes counted (`positions.metrics`), and what database, broker and cache know: that is asked
at the scrape, and kept for `KEPT_S`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import structlog
from flask import Response, current_app, jsonify, request
from flask.blueprints import BlueprintSetupState
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict

from positions import metrics
from positions.domain.times import utc_text
from positions.errors import Unavailable
from positions.messages.outbound import Time
from positions.queries.health import Activity, activity
from positions.queries.portfolio import portfolio
from positions.storage import validations
from positions.storage.database import answered_within, transaction
from positions.storage.validations import OUTCOMES
from positions.web.auth import public
from positions.web.checks import Queue, Recent
from positions.web.openapi import api
from positions.web.resources import resources

log = structlog.get_logger(__name__)
blueprint = api("metrics", prefix="")

KEPT_S = 5.0
DATABASE_S = 2.0
"""How long a scrape waits for the database."""
_NAME = "metrics"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def request_served(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count a request; ``route`` is the pattern it matched, None where it matched none."""
    # What a client makes up must not become a series each.
    metrics.HTTP_REQUESTS.observe(
        seconds, method if method in _METHODS else "other", route or "unknown", str(status)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauges:
    """What is asked for at a scrape; None is unknown."""

    activity: Activity | None
    gross_exposure: Decimal | None
    net_exposure: Decimal | None
    open_breaks: Mapping[str, int] | None
    """By cause."""
    scheduled: Mapping[str, int]
    """How many positions were validated on the schedule, by what was found; since ever."""
    queues: tuple[Queue, ...] | None
    cache: bool
    asked_at: datetime


@blueprint.record_once
def _init(state: BlueprintSetupState) -> None:
    metrics.begin("web")
    state.app.extensions[_NAME] = Recent(_ask, kept_s=KEPT_S)


class Metrics(BaseModel):
    """The short form, as the older service tells it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    database_connected: bool
    queue_connected: bool
    portfolio_cache_hit_rate: float | None
    """0 to 1; null before the first lookup."""
    validation_statistics: dict[str, int]
    """How many positions were validated, on the schedule and by request, by what was found; how many breaks
    stand."""
    timestamp: Time


@blueprint.get("/metrics", responses={200: Metrics}, openapi_extensions={"x-text": True})
@public
def scrape() -> Response:
    """Return the figures as Prometheus reads them, or, to who prefers JSON, a short form."""
    gauges: Gauges = current_app.extensions[_NAME]()
    registry = CollectorRegistry()
    registry.register(metrics.Counted())
    if request.accept_mimetypes.best_match(("text/plain", "application/json")) == "application/json":
        response = jsonify(_short(registry, gauges))
    else:
        registry.register(_Asked(gauges))
        response = Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
    response.vary.add("Accept")
    return response


def _ask() -> Gauges:
    stored, gross, net, breaks = None, None, None, None
    scheduled: Mapping[str, int] = {}
    try:
        with answered_within(DATABASE_S), transaction(resources().reads) as connection:
            own, stored = resources(), activity(connection)
            view = portfolio(
                connection, own.sums, now=datetime.now(UTC), stale_after=own.stale_after, max_exposure=None
            )
            gross, net = view.total_exposure_usdt, view.net_exposure_usdt
            breaks, scheduled = validations.open_breaks(connection), validations.outcomes(connection)
    except Unavailable as error:
        log.warning("database_unusable", reason=str(error))
    return Gauges(
        activity=stored,
        gross_exposure=gross,
        net_exposure=net,
        open_breaks=breaks,
        scheduled=scheduled,
        queues=resources().checks.queues(),
        cache=resources().checks.cache(),
        asked_at=datetime.now(UTC),
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Asked(Collector):
    gauges: Gauges

    def collect(self) -> Iterator[Metric]:
        """Yield what is known; a series that is missing says that it is not."""
        gauges, stored = self.gauges, self.gauges.activity
        yield from metrics.DATABASE_UP.of(stored is not None)
        yield from metrics.BROKER_UP.of(gauges.queues is not None)
        yield from metrics.CACHE_UP.of(gauges.cache)
        yield from metrics.GROSS_EXPOSURE.of(gauges.gross_exposure)
        yield from metrics.NET_EXPOSURE.of(gauges.net_exposure)
        if stored is not None:
            yield from metrics.STORED.of(stored.positions_count)
            yield from metrics.OPEN.of(stored.open_count)
            yield from metrics.OUTBOX.of(stored.outbox)
            yield from metrics.OUTBOX_AGE.of(seconds_since(stored.outbox_oldest_at, gauges.asked_at) or 0)
            yield from metrics.LAST_EVENT_AGE.of(seconds_since(stored.last_event_at, gauges.asked_at))
            yield from metrics.QUARANTINE.of(stored.quarantine)
            yield from metrics.SUSPECTED.of(stored.suspected)
        if gauges.open_breaks is not None:
            yield from metrics.OPEN_BREAKS.by_label(gauges.open_breaks)
        if gauges.queues is not None:
            yield from metrics.QUEUE_MESSAGES.by_label({each.name: each.messages for each in gauges.queues})
            yield from metrics.QUEUE_CONSUMERS.by_label({each.name: each.consumers for each in gauges.queues})
            yield from metrics.QUEUE_OWN_CONSUMERS.by_label({each.name: each.ours for each in gauges.queues})


def seconds_since(then: datetime | None, now: datetime) -> float | None:
    """Return the seconds from ``then`` to ``now``; 0 at least, as clocks differ."""
    return None if then is None else max((now - then).total_seconds(), 0.0)


def _short(registry: CollectorRegistry, gauges: Gauges) -> dict[str, object]:
    """Return what the older service tells here."""
    counts: dict[str, dict[str, int]] = {metrics.PORTFOLIO_CACHE.name: {}, metrics.VALIDATIONS.name: {}}
    for family in registry.collect():
        for sample in family.samples:
            if family.name in counts and sample.name.endswith("_total"):
                counts[family.name][sample.labels["outcome"]] = int(sample.value)
    lookups, asked = counts.values()
    found: dict[str, int] = {each: asked.get(each, 0) + gauges.scheduled.get(each, 0) for each in OUTCOMES}
    statistics = {"total": sum(found.values()), **found}
    if gauges.open_breaks is not None:
        statistics["open_breaks"] = sum(gauges.open_breaks.values())
    return {
        "database_connected": gauges.activity is not None,
        "queue_connected": gauges.queues is not None,
        "portfolio_cache_hit_rate": lookups["hit"] / sum(lookups.values()) if any(lookups.values()) else None,
        "validation_statistics": statistics,
        "timestamp": utc_text(datetime.now(UTC)),
    }
