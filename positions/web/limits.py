"""How often who may ask: requests a minute for each key, and for each address that sends wrong keys.

flask-limiter does it, on Redis, and in the process's own memory while Redis is away. Two parts of it are
replaced, as each request pays for them: which of many limits apply (here it is one), and how Redis is asked
(once, instead of once for the hit and once more for the headers).
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING, Any, Protocol

import flask_limiter
import redis
import structlog
from flask import Flask, Response, g, request
from flask_limiter import Limit as FlaskLimit
from flask_limiter import RateLimitExceeded, RequestLimit
from flask_limiter._limits import RuntimeLimit
from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug.middleware.proxy_fix import ProxyFix

from positions import metrics
from positions.settings import REDIS_SCHEMES, Settings
from positions.web.problems import problem
from positions.web.resources import NAME, Resources

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

log = structlog.get_logger(__name__)

WRONG_KEYS_PER_MINUTE = 20
"""From one address. A person who mistypes, or a service with an old key that tries again, stays below for a
while; of 32 random bytes nobody guesses one at any rate, but the log and the processor are spared."""
TIMEOUT_S = 0.2
AGAIN_S = 1.0
"""After an error of Redis it is not tried again sooner."""
WINDOW_S = 60

WINDOW = "positions.window"
"""Key of the WSGI environment: the `Window` of a request that is counted already, or why it could not be."""

_SCOPE = "api"

_SCRIPT = """
local times, limit, window_us, amount =
    KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]) * 1000000, tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
-- What has left the window goes: by the thousand first, so that a long list is not walked one by one.
for _, step in ipairs({1000, 1}) do
    local oldest = redis.call('LINDEX', times, -step)
    while oldest and tonumber(oldest) <= now - window_us do
        redis.call('LTRIM', times, 0, -step - 1)
        oldest = redis.call('LINDEX', times, -step)
    end
end
local held = redis.call('LLEN', times)
local passed = math.max(math.min(amount, limit - held), 0)
if passed > 0 then
    for _ = 1, passed do
        redis.call('LPUSH', times, now)
    end
    redis.call('PEXPIRE', times, window_us / 1000)
