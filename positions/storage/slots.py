"""Slots: the moments that scheduled snapshots are of, each of them taken once."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

MISSED_MAX = 200
"""So many missed slots, the newest ones, are made up for; so many more are never taken."""

_DUE = """
    SELECT CASE WHEN EXISTS (SELECT FROM snapshot_slots WHERE at = %(current)s AND taken)
        THEN (SELECT min(at) FROM snapshot_slots WHERE NOT taken AND at >= %(since)s AND at < %(current)s)
        ELSE %(current)s
    END
"""
# Whoever else takes the slot waits here until this transaction ends.
_CLAIM = """
    INSERT INTO snapshot_slots AS s (at, taken) VALUES (%(slot)s, true)
    ON CONFLICT (at) DO UPDATE SET taken = true WHERE NOT s.taken
"""
_MISSED = """
    INSERT INTO snapshot_slots (at, taken)
    SELECT n.at, false
    FROM (SELECT max(s.at) AS at FROM snapshot_slots s WHERE s.at < %(slot)s) AS before,
        generate_series(%(slot)s - %(interval)s, %(slot)s - %(interval)s * %(max)s, - %(interval)s) AS n (at)
    WHERE n.at > before.at AND n.at >= %(since)s
        AND NOT EXISTS (SELECT FROM snapshot_slots s WHERE s.at > %(slot)s AND s.at <= %(now)s)
    ON CONFLICT (at) DO NOTHING
"""
_FORGET = """
    DELETE FROM snapshot_slots WHERE at < %(before)s AND at < (SELECT max(at) FROM snapshot_slots)
"""


def slot_of(now: datetime, interval: timedelta) -> datetime:
    """Return the newest slot at ``now``: whole intervals since the Unix epoch."""
    return now - (now - _EPOCH) % interval


def due(connection: Connection, *, now: datetime, interval: timedelta, since: datetime) -> datetime | None:
    """Return the slot to be taken next: that of ``now``, else the oldest missed one from ``since`` on."""
    values = {"current": slot_of(now, interval), "since": since}
    found: datetime | None = connection.exec_driver_sql(_DUE, values).scalar_one()
    return found


def claim(
    connection: Connection, slot: datetime, *, now: datetime, interval: timedelta, since: datetime
) -> bool:
    """Return whether ``slot`` is this transaction's to take: nobody takes one twice.

    With the newest one up to ``now`` those that were missed before it are noted, back to ``since``, at most
    `MISSED_MAX`. Before the first one ever none was missed. A slot to come, from when a clock was ahead, says
    nothing of what was missed.
    """
    values = {"slot": slot, "now": now, "interval": interval, "since": since, "max": MISSED_MAX}
    if not connection.exec_driver_sql(_CLAIM, values).rowcount:
        return False
    connection.exec_driver_sql(_MISSED, values)
    return True


def forget(connection: Connection, before: datetime) -> None:
    """Remove what is known of slots before that moment; the newest of all stays."""
    connection.exec_driver_sql(_FORGET, {"before": before})
