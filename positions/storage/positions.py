"""Stored positions: locked in key order, written where their version still matches."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, event

from positions.domain.events import LegName, Mode, PositionKey, Report
from positions.domain.figures import Figures
from positions.domain.leg import Leg
from positions.domain.numbers import ZERO
from positions.domain.position import Held, Mark, Policy, State, advanced, empty, with_report
from positions.domain.values import value_class
from positions.errors import ConcurrencyConflict
from positions.storage import arrays, codec


@value_class(frozen=True, kw_only=True, slots=True)
class Stored:
    """A position as it is in the database."""

    id: str
    version: int
    """0 for a row that this transaction made and did not write yet."""
    state: State
    created_at: datetime
    last_snapshot_at: datetime | None
    adopted: bool = False
    """Whether an older service wrote the row, and ours has not since."""


class Kept(NamedTuple):
    """A position as a connection wrote it."""

    id: str
    version: int
    last_updated: datetime
    state: State


_KEPT = "positions_kept"
KEPT_MAX = 10_000
"""So many positions are kept for each connection, those that it wrote last."""

_KEY = {"asset": "text", "mode": "text"}
_KEYS = f"{arrays.unnest(_KEY)} AS v (asset, mode)"
_CREATE = f"""
    INSERT INTO positions (asset, mode, version)
    SELECT v.asset, v.mode, 0 FROM {_KEYS}
    WHERE NOT EXISTS (SELECT FROM positions p WHERE p.asset = v.asset AND p.mode = v.mode)
    ORDER BY v.asset, v.mode
    ON CONFLICT (asset, mode) DO NOTHING
    RETURNING asset, mode
"""
_IDS = f"""
    SELECT p.asset, p.mode, p.id::text FROM positions p JOIN {_KEYS} ON p.asset = v.asset AND p.mode = v.mode
"""
_REMOVE = (
    f"DELETE FROM positions p USING {_KEYS} WHERE p.asset = v.asset AND p.mode = v.mode AND p.version = 0"
)
_READ = f"""
    SELECT p.id::text, p.asset, p.mode, p.version, p.state, p.created_at, p.last_snapshot_at,
        false AS is_known
    FROM positions p JOIN {_KEYS} ON p.asset = v.asset AND p.mode = v.mode
    ORDER BY p.asset, p.mode
"""
_LOCK = _READ + " FOR NO KEY UPDATE OF p"
_LOCK_FREE = _LOCK + " SKIP LOCKED"
_KNOWN = {**_KEY, "version": "integer", "last_updated": "timestamptz"}
_IS_KNOWN = "p.version = v.version AND p.last_updated = v.last_updated"
_LOCK_UNKNOWN = f"""
    SELECT p.id::text, p.asset, p.mode, p.version, CASE WHEN {_IS_KNOWN} THEN NULL ELSE p.state END,
        p.created_at, p.last_snapshot_at, {_IS_KNOWN} AS is_known
    FROM positions p JOIN {arrays.unnest(_KNOWN)} AS v ({", ".join(_KNOWN)})
        ON p.asset = v.asset AND p.mode = v.mode
    ORDER BY p.asset, p.mode
    FOR NO KEY UPDATE OF p
"""

_FIGURES: Mapping[str, str] = {
    "size": "numeric",
    "average_entry_price": "numeric",
    "current_price": "numeric",
    "current_price_at": "timestamptz",
    "current_price_source": "text",
    "unrealized_pnl": "numeric",
    "realized_pnl": "numeric",
    "realized_gross": "numeric",
    "fees_paid": "numeric",
    "funding_received": "numeric",
    "realized_adjustment": "numeric",
    "long_size": "numeric",
    "short_size": "numeric",
    "long_avg_price": "numeric",
    "short_avg_price": "numeric",
    "opened_at": "timestamptz",
    "closed_at": "timestamptz",
}
_WRITTEN: Mapping[str, str] = {"id": "uuid", "version": "integer", "state": "jsonb", **_FIGURES}
_WRITE = f"""
    UPDATE positions p
    SET {", ".join(f"{name} = v.{name}" for name in _FIGURES)},
        state = v.state, last_updated = %(now)s, version = p.version + 1
    FROM {arrays.unnest(_WRITTEN)} AS v ({", ".join(_WRITTEN)})
    WHERE p.id = v.id AND p.version = v.version
