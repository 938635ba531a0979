"""The portfolio's figures in Redis, for all processes: each entry holds for one version of the portfolio.

A recomputation begun before an update is stored under the version it read, so it is never served after the
update. Redis away or slow means slower, never wrong: whoever asks computes for itself.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Literal

import redis
import structlog
from redis.backoff import NoBackoff
from redis.retry import Retry

log = structlog.get_logger(__name__)

TIMEOUT_S = 0.2
COMPUTE_S = 2
"""How long one process may compute while the others wait for it: the life of its lock."""
WAIT_S = 0.3
"""How long another waits before it computes for itself."""
POLL_S = 0.01
AWAY_S = 1.0
"""How long Redis is left alone after it failed, so that not every request pays its timeout."""
SEAL_BYTES = 16
"""Of what stands before the figures: it tells them from whatever else may lie under their key."""

Outcome = Literal["hit", "miss", "unavailable"]
Made = tuple[int, Mapping[str, bytes]]
"""The version that figures were read at, and each of them by name."""


class MetricsCache:
    """The cache as one process uses it; its threads may share it."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str,
        ttl_s: int,
        connections: int,
    ) -> None:
        """Open nothing yet.

        Args:
            url: of Redis.
            prefix: of every key: tells services and databases apart that share a Redis.
            ttl_s: longest life of an entry.
            connections: most connections at once.
        """
        pool = redis.BlockingConnectionPool.from_url(
            url,
            max_connections=connections,
            timeout=TIMEOUT_S,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis = redis.Redis(connection_pool=pool)
        self._prefix = prefix
        self._ttl_s = ttl_s
        self._away_until = 0.0
        self._last: set[str] = set()

    def get(
        self, version: int, names: Sequence[str], make: Callable[[], Made], *, era: str = ""
    ) -> tuple[int, list[bytes], Outcome]:
        """Return the figures of these names at ``version`` or a later one, which that is, and from where.

        All of them are of one making. Versions of different eras are of different things
        (`positions.storage.portfolio.Versions`).

        Of all processes that miss, one calls ``make``; the others wait a little for what it stores.
        """
        try:
            found = None if self._away() else self._from_redis(self._key(era, version), names)
        except redis.RedisError as error:
            self.leave_alone(error)
            found = None
        if found is not None:
            return version, found, "hit"
        outcome: Outcome = "unavailable" if self._away() else "miss"
        made_at, made = make()
        # Who waits for the version that was asked for takes a later one as well.
        keys = {self._key(era, each) for each in (version, made_at)}
        self._store(keys, made)
        return made_at, [made[name] for name in names], outcome

    def leave_alone(self, error: redis.RedisError) -> None:
        """Ask Redis for nothing for `AWAY_S`, as it failed, here or elsewhere."""
        self._away_until = time.monotonic() + AWAY_S
        log.warning("cache_unavailable", reason=type(error).__name__)

    def _from_redis(self, key: str, names: Sequence[str]) -> list[bytes] | None:
        """Return what is stored; None where it is for the caller to compute."""
        found = self._stored(key, names)
        if found is not None or self._redis.set(f"{key}:lock", "1", nx=True, ex=COMPUTE_S):
            return found
        end = time.monotonic() + WAIT_S
        while found is None and time.monotonic() < end:
            time.sleep(POLL_S)
            found = self._stored(key, names)
        return found

    def _stored(self, key: str, names: Sequence[str]) -> list[bytes] | None:
        found: list[bytes | None] = self._redis.hmget(key, list(names))  # type: ignore[assignment]
        entries = dict(zip(names, (each or b"" for each in found), strict=True))
        figures = {name: entry[SEAL_BYTES:] for name, entry in entries.items()}
        if any(entry[:SEAL_BYTES] != _seal(key, name, figures[name]) for name, entry in entries.items()):
            return None
        return list(figures.values())

    def _store(self, keys: set[str], made: Mapping[str, bytes]) -> None:
        if self._away():
            return
        try:
            with self._redis.pipeline(transaction=True) as pipe:
                # Nobody asks for older versions again, and under many changes they would fill Redis.
                for key in self._last - keys:
                    pipe.delete(key)
                for key in keys:
                    sealed = {name: _seal(key, name, each) + each for name, each in made.items()}
                    pipe.hset(key, mapping=sealed)
                    pipe.expire(key, self._ttl_s)
                    pipe.delete(f"{key}:lock")
                pipe.execute()
            self._last = keys
        except redis.RedisError as error:
            self.leave_alone(error)

    def _key(self, era: str, version: int) -> str:
        return f"{self._prefix}:portfolio:{era}:{version}"

    def _away(self) -> bool:
        return time.monotonic() < self._away_until


def _seal(key: str, name: str, figures: bytes) -> bytes:
    # A hash of megabytes would take longer than all else; what comes by accident has another length or sum.
    told = f"{key} {name} {len(figures)} {zlib.crc32(figures)}"
    return blake2b(told.encode(), digest_size=SEAL_BYTES).digest()
