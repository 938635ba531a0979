"""gunicorn's configuration: ``gunicorn -c python:positions.web.gunicorn_conf 'positions.web:create_app()'``.

Each module-level name that gunicorn knows is one of its settings.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import structlog
from gunicorn import glogging
from gunicorn.http import wsgi

from positions import log_config, metrics
from positions.settings import PREFIX, Settings, SettingsError, load
from positions.storage.database import bound_waits
from positions.web.auth import keys_of

_KEYS = f"{PREFIX}API_KEYS"
_keys = os.environ.get(_KEYS, "")


def _read() -> Settings:
    """Read the settings, and hand the keys of a file to the workers that are forked from now on.

    Workers that read the file themselves could not boot once it is broken, and a worker that does not boot
    ends the service.
    """
    settings = load({**os.environ, _KEYS: _keys})
    keys_of(settings)
    if _keys:
        os.environ[_KEYS] = json.dumps([key.model_dump(mode="json") for key in settings.keys])
    return settings


try:
    # Said once, here, and not by each worker that fails to boot.
    _settings = _read()
except SettingsError as error:
    sys.exit(f"positions: {error}")

log_config.configure(_settings)
log_config.warn_of_unknown_settings()

bind = f"{_settings.host}:{_settings.port}"
# What a worker has no room for waits in the kernel. Beyond this a client is not answered at all and tries
# again after a second, which under such load is better than a place at the end of a longer queue.
backlog = 512

# Processes for the cores, threads for the waiting; what is kept is answered without one. Each thread may hold
# a database connection, so that workers x threads is what PostgreSQL's max_connections has to bear.
workers = _settings.web_workers
worker_class = "positions.web.worker.Worker"  # gthread, and what it lacks
threads = _settings.web_threads
# Open connections of a worker, nearly all of them idle, below the 1024 files that a process may often have
# open.
worker_connections = 900

# Each worker makes the application for itself, so that no connection or thread is ever inherited over a fork.
# The modules are imported before the fork anyway, by this configuration: new code needs a restart.
preload_app = False

# A worker whose main loop is stuck for this long is replaced. It does not bound a request: that is for
# the statement and connect timeouts, and for the worker's own limit.
timeout = 30
# For requests in flight when a worker is to stop; below the ten seconds that Docker leaves before it kills.
graceful_timeout = 8
# Longer than pollers and Prometheus pause between two requests, so that they need no new connection for
# each, nor send one while we close. It costs no thread. A proxy's own idle time belongs below it.
keepalive = 75

# No client of ours sends as much; a query that is merely too long is refused by the application.
limit_request_line = 8190
limit_request_fields = 50
limit_request_field_size = 8190

# Whatever may leak somewhere below us stays small; jitter, so that not all workers leave at once.
max_requests = 100_000
max_requests_jitter = 10_000

# Nobody before us writes variables of WSGI; who the client is, behind proxies, the application decides.
forwarder_headers = ""
forwarded_allow_ips = ""

# The heartbeat is a file: on a disk that stalls, a healthy worker would be taken for stuck.
worker_tmp_dir = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - gunicorn makes its own file


class Logger(glogging.Logger):  # type: ignore[misc] # gunicorn has no types
    """gunicorn's, without the line of each request that it would put together for nobody."""

    def access(self, *_: Any) -> None:
        """Leave it to the application, whose line has the trace id."""


logger_class = Logger
# Its own lines in our format.
logconfig_dict = log_config.dict_config(_settings)
loglevel = _settings.log_level.lower()

# What serves us and in which version is nobody's business. There is no setting for it.
wsgi.SERVER = _settings.service_name
# A socket that commands this process, in the home folder of whoever runs it: nothing of ours uses it.
control_socket_disable = True

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


def on_starting(server: Any) -> None:
    """Make the folder of the metrics."""
    if server.cfg.is_ssl:
        # The main loop reads what clients send before TLS would be unwrapped.
        raise SystemExit("TLS is for the proxy in front: leave out --certfile and --keyfile")
    given = os.environ.get(_FOLDER)
    folder = Path(given) if given else metrics.folder_for(_settings.port)
    os.environ[_FOLDER] = metrics.emptied(folder)
    server.made_for_metrics = None if given else os.environ[_FOLDER]


def on_reload(server: Any) -> None:
    """Read the keys' file anew; one that is broken leaves the keys as they are."""
    del server
    try:
        _read()
    except SettingsError as error:
        structlog.get_logger(__name__).error("api_keys_unreadable", reason=str(error))


def on_exit(server: Any) -> None:
    """Leave nothing behind."""
    if folder := getattr(server, "made_for_metrics", None):
        shutil.rmtree(folder, ignore_errors=True)


def pre_fork(server: Any, worker: Any) -> None:
    """Give the worker the lowest number that no other has.

    Its metrics are kept under this number, not under its process id: a worker that is replaced leaves its
    files to the next, or they would grow more for as long as the service runs.
    """
    taken = {each.number for each in server.WORKERS.values()}
    worker.number = next(number for number in range(len(taken) + 1) if number not in taken)


def post_fork(server: Any, worker: Any) -> None:
    """Set up what is of one process."""
    del server
    metrics.keep_in(os.environ[_FOLDER], str(worker.number))
    bound_waits()
