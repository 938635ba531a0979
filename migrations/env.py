"""How migrations run: one at a time, one transaction each, never waiting long for a lock."""

import time

from alembic import context
from sqlalchemy import create_engine, pool, text

from positions.storage.tables import metadata

TURN_S = 0.5
LOCK = 4_800_001  # advisory lock: two deployments that migrate at once take turns


def run() -> None:
    url = context.config.attributes["url"]
    engine = create_engine(url, poolclass=pool.NullPool, connect_args={"connect_timeout": 5})
    with engine.connect() as connection:
        # Asked again and again: who builds an index CONCURRENTLY waits for all who wait in a statement.
        while not connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK}).scalar_one():
            connection.commit()
            time.sleep(TURN_S)
        # Only from here on: who waits for another deployment's migration may wait.
        connection.execute(
            text("SET lock_timeout = '2s'; SET statement_timeout = '300s'; SET timezone = 'UTC'")
        )
        connection.commit()
        context.configure(
            connection=connection,
            target_metadata=metadata,
            transaction_per_migration=True,
            compare_type=True,
            include_name=lambda name, kind, _: (
                kind != "table" or not str(name).startswith("position_snapshots_")
            ),
        )
        with context.begin_transaction():
            context.run_migrations()
        connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": LOCK})
        connection.commit()
    engine.dispose()


run()
