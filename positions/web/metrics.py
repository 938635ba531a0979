"""`/metrics`: what Prometheus scrapes, and a short JSON of it for who asks for that. No key.

Requests, lookups and validations are counted where they happen, in each process; under gunicorn a process
keeps its figures in a file (:func:`keep_in`), and whichever is scraped adds up the files of all. What the
database and the broker know is asked at the scrape, and kept for `KEPT_S`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache

import structlog
from flask import Response, current_app, jsonify, request
from flask.blueprints import BlueprintSetupState
from prometheus_client import CollectorRegistry, Counter, Histogram, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict

from positions.errors import Unavailable
from positions.messages.outbound import Time, utc_text
from positions.queries.health import Activity, activity
from positions.queries.portfolio import portfolio
from positions.storage.database import answered_within, transaction
from positions.web.auth import public
from positions.web.checks import Queue, Recent
from positions.web.openapi import api
from positions.web.resources import resources

log = structlog.get_logger(__name__)
blueprint = api("metrics", prefix="")

KEPT_S = 5.0
DATABASE_S = 2.0
"""How long a scrape waits for the database."""
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_NAME = "metrics"
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def keep_in(folder: str, process: str) -> None:
    """Keep this process's figures in files of ``folder``, under a name no other that runs now has.

    To be called before anything is counted. Who is given the name of a process that ended counts on.
    """
    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(lambda: process)  # type: ignore[no-untyped-call]


class _Counted:
    """What is counted in this process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "positions_http_request_duration_seconds",
            "How long requests took; how many there were is its count.",
            ("method", "route", "status"),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self.lookups = Counter(
            "positions_portfolio_cache",
            "Lookups of the portfolio's figures in the cache.",
            ("outcome",),
            registry=self.registry,
        )
        self.validations = Counter(
            "positions_validations",
            "Positions that were validated.",
            ("outcome",),
            registry=self.registry,
        )


@cache
def _counted() -> _Counted:
    """Return this process's; made on first use, which in a worker is after the fork."""
    return _Counted()


def request_served(method: str, route: str | None, status: int, seconds: float) -> None:
    """Count a request; ``route`` is the pattern it matched, None where it matched none."""
    # What a client makes up must not become a series each.
    _requests(method if method in _METHODS else "other", route or "unknown", status).observe(seconds)


@cache
def _requests(method: str, route: str, status: int) -> Histogram:
    return _counted().requests.labels(method, route, status)


def cache_outcome(outcome: str) -> None:
    """Count a lookup of the portfolio's figures: `hit`, `miss` or `unavailable`."""
    _lookups(outcome).inc()


@cache
def _lookups(outcome: str) -> Counter:
    return _counted().lookups.labels(outcome)


def validated(outcome: str) -> None:
    """Count a validation by what it found."""
    _counted().validations.labels(outcome).inc()


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauges:
    """What is asked for at a scrape; None is unknown."""

    activity: Activity | None
    gross_exposure: Decimal | None
    net_exposure: Decimal | None
    queues: tuple[Queue, ...] | None
    asked_at: datetime


@blueprint.record_once
def _init(state: BlueprintSetupState) -> None:
    _counted()
    state.app.extensions[_NAME] = Recent(_ask, kept_s=KEPT_S)