"""


def identify(
    connection: Connection, keys: Collection[PositionKey]
) -> tuple[dict[PositionKey, str], set[PositionKey]]:
    """Return the ids of ``keys``, and for which of them a row was made here: flat, at version 0.

    Those that this connection has written are known: nobody deletes positions. If somebody does by hand, the
    ledger's foreign key refuses the next entry, or a lock is missing, and all of it begins anew with nothing
    known.
    """
    kept = _kept(connection)
    ids = {key: kept[key].id for key in keys if key in kept}
    new = set(keys) - ids.keys()
    if not new:
        return ids, new
    made = {PositionKey.of(*row) for row in connection.exec_driver_sql(_CREATE, _arrays(new))}
    rows = connection.exec_driver_sql(_IDS, _arrays(new))
    return ids | {PositionKey.of(asset, mode): id_ for asset, mode, id_ in rows}, made


def remove(connection: Connection, keys: Iterable[PositionKey]) -> None:
    """Take back rows that this transaction made and has no use for."""
    if wanted := list(keys):
        connection.exec_driver_sql(_REMOVE, _arrays(wanted))


def lock(connection: Connection, keys: Iterable[PositionKey]) -> dict[PositionKey, Stored]:
    """Return the positions of ``keys``, locked until the transaction ends.

    Rows are locked in key order, so that workers whose batches overlap queue up instead of deadlocking.
    """
    return _load(connection, _LOCK, keys)


def lock_to_go_on(connection: Connection, keys: Iterable[PositionKey]) -> dict[PositionKey, Stored]:
    """Return the positions of ``keys``, locked as by `lock`, for events to be folded into them.

    A state that this very connection wrote last, and nobody since, is not read again (decision 0020).
    """
    kept = _kept(connection)
    ordered = sorted(set(keys))
    known = [kept.get(key) for key in ordered]
    columns: dict[str, Iterable[Any]] = {
        "asset": [key.asset for key in ordered],
        "mode": [key.mode for key in ordered],
        "version": [each and each.version for each in known],
        "last_updated": [each and each.last_updated for each in known],
    }
    rows = connection.exec_driver_sql(_LOCK_UNKNOWN, arrays.literals(_KNOWN, columns)).all()
    return _stored(connection, rows, kept)


def lock_free(connection: Connection, keys: Iterable[PositionKey]) -> dict[PositionKey, Stored]:
    """Return those of the positions that nobody else has locked, locked as by `lock`: waits for none."""
    return _load(connection, _LOCK_FREE, keys)


def read(connection: Connection, keys: Iterable[PositionKey]) -> dict[PositionKey, Stored]:
    """Return the positions of ``keys`` without a lock: `write` tells whether one changed since."""
    return _load(connection, _READ, keys)


def write(connection: Connection, changes: Sequence[tuple[Stored, State, Figures]], *, now: datetime) -> None:
    """Write new states and figures, each where the version is still the one that was read.

    Raises:
        ConcurrencyConflict: another writer was first at one of them; nothing of the transaction may stay.
    """
    if not changes:
        return
    columns: dict[str, Iterable[Any]] = {
        "id": [stored.id for stored, _, _ in changes],
        "version": [stored.version for stored, _, _ in changes],
        "state": [codec.dumps(codec.encode(state)) for _, state, _ in changes],
        **{name: [getattr(figures, name) for _, _, figures in changes] for name in _FIGURES},
    }
    result = connection.exec_driver_sql(_WRITE, {"now": now, **arrays.literals(_WRITTEN, columns)})
    if result.rowcount != len(changes):
        raise ConcurrencyConflict(
            f"{len(changes) - result.rowcount} of {len(changes)} positions changed meanwhile"
        )
    if _KEPT in connection.info:
        kept = _kept(connection)
        for stored, state, _ in changes:
            kept.pop(state.key, None)  # so that what was written last is last
            kept[state.key] = Kept(stored.id, stored.version + 1, now, state)
        while len(kept) > KEPT_MAX:
            del kept[next(iter(kept))]


def _kept(connection: Connection) -> dict[PositionKey, Kept]:
    """Return what a connection to the database keeps of the positions it wrote (decision 0020)."""
    kept: dict[PositionKey, Kept] = connection.info.setdefault(_KEPT, {})
    return kept


@event.listens_for(Engine, "rollback")
@event.listens_for(Engine, "rollback_savepoint")
def _forget(connection: Connection, *_: Any) -> None:
    """Forget it: some of it was not written after all."""
    if not connection.invalidated:
        connection.info.pop(_KEPT, None)


def figures_of(connection: Connection, id_: str) -> Mapping[str, Any]:
    """Return the stored figures of a position."""
    statement = f"SELECT {', '.join(_FIGURES)} FROM positions WHERE id = %(id)s"
    return dict(connection.exec_driver_sql(statement, {"id": id_}).mappings().one())


_DUE = """
    SELECT asset, mode,
        coalesce(current_price, average_entry_price, long_avg_price, short_avg_price) AS price,
        coalesce(current_price_at, last_updated) AS at,
        CASE WHEN current_price IS NULL THEN 'entry' ELSE coalesce(current_price_source, '') END AS source
    FROM positions
    WHERE (long_size <> 0 OR short_size <> 0)
        AND (current_price IS NULL OR current_price_at IS NULL OR current_price_at < %(before)s)
    ORDER BY current_price_at NULLS FIRST, asset, mode
    LIMIT %(limit)s
