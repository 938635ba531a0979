"""Schema migrations, run from code: `positions migrate`."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from psycopg2 import sql
from psycopg2.errors import DeadlockDetected, LockNotAvailable
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import OperationalError

from positions.errors import Unavailable
from positions.storage.tables import ledger, metadata, position_snapshots

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
            # An older release waits for its turn in a statement, and a newer one's index for that statement.
            if not isinstance(error.orig, LockNotAvailable | DeadlockDetected):
                raise
            log.warning("migration_waits_for_a_lock", attempt=attempt, of=TRIES)
        if attempt < TRIES:
            sleep(WAIT_S)
    raise Unavailable(
        f"a table stayed locked through {TRIES} tries: pg_stat_activity tells whose transaction has been open"
    )


def grant(url: str, role: str) -> None:
    """Let ``role`` do in the database at ``url`` what the service does there, and no more.

    Of the ledger it may read and append, of the migrations read which there were. The snapshots become its
    own, as the service makes and drops their partitions. Whoever migrates must be a member of ``role``, or a
    superuser: to alter those tables in the next release.
    """
    known, ours = sql.Identifier(role), []
    everything = sql.SQL("SELECT, INSERT, UPDATE, DELETE")
    for table in metadata.sorted_tables:
        if table is not position_snapshots:
            rights = sql.SQL("SELECT, INSERT") if table is ledger else everything
            ours.append(sql.SQL("GRANT {} ON {} TO {}").format(rights, sql.Identifier(table.name), known))
    ours += [
        sql.SQL(statement).format(known)
        for statement in (
            "GRANT SELECT ON alembic_version TO {}",
            "GRANT USAGE, CREATE ON SCHEMA public TO {}",
            "GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {}",
        )
    ]
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    with engine.begin() as connection:
        connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
        cursor = connection.connection.cursor()
        for statement in ours:
            cursor.execute(statement)
        foreign = connection.exec_driver_sql(
            "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relname ~ '^position_snapshots'"
            " AND relnamespace = 'public'::regnamespace AND relowner <> %(role)s::regrole",
            {"role": role},
        ).scalars()
        for name in foreign.all():
            cursor.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(name), known))
    engine.dispose()
