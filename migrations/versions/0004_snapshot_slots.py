"""Which scheduled snapshots were taken, and which are yet to be."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE snapshot_slots (
            at timestamptz NOT NULL CONSTRAINT snapshot_slots_pkey PRIMARY KEY,
            taken boolean NOT NULL
        )""")


def downgrade() -> None:
    op.execute("DROP TABLE snapshot_slots")