"""


def priced_before(connection: Connection, before: datetime, *, limit: int) -> dict[PositionKey, Mark | None]:
    """Return the open positions whose price is missing or older, the oldest first, each with what is known.

    Of a position without a price that is its average entry, as of its last change.
    """
    return {
        PositionKey.of(row.asset, row.mode): None
        if row.price is None
        else Mark(price=row.price, at=row.at, source=row.source)
        for row in connection.exec_driver_sql(_DUE, {"before": before, "limit": limit})
    }


def keys(connection: Connection, *, asset: str | None = None) -> list[PositionKey]:
    """Return the keys of all positions, or of those in one asset, in order."""
    statement = (
        "SELECT asset, mode FROM positions WHERE %(asset)s IS NULL OR asset = %(asset)s ORDER BY asset, mode"
    )
    return [PositionKey.of(*row) for row in connection.exec_driver_sql(statement, {"asset": asset})]


def _arrays(of: Iterable[PositionKey]) -> dict[str, str]:
    ordered = sorted(set(of))
    return arrays.literals(
        _KEY, {"asset": [key.asset for key in ordered], "mode": [key.mode for key in ordered]}
    )


def _load(connection: Connection, statement: str, keys: Iterable[PositionKey]) -> dict[PositionKey, Stored]:
    return _stored(connection, connection.exec_driver_sql(statement, _arrays(keys)).all(), {})


def _stored(
    connection: Connection, rows: Iterable[Any], kept: Mapping[PositionKey, Kept]
) -> dict[PositionKey, Stored]:
    found = {}
    for id_, asset, mode, version, data, created_at, last_snapshot_at, is_known in rows:
        key = PositionKey.of(asset, mode)
        state = kept[key].state if is_known else None
        adopted = state is None and data is None and version > 0
        found[key] = Stored(
            id=id_,
            version=version,
            state=state or (_adopted(connection, key, id_) if adopted else codec.decode(key, data)),
            created_at=created_at,
            last_snapshot_at=last_snapshot_at,
            adopted=adopted,
        )
    return found


def _adopted(connection: Connection, key: PositionKey, id_: str) -> State:
    """Return the state of a row that an older service wrote: its figures are taken as a first report."""
    row = connection.exec_driver_sql("SELECT * FROM positions WHERE id = %(id)s", {"id": id_}).one()
    report = Report(
        id=f"adopted:{row.id}",
        position=key,
        leg=LegName.NET,
        at=row.last_updated,
        size=row.size,
        average=row.average_entry_price,
        unrealized=row.unrealized_pnl,
        realized=row.realized_pnl,
        mark=row.current_price,
    )
    reports = [report]
    if key.mode is Mode.HEDGE:
        # The realized PnL of both legs was kept as one: it stays with the long one.
        long = replace(
            report, leg=LegName.LONG, size=row.long_size, average=row.long_avg_price, unrealized=None
        )
        short = replace(
            long, leg=LegName.SHORT, size=row.short_size, average=row.short_avg_price, realized=ZERO
        )
        reports = [long, short]
    state = empty(key)
    for each in reports:
        # Since when it is open or closed is known, and not the time of the report.
        size = each.size or ZERO
        since = Leg(size=size, opened_at=row.opened_at if size else None, closed_at=row.closed_at)
        state = replace(with_report(state, each), held={**state.held, each.leg: Held(since)})
    return advanced(state, [], Policy()) or state
