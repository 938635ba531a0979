"""The schema: in one step on an empty database, and over the tables of an older service without loss."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest
from alembic import command
from sqlalchemy import Engine, text

from positions.domain.events import Mode, PositionKey
from positions.handlers.take_snapshots import take_snapshots
from positions.queries.snapshots import snapshots
from positions.storage import migrate
from positions.storage.database import connect
from tests.integration.support import apply, execution, stored

BTC = PositionKey("BTCUSDT", Mode.ONE_WAY)
# As a service of the same contract may have made it: narrower numbers, times without zone, nulls.
OLDER = """
    CREATE TABLE positions (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        asset varchar(20) NOT NULL,
        mode varchar(20) NOT NULL DEFAULT 'one-way',
        size numeric(20, 8) NOT NULL DEFAULT 0,
        average_entry_price numeric(20, 8),
        current_price numeric(20, 8),
        unrealized_pnl numeric(20, 8),
        realized_pnl numeric(20, 8),
        long_size numeric(20, 8),
        short_size numeric(20, 8),
        long_avg_price numeric(20, 8),
        short_avg_price numeric(20, 8),
        version integer NOT NULL DEFAULT 1,
        last_updated timestamp NOT NULL DEFAULT now(),
        closed_at timestamp,
        created_at timestamp NOT NULL DEFAULT now(),
        note text,
        CONSTRAINT unique_asset_mode UNIQUE (asset, mode)
    );
    INSERT INTO positions
        (asset, size, average_entry_price, current_price, unrealized_pnl, realized_pnl, version,
        last_updated, note)
    VALUES
        ('BTCUSDT', -1.5, 50000, 49000, 1500, 12.5, 7, '2025-01-15 09:00', 'kept'),
        ('ethusdt', 0, NULL, NULL, NULL, 3, 2, '2025-01-15 09:00', NULL);
"""


@pytest.fixture
def engine(new_empty_database: str) -> Iterator[Engine]:
    made = connect(new_empty_database)
    yield made
    made.dispose()


def test_the_migrated_schema_is_the_tables_of_the_code(new_empty_database: str) -> None:
    migrate.upgrade(new_empty_database)
    migrate.upgrade(new_empty_database)
    command.check(migrate.config(new_empty_database))


def test_an_older_service_s_positions_are_brought_over_without_loss(
    new_empty_database: str, engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.execute(text(OLDER))
    migrate.upgrade(new_empty_database)
    rows = stored(engine)
    row = rows[BTC]
    assert (row["size"], row["realized_pnl"], row["version"]) == (Decimal("-1.5"), Decimal("12.5"), 7)
    assert (row["long_size"], row["short_size"]) == (0, Decimal("-1.5"))
    assert row["last_updated"] == datetime(2025, 1, 15, 9, tzinfo=UTC)
    parts = row["realized_gross"] - row["fees_paid"] + row["funding_received"] + row["realized_adjustment"]
    assert parts == row["realized_pnl"]
    assert rows[PositionKey("ETHUSDT", Mode.ONE_WAY)]["unrealized_pnl"] == 0
    with engine.connect() as connection:
        assert (
            connection.execute(text("SELECT note FROM positions WHERE asset = 'BTCUSDT'")).scalar() == "kept"
        )


def test_fills_fold_on_top_of_a_position_that_was_brought_over(
    new_empty_database: str, engine: Engine
) -> None:
    with engine.begin() as connection:
        connection.execute(text(OLDER))
    migrate.upgrade(new_empty_database)
    apply(engine, [execution("BTCUSDT", "Buy", "0.5", "48000", execution_fees="1")])
    row = stored(engine)[BTC]
    assert (row["size"], row["average_entry_price"], row["version"]) == (-1, 50000, 8)
    # 12.5 brought over, 0.5 x (50000 - 48000) gained, 1 paid.
    assert row["realized_pnl"] == Decimal("1011.5")


NAMES = ("first", "second", "third", "fourth", "fifth")
OLDER_SNAPSHOTS = """
    CREATE TABLE position_snapshots (
        id {id_type} PRIMARY KEY,
        position_id uuid NOT NULL REFERENCES positions (id),
        asset varchar(20) NOT NULL,
        mode varchar(20) NOT NULL,
        snapshot_data {data_type} NOT NULL,
        created_at timestamp NOT NULL DEFAULT now()
    );
    CREATE INDEX idx_snapshots_created_at ON position_snapshots (created_at);
    INSERT INTO position_snapshots (id, position_id, asset, mode, snapshot_data, created_at)
    SELECT v.id::{id_type}, p.id, v.asset, v.mode, v.data::{data_type}, v.at::timestamp
    FROM positions p JOIN (VALUES
        ('{first}', 'BTCUSDT', 'one-way', '{{"size": -1.123456789012345, "note": "a"}}', '2024-11-30 23:59'),
        ('{second}', 'BTCUSDT', 'one_way', '{{"size": -2, "note": "b"}}', '2024-12-01 00:00'),
        ('{third}', 'BTCUSDT', 'one-way', '{{"size": -3, "note": "c"}}', '2024-12-01 00:00'),
        ('{fourth}', 'BTCUSDT', 'one-way', '{{"size": -4, "note": "d"}}', '2024-12-01 00:00:00.000001'),
        ('{fifth}', 'ethusdt', 'one-way', '{{"size": 0, "note": "e"}}', '2025-02-03 04:05')
    ) AS v (id, asset, mode, data, at) ON v.asset = p.asset
    ORDER BY v.at, v.id;
