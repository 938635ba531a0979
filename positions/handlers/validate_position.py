"""Validate a position: is it what its ledger folds to, and what the venue reports?"""

from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal

import structlog
from sqlalchemy import Connection

from positions.domain.breaks import Break, breaks_of
from positions.domain.events import LegName, PositionKey
from positions.domain.numbers import ZERO, plain
from positions.handlers.rebuild_position import Comparison, Differences, compared, repaired
from positions.handlers.write_changes import Rules
from positions.messages.outbound import BreakView, utc_text
from positions.storage import breaks

log = structlog.get_logger(__name__)

REFOLDED = "refolded"
_FIELDS = tuple(field.name for field in fields(BreakView))


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What a validation found."""

    is_valid: bool
    """Whether nothing differed when it began: neither a stored figure, nor the venue's newest report."""
    error_message: str | None
    """What differed, in words."""
    breaks: tuple[BreakView, ...]
    """The breaks that stand, and the stored figures that differed."""
    updated: bool
    """Whether stored figures were set right."""


def validate_position(
    connection: Connection, key: PositionKey, *, rules: Rules, now: datetime, fix: bool
) -> Validation:
    """Compare a position with the fold of its whole ledger, and with the newest reports it knows.

    To ``fix`` is to write what the ledger folds to where something else was stored; each figure that was
    wrong is kept as a break with both values. A break with the venue is reported and stays as it is: what
    reports may overrule they have overruled already. The position is locked only once it seems to differ.

    Without ``fix`` nothing is written, and the connection should see one moment (REPEATABLE READ): else
    a position that changes meanwhile may seem to differ.

    Raises:
        NotFound: there is no such position.
        ConcurrencyConflict: the position changed meanwhile.
    """
    found = compared(connection, key, rules=rules, lock=False)
    if fix and (found.differences or _standing(found)):
        found = compared(connection, key, rules=rules, lock=True)
        _keep(connection, found, now=now)
        if found.differences:
            repaired(connection, found, rules=rules, now=now)
    updated = fix and bool(found.differences)
    known = {
        (row["leg"], row["kind"]): row for row in breaks.listed(connection, found.stored.id, open_only=True)
    }
    with_venue = [
        *(BreakView(**{name: row[name] for name in _FIELDS}) for row in known.values()),
        *(_view(leg, kind, each, now) for leg, kind, each in _standing(found) if (leg, kind) not in known),
    ]
    stored = [
        _view(LegName.NET, kind, each, now, resolution=REFOLDED if updated else None)
        for kind, each in _stored(found.differences)
    ]
    words = [
        *map(_in_words, with_venue),
        *(
            f"{name}: stored {_text(was)}, the ledger folds to {_text(folded)}"
            for name, (was, folded) in found.differences.items()
        ),
    ]
    return Validation(
        is_valid=not words,
        error_message="; ".join(words) or None,
        breaks=(*with_venue, *stored),
        updated=updated,
    )


def _standing(found: Comparison) -> list[tuple[str, str, Break]]:
    """Return the breaks with the venue that the position knows of and that were not taken over."""
    return [
        (leg, kind, each)
        for (leg, kind), each in breaks_of(found.state).items()
        if each.taken_over_at is None
    ]


def _stored(differences: Differences) -> list[tuple[str, Break]]:
    """Return stored figures that differ, as breaks by their kinds; what is no number is left to the words."""
    return [
        (f"stored_{name}", Break(ours=_number(folded), theirs=_number(was)))
        for name, (was, folded) in differences.items()
    ]


def _keep(connection: Connection, found: Comparison, *, now: datetime) -> None:
    """Keep what stands as seen now, and what was stored wrong as set right; the position must be locked."""
    id_ = found.stored.id
    wrong = [(id_, str(LegName.NET), kind, each) for kind, each in _stored(found.differences)]
    breaks.keep(connection, [*((id_, *each) for each in _standing(found)), *wrong], now=now)
    breaks.resolve(connection, [each[:3] for each in wrong], resolution=REFOLDED, now=now)
    for name, (was, folded) in found.differences.items():
        log.warning(
            "figure_refolded",
            asset=found.state.key.asset,
            mode=found.state.key.mode,
            figure=name,
            stored=_text(was),
            folded=_text(folded),
        )


def _view(leg: str, kind: str, each: Break, now: datetime, *, resolution: str | None = None) -> BreakView:
    return BreakView(
        kind=kind,
        leg=leg,
        ours=each.ours,
        theirs=each.theirs,
        report_id=each.report_id,
        first_seen_at=now,
        last_seen_at=now,
        resolution=resolution,
    )


def _in_words(view: BreakView) -> str:
    return f"{view.kind} of the {view.leg} leg: ours {plain(view.ours)}, theirs {plain(view.theirs)}"


def _number(figure: object) -> Decimal:
    """Return a figure that is a number; 0 for none, and for what is no number."""
    return figure if isinstance(figure, Decimal) else ZERO


def _text(figure: object) -> str:
    if isinstance(figure, Decimal):
        return plain(figure)
    return utc_text(figure) if isinstance(figure, datetime) else "none" if figure is None else str(figure)
