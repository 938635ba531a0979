"""Every figure that Prometheus is told, defined here and nowhere else; how a process keeps and serves them.

A figure is counted where it happens, in the process it happens in. A service of several processes (gunicorn,
a prefork worker) keeps them in files of one folder, and whoever is scraped adds up the files of all. What the
database and the broker know (`Gauge`) is asked by the web process that is scraped.

`docs/reference/metrics.md` is made from this module.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Literal

import prometheus_client
import structlog
from prometheus_client import CollectorRegistry, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from positions.settings import Settings

log = structlog.get_logger(__name__)

Process = Literal["web", "worker", "jobs", "beat", "relay"]
PORTS: dict[Process, int] = {"worker": 4801, "jobs": 4802, "beat": 4803, "relay": 4804}
"""Where each listens by default; the web process answers beside its API."""
WORKERS: tuple[Process, ...] = ("worker", "jobs")

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1200, 3600, 86_400)
_MESSAGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

# When a series began: two more of each would tell it, and nothing reads them.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


FAMILIES: list[Family] = []
"""All of them, in the order of this file."""


class Family:
    """One figure, and the series it has for each combination of its labels' values."""

    kind: ClassVar[str]

    def __init__(self, name: str, about: str, *, by: Sequence[Process], **labels: Sequence[str]) -> None:
        """Define it.

        Args:
            name: without the `positions_` before it, and the `_total` after a counter's.
            about: what it is, in a sentence.
            by: the processes that count or ask it.
            labels: the values that each may have; none where that is not for us to say.
        """
        self.name, self.about, self.by, self.labels = f"positions_{name}", about, tuple(by), labels
        FAMILIES.append(self)

    @property
    def exposed_as(self) -> str:
        """The name that queries use."""
        return self.name


class _Counted(Family):
    _type: ClassVar[Any]
    _options: ClassVar[dict[str, Any]] = {}

    def __init__(self, name: str, about: str, *, by: Sequence[Process], **labels: Sequence[str]) -> None:
        super().__init__(name, about, by=by, **labels)
        self._series: dict[tuple[str, ...], Any] = {}

    def _of(self, given: tuple[str, ...]) -> Any:
        series = self._series.get(given)
        if series is None:
            with _kept.lock:
                made = _kept.made(self, self._type, **self._options)
            series = self._series[given] = made.labels(*given) if self.labels else made
        return series

    def begin(self) -> None:
        """Show each series that may come at zero, so that the first thing counted is an increase."""
        if all(self.labels.values()):
            for given in itertools.product(*self.labels.values()):
                self._of(given)


class Counter(_Counted):
    """Something that is counted from the start of the process."""

    kind = "counter"
    _type = prometheus_client.Counter

    @property
    def exposed_as(self) -> str:
        return f"{self.name}_total"

    def inc(self, *given: str, by: float = 1) -> None:
        """Count ``by`` more of the labels' values ``given``."""
        self._of(given).inc(by)


class Histogram(_Counted):
    """How something is distributed; what was observed is counted up to each of its ``buckets``."""

    kind = "histogram"
    _type = prometheus_client.Histogram

    def __init__(
        self,
        name: str,
        about: str,
        *,
        by: Sequence[Process],
        buckets: Sequence[float],
        **labels: Sequence[str],
    ) -> None:
        super().__init__(name, about, by=by, **labels)
        self._options = {"buckets": buckets}  # type: ignore[misc]

    def observe(self, value: float, *given: str) -> None:
        """Observe ``value`` under the labels' values ``given``."""
        self._of(given).observe(value)


class Gauge(Family):
    """Something that is asked for at a scrape."""

    kind = "gauge"

    def of(self, value: float | Decimal | None) -> Iterator[Metric]:
        """Yield its one series; nothing where the value is unknown, as a missing series says so."""
        if value is not None:
            # Prometheus knows floats only: these are for graphs, the exact figures are the API's.
            yield GaugeMetricFamily(self.name, self.about, value=float(value))

    def by_label(self, found: Mapping[str, float | None]) -> Iterator[Metric]:
        """Yield a series for each value of its label that something is known of."""
        family = GaugeMetricFamily(self.name, self.about, labels=tuple(self.labels))
        for given, value in found.items():
            if value is not None:
                family.add_metric((given,), float(value))
        yield family


