"""Who may ask: the key in ``X-API-Key``, for everything that is not marked `public`."""

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import structlog
from flask import Flask, current_app, g, request
from sqlalchemy import Engine
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, Unauthorized

from positions.errors import Unavailable
from positions.settings import DEFAULT_KEY, PREFIX, Role, Settings, SettingsError
from positions.storage import api_keys
from positions.storage.database import transaction
from positions.web import limits
from positions.web.resources import NAME

log = structlog.get_logger(__name__)
View = TypeVar("View", bound=Callable[..., object])

# What any key may do: none of them changes anything.
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

READ_AGAIN_S = 2.0
"""Keys of the database that are older are read anew, while requests go on with what there is."""
TRUSTED_S = 4.0
"""Keys of the database that are older are not used before they are read anew: a revocation works by then."""
PAUSE_S = 1.0
"""The database is not asked more often, whatever keys come in."""
WAIT_S = 0.5
"""So long a request waits for the keys: with the database away, it goes on with the last ones known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key that may be used."""

    name: str
    role: Role
    requests_per_minute: int
    expires_at: datetime | None = None

    @property
    def expired(self) -> bool:
        """Whether it may be used no longer."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


Keys = Mapping[bytes, Key]
"""Keys by the SHA-256 of what the client sends."""


def public(view: View) -> View:
    """Mark a view that asks for no key."""
    view.public = True  # type: ignore[attr-defined]
    return view


def needs_operate(view: View) -> View:
    """Mark a view that only a key of the role `operate` may call; all that change something are, unmarked."""
    view.needs_operate = True  # type: ignore[attr-defined]
    return view


def any_key_will_do() -> bool:
    """Tell whether the present view asks for a key, and for no more than that."""
    view = _view()
    return not getattr(view, "public", False) and not getattr(view, "needs_operate", False)


def init(app: Flask, settings: Settings) -> "tuple[KeyRing, limits.Limiter | None]":
    """Let only requests with a key pass, whether or not there is anything at their address; limit them.

    `g.key` and `g.key_name` are those of the request from then on.

    Returns:
        the keys, and what counts their requests, if anything does.

    Raises:
        SettingsError: a key or a limit is wrong, or no key is set.
    """
    ring = KeyRing(keys_of(settings), lambda: _stored(app.extensions[NAME].reads, settings))
    challenge = WWWAuthenticate("ApiKey", {"realm": settings.service_name})

    def identify() -> None:
        if getattr(_view(), "public", False):
            return
        given = request.headers.get("X-API-Key")
        if given is None:
            g.refusal = "The header X-API-Key is missing."
            return
        # WSGI hands over the header's bytes as Latin-1.
        key = ring.find(given.encode("latin-1"))
        if key is None:
            g.refusal = "The API key is not known here."
            g.wrong_key = True
            return
        g.key_name = key.name
        if key.expired:
            g.refusal = "The API key has expired."
            g.wrong_key = True
            return
        g.key = key

    def authorise() -> None:
        if "refusal" in g:
            raise Unauthorized(g.refusal, www_authenticate=challenge)
        view = _view()
        if view is None or "key" not in g or g.key.role == "operate":
            return
        if getattr(view, "needs_operate", False) or request.method not in _SAFE_METHODS:
            raise Forbidden("This needs a key of the role operate.")

    app.before_request(identify)
    # In between: a wrong key counts against its address before it is told that it is wrong.
    limiter = limits.init(app, settings)
    app.before_request(authorise)
    return ring, limiter


def keys_of(settings: Settings) -> dict[bytes, Key]:
    """Return the keys in the settings.

    Raises:
        SettingsError: one of them or a limit is wrong, or there is no setting for keys. An empty list of
            keys is one: it says that all of them are in the database.
    """
    if settings.api_key is None and settings.api_keys is None:
        raise SettingsError(f"{PREFIX}API_KEY: required, the key that clients send as X-API-Key")
    found = {}
    for entry in settings.keys:
        digest = bytes.fromhex(entry.hash)
        found[digest] = Key(
            name=entry.name,
            role=entry.role,
            requests_per_minute=_limit(settings, entry.name, entry.hash, entry.tier),
            expires_at=entry.expires,
        )
    if settings.api_key is not None:
        key = settings.api_key.get_secret_value().encode()
        digest = hashlib.sha256(key).digest()
        limit = _limit(settings, DEFAULT_KEY, digest.hex(), None)
        found[digest] = Key(name=DEFAULT_KEY, role="operate", requests_per_minute=limit)
    return found


def _stored(engine: Engine, settings: Settings) -> dict[bytes, Key]:
    with transaction(engine) as connection:
        rows = api_keys.valid(connection)
    return {
        bytes.fromhex(row.digest): Key(
            name=row.name,
            role=row.role,
            requests_per_minute=_limit(settings, row.name, row.digest, row.requests_per_minute),
            expires_at=row.expires_at,
        )
        for row in rows
    }


def _limit(settings: Settings, name: str, digest: str, tier: int | None) -> int:
    """Return the requests a minute of a key: as overridden by name or by the key itself, or its tier."""
    for whose, limit in settings.limits.items():
        if whose == name or api_keys.digest_of(whose.encode()) == digest.lower():
            return limit
    return tier or settings.rate_limit_default


class KeyRing:
    """The keys of one process: those of the settings, and those of the database as last read.

    A key that is known costs no I/O. The database is read by a thread of its own, so that one that hangs
    holds up nobody for longer than `WAIT_S`.

    Args:
        own: keys of the settings, which need no database.
        read: returns those of the database; may raise `Unavailable`.
        clock: seconds.
    """

    def __init__(
        self, own: Keys, read: Callable[[], Keys], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._secret = secrets.token_bytes(32)
        self._own = self._indexed(own.items())
        self._read = read
        self._clock = clock
        self._stored: dict[bytes, tuple[bytes, Key]] = {}
        self._read_at: float | None = None
        self._lock = threading.Lock()
        self._asked_at = float("-inf")
        self._reading: threading.Event | None = None

    def known(self, given: bytes) -> Key | None:
        """Return the key that a client gave, expired or not, where that is known at once."""
        return self._known(*self._digest(given))

    def find(self, given: bytes) -> Key | None:
        """Return the key that a client gave, expired or not; None if there is no such key.

        Raises:
            Unavailable: it is none of the settings', and those of the database could never be read.
        """
        digest, index = self._digest(given)
        if key := self._known(digest, index):
            return key
        age = self._age()
        if age > READ_AGAIN_S:
            self._read_anew(wait=age > TRUSTED_S)
        key = _same(self._stored.get(index), digest)
        if key is None:
            self._read_anew(wait=True)
            key = _same(self._stored.get(index), digest)
        if key is None and self._read_at is None:
            raise Unavailable("the API keys could not be read yet")
        return key

    def _known(self, digest: bytes, index: bytes) -> Key | None:
        key = _same(self._own.get(index), digest)
        if key is None and self._age() <= READ_AGAIN_S:
            key = _same(self._stored.get(index), digest)
        return key

    def _age(self) -> float:
        return float("inf") if self._read_at is None else self._clock() - self._read_at

    def _digest(self, given: bytes) -> tuple[bytes, bytes]:
        digest = hashlib.sha256(given).digest()
        return digest, self._index(digest)

    def _indexed(self, keys: Iterable[tuple[bytes, Key]]) -> dict[bytes, tuple[bytes, Key]]:
        return {self._index(digest): (digest, key) for digest, key in keys}

    def _index(self, digest: bytes) -> bytes:
        # With a secret: how long the dictionary takes to look at similar entries says nothing of the
        # digests, let alone of the keys.
        return hashlib.blake2b(digest, key=self._secret, digest_size=16).digest()

    def _read_anew(self, *, wait: bool) -> None:
        with self._lock:
            now = self._clock()
            if self._reading is None and now - self._asked_at >= PAUSE_S:
                self._asked_at = now
                self._reading = threading.Event()
                threading.Thread(target=self._fetch, args=(self._reading,), daemon=True).start()
            reading, left_s = self._reading, self._asked_at + WAIT_S - now
        # Who comes while the database hangs does not wait as well.
        if wait and reading is not None:
            reading.wait(left_s)

    def _fetch(self, done: threading.Event) -> None:
        began_at = self._clock()
        try:
            self._stored = self._indexed(self._read().items())
            self._read_at = began_at
        except Exception as error:  # noqa: BLE001 - whatever it is, the next reading must be tried
            log.warning("api_keys_unreadable", reason=f"{type(error).__name__}: {error}".partition("\n")[0])
        finally:
            with self._lock:
                self._reading = None
            done.set()


def _same(found: tuple[bytes, Key] | None, digest: bytes) -> Key | None:
    return found[1] if found and hmac.compare_digest(found[0], digest) else None


def _view() -> Callable[..., object] | None:
    return current_app.view_functions.get(request.endpoint or "")
