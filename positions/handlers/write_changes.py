"""What every change of a position ends in: the row with its next version, and the event that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self
from uuid import uuid4

import structlog
from sqlalchemy import Connection

from positions.domain.breaks import breaks_of
from positions.domain.events import Entry
from positions.domain.figures import figures
from positions.domain.numbers import exact
from positions.domain.position import Point, Policy, State
from positions.domain.values import value_class
from positions.messages.outbound import PositionView
from positions.messages.published import POSITION_UPDATED, position_updated
from positions.settings import Settings
from positions.storage import breaks, fold_points, ledger, outbox, positions
from positions.storage.portfolio import GROSS_EXPOSURE
from positions.storage.positions import Stored

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What handlers take from the settings."""

    policy: Policy
    price_stale_after: timedelta

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return the rules that the settings describe."""
        return cls(
            policy=Policy(
                size_threshold=settings.size_validation_threshold,
                average_threshold=settings.avg_price_diff_threshold,
                take_average=settings.use_ws_avg_price,
                take_size=settings.enable_timestamp_resolution,
                tolerance=timedelta(microseconds=int(settings.timestamp_tolerance_seconds * 1_000_000)),
            ),
            price_stale_after=timedelta(seconds=settings.price_staleness_threshold),
        )


@value_class(frozen=True, kw_only=True, slots=True)
class Change:
    """One position's way from what is stored to what is to be written."""

    stored: Stored
    state: State
    covers: int
    """How many events are in it."""
    source: str
    """`order_execution`, `websocket`, `validation` or `price_refresh`."""
    trace_id: str = ""
    """Of the last event; made here where it had none."""
    adjustments: Sequence[Entry] = ()
    """Ledger entries that are no trades: what was taken over from the venue."""
    points: Sequence[Point] = ()
    """Points to fold on from."""


def write_changes(
    connection: Connection, changes: Sequence[Change], *, stale_after: timedelta, now: datetime
) -> int:
    """Write ``changes``, one `position_updated` each with the final state; return how many breaks they show.

    Raises:
        ConcurrencyConflict: another writer was first at one of them; nothing of the transaction may stay.
    """
    if not changes:
        return 0
    with exact():
        computed = [figures(change.state) for change in changes]
    ledger.insert(
        connection,
        [entry for change in changes for entry in change.adjustments],
        {change.state.key: change.stored.id for change in changes},
    )
    fold_points.add(connection, [(change.stored.id, point) for change in changes for point in change.points])
    found_breaks = _keep_breaks(connection, changes, now)
    pairs = list(zip(changes, computed, strict=True))
    positions.write(connection, [(change.stored, change.state, found) for change, found in pairs], now=now)
    gross_exposure = connection.execute(GROSS_EXPOSURE).scalar_one()
    messages = []
    for change, found in pairs:
        stored = change.stored
        trace_id = change.trace_id or uuid4().hex
        view = PositionView.of_figures(
            found,
            id=stored.id,
            key=change.state.key,
            version=stored.version + 1,
            last_updated=now,
            last_snapshot_at=stored.last_snapshot_at,
            created_at=stored.created_at,
            portfolio_exposure=gross_exposure,
            now=now,
            stale_after=stale_after,
        )
        body = position_updated(
            view, update_source=change.source, events_covered=change.covers, trace_id=trace_id, now=now
        )
        messages.append(outbox.Message(POSITION_UPDATED, trace_id, body))
        log.debug(
            "position_updated",
            asset=view.asset,
            mode=view.mode,
            version=view.version,
            size=str(view.size),
            trace_id=trace_id,
        )
    outbox.add(connection, messages)
    return found_breaks


def _taken_over(state: State) -> set[str]:
    return {held.takeover.report_id for held in state.held.values() if held.takeover}


def _keep_breaks(connection: Connection, changes: Sequence[Change], now: datetime) -> int:
    """Keep the breaks that came or changed, resolve those that are gone; return how many came or changed."""
    kept: list[breaks.Found] = []
    gone = []
    for change in changes:
        before, after = breaks_of(change.stored.state), breaks_of(change.state)
        if not before and not after:
            continue
        for (leg, kind), found in after.items():
            # Back to what was taken over before a dispute: known, and ended, already.
            told = found.taken_over_at is not None and found.report_id in _taken_over(change.stored.state)
            if before.get((leg, kind)) != found and not told:
                kept.append((change.stored.id, leg, kind, found))
                log.warning(
                    "break_found",
                    asset=change.state.key.asset,
                    mode=change.state.key.mode,
                    leg=leg,
                    kind=kind,
                    ours=str(found.ours),
                    theirs=str(found.theirs),
                    taken_over=found.taken_over_at is not None,
                )
        gone += [
            (change.stored.id, leg, kind)
            for (leg, kind), was in before.items()
            if was.taken_over_at is None
            and ((leg, kind) not in after or after[leg, kind].taken_over_at is not None)
        ]
    breaks.keep(connection, kept, now=now)
    breaks.resolve(connection, gone, resolution="agrees", now=now)
    return len(kept)
