"""The short way: an answer that a process keeps is given again without Flask, which costs more than all else.

Keys, limits, the version, headers, metrics and the line in the log are those of the long way, by the same
functions. The worker's main loop (`positions.web.worker`) goes it for many requests at once: it looks at what
each wants, asks Redis and PostgreSQL for all of them, and answers.

Whatever is not plain takes the long way: another method, no such answer, a key that is not known at once, a
limit that is reached, a server that is away or slow. How it stands to its limit goes along, in the WSGI
environment, so that a request is counted once. So does an error that nobody foresaw, which the long way
answers and logs. The version is asked for again there, which tells also of which server it is.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import redis
import structlog
from flask import Flask

from positions import metrics
from positions.errors import Unavailable
from positions.settings import Settings
from positions.storage.portfolio import VersionsAside
from positions.web.answers import question_of, told
from positions.web.auth import Key, KeyRing
from positions.web.limits import WINDOW, Limiter, Window, behind_proxies
from positions.web.resources import NAME as RESOURCES
from positions.web.resources import Resources
from positions.web.tracing import BEGAN, REFUSED, served, trace_id_of

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

log = structlog.get_logger(__name__)

NAME = "positions.short_way"
"""Of the `ShortWay` among the extensions of an application."""

WAIT_S = 0.1
"""How long is waited for the version. The main loop must not stand still: where Redis and PostgreSQL take
longer, it leaves them to the threads of the long way for `AGAIN_S`."""
AGAIN_S = 1.0

_STATUS = {each: f"{each} {HTTPStatus(each).phrase.upper()}" for each in (200, 304)}


@dataclass(eq=False, slots=True)
class Asked:
    """A request on the short way."""

    question: tuple[str, str]
    route: str
    key: Key
    environ: "WSGIEnvironment"
    began_at: float
    window: Window | redis.RedisError | None = None
    """How it stands to its limit; None where it is not counted."""
    version: int | None = None
    """None where it is not known."""
    error: Exception | None = None
    """What nobody foresaw."""

    @property
    def found_out(self) -> dict[str, object]:
        """What the long way finds in its WSGI environment."""
        found = {BEGAN: self.began_at, WINDOW: self.window, REFUSED: self.error}
        return {name: each for name, each in found.items() if each is not None}


class ShortWay:
    """Answers requests to an application with what it keeps; for one thread, which never waits for long."""

    def __init__(
        self,
        app: Flask,
        settings: Settings,
        ring: KeyRing,
        limiter: Limiter | None,
        headers: Iterable[tuple[str, str]],
    ) -> None:
        """Each answer has ``headers``; nothing is connected before the first request."""
        own: Resources = app.extensions[RESOURCES]
        self._answers = own.answers
        self._version = VersionsAside(own.engine)
        self._ring = ring
        self._limiter = limiter
        self._redis: Any = None
        self._headers = tuple(headers)
        self._behind_proxies = behind_proxies(lambda *_: (), settings)
        self._connecting = threading.Lock()
        self._closed_until = 0.0
        self.connected = False
        """Whether there are connections; a thread makes them, as that may take long."""

    def keeps(self, target: str) -> bool:
        """Tell whether there may be an answer to a request with ``target`` in its first line."""
        path, _, query = target.partition("?")
        return self._answers.get((path, query), 0) is not None

    def begin(self, environ: "WSGIEnvironment") -> Asked | None:
        """Return a request that may take the short way, None for others; waits for nothing."""
        began_at = time.perf_counter()
        question = question_of(environ)
        kept = self._answers.get(question, 0)
        if kept is None or kept.route is None or not _is_plain(environ):
            return None
        given = environ.get("HTTP_X_API_KEY")
        key = None if given is None else self._ring.known(given.encode("latin-1"))
        if key is None or key.expired or (self._limiter and not self._limiter.in_redis):
            return None
        if not self.connected:
            if self._connecting.acquire(blocking=False):
                self._connect_aside()
            return None
        if began_at < self._closed_until:
            return None
        return Asked(question, kept.route, key, environ, began_at)

    def _connect_aside(self) -> None:
        try:
            threading.Thread(target=self._connect, daemon=True).start()
        except RuntimeError:  # there can be no more threads now
            self._connecting.release()

    def _connect(self) -> None:
        try:
            if self._limiter:
                self._redis = self._limiter.connected()
            self._version.connect()
            self.connected = True
        except (redis.RedisError, Unavailable):
            pass  # the long way says so
        except Exception:
            log.exception("short_way_not_connected")
        finally:
            if not self.connected:
                time.sleep(AGAIN_S)
            self._connecting.release()

    def ask(self, together: Sequence[Asked]) -> None:
        """Find out how requests stand to their limits, and the version committed now: once for all.

        PostgreSQL is asked first and listened to last, so that it works while Redis does.
        """
        began_at = time.perf_counter()
        try:
            if not self._version.begin():
                return
            if self._limiter:
                self._count(self._limiter, together, until=began_at + WAIT_S)
            version = self._version.end(WAIT_S)
            for each in together:
                each.version = version
        except Unavailable:
            self.connected = False
        except Exception as error:  # noqa: BLE001 - the long way has an answer to everything
            self.connected = False
            for each in together:
                each.error = error
        now = time.perf_counter()
        if now - began_at > WAIT_S:
            self._closed_until = now + AGAIN_S

    def _count(self, limiter: Limiter, together: Sequence[Asked], *, until: float) -> None:
        of_key: defaultdict[Key, list[Asked]] = defaultdict(list)
        for each in together:
            of_key[each.key].append(each)
        try:
            for key, requests in of_key.items():
                if time.perf_counter() > until:
                    return  # Redis is slow, and the rest is for the long way
                for each, window in zip(requests, limiter.take(key, len(requests), self._redis), strict=True):
                    each.window = window
        except redis.ConnectionError:
            # It was closed, by Redis or on the way; the long way opens another, and counts.
            self.connected = False
        except redis.RedisError as error:
            self.connected = False
            for each in together:
                each.window = each.window or error

    def answer(self, asked: Asked) -> tuple[str, list[tuple[str, str]], bytes] | None:
        """Return status, headers and body for a request that was asked for; None: it goes on the long way."""
        try:
            return self._answer(asked)
        except Exception as error:  # noqa: BLE001 - the long way has an answer to everything
            asked.error = error
            return None

    def _answer(self, asked: Asked) -> tuple[str, list[tuple[str, str]], bytes] | None:
        window, environ = asked.window, asked.environ
        if asked.error or asked.version is None or isinstance(window, redis.RedisError):
            return None
        if self._limiter and not (window and window.passed):
            return None
        answer = self._answers.get(asked.question, asked.version)
        if answer is None:
            return None
        if answer.shared:
            metrics.PORTFOLIO_CACHE.inc("hit")
        status, head, body = told(answer, environ)
        trace_id = trace_id_of(environ)
        head += self._headers
        if window:
            head += window.headers()
        head.append(("X-Trace-Id", trace_id))
        self._behind_proxies(environ, _said_to_nobody)
        served(
            method="GET",
            route=asked.route,
            status=status,
            began_at=asked.began_at,
            key_name=asked.key.name,
            client=environ.get("REMOTE_ADDR"),
            trace_id=trace_id,
        )
        return _STATUS[status], head, body


def _said_to_nobody(*_: object) -> Callable[[bytes], object]:
    # Of an application that answers nothing, and is there for what proxies say of the client.
    raise AssertionError("nothing is answered here")


def _is_plain(environ: Mapping[str, Any]) -> bool:
    return (
        environ["REQUEST_METHOD"] == "GET"
        and "HTTP_TRANSFER_ENCODING" not in environ
        and environ.get("CONTENT_LENGTH", "") in ("", "0")
        # What is kept is JSON, and there may be other answers.
        and environ.get("HTTP_ACCEPT", "*/*") in ("*/*", "application/json")
    )