# --- the REST API
HTTP_REQUESTS = Histogram(
    "http_request_duration_seconds",
    "How long requests took; how many there were is its count.",
    by=("web",),
    buckets=_SECONDS,
    method=(),
    route=(),
    status=(),
)
PORTFOLIO_CACHE = Counter(
    "portfolio_cache",
    "Lookups of the portfolio's figures in the cache.",
    by=("web",),
    outcome=("hit", "miss", "unavailable"),
)
LIMITED = Counter(
    "http_limited_requests",
    "Requests refused with 429, by what had been used up: a key's limit, or an address's of wrong keys.",
    by=("web",),
    whose=("key", "address"),
)
VALIDATIONS = Counter(
    "validations",
    "Positions that were validated, by what was found.",
    by=("web", "jobs"),
    outcome=("valid", "invalid", "repaired"),
)

# --- events and the tasks they travel in
EVENTS = Counter(
    "events",
    "Events by what became of them; ignored and quarantined ones are messages.",
    by=("worker",),
    outcome=("applied", "duplicate", "stale", "ignored", "quarantined"),
)
EVENT_KINDS = Counter(
    "events_decoded",
    "Events that could be decoded, by kind.",
    by=("worker",),
    kind=("trade", "funding", "order_report", "exchange_report"),
)
REFOLDS = Counter("refolds", "Positions folded anew because something was late for them.", by=("worker",))
BREAKS = Counter("breaks", "Breaks with the exchange's reports that came or changed.", by=("worker",))
BATCH_MESSAGES = Histogram(
    "batch_messages", "Messages in a batch, which is one task.", by=("worker",), buckets=_MESSAGES
)
COMMITS = Histogram(
    "commit_duration_seconds",
    "How long the transactions of a batch took, from their begin to their commit, every try of them.",
    by=("worker",),
    buckets=_SECONDS,
)
INTAKE_LAG = Histogram(
    "intake_lag_seconds",
    "From the arrival of a batch's first message in the worker to its commit.",
    by=("worker",),
    buckets=_LONG_SECONDS,
)
EVENT_LAG = Histogram(
    "event_lag_seconds",
    "From when the newest event of a batch happened, as it says, to the batch's commit.",
    by=("worker",),
    buckets=_LONG_SECONDS,
)
BATCHES_FAILED = Counter(
    "batches_failed",
    "Batches that were not applied, by what was done with them: held and tried again as they are, given back"
    " to the queue, split so that each message travels alone, tried again alone, put into quarantine.",
    by=("worker",),
    outcome=("held", "given_back", "isolated", "alone", "parked"),
)
TASKS = Histogram(
    "task_duration_seconds",
    "How long tasks took, batches among them; one that was killed is not in it.",
    by=WORKERS,
    buckets=_LONG_SECONDS,
    task=(),
    state=(),
)
VERSION_CONFLICTS = Counter(
    "version_conflicts",
    "Transactions that lost the race for a position.",
    by=("web", *WORKERS),
    outcome=("retried", "gave_up"),
)
TRANSACTIONS_LOST = Counter(
    "transactions_lost",
    "Transactions that the database gave up, or was not there for.",
    by=("web", *WORKERS),
    outcome=("retried", "gave_up"),
)
PRICE_FETCHES = Counter(
    "price_fetches",
    "Positions whose price was due, by what the exchange said: it was taken, the exchange has no such symbol,"
    " what it said is no price, a jump was not confirmed, others kept changing the position. Of those it did"
    " not answer for, the runs.",
    by=("jobs",),
    outcome=("priced", "unlisted", "refused", "doubted", "busy", "failed"),
)

# --- what is published, and on schedule
RELAY_POLLS = Counter(
    "relay_polls",
    "Looks of the working relay into the outbox; one that waits for another makes none.",
    by=("relay",),
)
PUBLISHED = Counter(
    "published_messages",
    "Messages of the outbox by what the broker said.",
    by=("relay",),
    outcome=("confirmed", "refused"),
)
PUBLISH_LAG = Histogram(
    "publish_lag_seconds",
    "From the transaction of the oldest message of a window to the window's confirmation.",
    by=("relay",),
    buckets=_LONG_SECONDS,
)
RELAY_INTERRUPTIONS = Counter(
    "relay_interruptions", "Times that the relay lost its database or its broker.", by=("relay",)
)
SCHEDULED = Counter("scheduled_tasks", "Tasks that beat sent.", by=("beat",), task=())

