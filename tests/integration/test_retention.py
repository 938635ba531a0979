"""Retention: what is too old goes, all else stays, and nobody who reads or writes meanwhile waits for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, text

from positions.errors import Unavailable
from positions.settings import load
from positions.storage import attempts, retention
from positions.storage.database import transaction
from positions.tasks.resources import Resources
from positions.tasks.retention import tidy
from tests.integration.support import apply, execution

NOW = datetime(2025, 6, 20, 12, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def own(database_url: str) -> Resources:
    return resources(database_url)


def resources(database_url: str, days: int = 100) -> Resources:
    """Return a worker's own, that keeps snapshots since 2025-03-12T12:00Z."""
    named = {"DATABASE_URL": database_url, "SNAPSHOT_RETENTION_DAYS": str(days)}
    return Resources(load({f"POSITION_MANAGER_{name}": value for name, value in named.items()}))


def fill(engine: Engine, since: datetime, until: datetime, step: timedelta = 6 * timedelta(hours=1)) -> None:
    """Write a snapshot of each of three positions at each step."""
    with transaction(engine) as connection:
        months = connection.execute(
            text("SELECT generate_series(date_trunc('month', :since, 'UTC'), :until, '1 month')"),
            {"since": since, "until": until},
        ).scalars()
        for month in months.all():
            retention.make(connection, month)
        connection.execute(
            text("""
                INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
                SELECT md5(n::text)::uuid, 'A' || n || 'USDT', 'one-way', at, '{}'
                FROM generate_series(1, 3) n, generate_series(:since, :until, :step) at
            """),
            {"since": since, "until": until, "step": step},
        )


def rows(engine: Engine, statement: str, **values: Any) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(text(statement), values).scalars())


def tables(engine: Engine) -> list[str]:
    """Return the tables of months, attached or not."""
    statement = "SELECT relname FROM pg_class WHERE relname ~ '^position_snapshots_20.*' AND relkind = 'r'"
    return sorted(name.removeprefix("position_snapshots_") for name in rows(engine, statement))


def moments(engine: Engine) -> list[datetime]:
    return rows(engine, "SELECT created_at FROM position_snapshots ORDER BY 1")


def test_whole_months_are_dropped_and_the_rest_deleted_to_the_moment(engine: Engine, own: Resources) -> None:
    fill(engine, NOW - 200 * DAY, NOW)
    kept = [at for at in moments(engine) if at >= NOW - 100 * DAY]
    done = tidy(own, now=NOW)
    assert moments(engine) == kept
    assert tables(engine) == [f"2025_0{month}" for month in range(3, 9)]
    assert (done["months_dropped"], done["snapshots_deleted"]) == (3, 3 * 46)
    assert done["partitions_made"] == 2
    again = tidy(own, now=NOW)
    assert set(again.values()) == {0}
    assert moments(engine) == kept


def test_the_oldest_moment_that_is_kept_is_kept(engine: Engine, own: Resources) -> None:
    edge = NOW - 100 * DAY
    microsecond = timedelta(microseconds=1)
    fill(engine, edge - microsecond, edge, step=microsecond)
    tidy(own, now=NOW)
    assert moments(engine) == [edge] * 3


def test_old_rows_of_no_month_s_partition_go_too(engine: Engine, own: Resources) -> None:
    insert = """
        INSERT INTO position_snapshots (position_id, asset, mode, created_at, snapshot_data)
        SELECT gen_random_uuid(), 'BTCUSDT', 'one-way', at, '{}' FROM unnest(:moments) at
    """
    kept = NOW + 200 * DAY
    with transaction(engine) as connection:
        connection.execute(text(insert), {"moments": [NOW - 3000 * DAY, NOW - 101 * DAY, kept]})
    assert tidy(own, now=NOW)["snapshots_deleted"] == 2
    assert moments(engine) == [kept]


def test_more_than_a_chunk_is_deleted_chunk_by_chunk(
    engine: Engine, own: Resources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "CHUNK_PAGES", 1)
    fill(engine, NOW - 111 * DAY, NOW - 99 * DAY)
    kept = [at for at in moments(engine) if at >= NOW - 100 * DAY]
    done = tidy(own, now=NOW)
    assert done["snapshots_deleted"] == 3 * 44
    assert moments(engine) == kept


