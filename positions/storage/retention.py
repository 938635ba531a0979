"""What is not kept for ever: old snapshots, replayed messages, settled breaks. Ledger and positions are.

Every statement here ends soon, and holds its locks for as long. What waits for a lock that others queue up
behind gives up after `LOCK_WAIT`, so that they need not wait much longer.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Connection

from positions.storage.snapshots import PARTITIONS_LOCK, make_partition

LOCK_WAIT = "100ms"
CHUNK_ROWS = 5000
CHUNK_PAGES = 500
DEFAULT = "position_snapshots_default"
_MONTH_NAME = "^position_snapshots_[0-9]{4}_[0-9]{2}"

# What was detached to be dropped has another name: what somebody else detached is left alone.
_MONTHS = f"""
    SELECT c.relname AS name, left(right(c.relname, -length('position_snapshots_')), 7) AS month
    FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid
    WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'position_snapshots'::regclass)
        AND (i.inhparent = 'position_snapshots'::regclass AND c.relname ~ '{_MONTH_NAME}$'
            OR i.inhparent IS NULL AND c.relname ~ '{_MONTH_NAME}_dropped$' AND c.relkind = 'r')
    ORDER BY c.relname
"""
# Page by page, as they were written in the order of time: each is read once, whatever of it is old.
_DELETE = """
    DELETE FROM {part}
    WHERE ctid >= '({first},0)'::tid AND ctid < '({end},0)'::tid AND created_at < %(before)s
"""
_PAGES = "SELECT pg_relation_size(%(part)s) / current_setting('block_size')::bigint"
_DELETE_SETTLED = """
    DELETE FROM {table}
    WHERE id IN (SELECT id FROM {table} WHERE {settled_at} < %(before)s ORDER BY id LIMIT %(limit)s)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Month:
    """A month of snapshots that may be dropped as a whole."""

    name: str
    """Of its table."""
    begins: datetime
    attached: bool
    """Whether its snapshots can still be seen."""


def months(connection: Connection) -> list[Month]:
    """Return all months there are, the oldest first, and those whose dropping was begun."""
    return [
        Month(
            name=row.name,
            begins=datetime.strptime(row.month, "%Y_%m").replace(tzinfo=UTC),
            attached=not row.name.endswith("_dropped"),
        )
        for row in connection.exec_driver_sql(_MONTHS)
    ]


def make(connection: Connection, month: datetime) -> bool:
    """Make a month's partition (:func:`positions.storage.snapshots.make_partition`); others hardly wait."""
    _bound_waits(connection)
    return make_partition(connection, month)


def detach(connection: Connection, month: Month) -> None:
    """Take the month's snapshots out of sight; nothing if they are.

    Readers and writers of snapshots wait until the transaction ends, which is to be at once. (CONCURRENTLY is
    refused where there is a default partition.)
    """
    _bound_waits(connection)
    if month in months(connection):
        connection.exec_driver_sql(f"ALTER TABLE position_snapshots DETACH PARTITION {month.name}")
        connection.exec_driver_sql(f"ALTER TABLE {month.name} RENAME TO {month.name}_dropped")


def drop(connection: Connection, month: Month) -> None:
    """Drop the table of a month that was detached: nobody waits for that; nothing if it is gone."""
    _bound_waits(connection)
    connection.exec_driver_sql(f"DROP TABLE IF EXISTS {month.name}")


def pages(connection: Connection, part: str) -> int:
    """Return how many pages a partition of the snapshots has."""
    return int(connection.exec_driver_sql(_PAGES, {"part": part}).scalar_one())


def delete_snapshots(connection: Connection, part: str, *, before: datetime, first: int) -> int:
    """Delete what is of before that moment in a chunk of a partition's pages; return how many snapshots."""
    statement = _DELETE.format(part=part, first=first, end=first + CHUNK_PAGES)
    return connection.exec_driver_sql(statement, {"before": before}).rowcount


def delete_replayed(connection: Connection, *, before: datetime) -> int:
    """Delete a chunk of the messages in quarantine that were replayed before that moment; return how many."""
    return _delete_settled(connection, "quarantine", "replayed_at", before)


def delete_resolved(connection: Connection, *, before: datetime) -> int:
    """Delete a chunk of the breaks that were resolved before that moment; return how many."""
    return _delete_settled(connection, "breaks", "resolved_at", before)


def _delete_settled(connection: Connection, table: str, settled_at: str, before: datetime) -> int:
    statement = _DELETE_SETTLED.format(table=table, settled_at=settled_at)
    return connection.exec_driver_sql(statement, {"before": before, "limit": CHUNK_ROWS}).rowcount


def _bound_waits(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WAIT}'")
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(%(lock)s)", {"lock": PARTITIONS_LOCK})
