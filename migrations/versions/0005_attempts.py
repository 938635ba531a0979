"""Attempts of messages that were delivered again."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE attempts (
            digest varchar(64) NOT NULL CONSTRAINT attempts_pkey PRIMARY KEY,
            queue text NOT NULL,
            alone integer NOT NULL,
            first_begun_at timestamptz NOT NULL,
            last_begun_at timestamptz NOT NULL
        )""")


def downgrade() -> None:
    op.execute("DROP TABLE attempts")
