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
    """A reported size is not the one our fills fold to."""
    OVER_REDUCTION = "over_reduction"
    """A hedge leg was reduced by more than it held: a fill is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Break:
    """One difference, with both figures."""

    ours: Decimal
    theirs: Decimal
    report_id: str | None = None
    taken_over_at: datetime | None = None
    """When the venue's figure took effect; None while the difference stands."""


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
            found[name, BreakKind.OVER_REDUCTION] = Break(ours=fold.missing, theirs=ZERO)
    return found
