"""The tables, as SQLAlchemy Core: the one place that names columns.

Sizes, prices and money are ``NUMERIC(38, 18)``; times are ``timestamptz``, UTC.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

Amount = Numeric(38, 18)
Time = DateTime(timezone=True)

positions = Table(
    "positions",
    metadata,
    Column("id", UUID(as_uuid=False), primary_key=True, server_default=func.gen_random_uuid()),
    Column("asset", String(64), nullable=False),
    Column("mode", String(16), nullable=False),
    Column("size", Amount, nullable=False, server_default="0"),
    Column("average_entry_price", Amount),
    Column("current_price", Amount),
    Column("current_price_at", Time),
    Column("current_price_source", String(16)),
    Column("unrealized_pnl", Amount, nullable=False, server_default="0"),
    Column("realized_pnl", Amount, nullable=False, server_default="0"),
    Column("realized_gross", Amount, nullable=False, server_default="0"),
    Column("fees_paid", Amount, nullable=False, server_default="0"),
    Column("funding_received", Amount, nullable=False, server_default="0"),
    Column("realized_adjustment", Amount, nullable=False, server_default="0"),
    Column("long_size", Amount, nullable=False, server_default="0"),
    Column("short_size", Amount, nullable=False, server_default="0"),
    Column("long_avg_price", Amount),
    Column("short_avg_price", Amount),
    Column("version", Integer, nullable=False, server_default="1"),
    Column("opened_at", Time),
    Column("closed_at", Time),
    Column("last_updated", Time, nullable=False, server_default=func.now()),
    Column("last_snapshot_at", Time),
    Column("created_at", Time, nullable=False, server_default=func.now()),
    # What the fold needs to go on from here, exact (positions.storage.codec). NULL: nothing folded yet,
    # or a row brought over from an older service.
    Column("state", JSONB),
    UniqueConstraint("asset", "mode"),
    CheckConstraint("mode IN ('one-way', 'hedge')", name="mode"),
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("position_id", UUID(as_uuid=False), ForeignKey("positions.id"), nullable=False),
    # What makes an entry new: the execution's id, or what stands in for it (domain rules, Convergence).
    Column("key", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("leg", String(8), nullable=False),
    Column("quantity", Amount, nullable=False),
    Column("price", Amount, nullable=False),
    # NULL: an order report that does not say.
    Column("fee", Amount),
    Column("executed_at", Time, nullable=False),
    Column("time_source", String(8), nullable=False),
    Column("venue_seq", BigInteger),
    Column("order_id", Text),
    Column("exec_type", String(32), nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("recorded_at", Time, nullable=False, server_default=func.now()),
    # The size an adjustment took its leg to; NULL for whatever is no adjustment.
    Column("size_after", Amount),
    UniqueConstraint("key"),
    Index(None, "position_id", "executed_at"),
    Index("ledger_order_id_idx", "order_id", postgresql_where=text("order_id IS NOT NULL")),
    Index("ledger_order_reports_idx", "order_id", postgresql_where=text("kind = 'order_report'")),
)

# States of the past to fold on from when a fill comes late: nothing that could not be folded anew.
fold_points = Table(
    "fold_points",
    metadata,
    Column("position_id", UUID(as_uuid=False), ForeignKey("positions.id"), primary_key=True),
    Column("at", Time, primary_key=True),
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text(collation="C"), primary_key=True),
    Column("state", JSONB, nullable=False),
)

breaks = Table(
    "breaks",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("position_id", UUID(as_uuid=False), ForeignKey("positions.id"), nullable=False),
    Column("leg", String(8), nullable=False),
    Column("kind", String(32), nullable=False),
    # The two figures that differ: what our fills say, and what the venue says.
    Column("ours", Amount, nullable=False),
    Column("theirs", Amount, nullable=False),
    Column("report_id", Text),
    # Why they differ, as far as there is evidence (positions.domain.breaks.Cause), and the evidence in words.
    Column("cause", String(16), nullable=False, server_default="unknown"),
    Column("detail", Text),
    Column("first_seen_at", Time, nullable=False),
    Column("last_seen_at", Time, nullable=False),
    Column("resolved_at", Time),
    Column("resolution", String(32)),
    Index(
        "breaks_open_key",
        "position_id",
        "leg",
        "kind",
        unique=True,
        postgresql_where=text("resolved_at IS NULL"),
    ),
)

# When each position was last validated, and what became of it: a run that was cut short goes on from
# here. No foreign key: to add it would hold up writers, and nobody deletes positions.
validations = Table(
    "validations",
    metadata,
    Column("position_id", UUID(as_uuid=False), primary_key=True),
    Column("checked_at", Time, nullable=False),
    # When the venue last said the same: what is missing happened after it.
    Column("agreed_at", Time),
    Column("valid", BigInteger, nullable=False, server_default="0"),
    Column("repaired", BigInteger, nullable=False, server_default="0"),
    Column("invalid", BigInteger, nullable=False, server_default="0"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("message_id", UUID(as_uuid=False), nullable=False, server_default=func.gen_random_uuid()),
    # Event type and routing key: position_updated, portfolio_updated, position_snapshot_created.
    Column("event_type", String(64), nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("created_at", Time, nullable=False, server_default=func.now()),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    # SHA-256 of queue and body: a message that comes again is counted, not stored again.
    Column("digest", String(64), nullable=False),
    Column("queue", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("field", Text),
    Column("trace_id", Text),
    Column("headers", JSONB, nullable=False, server_default="{}"),
    Column("properties", JSONB, nullable=False, server_default="{}"),
    Column("body", LargeBinary, nullable=False),
    Column("times_seen", Integer, nullable=False, server_default="1"),
    Column("first_seen_at", Time, nullable=False, server_default=func.now()),
    Column("last_seen_at", Time, nullable=False, server_default=func.now()),
    Column("replayed_at", Time),
    UniqueConstraint("digest"),
)

# Messages delivered again that were begun and did not end yet (positions.storage.attempts).
attempts = Table(
    "attempts",
    metadata,
    # As in quarantine.
    Column("digest", String(64), primary_key=True),
    Column("queue", Text, nullable=False),
    # How often it was begun with nothing beside it.
    Column("alone", Integer, nullable=False),
    Column("first_begun_at", Time, nullable=False),
    Column("last_begun_at", Time, nullable=False),
)

# One row: how the portfolio stood when portfolio_updated was last published.
portfolio_mark = Table(
    "portfolio_mark",
    metadata,
    Column("id", SmallInteger, primary_key=True, server_default="1", autoincrement=False),
    Column("published_at", Time, nullable=False),
    # The sum of all versions then: whatever is committed changes it, in whatever order.
    Column("versions", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="single"),
)

# Their sum grows with every committed change of any position, by a trigger: one number that says whether
# anything changed.
portfolio_versions = Table(
    "portfolio_versions",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False, server_default="0"),
)

# Their sum is the gross exposure of all priced positions, exactly, kept by triggers with every change.
portfolio_exposures = Table(
    "portfolio_exposures",
    metadata,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("gross", Numeric, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("name", String(60), primary_key=True),
    # SHA-256 of the key, in hex; the key itself is nowhere.
    Column("digest", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    # NULL: the default.
    Column("requests_per_minute", Integer),
    Column("created_at", Time, nullable=False, server_default=func.now()),
    Column("expires_at", Time),
    Column("revoked_at", Time),
    UniqueConstraint("digest"),
    CheckConstraint("digest ~ '^[0-9a-f]{64}$'", name="digest"),
    CheckConstraint("role IN ('read', 'operate')", name="role"),
    CheckConstraint("requests_per_minute > 0", name="requests_per_minute"),
)

# The moments that scheduled snapshots are of; not taken: missed, and to be made up for.
snapshot_slots = Table(
    "snapshot_slots",
    metadata,
    Column("at", Time, primary_key=True),
    Column("taken", Boolean, nullable=False),
)

# Partitioned by month of created_at (positions.storage.snapshots); no foreign key, which would slow every
# insert for a table whose rows nobody deletes.
position_snapshots = Table(
    "position_snapshots",
    metadata,
    Column("id", UUID(as_uuid=False), nullable=False, server_default=func.gen_random_uuid()),
    Column("position_id", UUID(as_uuid=False), nullable=False),
    Column("asset", String(64), nullable=False),
    Column("mode", String(16), nullable=False),
    # The moment the snapshot is of; that of its slot where it was taken on a schedule.
    Column("created_at", Time, nullable=False),
    # NULL in exposures: open without a price. NULL in any: a row of an older service.
    Column("exposure", Numeric),
    Column("net_exposure", Numeric),
    Column("unrealized_pnl", Numeric),
    Column("realized_pnl", Numeric),
    # The position object, what its realized PnL is made of, and the state to fold on from.
    Column("snapshot_data", JSONB, nullable=False),
    PrimaryKeyConstraint("position_id", "created_at", name="position_snapshots_key"),
    postgresql_partition_by="RANGE (created_at)",
)
