"""Whether broker and cache can be reached: asked with short timeouts, the answer kept for a moment."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import redis
import structlog
from kombu import Connection
from redis.backoff import NoBackoff
from redis.retry import Retry

from positions.storage.broker import INTAKE_QUEUE, is_redis

log = structlog.get_logger(__name__)
Answer = TypeVar("Answer")

TIMEOUT_S = 0.5
KEPT_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """How a queue stands; one that does not exist is empty."""

    name: str
    messages: int
    consumers: int | None
    """None where the broker cannot tell: Redis."""
    ours: int | None
    """How many of them our workers have, each one; None likewise."""


class Checks:
    """The checks of one process."""

    def __init__(self, *, broker: str, queues: Iterable[str], cache: str) -> None:
        names = tuple(queues)
        self.queues = Recent(lambda: queues_at(broker, names))
        """The foreign queues; None while the broker is away."""
        self.cache = Recent(lambda: answers(cache))


class Recent(Generic[Answer]):
    """What ``ask`` answered at most ``kept_s`` seconds ago, however many threads want to know."""

    def __init__(
        self,
        ask: Callable[[], Answer],
        *,
        kept_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._kept_s = kept_s
        self._clock = clock
        self._lock = threading.Lock()
        self._last: tuple[Answer, float] | None = None

    def __call__(self) -> Answer:
        # One thread asks, the others wait for its answer, which the timeouts bound.
        with self._lock:
            if self._last is None or self._clock() - self._last[1] > self._kept_s:
                self._last = self._ask(), self._clock()
            return self._last[0]


def queues_at(broker: str, names: Iterable[str]) -> tuple[Queue, ...] | None:
    """Return how the queues stand, by declaring them passively; None where the broker does not answer."""
    redis_broker = is_redis(broker)
    options = (
        {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S}
        if redis_broker
        else {"read_timeout": TIMEOUT_S, "write_timeout": TIMEOUT_S}
    )
    client = Connection(broker, connect_timeout=TIMEOUT_S, transport_options=options)
    transport = client.transport

    def state(connection: Any, name: str) -> tuple[int, int]:
        # A channel each: a passive declare of what does not exist closes its channel.
        channel = transport.create_channel(connection)
        try:
            found = channel.queue_declare(name, passive=True)
        except client.channel_errors:
            return 0, 0
        return found.message_count, found.consumer_count

    try:
        # Not through the client, which would try again after two seconds.
        connection = transport.establish_connection()
        try:
            # Before and after: a worker that comes or goes meanwhile is not taken for a stranger.
            _, before = state(connection, INTAKE_QUEUE)
            found = {name: state(connection, name) for name in names}
            _, after = state(connection, INTAKE_QUEUE)
        finally:
            transport.close_connection(connection)
    except (*client.connection_errors, *client.channel_errors) as error:
        log.warning("broker_unreachable", reason=type(error).__name__)
        return None
    return tuple(
        Queue(
            name=name,
            messages=messages,
            consumers=None if redis_broker else consumers,
            ours=None if redis_broker else max(before, after),
        )
        for name, (messages, consumers) in found.items()
    )


def answers(cache: str) -> bool:
    """Tell whether the cache answers."""
    try:
        with redis.Redis.from_url(
            cache,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            # One that answers but takes nothing, being full or read-only, is of no use.
            return bool(client.set("positions:check", "1", ex=1))
    except redis.RedisError as error:
        log.warning("cache_unreachable", reason=type(error).__name__)
        return False