def test_any_number_at_once_and_one_that_was_killed_do_no_harm(engine: Engine, own: Resources) -> None:
    fill(engine, NOW - 200 * DAY, NOW)
    kept = [at for at in moments(engine) if at >= NOW - 100 * DAY]
    with transaction(engine) as connection:
        first, *_ = retention.months(connection)
        retention.detach(connection, first)  # and no further
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: tidy(own, now=NOW), range(2)))
    assert sum(each["snapshots_deleted"] for each in done) == 3 * 46
    assert moments(engine) == kept
    assert tables(engine) == [f"2025_0{month}" for month in range(3, 9)]


def test_a_month_that_somebody_else_detached_is_left_alone(engine: Engine, own: Resources) -> None:
    fill(engine, NOW - 200 * DAY, NOW)
    with transaction(engine) as connection:
        connection.execute(text("ALTER TABLE position_snapshots DETACH PARTITION position_snapshots_2025_01"))
    tidy(own, now=NOW)
    assert "2025_01" in tables(engine)
    assert "2025_02" not in tables(engine)


def test_who_reads_snapshots_for_long_is_not_queued_behind(engine: Engine, own: Resources) -> None:
    """A month that cannot be had at once is given up for a while: nobody waits in line behind the job."""
    fill(engine, NOW - 200 * DAY, NOW)
    asked = "SELECT count(*) FROM position_snapshots"
    with engine.connect() as reader, ThreadPoolExecutor(1) as pool:
        reader.execute(text(asked))
        job = pool.submit(tidy, own, now=NOW)
        with engine.connect() as another:
            another.execute(text("SET lock_timeout = '2s'"))
            while not job.done():
                another.execute(text(asked))
                another.rollback()
        with pytest.raises(Unavailable):
            job.result()
        # What needs no lock was done.
        left = "SELECT id FROM position_snapshots_2025_03 WHERE created_at < :at"
        assert rows(engine, left, at=NOW - 100 * DAY) == []
        assert tables(engine)[0] == "2024_12"
        reader.rollback()
    assert tidy(own, now=NOW)["months_dropped"] == 3


def test_ledger_positions_and_whatever_is_open_are_never_touched(engine: Engine, own: Resources) -> None:
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100")])
    long_ago = NOW - 400 * DAY
    with transaction(engine) as connection:
        connection.execute(
            text("""
                INSERT INTO quarantine (digest, queue, reason, body, first_seen_at, last_seen_at, replayed_at)
                SELECT n, 'q', 'r', '', :at, :at, CASE n WHEN 1 THEN NULL WHEN 2 THEN :at ELSE :lately END
                FROM generate_series(1, 3) n
            """),
            {"at": long_ago, "lately": NOW - DAY},
        )
        connection.execute(
            text("""
                INSERT INTO breaks
                    (position_id, leg, kind, ours, theirs, first_seen_at, last_seen_at, resolved_at)
                SELECT id, 'net', n, 1, 2, :at, :at, CASE n WHEN 1 THEN NULL WHEN 2 THEN :at ELSE :lately END
                FROM positions, generate_series(1, 3) n
            """),
            {"at": long_ago, "lately": NOW - DAY},
        )
    held = ("SELECT positions::text FROM positions", "SELECT ledger::text FROM ledger")
    before = [rows(engine, statement) for statement in held]
    done = tidy(own, now=NOW)
    assert (done["replayed_deleted"], done["breaks_deleted"]) == (1, 1)
    assert rows(engine, "SELECT digest FROM quarantine ORDER BY 1") == ["1", "3"]
    assert rows(engine, "SELECT kind FROM breaks ORDER BY 1") == ["1", "3"]
    assert [rows(engine, statement) for statement in held] == before


def test_what_was_begun_long_ago_and_never_came_again_is_forgotten(own: Resources, engine: Engine) -> None:
    with transaction(engine) as connection:
        for digest, at in (("old", NOW - 1.1 * DAY), ("new", NOW - 0.9 * DAY)):
            attempts.begun(connection, {digest: "queue"}, alone=True, now=at)
    tidy(own, now=NOW)
    assert rows(engine, "SELECT digest FROM attempts") == ["new"]
