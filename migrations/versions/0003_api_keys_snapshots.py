"""Keys of the API, the portfolio's version, snapshots by month, and sizes taken over.

Accepts a database that holds the `position_snapshots` of an older service: its rows are moved into the
partitioned table, none is lost.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

AMOUNT = "numeric(38, 18)"


def upgrade() -> None:
    # Sixteen counters, so that writers who commit at the same time seldom wait for each other's.
    op.execute("""
        CREATE TABLE portfolio_versions (
            shard smallint NOT NULL CONSTRAINT portfolio_versions_pkey PRIMARY KEY,
            value bigint NOT NULL DEFAULT 0
        ) WITH (fillfactor = 10)""")
    # Whoever writes positions advances it: also a worker of the release before, and a person with psql. Not on
    # INSERT: a row is made before other rows are locked, and this must be the last lock of a transaction.
    op.execute("""
        CREATE FUNCTION portfolio_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO portfolio_versions AS v (shard, value) VALUES (pg_backend_pid() & 15, 1)
            ON CONFLICT (shard) DO UPDATE SET value = v.value + 1;
            RETURN NULL;
        END $$""")
    op.execute("""
        CREATE TRIGGER portfolio_changed AFTER UPDATE ON positions
        FOR EACH STATEMENT EXECUTE FUNCTION portfolio_changed()""")
    op.execute("""
        CREATE TABLE api_keys (
            name varchar(60) NOT NULL CONSTRAINT api_keys_pkey PRIMARY KEY,
            digest varchar(64) NOT NULL CONSTRAINT api_keys_digest_key UNIQUE
                CONSTRAINT api_keys_digest_check CHECK (digest ~ '^[0-9a-f]{64}$'),
            role varchar(16) NOT NULL CONSTRAINT api_keys_role_check CHECK (role IN ('read', 'operate')),
            requests_per_minute integer
                CONSTRAINT api_keys_requests_per_minute_check CHECK (requests_per_minute > 0),
            created_at timestamptz NOT NULL DEFAULT now(),
            expires_at timestamptz,
            revoked_at timestamptz
        )""")
    _snapshots()
    # What an adjustment took the leg's size to: with it the past can be told from the ledger. Last, since
    # from here on the ledger waits for this transaction.
    op.execute(f"ALTER TABLE ledger ADD COLUMN size_after {AMOUNT}")


def _snapshots() -> None:
    older = op.get_bind().exec_driver_sql("SELECT to_regclass('position_snapshots') IS NOT NULL").scalar()
    if older:
        op.execute("ALTER TABLE position_snapshots RENAME TO position_snapshots_before")
    # The equity curve is read from the key's index alone: the rows are wide, and seldom in memory.
    op.execute("""
        CREATE TABLE position_snapshots (
            id uuid NOT NULL DEFAULT gen_random_uuid(),
            position_id uuid NOT NULL,
            asset varchar(64) NOT NULL,
            mode varchar(16) NOT NULL,
            created_at timestamptz NOT NULL,
            exposure numeric,
            net_exposure numeric,
            unrealized_pnl numeric,
            realized_pnl numeric,
            snapshot_data jsonb NOT NULL,
            CONSTRAINT position_snapshots_key PRIMARY KEY (position_id, created_at)
                INCLUDE (exposure, net_exposure, unrealized_pnl, realized_pnl)
        ) PARTITION BY RANGE (created_at)""")
    op.execute("CREATE TABLE position_snapshots_default PARTITION OF position_snapshots DEFAULT")
    if older:
        _move_older()


def _move_older() -> None:
    # As many as there are: nobody waits for them.
    op.execute("SET LOCAL statement_timeout = 0")
    at = "created_at AT TIME ZONE 'UTC'" if _type("created_at") == "timestamp without time zone" else "created_at"
    id_ = "id" if _type("id") == "uuid" else "gen_random_uuid()"
    op.execute(f"""
        DO $$ DECLARE month timestamptz; BEGIN
            FOR month IN SELECT DISTINCT date_trunc('month', {at}, 'UTC') FROM position_snapshots_before LOOP
                EXECUTE format('CREATE TABLE position_snapshots_%s PARTITION OF position_snapshots'
                    ' FOR VALUES FROM (%L) TO (%L)', to_char(month AT TIME ZONE 'UTC', 'YYYY_MM'), month,
                    (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC');
            END LOOP;
        END $$""")
    # Those of one position at one moment are told apart by microseconds: each is at least one after the last.
    op.execute(f"""
        INSERT INTO position_snapshots (id, position_id, asset, mode, created_at, snapshot_data)
        SELECT id, position_id, asset, mode,
            max(at - place * interval '1 microsecond') OVER (PARTITION BY position_id ORDER BY place)
                + place * interval '1 microsecond',
            data
        FROM (
            SELECT {id_} AS id, position_id::uuid, upper(asset) AS asset,
                CASE lower(mode) WHEN 'hedge' THEN 'hedge' ELSE 'one-way' END AS mode, {at} AS at,
                row_number() OVER (PARTITION BY position_id ORDER BY created_at, ctid) AS place,
                coalesce(snapshot_data::jsonb, '{{}}') AS data
            FROM position_snapshots_before
        ) older""")
    op.execute("DROP TABLE position_snapshots_before")


def _type(name: str) -> str:
    found = op.get_bind().exec_driver_sql(
        "SELECT format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = 'position_snapshots_before'::regclass AND attname = %s", (name,)
    )
    return str(found.scalar())


def downgrade() -> None:
    op.execute("DROP TABLE position_snapshots")
    op.execute("DROP TABLE api_keys")
    op.execute("DROP TRIGGER portfolio_changed ON positions")
    op.execute("DROP FUNCTION portfolio_changed")
    op.execute("DROP TABLE portfolio_versions")
    op.execute("ALTER TABLE ledger DROP COLUMN size_after")