end
local oldest = redis.call('LINDEX', times, -1)
return {passed, held + passed, oldest and now - oldest or 0}
"""
_SHA = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()


class Key(Protocol):
    """What is limited."""

    @property
    def name(self) -> str:
        """Of whom."""

    @property
    def requests_per_minute(self) -> int:
        """How many it may make."""


@dataclass(frozen=True, slots=True)
class Window:
    """How a request stands to its limit."""

    limit: int
    """Requests a minute."""
    remaining: int
    reset_s: int
    """Until the first of those that count no longer does."""
    passed: bool

    def headers(self) -> list[tuple[str, str]]:
        """Return what tells a client of it."""
        told = [
            ("RateLimit-Limit", str(self.limit)),
            ("RateLimit-Remaining", str(self.remaining)),
            ("RateLimit-Reset", str(self.reset_s)),
        ]
        return told if self.passed else [*told, ("Retry-After", str(self.reset_s))]


def init(app: Flask, settings: Settings) -> "Limiter | None":
    """Limit the requests of `g.key`, and of addresses with `g.wrong_key`; others are not limited.

    Wrong keys are counted for each address, and beyond `WRONG_KEYS_PER_MINUTE` answered with 429 instead of
    401. A right key from the same address is not held back by that: otherwise whoever shares a proxy or a
    host with the risk manager could lock it out by sending rubbish.

    Returns:
        what counts them; None where limits are switched off.
    """
    if not settings.rate_limit_enabled:
        return None
    own: Resources = app.extensions[NAME]
    limiter = Limiter(
        _whose,
        storage_uri=f"positions+{settings.redis}",
        # Not counted again after a timeout; whoever waited 0.2 s has waited enough.
        storage_options={
            "socket_timeout": TIMEOUT_S,  # type: ignore[dict-item]
            "socket_connect_timeout": TIMEOUT_S,  # type: ignore[dict-item]
            "retry": Retry(NoBackoff(), 0),  # type: ignore[dict-item]
            "key_prefix": f"{settings.service_name}:limits",
            # A request that waited for Redis here in vain must not do so for what it has cached.
            "on_error": own.metrics.leave_alone,  # type: ignore[dict-item]
        },
        strategy="moving-window",
        default_limits=[FlaskLimit(lambda: f"{_amount()}/minute", exempt_when=_exempt)],
        # One limit for the whole of the API, and for addresses where there is nothing.
        request_identifier=lambda: _SCOPE,
        in_memory_fallback_enabled=True,
        headers_enabled=False,
    )
    limiter.init_app(app)
    # It says of each refusal what the request's own line says.
    limiter.logger.addFilter(_is_no_refusal)

    @app.after_request
    def show(response: Response) -> Response:
        window: Window | None = g.get("window")
        if window is None and (limit := limiter.current_limit):
            window = _window(limit)
        if window is not None:
            response.headers.update(window.headers())
        return response

    app.register_error_handler(RateLimitExceeded, _refused)
    return limiter


def behind_proxies(app: "WSGIApplication", settings: Settings) -> "WSGIApplication":
    """Return ``app`` as it is behind our own proxies: an address is the one that they wrote down."""
    if not settings.trusted_proxies:
        return app
    return ProxyFix(app, x_for=settings.trusted_proxies, x_proto=0, x_host=0)


def _exempt() -> bool:
    return "key" not in g and "wrong_key" not in g


def _whose() -> str:
    return _whose_key(g.key) if "key" in g else f"address:{network(request.remote_addr)}"


def _whose_key(key: Key) -> str:
    return f"key:{key.name}"


def _amount() -> int:
    return g.key.requests_per_minute if "key" in g else WRONG_KEYS_PER_MINUTE


def network(address: str | None) -> str:
    """Return what counts as one address: of IPv6 the first 64 bits, as one host has all the rest.

    What is no address, which only a proxy or a Unix socket can send, is all one.
    """
    try:
        found = ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ip_network((int(found), 64), strict=False))
    return str(found)


def _is_no_refusal(record: object) -> bool:
    return not str(getattr(record, "msg", "")).startswith("ratelimit ")


def _window(limit: RequestLimit) -> Window:
    """Return the window of a request that flask-limiter counted itself, in memory."""
    try:
        frees_at, remaining = limit.window
    except redis.RedisError:
        # Back since, and gone again.
        frees_at, remaining = time.time() + WINDOW_S, 0
    return _told(limit.limit.amount, remaining, frees_at - time.time(), passed=not limit.breached)


def _told(amount: int, remaining: int, left_s: float, *, passed: bool) -> Window:
    return Window(amount, max(remaining, 0), min(max(math.ceil(left_s), 1), WINDOW_S), passed)


def _refused(_: RateLimitExceeded) -> Response:
    metrics.LIMITED.inc("key" if "key" in g else "address")
    if "key" in g:
        detail = f"The key {g.key.name} may make {g.key.requests_per_minute} requests a minute."
    else:
        detail = f"More than {WRONG_KEYS_PER_MINUTE} wrong API keys came from this address within a minute."
    return problem(429, code="rate_limited", title="Too Many Requests", detail=detail)


@lru_cache(1000)
def _per_minute(amount: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(amount)


@lru_cache(1000)
def _name(whose: str, amount: int) -> str:
    return _per_minute(amount).key_for(whose, _SCOPE)


class Limiter(flask_limiter.Limiter):
    """flask-limiter's, with a short way for as long as Redis answers."""

    def _check_request_limit(self, callable_name: str | None = None, in_middleware: bool = True) -> None:
        """Count the request against the one limit it has, the short way while Redis answers.

        The long way is flask-limiter's own, with its switch to memory and back. It lets an error pass where
        another thread saw Redis go a moment before: then Redis is known to be away, and the second try ends.
        """
        if not self._storage_dead:
            try:
                return self._count()
            except redis.RedisError as error:
                # Here, or flask-limiter would ask, and wait, once more to find it out.
                self._storage_dead = True
                self.context.seen_limits.clear()
                log.warning("limits_in_memory", reason=type(error).__name__)
        while True:
            try:
                return super()._check_request_limit(callable_name, in_middleware)
            except redis.RedisError:
                self.context.seen_limits.clear()

    def _count(self) -> None:
        if _exempt():
            return
        counted = request.environ.get(WINDOW)
        if isinstance(counted, redis.RedisError):
            raise counted
        if counted is None:
            [counted] = self._take(_whose(), _amount(), 1)
        g.window = counted
        if not g.window.passed:
            raise RateLimitExceeded(RuntimeLimit(_per_minute(g.window.limit), _whose, None))

    @property
    def in_redis(self) -> bool:
        """Whether requests are counted there now."""
        return not self._storage_dead

    def connected(self) -> Any:
        """Return a connection for `take`.

        Raises:
            RedisError: Redis is away.
        """
        storage: _OneCall = self._storage  # type: ignore[assignment]
        return storage.connected()

    def take(self, key: Key, requests: int, connection: Any) -> list[Window]:
        """Count some requests of ``key`` in Redis, over ``connection``, and return how each stands then.

        Raises:
            RedisError: it is away, or does not take it.
        """
        return self._take(_whose_key(key), key.requests_per_minute, requests, connection)

    def _take(self, whose: str, amount: int, requests: int, connection: Any = None) -> list[Window]:
        storage: _OneCall = self._storage  # type: ignore[assignment]
        passed, held, age_us = storage.hit(_name(whose, amount), amount, WINDOW_S, requests, connection)
        left_s = WINDOW_S - age_us / 1_000_000
        # As if each had come by itself.
        return [
            _told(amount, amount - held + max(passed - number, 0), left_s, passed=number <= passed)
            for number in range(1, requests + 1)
        ]


