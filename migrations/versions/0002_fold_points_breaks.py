"""Points to fold on from, and breaks."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE fold_points (
            position_id uuid NOT NULL CONSTRAINT fold_points_position_id_fkey REFERENCES positions (id),
            at timestamptz NOT NULL,
            seq bigint NOT NULL,
            key text COLLATE "C" NOT NULL,
            state jsonb NOT NULL,
            CONSTRAINT fold_points_pkey PRIMARY KEY (position_id, at, seq, key)
        )""")
    op.execute("""
        CREATE TABLE breaks (
            id bigint GENERATED ALWAYS AS IDENTITY CONSTRAINT breaks_pkey PRIMARY KEY,
            position_id uuid NOT NULL CONSTRAINT breaks_position_id_fkey REFERENCES positions (id),
            leg varchar(8) NOT NULL,
            kind varchar(32) NOT NULL,
            ours numeric(38, 18) NOT NULL,
            theirs numeric(38, 18) NOT NULL,
            report_id text,
            first_seen_at timestamptz NOT NULL,
            last_seen_at timestamptz NOT NULL,
            resolved_at timestamptz,
            resolution varchar(32)
        )""")
    op.execute(
        "CREATE UNIQUE INDEX breaks_open_key ON breaks (position_id, leg, kind) WHERE resolved_at IS NULL"
    )


def downgrade() -> None:
    op.execute("DROP TABLE breaks")
    op.execute("DROP TABLE fold_points")