"""


@pytest.mark.parametrize("data_type", ["jsonb", "json", "text"])
@pytest.mark.parametrize("id_type", ["uuid", "text"])
def test_an_older_service_s_snapshots_are_brought_over_without_loss(
    new_empty_database: str, engine: Engine, data_type: str, id_type: str
) -> None:
    ids = [str(UUID(int=number)) for number in range(1, 6)]
    names = dict(zip(NAMES, ids, strict=True))
    with engine.begin() as connection:
        connection.exec_driver_sql(OLDER)
        connection.exec_driver_sql(OLDER_SNAPSHOTS.format(data_type=data_type, id_type=id_type, **names))
    migrate.upgrade(new_empty_database)
    midnight = datetime(2024, 12, 1, tzinfo=UTC)
    with engine.connect() as connection:
        found = snapshots(connection, BTC, limit=100)
        (other,) = snapshots(connection, PositionKey("ETHUSDT", Mode.ONE_WAY), limit=100)
        in_default = connection.exec_driver_sql("SELECT FROM position_snapshots_default").all()
    assert [each.created_at for each in found] == [
        midnight + timedelta(microseconds=2),
        midnight + timedelta(microseconds=1),
        midnight,
        midnight - timedelta(minutes=1),
    ]
    assert [each.snapshot_data["note"] for each in found] == ["d", "c", "b", "a"]
    assert found[3].snapshot_data["size"] == "-1.123456789012345"
    assert {(each.asset, each.mode) for each in found} == {("BTCUSDT", "one-way")}
    assert (other.asset, other.created_at) == ("ETHUSDT", datetime(2025, 2, 3, 4, 5, tzinfo=UTC))
    assert not in_default
    if id_type == "uuid":
        assert [each.id for each in (*found[::-1], other)] == ids


def test_snapshots_go_on_beside_those_that_were_brought_over(new_empty_database: str, engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(OLDER)
        connection.exec_driver_sql(
            OLDER_SNAPSHOTS.format(data_type="jsonb", id_type="text", **dict.fromkeys(NAMES, "x")).replace(
                "PRIMARY KEY", ""
            )
        )
    migrate.upgrade(new_empty_database)
    with engine.begin() as connection:
        at = datetime(2025, 2, 3, 5, tzinfo=UTC)
        (taken,) = take_snapshots(connection, [BTC], at=at, stale_after=timedelta(minutes=5))
        newest, *rest = snapshots(connection, BTC, limit=100)
        assert newest == taken
        assert len(rest) == 4
        assert taken.snapshot_data["size"] == "-1.5"
        assert not connection.exec_driver_sql("SELECT FROM position_snapshots_default").all()


def older(engine: Engine, table: str, rows: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE positions ({table}); INSERT INTO positions {rows}"))


def test_ids_that_the_older_service_made_itself_are_made_by_the_database_now(
    new_empty_database: str, engine: Engine
) -> None:
    older(
        engine,
        "id uuid PRIMARY KEY, asset text, mode text, size numeric, long_size numeric, short_size numeric,"
        " version integer, last_updated timestamp",
        "VALUES ('00000000-0000-0000-0000-000000000001', 'BTCUSDT', 'hedge', -1, 2, 3, 0, '2025-01-01')",
    )
    migrate.upgrade(new_empty_database)
    apply(engine, [execution("ETHUSDT", "Buy", "1", "100")])
    apply(engine, [execution("BTCUSDT", "Buy", "1", "100", position_idx=1)])
    row = stored(engine)[PositionKey("BTCUSDT", Mode.HEDGE)]
    assert (row["long_size"], row["short_size"], row["size"], row["version"]) == (3, -3, 0, 2)


@pytest.mark.parametrize(
    ("table", "rows", "named"),
    [
        ("id bigint PRIMARY KEY, asset text, mode text", "VALUES (1, 'BTCUSDT', 'one-way')", "bigint"),
        (
            "id uuid PRIMARY KEY DEFAULT gen_random_uuid(), asset text, mode text",
            "(asset, mode) VALUES ('BTCUSDT', 'one-way'), ('btcusdt', 'one_way')",
            "BTCUSDT",
        ),
        (
            "id uuid PRIMARY KEY DEFAULT gen_random_uuid(), asset text, mode text",
            "(asset, mode) VALUES ('BTCUSDT', 'cross')",
            "cross",
        ),
    ],
)
def test_what_would_lose_data_is_named_and_nothing_changed(
    new_empty_database: str, engine: Engine, table: str, rows: str, named: str
) -> None:
    older(engine, table, rows)
    with pytest.raises(RuntimeError, match=named):
        migrate.upgrade(new_empty_database)
    with engine.connect() as connection:
        columns = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'positions'::regclass AND attnum > 0"
        assert connection.execute(text(columns)).scalar() == 3