class _OneCall(RedisStorage):
    """A moving window in Redis that tells with each hit what the headers say.

    It is exact: no minute, wherever it begins, has more requests than the limit, and a request is refused
    only if the minute before it was full. The window is a list of times, by the clock of Redis, so that the
    clocks of the web's hosts do not matter; of a key with 1,000 requests a minute, it takes some 20 kB.
    """

    STORAGE_SCHEME = [f"positions+{scheme}" for scheme in REDIS_SCHEMES]  # noqa: RUF012 - as in the class below it

    def __init__(self, uri: str, *, on_error: Callable[[redis.RedisError], None], **options: Any) -> None:
        super().__init__(uri.removeprefix("positions+"), **options)
        self._on_error = on_error
        self._failed_at = float("-inf")
        # A connection for each thread costs half of what the pool does: the pool asks the kernel before each
        # use whether the connection is still there.
        self._of_thread = threading.local()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self.hit(key, limit, expiry, amount)[0] == amount

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        _, held, age_us = self.hit(key, limit, expiry, 0)
        return time.time() - age_us / 1_000_000, held

    def check(self) -> bool:
        """Tell whether Redis can count: one that answers, but refuses to write, cannot."""
        if time.monotonic() - self._failed_at < AGAIN_S:
            return False
        try:
            self.hit("check", 1000, 1, 1)
        except redis.RedisError:
            return False
        return True

    def connected(self) -> Any:
        """Return a connection for `hit`."""
        connection: Any = self.storage.connection_pool.make_connection()
        connection.connect()
        return connection

    def hit(
        self, key: str, limit: int, expiry: int, amount: int, connection: Any = None
    ) -> tuple[int, int, int]:
        """Count ``amount`` requests, or those of them that still fit.

        A ``connection`` that is given is used, and never opened again.

        Returns:
            how many fitted, how many there are now, and the age of the oldest in microseconds.

        Raises:
            RedisError: Redis is away, or does not take them.
        """
        given = connection is not None
        if connection is None:
            connection = getattr(self._of_thread, "connection", None)
        if connection is None:
            connection = self._of_thread.connection = self.storage.connection_pool.make_connection()
        arguments = (1, self.prefixed_key(key), limit, expiry, amount)
        try:
            try:
                return self._run(connection, *arguments)
            except redis.ConnectionError:
                # Redis, or something on the way, has closed it since its last use.
                if given:
                    raise
                return self._run(connection, *arguments)
        except redis.RedisError as error:
            # That one was closed says nothing of Redis before another was tried.
            if not given or not isinstance(error, redis.ConnectionError):
                self._failed_at = time.monotonic()
                self._on_error(error)
            raise

    @staticmethod
    def _run(connection: Any, *arguments: object) -> tuple[int, int, int]:
        try:
            try:
                connection.send_command("EVALSHA", _SHA, *arguments)
                passed, held, age_us = connection.read_response()
            except redis.exceptions.NoScriptError:
                connection.send_command("EVAL", _SCRIPT, *arguments)
                passed, held, age_us = connection.read_response()
        except redis.ResponseError:
            raise
        except BaseException:
            # Whatever came between, the next one must not read the answer to this.
            connection.disconnect()
            raise
        return passed, held, age_us
