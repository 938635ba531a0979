"""Schema migrations, run from code: `positions migrate`."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from psycopg2.errors import LockNotAvailable
from sqlalchemy.exc import OperationalError

from positions.errors import Unavailable

log = structlog.get_logger(__name__)

ROOT = Path(__file__).resolve().parents[2]
TRIES = 20
WAIT_S = 3.0
"""Between two tries: a migration that waits for a lock holds up who comes after it, so that it waits briefly
(migrations/env.py), lets them pass, and comes again."""


def config(url: str) -> Config:
    """Return Alembic's configuration for the database at ``url``."""
    made = Config()
    made.set_main_option("script_location", str(ROOT / "migrations"))
    made.attributes["url"] = url
    return made


def upgrade(url: str, revision: str = "head", *, sleep: Callable[[float], None] = time.sleep) -> None:
    """Bring the schema at ``url`` up to ``revision``; does nothing where it is there already.

    Each migration is a transaction of its own: those that were made stay when a later one fails.

    Raises:
        Unavailable: somebody held a lock on a table through all tries, as a forgotten session does.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return command.upgrade(config(url), revision)
        except OperationalError as error:
            if not isinstance(error.orig, LockNotAvailable):
                raise
            log.warning("migration_waits_for_a_lock", attempt=attempt, of=TRIES)
        if attempt < TRIES:
            sleep(WAIT_S)
    raise Unavailable(
        f"a table stayed locked through {TRIES} tries: pg_stat_activity tells whose transaction has been open"
    )
