"""Which orders have order reports is asked for every batch: an index of those few rows alone."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Beside readers and writers, however large the ledger is: outside of a transaction, and waiting for those
    # that were open when it began. What an attempt left that was cut short is useless, and costs each insert.
    with op.get_context().autocommit_block():
        op.execute("SET lock_timeout = '10min'; SET statement_timeout = 0")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS ledger_order_reports_idx")
        op.execute(
            "CREATE INDEX CONCURRENTLY ledger_order_reports_idx ON ledger (order_id) WHERE kind = 'order_report'"
        )
        op.execute("SET lock_timeout = '2s'; SET statement_timeout = '300s'")


def downgrade() -> None:
    op.execute("DROP INDEX ledger_order_reports_idx")
