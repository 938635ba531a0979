"""The portfolio's gross exposure, kept beside its version: a sum over all positions for nobody to take."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# A flat position is worth 0, one without a price is left out: as positions.storage.portfolio has it.
EXPOSURE = "(long_size - short_size) * current_price"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE portfolio_exposures (
            shard smallint NOT NULL CONSTRAINT portfolio_exposures_pkey PRIMARY KEY,
            gross numeric NOT NULL
        ) WITH (fillfactor = 10)""")
    # The sums of 16 counters are exact: each statement adds what it changed, and numeric does not round.
    op.execute(f"""
        CREATE FUNCTION portfolio_exposure_changed() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE change numeric := 0; part numeric; BEGIN
            IF TG_OP <> 'INSERT' THEN
                SELECT sum({EXPOSURE}) INTO part FROM was;
                change := change - coalesce(part, 0);
            END IF;
            IF TG_OP <> 'DELETE' THEN
                SELECT sum({EXPOSURE}) INTO part FROM became;
                change := change + coalesce(part, 0);
            END IF;
            -- Rows are made flat, and before others are locked: this must be the last lock of a transaction.
            IF change <> 0 THEN
                INSERT INTO portfolio_exposures AS e (shard, gross) VALUES (pg_backend_pid() & 15, change)
                ON CONFLICT (shard) DO UPDATE SET gross = e.gross + excluded.gross;
            END IF;
            RETURN NULL;
        END $$""")
    op.execute("""
        CREATE FUNCTION portfolio_emptied() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            DELETE FROM portfolio_exposures;
            RETURN NULL;
        END $$""")
    # From here on writers wait, so that nothing is counted twice or not at all. The name sorts behind that of
    # the trigger which advances the version: counters are locked in one order.
    for operation, tables in {
        "INSERT": "NEW TABLE AS became",
        "UPDATE": "OLD TABLE AS was NEW TABLE AS became",
        "DELETE": "OLD TABLE AS was",
    }.items():
        op.execute(f"""
            CREATE TRIGGER portfolio_exposure_{operation.lower()} AFTER {operation} ON positions
            REFERENCING {tables} FOR EACH STATEMENT EXECUTE FUNCTION portfolio_exposure_changed()""")
    op.execute("""
        CREATE TRIGGER portfolio_exposure_truncate AFTER TRUNCATE ON positions
        FOR EACH STATEMENT EXECUTE FUNCTION portfolio_emptied()""")
    op.execute(f"INSERT INTO portfolio_exposures SELECT 0, coalesce(sum({EXPOSURE}), 0) FROM positions")


def downgrade() -> None:
    for operation in ("insert", "update", "delete", "truncate"):
        op.execute(f"DROP TRIGGER portfolio_exposure_{operation} ON positions")
    op.execute("DROP FUNCTION portfolio_exposure_changed, portfolio_emptied")
    op.execute("DROP TABLE portfolio_exposures")
