"""Causes of breaks, and when each position was validated."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE validations (
            position_id uuid NOT NULL CONSTRAINT validations_pkey PRIMARY KEY,
            checked_at timestamptz NOT NULL,
            agreed_at timestamptz,
            valid bigint NOT NULL DEFAULT 0,
            repaired bigint NOT NULL DEFAULT 0,
            invalid bigint NOT NULL DEFAULT 0
        )""")
    # A default that is a constant rewrites nothing. Last, since from here on breaks wait for this transaction.
    op.execute("""
        ALTER TABLE breaks
            ADD COLUMN cause varchar(16) NOT NULL DEFAULT 'unknown',
            ADD COLUMN detail text""")
    op.execute("UPDATE breaks SET cause = 'missing_fill' WHERE kind = 'over_reduction' AND resolved_at IS NULL")


def downgrade() -> None:
    op.execute("ALTER TABLE breaks DROP COLUMN detail, DROP COLUMN cause")
    op.execute("DROP TABLE validations")