class Metrics(BaseModel):
    """The short form, as the older service tells it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    database_connected: bool
    queue_connected: bool
    portfolio_cache_hit_rate: float | None
    """0 to 1; null before the first lookup."""
    validation_statistics: dict[str, int]
    """How many positions were validated, by what was found."""
    timestamp: Time


@blueprint.get("/metrics", responses={200: Metrics}, openapi_extensions={"x-text": True})
@public
def metrics() -> Response:
    """Return the figures as Prometheus reads them, or, to who prefers JSON, a short form."""
    gauges: Gauges = current_app.extensions[_NAME]()
    registry = _of_all_processes()
    if request.accept_mimetypes.best_match(("text/plain", "application/json")) == "application/json":
        response = jsonify(_short(registry, gauges))
    else:
        registry.register(_Families(gauges))
        response = Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
    response.vary.add("Accept")
    return response


def _ask() -> Gauges:
    stored, gross, net = None, None, None
    try:
        with answered_within(DATABASE_S), transaction(resources().reads) as connection:
            stored = activity(connection)
            view = portfolio(
                connection, now=datetime.now(UTC), stale_after=resources().stale_after, max_exposure=None
            )
            gross, net = view.total_exposure_usdt, view.net_exposure_usdt
    except Unavailable as error:
        log.warning("database_unusable", reason=str(error))
    return Gauges(
        activity=stored,
        gross_exposure=gross,
        net_exposure=net,
        queues=resources().checks.queues(),
        asked_at=datetime.now(UTC),
    )


def _of_all_processes() -> CollectorRegistry:
    """Return a registry that holds what all processes counted."""
    registry = CollectorRegistry()
    if folder := os.environ.get(_FOLDER):
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    else:
        registry.register(_counted().registry)
    return registry


@dataclass(frozen=True, slots=True)
class _Families(Collector):
    gauges: Gauges

    def collect(self) -> Iterator[Metric]:
        """Yield what is known; a series that is missing says that it is not."""
        gauges, stored = self.gauges, self.gauges.activity

        def gauge(name: str, help_: str, value: Decimal | float | None) -> Iterator[Metric]:
            if value is not None:
                # Prometheus knows floats only: these are for graphs, the exact figures are the API's.
                yield GaugeMetricFamily(f"positions_{name}", help_, value=float(value))

        yield from gauge("database_up", "Whether the database answers.", stored is not None)
        yield from gauge("broker_up", "Whether the broker answers.", gauges.queues is not None)
        yield from gauge("gross_exposure_usdt", "Sum of |size| x price.", gauges.gross_exposure)
        yield from gauge("net_exposure_usdt", "Sum of size x price.", gauges.net_exposure)
        if stored is not None:
            yield from gauge("stored", "Positions, open and closed.", stored.positions_count)
            yield from gauge("open", "Positions with a leg that is not flat.", stored.open_count)
            yield from gauge("outbox_messages", "Messages not published yet.", stored.outbox)
            yield from gauge(
                "outbox_oldest_age_seconds",
                "Age of the oldest of them; 0 where there is none.",
                seconds_since(stored.outbox_oldest_at, gauges.asked_at) or 0,
            )
            yield from gauge(
                "last_event_age_seconds",
                "Since an event was last recorded or moved a position.",
                seconds_since(stored.last_event_at, gauges.asked_at),
            )
            yield from gauge("quarantine_messages", "Messages in quarantine.", stored.quarantine)
        if gauges.queues is not None:
            for name, help_ in (("messages", "Messages that wait."), ("consumers", "Consumers.")):
                family = GaugeMetricFamily(f"positions_queue_{name}", help_, labels=("queue",))
                for queue in gauges.queues:
                    if (value := getattr(queue, name)) is not None:
                        family.add_metric((queue.name,), value)
                yield family


def seconds_since(then: datetime | None, now: datetime) -> float | None:
    """Return the seconds from ``then`` to ``now``; 0 at least, as clocks differ."""
    return None if then is None else max((now - then).total_seconds(), 0.0)


def _short(registry: CollectorRegistry, gauges: Gauges) -> dict[str, object]:
    """Return what the older service tells here."""
    counts: dict[str, dict[str, int]] = {"positions_portfolio_cache": {}, "positions_validations": {}}
    for family in registry.collect():
        for sample in family.samples:
            if family.name in counts and sample.name.endswith("_total"):
                counts[family.name][sample.labels["outcome"]] = int(sample.value)
    lookups, validations = counts.values()
    return {
        "database_connected": gauges.activity is not None,
        "queue_connected": gauges.queues is not None,
        "portfolio_cache_hit_rate": lookups.get("hit", 0) / sum(lookups.values()) if lookups else None,
        "validation_statistics": {"total": sum(validations.values()), **validations},
        "timestamp": utc_text(datetime.now(UTC)),
    }
