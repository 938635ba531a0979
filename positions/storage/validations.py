"""When each position was last validated, and with which outcome."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Literal

from sqlalchemy import Connection, Engine

from positions.domain.events import PositionKey

Outcome = Literal["valid", "repaired", "invalid"]
OUTCOMES: tuple[Outcome, ...] = ("valid", "repaired", "invalid")

LOCK = 4_800_004
"""Advisory lock: of several runs at once one works."""

_DUE = """
    SELECT p.asset, p.mode FROM positions p LEFT JOIN validations v ON v.position_id = p.id
    ORDER BY v.checked_at NULLS FIRST, p.asset, p.mode LIMIT %(limit)s
"""
_RECORD = """
    INSERT INTO validations AS v (position_id, checked_at, agreed_at, valid, repaired, invalid)
    SELECT p.id, %(now)s, %(agreed)s, %(valid)s, %(repaired)s, %(invalid)s
    FROM positions p WHERE p.asset = %(asset)s AND p.mode = %(mode)s
    ON CONFLICT (position_id) DO UPDATE SET checked_at = excluded.checked_at,
        agreed_at = coalesce(excluded.agreed_at, v.agreed_at), valid = v.valid + excluded.valid,
        repaired = v.repaired + excluded.repaired, invalid = v.invalid + excluded.invalid
"""
_OPEN = "SELECT cause, count(*) AS breaks FROM breaks WHERE resolved_at IS NULL GROUP BY cause ORDER BY cause"


@contextmanager
def alone(engine: Engine) -> Iterator[bool]:
    """Tell whether no other run is at work; none begins until the block ends. No transaction is held."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            alone = connection.exec_driver_sql(
                "SELECT pg_try_advisory_lock(%(lock)s)", {"lock": LOCK}
            ).scalar()
            yield bool(alone)
        finally:
            connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")


def due(connection: Connection, *, limit: int | None) -> list[PositionKey]:
    """Return the positions to validate next: those never validated, then those longest ago."""
    return [PositionKey.of(*row) for row in connection.exec_driver_sql(_DUE, {"limit": limit})]


def agreed_at(connection: Connection, position_id: str) -> datetime | None:
    """Return when the venue last said the same of a position; None if it never did."""
    statement = "SELECT agreed_at FROM validations WHERE position_id = %(id)s"
    found: datetime | None = connection.exec_driver_sql(statement, {"id": position_id}).scalar()
    return found


def record(
    connection: Connection, key: PositionKey, outcome: Outcome, *, agreed: datetime | None, now: datetime
) -> None:
    """Keep that a position was validated, with which outcome, and until when the venue said the same."""
    counts: dict[str, int] = {each: int(each == outcome) for each in OUTCOMES}
    connection.exec_driver_sql(
        _RECORD, {"asset": key.asset, "mode": key.mode, "now": now, "agreed": agreed, **counts}
    )


def outcomes(connection: Connection) -> Mapping[str, int]:
    """Return how often positions were validated on the schedule, by outcome."""
    sums = ", ".join(f"coalesce(sum({each}), 0)::bigint AS {each}" for each in OUTCOMES)
    return dict(connection.exec_driver_sql(f"SELECT {sums} FROM validations").mappings().one())


def open_breaks(connection: Connection) -> Mapping[str, int]:
    """Return how many breaks stand, by cause."""
    return {row.cause: row.breaks for row in connection.exec_driver_sql(_OPEN)}
