"""The short way: an answer that a process keeps is given again without Flask, which costs more than all else.

Keys, limits, the version, headers, metrics and the line in the log are those of the long way, by the same
functions. Redis and PostgreSQL are asked once for all requests that come while they were asked before: waking
a thread costs less than asking.

Whatever is not plain takes the long way: another method, no such answer, a key that is not known at once, a
limit that is reached, a server that is away. What is found out by then is left in the WSGI environment, so
that a request is counted once, and waits once. So is an error that nobody foresaw, which the long way answers
and logs.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import redis
from flask import Flask

from positions import metrics
from positions.errors import Unavailable
from positions.storage.database import refuse_while_silent
from positions.storage.portfolio import Versions
from positions.web.answers import VERSION, question_of, told
from positions.web.auth import Key, KeyRing
from positions.web.limits import WINDOW, Limiter, Window
from positions.web.resources import NAME, Resources
from positions.web.tracing import BEGAN, REFUSED, served, trace_id_of

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

Headers = list[tuple[str, str]]
_STATUS = {each: f"{each} {HTTPStatus(each).phrase.upper()}" for each in (200, 304)}


def init(app: Flask, ring: KeyRing, limiter: Limiter | None, headers: Iterable[tuple[str, str]]) -> None:
    """Let requests to ``app`` take the short way where there is one; each answer has ``headers``."""
    own: Resources = app.extensions[NAME]
    long_way, headers = app.wsgi_app, tuple(headers)
    together = _Together(own.version, limiter)

    def short_way(environ: "WSGIEnvironment") -> tuple[int, Headers, bytes] | None:
        began_at = time.perf_counter()
        question = question_of(environ)
        kept = own.answers.get(question, 0)
        if kept is None or kept.route is None or not _is_plain(environ):
            return None
        given = environ.get("HTTP_X_API_KEY")
        key = None if given is None else ring.known(given.encode("latin-1"))
        if key is None or key.expired:
            return None
        environ[BEGAN] = began_at
        if limiter and not limiter.in_redis:
            return None
        window, version = environ[WINDOW], environ[VERSION] = together(key)
        if isinstance(version, Exception) or isinstance(window, Exception) or (window and not window.passed):
            return None
        answer = own.answers.get(question, version)
        if answer is None:
            return None
        if answer.shared:
            metrics.PORTFOLIO_CACHE.inc("hit")
        status, head, body = told(answer, environ)
        trace_id = trace_id_of(environ)
        head += headers
        if window:
            head += window.headers()
        head.append(("X-Trace-Id", trace_id))
        served(
            method="GET",
            route=kept.route,
            status=status,
            began_at=began_at,
            key_name=key.name,
            client=environ.get("REMOTE_ADDR"),
            trace_id=trace_id,
        )
        return status, head, body

    def either_way(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        try:
            answer = short_way(environ)
        except Exception as error:  # noqa: BLE001 - the long way has an answer to everything
            environ[REFUSED] = error
            answer = None
        if answer is None:
            return long_way(environ, start_response)
        status, head, body = answer
        start_response(_STATUS[status], head)
        return [body]

    app.wsgi_app = either_way  # type: ignore[method-assign]


class _Asked:
    """What requests that wait together want to know, and what they are told."""

    def __init__(self) -> None:
        self.requests: Counter[Key] = Counter()
        self.windows: dict[Key, list[Window] | redis.RedisError] = {}
        """How the requests of a key stand, each for one of them."""
        self.counted = threading.Event()
        self.begun = False
        self.version: int | Exception = Unavailable("interrupted")

    def window(self, key: Key) -> Window | redis.RedisError | None:
        """Return how one more request of ``key`` stands, None without limits."""
        windows = self.windows.get(key)
        return windows.pop(0) if isinstance(windows, list) else windows


class _Together:
    """Asks how requests stand to their limits, and for the version: once for all that wait for it."""

    def __init__(self, version: Versions, limiter: Limiter | None) -> None:
        self._version = version
        self._limiter = limiter
        self._turn = threading.Lock()
        self._gathering = threading.Lock()
        self._next = _Asked()

    def __call__(self, key: Key) -> tuple[Window | redis.RedisError | None, int | Unavailable]:
        """Return the window of a request of ``key``, None without limits, and the version committed now."""
        try:
            refuse_while_silent()
        except Unavailable as error:
            return None, error
        with self._gathering:
            asked = self._next
            asked.requests[key] += 1
        if not self._turn.acquire(timeout=self._version.WAIT_S):
            return self._without(asked, key), Unavailable("the database does not answer")
        try:
            if not asked.begun:
                self._ask()
        finally:
            self._turn.release()
        if not isinstance(asked.version, int | Unavailable):
            raise asked.version
        return asked.window(key), asked.version

    def _without(self, asked: _Asked, key: Key) -> Window | redis.RedisError | None:
        """Return the window of a request that waits no longer, None if it is not counted here."""
        with self._gathering:
            if asked is self._next:
                asked.requests[key] -= 1
                return None
        # Redis does not keep it long.
        asked.counted.wait()
        return asked.window(key)

    def _ask(self) -> None:
        with self._gathering:
            asked, self._next = self._next, _Asked()
        asked.begun = True
        try:
            if self._limiter:
                for key, requests in asked.requests.items():
                    try:
                        asked.windows[key] = self._limiter.take(key, requests)
                    except redis.RedisError as error:
                        asked.windows = dict.fromkeys(asked.requests, error)
                        break
            asked.counted.set()
            asked.version = self._version()
        except Exception as error:  # noqa: BLE001 - each that waits for it raises or is told it
            asked.version = error
        finally:
            asked.counted.set()


def _is_plain(environ: Mapping[str, Any]) -> bool:
    return (
        environ["REQUEST_METHOD"] == "GET"
        and "HTTP_TRANSFER_ENCODING" not in environ
        and environ.get("CONTENT_LENGTH", "") in ("", "0")
        # What is kept is JSON, and there may be other answers.
        and environ.get("HTTP_ACCEPT", "*/*") in ("*/*", "application/json")
    )
