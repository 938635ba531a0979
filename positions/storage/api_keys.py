"""Keys of the API in the database: their digests, for the keys themselves are nowhere."""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import Connection, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError

from positions.errors import NotFound, PositionsError
from positions.settings import Role
from positions.storage.tables import api_keys

KEYS_MAX = 1000
"""Each process of the web keeps all of them, and reads them anew every few seconds."""
PREFIX = "pk_"
"""Keys begin with it, so that people, and programs that look for leaked secrets, know one."""


class KeyRefused(PositionsError):
    """A key cannot be created; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredKey:
    """A key as the database knows it."""

    name: str
    digest: str
    """SHA-256 of the key, hex."""
    role: Role
    requests_per_minute: int | None
    """None: the default."""
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None


def generated() -> str:
    """Return a new key: 32 random bytes."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> str:
    """Return what is stored of a key.

    A plain hash is enough, and fast enough for every request: nobody guesses 32 random bytes.
    """
    return hashlib.sha256(key).hexdigest()


def create(
    connection: Connection,
    *,
    name: str,
    digest: str,
    role: Role,
    requests_per_minute: int | None,
    expires_at: datetime | None,
) -> None:
    """Store a key.

    Raises:
        KeyRefused: there is one of that name, revoked or not, as logs may still speak of it; or there are
            too many.
    """
    # Two that are created at once are counted one after the other.
    connection.execute(text("LOCK TABLE api_keys IN SHARE ROW EXCLUSIVE MODE"))
    valid = select(func.count()).where(api_keys.c.revoked_at.is_(None))
    if connection.execute(valid).scalar_one() >= KEYS_MAX:
        raise KeyRefused(f"there are {KEYS_MAX} keys; revoke some first")
    try:
        connection.execute(
            insert(api_keys).values(
                name=name,
                digest=digest,
                role=role,
                requests_per_minute=requests_per_minute,
                expires_at=expires_at,
            )
        )
    except IntegrityError:
        raise KeyRefused(f"there is, or was, a key of the name {name}") from None


def revoke(connection: Connection, name: str, *, now: datetime) -> None:
    """Revoke a key; one that is revoked stays so, since when it was.

    Raises:
        NotFound: there is none of that name.
    """
    since = func.coalesce(api_keys.c.revoked_at, now)
    done = connection.execute(update(api_keys).where(api_keys.c.name == name).values(revoked_at=since))
    if not done.rowcount:
        raise NotFound(f"no key of the name {name}")


def everything(connection: Connection) -> list[StoredKey]:
    """Return all keys that ever were, by name."""
    return _read(connection, revoked=True)


def valid(connection: Connection) -> list[StoredKey]:
    """Return the keys that are not revoked, expired ones too, by name."""
    return _read(connection, revoked=False)


def _read(connection: Connection, *, revoked: bool) -> list[StoredKey]:
    query = select(api_keys).order_by(api_keys.c.name)
    if not revoked:
        query = query.where(api_keys.c.revoked_at.is_(None)).limit(KEYS_MAX)
    return [
        StoredKey(
            name=row.name,
            digest=row.digest,
            role=cast(Role, row.role),
            requests_per_minute=row.requests_per_minute,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked_at=row.revoked_at,
        )
        for row in connection.execute(query)
    ]
