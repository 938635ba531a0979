"""Positions, ledger, outbox, quarantine.

Accepts a database that already holds the `positions` table of an older service: its columns and rows
stay, what is missing is added, and numbers are widened. Such a row has no `state`: the service takes its
figures over as a first report (positions.storage.positions).
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

AMOUNT = "numeric(38, 18)"

# name, type, not null, default
POSITIONS = [
    ("asset", "varchar(64)", True, None),
    ("mode", "varchar(16)", True, "'one-way'"),
    ("size", AMOUNT, True, "0"),
    ("average_entry_price", AMOUNT, False, None),
    ("current_price", AMOUNT, False, None),
    ("current_price_at", "timestamptz", False, None),
    ("current_price_source", "varchar(16)", False, None),
    ("unrealized_pnl", AMOUNT, True, "0"),
    ("realized_pnl", AMOUNT, True, "0"),
    ("realized_gross", AMOUNT, True, "0"),
    ("fees_paid", AMOUNT, True, "0"),
    ("funding_received", AMOUNT, True, "0"),
    ("realized_adjustment", AMOUNT, True, "0"),
    ("long_size", AMOUNT, True, "0"),
    ("short_size", AMOUNT, True, "0"),
    ("long_avg_price", AMOUNT, False, None),
    ("short_avg_price", AMOUNT, False, None),
    ("version", "integer", True, "1"),
    ("opened_at", "timestamptz", False, None),
    ("closed_at", "timestamptz", False, None),
    ("last_updated", "timestamptz", True, "now()"),
    ("last_snapshot_at", "timestamptz", False, None),
    ("created_at", "timestamptz", True, "now()"),
    ("state", "jsonb", False, None),
]


def upgrade() -> None:
    op.execute("CREATE TABLE IF NOT EXISTS positions (id uuid CONSTRAINT positions_pkey PRIMARY KEY DEFAULT gen_random_uuid())")
    _refuse_what_would_lose_data()
    op.execute("ALTER TABLE positions ALTER COLUMN id SET DEFAULT gen_random_uuid()")
    for name, kind, required, default in POSITIONS:
        op.execute(f"ALTER TABLE positions ADD COLUMN IF NOT EXISTS {name} {kind} DEFAULT {default or 'NULL'}")
        if default:
            op.execute(f"UPDATE positions SET {name} = {default} WHERE {name} IS NULL")
        # A time without zone was UTC; a number or text only gets wider.
        as_utc = f" USING {name} AT TIME ZONE 'UTC'" if kind == "timestamptz" and _type(name) == "timestamp without time zone" else ""
        if _type(name, full=True) != _canonical(kind):
            op.execute(f"ALTER TABLE positions ALTER COLUMN {name} DROP DEFAULT")
            op.execute(f"ALTER TABLE positions ALTER COLUMN {name} TYPE {kind}{as_utc}")
        if default:
            op.execute(f"ALTER TABLE positions ALTER COLUMN {name} SET DEFAULT {default}")
        if required:
            op.execute(f"ALTER TABLE positions ALTER COLUMN {name} SET NOT NULL")
    op.execute("UPDATE positions SET version = 1 WHERE version < 1")
    op.execute("""
        UPDATE positions SET mode = CASE lower(mode) WHEN 'hedge' THEN 'hedge' ELSE 'one-way' END
        WHERE mode NOT IN ('one-way', 'hedge')""")
    op.execute("UPDATE positions SET long_size = abs(long_size) WHERE long_size < 0")
    op.execute("UPDATE positions SET short_size = -short_size WHERE short_size > 0")
    # What an older service did not keep follows from what it did: exposure is read from the legs, and the
    # parts of the realized PnL sum to it.
    op.execute("""
        UPDATE positions SET long_size = greatest(size, 0), short_size = least(size, 0)
        WHERE mode = 'one-way' AND long_size = 0 AND short_size = 0 AND size <> 0""")
    op.execute("UPDATE positions SET opened_at = created_at WHERE size <> 0 AND opened_at IS NULL")
    op.execute("""
        UPDATE positions SET realized_adjustment = realized_pnl - realized_gross + fees_paid - funding_received
        WHERE realized_pnl <> realized_gross - fees_paid + funding_received + realized_adjustment""")
    op.execute("UPDATE positions SET asset = upper(asset) WHERE asset <> upper(asset)")
    op.execute("ALTER TABLE positions DROP CONSTRAINT IF EXISTS positions_mode_check")
    op.execute("ALTER TABLE positions ADD CONSTRAINT positions_mode_check CHECK (mode IN ('one-way', 'hedge'))")
    op.execute("ALTER TABLE positions DROP CONSTRAINT IF EXISTS positions_asset_mode_key")
    op.execute("ALTER TABLE positions ADD CONSTRAINT positions_asset_mode_key UNIQUE (asset, mode)")
    # Rows change often: leave room for updates in place, and keep no index on a column that changes.
    op.execute("ALTER TABLE positions SET (fillfactor = 50)")
    op.execute(f"""
        CREATE TABLE ledger (
            id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT ledger_pkey PRIMARY KEY,
            position_id uuid NOT NULL CONSTRAINT ledger_position_id_fkey REFERENCES positions (id),
            key text NOT NULL CONSTRAINT ledger_key_key UNIQUE,
            kind varchar(16) NOT NULL,
            leg varchar(8) NOT NULL,
            quantity {AMOUNT} NOT NULL,
            price {AMOUNT} NOT NULL,
            fee {AMOUNT},
            executed_at timestamptz NOT NULL,
            time_source varchar(8) NOT NULL,
            venue_seq bigint,
            order_id text,
            exec_type varchar(32) NOT NULL,
            trace_id text NOT NULL,
            recorded_at timestamptz NOT NULL DEFAULT now()
        )""")
    op.execute("CREATE INDEX ledger_position_id_executed_at_idx ON ledger (position_id, executed_at)")
    op.execute("CREATE INDEX ledger_order_id_idx ON ledger (order_id) WHERE order_id IS NOT NULL")
    op.execute("""
        CREATE TABLE outbox (
            id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT outbox_pkey PRIMARY KEY,
            message_id uuid NOT NULL DEFAULT gen_random_uuid(),
            event_type varchar(64) NOT NULL,
            trace_id text NOT NULL,
            body text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now()
        )""")
    op.execute("""
        CREATE TABLE quarantine (
            id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT quarantine_pkey PRIMARY KEY,
            digest varchar(64) NOT NULL CONSTRAINT quarantine_digest_key UNIQUE,
            queue text NOT NULL,
            reason text NOT NULL,
            field text,
            trace_id text,
            headers jsonb NOT NULL DEFAULT '{}',
            properties jsonb NOT NULL DEFAULT '{}',
            body bytea NOT NULL,
            times_seen integer NOT NULL DEFAULT 1,
            first_seen_at timestamptz NOT NULL DEFAULT now(),
            last_seen_at timestamptz NOT NULL DEFAULT now(),
            replayed_at timestamptz
        )""")
    op.execute("""
        CREATE TABLE portfolio_mark (
            id smallint CONSTRAINT portfolio_mark_pkey PRIMARY KEY DEFAULT 1,
            published_at timestamptz NOT NULL,
            versions bigint NOT NULL,
            CONSTRAINT portfolio_mark_single_check CHECK (id = 1)
        )""")


def _refuse_what_would_lose_data() -> None:
    """Name what stands in the way before anything is changed."""
    if _type("id") != "uuid":
        raise RuntimeError(
            f"positions.id is of type {_type('id')}: cast it to uuid, with what refers to it, and migrate again"
        )
    columns = {row[0] for row in op.get_bind().exec_driver_sql("SELECT attname FROM pg_attribute WHERE attrelid = 'positions'::regclass")}
    if not {"asset", "mode"} <= columns:
        return
    twice = op.get_bind().exec_driver_sql(
        "SELECT upper(asset), count(*) FROM positions GROUP BY upper(asset),"
        " CASE lower(mode) WHEN 'hedge' THEN 'hedge' ELSE 'one-way' END HAVING count(*) > 1 LIMIT 10"
    )
    if names := ", ".join(sorted(row[0] for row in twice)):
        raise RuntimeError(f"more than one position of one asset and mode: {names}: merge them, and migrate again")
    unknown = op.get_bind().exec_driver_sql(
        "SELECT DISTINCT mode FROM positions"
        " WHERE lower(mode) NOT IN ('one-way', 'one_way', 'oneway', 'hedge', '0', '') LIMIT 10"
    )
    if names := ", ".join(sorted(row[0] for row in unknown)):
        raise RuntimeError(f"positions of unknown mode: {names}: make them one-way or hedge, and migrate again")


def downgrade() -> None:
    # `positions` may be another service's: it stays, with what was added.
    for table in ("portfolio_mark", "quarantine", "outbox", "ledger"):
        op.execute(f"DROP TABLE {table}")


def _type(name: str, *, full: bool = False) -> str:
    column = "format_type(atttypid, atttypmod)" if full else "format_type(atttypid, NULL)"
    found = op.get_bind().exec_driver_sql(
        f"SELECT {column} FROM pg_attribute WHERE attrelid = 'positions'::regclass AND attname = %s", (name,)
    )
    return str(found.scalar_one())


def _canonical(kind: str) -> str:
    names = {"timestamptz": "timestamp with time zone", AMOUNT: "numeric(38,18)"}
    return names.get(kind, kind.replace("varchar", "character varying"))
