"""Connections to PostgreSQL, and the transaction: one unit of work, retried as a whole where right."""

import math
import random
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import psycopg2
import structlog
from psycopg2 import extensions
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DataError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from positions import metrics
from positions.errors import ConcurrencyConflict, Unavailable

log = structlog.get_logger(__name__)
Result = TypeVar("Result")

# Every wait has an end, and all tries of a transaction together end before a task's soft limit.
_SESSION = {
    "timezone": "UTC",
    "statement_timeout": "8s",
    "idle_in_transaction_session_timeout": "30s",
    # Compiling our statements takes longer than running them.
    "jit": "off",
    # A client that is gone without a word must not keep its locks for hours.
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
}
TRIES_S = 10.0
"""No further try of a transaction begins after so long."""
ANSWER_S = 10.0
"""How long a server may take to answer where waits are bounded (:func:`bound_waits`): longer than one that is
alive takes to give up a statement."""
PROBE_S = 2.0
"""The same for a server that did not answer in time the last time."""

_deadline: ContextVar[float] = ContextVar("deadline")
# Set from when the server did not answer in time until it answers anyone.
_silent = threading.Event()
_probe = threading.Lock()


def connect(
    url: str, *, pool_size: int = 5, application: str = "positions", lock_timeout: str = "4s"
) -> Engine:
    """Return an engine for the database at ``url``; nothing is opened before the first use."""
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=5,
        pool_use_lifo=True,  # the connection that was used last keeps most (decision 0020)
        pool_pre_ping=True,
        pool_recycle=1800,
        hide_parameters=True,  # an error's text goes to logs and to quarantine: no payload in it
        connect_args={
            "connect_timeout": 4,
            "tcp_user_timeout": 8000,  # ms without an answer from a host that is gone
            "options": " ".join(
                f"-c {name}={value}" for name, value in {**_SESSION, "lock_timeout": lock_timeout}.items()
            ),
            "application_name": application,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
        },
    )


def bound_waits() -> None:
    """End every wait for the database in this process after `ANSWER_S`, and close its connection.

    libpq waits for ever for a server that is frozen, or whose machine is: the timeouts of a session are
    the server's own, and the kernel goes on acknowledging. While the server is silent one thread at a time
    tries it; the others are told at once, so that requests do not pile up behind it.

    Not for processes that COPY, nor for Celery's, whose tasks have a time limit: it is in force for all
    connections, and costs some 10 µs a statement.
    """
    extensions.set_wait_callback(wait)


def wait(connection: Any) -> None:
    """Wait until ``connection`` has what it asked for; it is of no use any more when this raises."""
    deadline = min(time.monotonic() + ANSWER_S, _deadline.get(math.inf))
    if not _silent.is_set():
        _wait_until(connection, deadline)
    elif _probe.acquire(blocking=False):
        try:
            _wait_until(connection, min(deadline, time.monotonic() + PROBE_S))
        finally:
            _probe.release()
        _silent.clear()
    else:
        raise psycopg2.OperationalError("the server did not answer in time, and is being tried again")


def _wait_until(connection: Any, deadline: float) -> None:
    while (state := connection.poll()) != extensions.POLL_OK:
        socket = select.poll()
        socket.register(
            connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        )
        if not socket.poll(max(deadline - time.monotonic(), 0) * 1000):
            _silent.set()
            raise psycopg2.OperationalError("the server did not answer in time")


def refuse_while_silent() -> None:
    """Return unless the server is silent and another thread is trying it; for who would wait for that thread.

    Raises:
        Unavailable: it is.
    """
    if _silent.is_set() and _probe.locked():
        raise Unavailable("the server did not answer in time, and is being tried again")


@contextmanager
def answered_within(seconds: float) -> Iterator[None]:
    """Bound all waits of the block together, where waits are bounded at all."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often a lost transaction is tried again, and after which waits."""

    retries: int = 3
    base_ms: int = 100

    def wait_ms(self, attempt: int) -> float:
        """Return the wait before retry ``attempt`` (from 1): base, 2 x base, 4 x base, each with jitter.

        The jitter adds at most a tenth, so that writers who collided do not meet again.
        """
        return float(self.base_ms << (attempt - 1)) * random.uniform(1.0, 1.1)  # noqa: S311 - not a secret


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """Run the block in one transaction: committed when it ends, rolled back when it raises.

    Raises:
        Unavailable: the database cannot be reached, gave up the transaction (deadlock, timeout, shutdown),
            or is not as we need it (read-only, not migrated). Nothing is known to be committed, and all of
            it may be tried again.
        DataError: the database refuses a value; it would again.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except DataError:
        raise
    except (DBAPIError, PoolTimeoutError) as error:
        raise Unavailable(_reason(error)) from error


def in_transaction(
    engine: Engine,
    work: Callable[[Connection], Result],
    *,
    retry: Retry,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Return ``work(connection)``, committed; a lost race or a lost connection starts it anew.

    Raises:
        ConcurrencyConflict: the position kept changing under every try.
        Unavailable: as :func:`transaction`, after every try.
    """
    attempt, started = 0, time.monotonic()
    while True:
        try:
            with transaction(engine) as connection:
                return work(connection)
        except (ConcurrencyConflict, Unavailable) as error:
            attempt += 1
            lost_race = isinstance(error, ConcurrencyConflict)
            event = "version_conflict" if lost_race else "transaction_lost"
            counted = metrics.VERSION_CONFLICTS if lost_race else metrics.TRANSACTIONS_LOST
            gave_up = attempt > retry.retries or time.monotonic() - started > TRIES_S
            counted.inc("gave_up" if gave_up else "retried")
            if gave_up:
                log.warning(event, attempt=attempt, outcome="gave_up", reason=str(error))
                raise
            wait_ms = retry.wait_ms(attempt)
            log.warning(event, attempt=attempt, outcome="retry", wait_ms=round(wait_ms), reason=str(error))
            sleep(wait_ms / 1000)


def _reason(error: Exception) -> str:
    """Return what went wrong in one line, without the statement or its parameters."""
    origin = getattr(error, "orig", None) or error
    code = getattr(origin, "pgcode", None)
    lines = str(origin).strip().splitlines()
    return f"{type(origin).__name__}{f' {code}' if code else ''}: {lines[0] if lines else ''}"
