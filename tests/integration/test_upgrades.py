"""Releases follow each other on one database: while others work, and with a way back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError

from positions.errors import Unavailable
from positions.storage import migrate
from positions.storage.database import connect
from tests.integration.processes import Process, environment
from tests.integration.support import apply, assert_positions_are_the_fold_of_the_ledger, executions, stored
from tests.integration.test_migrations import NAMES, OLDER, OLDER_SNAPSHOTS
from tests.services import wait_until

REVISIONS = [script.revision for script in ScriptDirectory.from_config(migrate.config("")).walk_revisions()][
    ::-1
]
STEPS = list(itertools.pairwise(REVISIONS))


@pytest.fixture
def engine(new_empty_database: str) -> Iterator[Engine]:
    made = connect(new_empty_database, lock_timeout="60s")
    yield made
    made.dispose()


def columns(engine: Engine) -> dict[tuple[str, str], tuple[str, bool]]:
    """Return type, and whether an INSERT may leave it out, of each column of each table."""
    statement = """
        SELECT attrelid::regclass::text AS name, attname, format_type(atttypid, atttypmod) AS type,
            NOT attnotnull OR atthasdef OR attidentity <> '' AS optional
        FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
        WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace AND attnum > 0
            AND NOT attisdropped
    """
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(statement)
        return {(row.name, row.attname): (row.type, row.optional) for row in rows}


@pytest.mark.parametrize(("before", "after"), STEPS)
def test_the_release_before_goes_on_working_on_the_new_schema(
    new_empty_database: str, engine: Engine, before: str, after: str
) -> None:
    migrate.upgrade(new_empty_database, before)
    was = columns(engine)
    migrate.upgrade(new_empty_database, after)
    now = columns(engine)
    # What it reads and writes is there, of the same type, and it need not know of what is new.
    assert {name: kind for name, (kind, _) in was.items()} == {
        name: kind for name, (kind, _) in now.items() if name in was
    }
    tables = {table for table, _ in was}
    needed = {
        name for name, (_, optional) in now.items() if name not in was and name[0] in tables and not optional
    }
    assert needed == set()


def test_every_migration_can_be_taken_back_and_made_again_without_a_change_of_figures(
    new_empty_database: str, engine: Engine
) -> None:
    migrate.upgrade(new_empty_database)
    apply(engine, executions(300, assets=5))
    figures = snapshot_of(engine)
    for before, after in reversed(STEPS):
        command.downgrade(migrate.config(new_empty_database), before)
        migrate.upgrade(new_empty_database, after)
    for _, after in STEPS:
        migrate.upgrade(new_empty_database, after)
    command.check(migrate.config(new_empty_database))
    assert snapshot_of(engine) == figures
    assert_positions_are_the_fold_of_the_ledger(engine)
    apply(engine, executions(400, assets=5))
    assert_positions_are_the_fold_of_the_ledger(engine)


def snapshot_of(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        ledger = "SELECT key, kind, quantity, price, fee, executed_at FROM ledger ORDER BY key"
        names = ("size", "average_entry_price", "realized_pnl", "version")
        return [
            *connection.exec_driver_sql(ledger).all(),
            *((key, *(row[name] for name in names)) for key, row in sorted(stored(engine).items())),
        ]


def test_a_migration_lets_others_pass_while_it_waits_for_a_lock(
    new_empty_database: str, engine: Engine
) -> None:
    migrate.upgrade(new_empty_database, "0002")
    waits = threading.Semaphore(0)
    done = threading.Event()

    def upgrade() -> None:
        migrate.upgrade(new_empty_database, sleep=lambda _: waits.release())
        done.set()

    thread = threading.Thread(target=upgrade)
    with engine.connect() as reader, reader.begin():
        # A long report reads the ledger: the migration that adds a column to it cannot begin.
        reader.execute(text("SELECT count(*) FROM ledger"))
        thread.start()
        assert waits.acquire(timeout=60)
        # Who comes after the migration waits for its try at most, and not for the report.
        with engine.connect() as other:
            other.execute(text("SELECT count(*) FROM ledger"))
        assert not done.is_set()
    assert wait_until(done.is_set, limit_s=60)
    thread.join()
    command.check(migrate.config(new_empty_database))


def test_a_lock_that_is_never_given_up_is_told(new_empty_database: str, engine: Engine) -> None:
    migrate.upgrade(new_empty_database, "0002")
    waits: list[float] = []
    with engine.connect() as reader, reader.begin():
        reader.execute(text("SELECT count(*) FROM ledger"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(migrate, "TRIES", 2)
            with pytest.raises(Unavailable, match="pg_stat_activity"):
                migrate.upgrade(new_empty_database, sleep=waits.append)
    assert waits == [migrate.WAIT_S]
    migrate.upgrade(new_empty_database)


def test_deployments_that_migrate_at_once_take_turns(
    new_empty_database: str, engine: Engine, tmp_path: Path
) -> None:
    env = environment(new_empty_database, "amqp://guest:guest@127.0.0.1:9/", "redis://127.0.0.1:9/0")
    with engine.connect() as third:
        third.exec_driver_sql("SELECT pg_advisory_lock(4800001)")
        third.commit()
        both = [Process(["positions.cli", "migrate"], env, tmp_path / f"{each}.log") for each in range(2)]
        time.sleep(3)  # so that both wait for their turn
        assert not any(each.ended for each in both)
        third.exec_driver_sql("SELECT pg_advisory_unlock(4800001)")
    assert [each.wait() for each in both] == [0, 0], [each.log.read_text() for each in both]
    command.check(migrate.config(new_empty_database))


def test_an_older_release_that_waits_for_its_turn_in_a_statement_is_no_hindrance(
    new_empty_database: str, engine: Engine
) -> None:
    migrate.upgrade(new_empty_database, "0007")
    apply(engine, executions(1))

    def older() -> None:
        # Each waits for the other: PostgreSQL ends one of them, and ours comes again.
        with engine.connect() as connection, suppress(OperationalError):
            connection.exec_driver_sql("SELECT pg_advisory_lock(4800001)")

    def waits(statement: str) -> bool:
        waiting = """
            SELECT count(*) FROM pg_stat_activity
            WHERE wait_event_type = 'Lock' AND query LIKE %(query)s AND datname = current_database()
        """
        with engine.connect() as connection:
            return bool(connection.exec_driver_sql(waiting, {"query": f"{statement}%"}).scalar_one())

    threads = [
        threading.Thread(target=migrate.upgrade, args=[new_empty_database]),
        threading.Thread(target=older),
    ]
    with engine.connect() as writer:
        writer.exec_driver_sql("UPDATE ledger SET trace_id = 'open'")
        threads[0].start()
        assert wait_until(lambda: waits("CREATE INDEX CONCURRENTLY"), limit_s=30)
        threads[1].start()
        assert wait_until(lambda: waits("SELECT pg_advisory_lock"), limit_s=30)
        writer.commit()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    command.check(migrate.config(new_empty_database))


def test_an_index_that_was_not_finished_is_built_anew(new_empty_database: str, engine: Engine) -> None:
    migrate.upgrade(new_empty_database, "0007")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE INDEX ledger_order_reports_idx ON ledger (order_id)")
        connection.exec_driver_sql(
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ledger_order_reports_idx'::regclass"
        )
    migrate.upgrade(new_empty_database)
    with engine.connect() as connection:
        assert connection.exec_driver_sql(
            "SELECT indisvalid AND indpred IS NOT NULL FROM pg_index"
            " WHERE indexrelid = 'ledger_order_reports_idx'::regclass"
        ).scalar_one()


def test_the_older_service_can_go_back_to_work_on_its_tables(new_empty_database: str, engine: Engine) -> None:
    """The way back: what it says to its two tables still works, whatever we added."""
    names = {name: f"00000000-0000-0000-0000-00000000000{number}" for number, name in enumerate(NAMES)}
    with engine.begin() as connection:
        connection.exec_driver_sql(OLDER)
        connection.exec_driver_sql(OLDER_SNAPSHOTS.format(data_type="jsonb", id_type="uuid", **names))
    migrate.upgrade(new_empty_database)
    apply(engine, executions(20, assets=3))
    with engine.begin() as connection:
        changed = connection.exec_driver_sql("""
            UPDATE positions SET size = -2, average_entry_price = 49500.5, unrealized_pnl = 3,
                realized_pnl = 4, current_price = 49000, version = version + 1,
                last_updated = '2025-01-15 10:00'
            WHERE asset = 'BTCUSDT' AND mode = 'one-way' AND version = 7
        """)
        assert changed.rowcount == 1
        connection.exec_driver_sql("""
            INSERT INTO positions (asset, mode, size, average_entry_price, unrealized_pnl, realized_pnl)
            VALUES ('SOLUSDT', 'one-way', 1, 150, 0, 0)
        """)
        connection.exec_driver_sql("""
            INSERT INTO position_snapshots (id, position_id, asset, mode, snapshot_data, created_at)
            SELECT gen_random_uuid(), id, asset, mode, '{"size": "-2"}', now() FROM positions
        """)
        kept = connection.exec_driver_sql("SELECT count(*) FROM position_snapshots WHERE asset = 'BTCUSDT'")
        assert kept.scalar_one() == 5
