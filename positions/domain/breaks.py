"""Breaks: where our fills and the venue do not say the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum

from positions.domain.events import LegName
from positions.domain.numbers import ZERO
from positions.domain.position import State


class BreakKind(StrEnum):
    """What differs."""

    SIZE = "size"
    """The venue tells another size than our fills fold to."""
    AVERAGE = "average"
    """Of the same size, the venue tells another average entry price."""
    REALIZED = "realized"
    """The venue tells another realized PnL."""
    ABSENT = "absent"
    """The venue, asked for the position by name, knows nothing of it, and we hold one."""
    OVER_REDUCTION = "over_reduction"
    """A hedge leg was reduced by more than it held: a fill is missing."""


class Cause(StrEnum):
    """Why it differs, as far as there is evidence (docs/decisions/0013)."""

    MISSING_FILL = "missing_fill"
    """With executions that the venue has and the ledger has not, both say the same."""
    MANUAL_TRADE = "manual_trade"
    """The same, and all of them are of orders made by hand, of which the ledger has nothing."""
    DUPLICATE = "duplicate"
    """Without executions that only the ledger has, or has twice, both say the same."""
    FUNDING = "funding"
    """Realized PnL differs by funding that one of the two has not."""
    ROUNDING = "rounding"
    """They differ by no more than the settings, or the digits of the venue, allow for."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Break:
    """One difference, with both figures."""

    ours: Decimal
    theirs: Decimal
    report_id: str | None = None
    taken_over_at: datetime | None = None
    """When the venue's figure took effect; None while the difference stands."""
    cause: Cause = Cause.UNKNOWN
    detail: str | None = None
    """The evidence for the cause, in words."""


def breaks_of(state: State) -> Mapping[tuple[LegName, BreakKind], Break]:
    """Return the differences that ``state`` knows of."""
    found: dict[tuple[LegName, BreakKind], Break] = {}
    for name, held in state.held.items():
        fold = state.ledger[name]
        disputed = next(
            (each for each in state.reports if each.id == held.disputed and each.leg is name), None
        )
        if disputed is not None and disputed.size is not None:
            found[name, BreakKind.SIZE] = Break(
                ours=held.disputed_size, theirs=disputed.size, report_id=disputed.id
            )
        elif held.takeover and fold.traded_at:
            taken = held.takeover
            found[name, BreakKind.SIZE] = Break(
                ours=taken.found, theirs=taken.size, report_id=taken.report_id, taken_over_at=taken.at
            )
        if fold.missing:
            found[name, BreakKind.OVER_REDUCTION] = Break(
                ours=fold.missing, theirs=ZERO, cause=Cause.MISSING_FILL
            )
    return found