# --- asked for at a scrape
DATABASE_UP = Gauge("database_up", "Whether the database answers.", by=("web",))
BROKER_UP = Gauge("broker_up", "Whether the broker answers.", by=("web",))
CACHE_UP = Gauge("cache_up", "Whether Redis answers and takes what is written.", by=("web",))
GROSS_EXPOSURE = Gauge("gross_exposure_usdt", "Sum of |size| x price.", by=("web",))
NET_EXPOSURE = Gauge("net_exposure_usdt", "Sum of size x price.", by=("web",))
STORED = Gauge("stored", "Positions, open and closed.", by=("web",))
OPEN = Gauge("open", "Positions with a leg that is not flat.", by=("web",))
OUTBOX = Gauge("outbox_messages", "Messages not published yet.", by=("web",))
OUTBOX_AGE = Gauge(
    "outbox_oldest_age_seconds", "Age of the oldest of them; 0 where there is none.", by=("web",)
)
LAST_EVENT_AGE = Gauge(
    "last_event_age_seconds", "Since an event was last recorded or moved a position.", by=("web",)
)
QUARANTINE = Gauge("quarantine_messages", "Messages in quarantine.", by=("web",))
SUSPECTED = Gauge("suspected_messages", "Messages that seem to end their worker.", by=("web",))
OPEN_BREAKS = Gauge("open_breaks", "Breaks that stand, by what caused them.", by=("web",), cause=())
QUEUE_MESSAGES = Gauge("queue_messages", "Messages that wait in a queue.", by=("web",), queue=())
QUEUE_CONSUMERS = Gauge("queue_consumers", "Consumers of a queue.", by=("web",), queue=())
QUEUE_OWN_CONSUMERS = Gauge("queue_own_consumers", "Those of them that are ours.", by=("web",), queue=())


class _Kept:
    """What this process counts, made on first use, which in a child is after the fork."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lock = threading.Lock()
        self.folder: str | None = None
        """Where its files are, and those of the service's other processes; None: it keeps them in itself."""
        self.name = ""
        """Of its files."""
        self._made: dict[str, Any] = {}

    def made(self, family: Family, type_: Any, **options: Any) -> Any:
        found = self._made.get(family.name)
        if found is None:
            found = self._made[family.name] = type_(
                family.name, family.about, tuple(family.labels), registry=self.registry, **options
            )
        return found


_kept = _Kept()


def keep_in(folder: str, process: str) -> None:
    """Keep this process's figures in files of ``folder``, under a name no other that runs now has.

    To be called before anything is counted, and again in each process that is forked since. Who is given the
    name of a process that ended counts on: files are named after places, not process ids, or they would be
    more with each process that is replaced.
    """
    _kept.name = process
    if _kept.folder != folder:
        _kept.folder = os.environ[_FOLDER] = folder
        values.ValueClass = values.MultiProcessValue(lambda: _kept.name)  # type: ignore[no-untyped-call]


def forked(process: str) -> None:
    """Keep the figures of a process that was just forked apart from its parent's, in the same folder."""
    if _kept.folder:
        keep_in(_kept.folder, process)


def folder_for(port: int) -> Path:
    """Return a folder for the service that listens at ``port`` of this machine.

    By address, so that what a kill -9 left is found and used again.
    """
    memory = Path("/dev/shm")  # noqa: S108 - the name below is ours
    base = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return base / f"positions-metrics-{os.getuid()}-{port}"


def emptied(path: Path) -> str:
    """Make the folder, or empty it: what was counted before a restart is Prometheus's.

    Where another user has made it, another is made and returned: his files are not ours to write through.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.lstat().st_uid != os.getuid():
        return tempfile.mkdtemp(prefix=path.name)
    for file in path.glob("*.db"):
        file.unlink()
    return str(path)


class Counted(Collector):
    """What all processes of this service counted, read anew at each scrape: processes come and go."""

    def collect(self) -> Iterator[Metric]:
        """Yield it."""
        if _kept.folder is None:
            return iter(_kept.registry.collect())
        files: Collector = MultiProcessCollector(None, _kept.folder)  # type: ignore[no-untyped-call]
        return iter(files.collect())


def begin(process: Process) -> None:
    """Show everything that ``process`` counts at zero."""
    for family in FAMILIES:
        if isinstance(family, _Counted) and process in family.by:
            family.begin()


def serve(process: Process, settings: Settings, *, forks: bool = False) -> None:
    """Answer `/metrics` from a thread until the process ends.

    A port that is taken is logged, and the process works on without: figures are not worth its life.

    Args:
        process: what this is.
        settings: where to listen.
        forks: children of this process count too, each after :func:`forked`.
    """
    host, port = settings.metrics_host, settings.metrics_port
    if port is None:
        port = PORTS[process]
    if port:
        registry = CollectorRegistry()
        registry.register(Counted())
        try:
            prometheus_client.start_http_server(port, host, registry)
            if forks:
                # Whoever has the port has the folder.
                keep_in(emptied(folder_for(port)), "main")
        except OSError as error:
            log.warning("metrics_not_served", host=host, port=port, reason=error.strerror or str(error))
        else:
            log.info("metrics_served", host=host, port=port)
    begin(process)


def leave_nothing() -> None:
    """Remove the files of this service's processes, which are to have ended."""
    if _kept.folder:
        shutil.rmtree(_kept.folder, ignore_errors=True)
