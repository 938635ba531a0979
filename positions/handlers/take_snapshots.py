"""Keep what positions are at a moment, and tell the neighbours."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.figures import position_exposure
from positions.domain.numbers import exact
from positions.errors import NotFound
from positions.messages.outbound import PositionView, SnapshotView, snapshot_data
from positions.messages.published import SNAPSHOT_CREATED, position_snapshot_created
from positions.storage import outbox, slots, snapshots
from positions.storage.snapshots import Snapshot


def take_snapshots(
    connection: Connection,
    keys: Sequence[PositionKey] | None,
    *,
    at: datetime,
    stale_after: timedelta,
    trace_id: str = "",
) -> list[SnapshotView]:
    """Keep the positions of ``keys`` (None: of all), all of one moment, and return the new snapshots.

    Of a position that has a snapshot of ``at`` already, that one stays. A position's version does not
    change: who writes it meanwhile is not disturbed.

    Args:
        connection: in a transaction that has read no snapshots yet.
        keys: in any order.
        at: the moment the snapshots are said to be of; of what is committed now.
        stale_after: age from which a price is stale.
        trace_id: of the events; made here where there is none.

    Raises:
        NotFound: there is no position of one of ``keys``; nothing was kept.
    """
    rows = snapshots.cut(connection, keys)
    found = {PositionKey.of(row["asset"], row["mode"]) for row in rows}
    for key in keys or ():
        if key not in found:
            raise NotFound(f"There is no {key.mode} position in {key.asset}.")
    return _keep(connection, rows, at=at, stale_after=stale_after, trace_id=trace_id)


def take_slot(
    connection: Connection,
    slot: datetime,
    rows: Sequence[Mapping[Any, Any]] | None,
    *,
    now: datetime,
    interval: timedelta,
    since: datetime,
    stale_after: timedelta,
) -> list[SnapshotView] | None:
    """Keep every position open at ``slot``, or closed since its last snapshot; None if it was done before.

    Args:
        connection: in a transaction that has read no snapshots yet.
        slot: a moment that scheduled snapshots are of.
        rows: what positions were then (:func:`positions.storage.past.cut_at`); None: what they are.
        now: when it is taken.
        interval: from slot to slot.
        since: older slots that were missed are left out.
        stale_after: age from which a price is stale.
    """
    if not slots.claim(connection, slot, now=now, interval=interval, since=since):
        return None
    snapshots.make_partition(connection, snapshots.month_of(slot))
    rows = snapshots.cut(connection, None) if rows is None else rows
    flat = {row["id"]: row for row in rows if not (row["long_size"] or row["short_size"])}
    last = snapshots.newest_before(connection, list(flat), slot)
    told = {id_ for id_, row in flat.items() if _is_told(row, last.get(id_))}
    wanted = [row for row in rows if row["id"] not in told]
    return _keep(connection, wanted, at=slot, stale_after=stale_after)


def _is_told(flat: Mapping[Any, Any], last: Mapping[Any, Any] | None) -> bool:
    """Tell whether a flat position's last snapshot, or its having none, tells all there is to tell of it."""
    if last is None:
        return flat["closed_at"] is None and not flat["realized_pnl"]
    closed_since = flat["closed_at"] is not None and flat["closed_at"] > last["created_at"]
    return not closed_since and last["exposure"] == 0 and last["realized_pnl"] == flat["realized_pnl"]


def _keep(
    connection: Connection,
    rows: Sequence[Mapping[Any, Any]],
    *,
    at: datetime,
    stale_after: timedelta,
    trace_id: str = "",
) -> list[SnapshotView]:
    """Keep rows as of :func:`positions.storage.snapshots.cut`, tell of the new ones, and return them."""
    taken = {
        row["id"]: PositionView.of(
            row, portfolio_exposure=row["portfolio_exposure"], now=at, stale_after=stale_after
        )
        for row in rows
    }
    made = [_snapshot(row, taken[row["id"]], at) for row in rows]
    new = snapshots.add(connection, made)
    trace_id = trace_id or uuid4().hex
    views = [
        SnapshotView(
            id=new[each.position_id, at],
            position_id=each.position_id,
            asset=each.key.asset,
            mode=str(each.key.mode),
            snapshot_data=each.data,
            created_at=at,
        )
        for each in made
        if (each.position_id, at) in new
    ]
    outbox.add(
        connection,
        [
            outbox.Message(
                SNAPSHOT_CREATED,
                trace_id,
                position_snapshot_created(view, taken[view.position_id], trace_id=trace_id, now=at),
            )
            for view in views
        ],
    )
    if views:
        snapshots.mark_taken(connection, [view.position_id for view in views], at=at)
    return views


def _snapshot(row: Mapping[Any, Any], view: PositionView, at: datetime) -> Snapshot:
    with exact():
        exposure = position_exposure(view.long_size - view.short_size, view.current_price)
        return Snapshot(
            position_id=view.id,
            key=PositionKey.of(view.asset, view.mode),
            created_at=at,
            exposure=exposure,
            net_exposure=None if exposure is None else position_exposure(view.size, view.current_price),
            unrealized_pnl=view.unrealized_pnl,
            realized_pnl=view.realized_pnl,
            data=snapshot_data(view, row),
        )
