"""Fold positions anew where something came late: from the last point before it, not from their beginning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog
from sqlalchemy import Connection

from positions.domain.events import PositionKey
from positions.domain.leg import FillOrder
from positions.domain.orders import fills_of
from positions.domain.position import Point, Policy, State, decided_since, refolded, usable
from positions.errors import DeepRefold
from positions.storage import fold_points, ledger

log = structlog.get_logger(__name__)

BESIDE_OTHERS_MAX = 5_000
"""Entries that one position of many in a transaction may have to fold: its neighbours wait as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Late:
    """A position that something came late for."""

    id: str
    state: State
    """With the reports it knows now."""
    change: FillOrder | None
    """The first fill that changes; None where only reports did."""


def refold(
    connection: Connection, late: Mapping[PositionKey, Late], *, policy: Policy, alone: bool
) -> dict[PositionKey, tuple[State, Sequence[Point]]]:
    """Return the new states of ``late`` and the points to keep of them. The positions must be locked.

    Raises:
        DeepRefold: one of them would keep the others waiting (`BESIDE_OTHERS_MAX`), and is not ``alone``.
    """
    points = fold_points.before(
        connection, {each.id: (each.change, decided_since(each.state)) for each in late.values()}
    )
    bases: dict[PositionKey, Point | None] = {
        key: next((point for point in points[each.id] if usable(point, each.state, each.change)), None)
        for key, each in late.items()
    }
    starts = {late[key].id: base.order if base else None for key, base in bases.items()}
    limit = None if alone else BESIDE_OTHERS_MAX + 1
    entries = ledger.after(connection, starts, limit=limit)
    deep = [key for key, found in entries.items() if len(found) == limit]
    if deep:
        raise DeepRefold(deep)
    # What an order report implies depends on all reports of its order, however old.
    of_orders = ledger.of_reported_orders(
        connection, [entry.order_id for found in entries.values() for entry in found if entry.order_id]
    )
    folded = {}
    changed = {}
    for key, each in late.items():
        base = bases[key]
        whole = {entry.key: entry for entry in (*of_orders.get(key, ()), *entries.get(key, ()))}
        fills = [fill for fill in fills_of(whole.values()) if base is None or fill.order > base.order]
        folded[key] = refolded(each.state, fills, policy, base=base)
        # A fill that was taken back may have stood before all that are left.
        firsts = [order for order in (each.change, fills[0].order if fills else None) if order]
        if firsts:
            changed[each.id] = min(firsts)
        log.debug("position_refolded", asset=key.asset, mode=key.mode, fills=len(fills))
    # From here on they are made anew: a point after a late fill is wrong, one before an old report useless.
    fold_points.delete_from(connection, changed)
    return dict(folded)
