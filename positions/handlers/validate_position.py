"""Validate a position: is it what its ledger folds to, and what the venue reports?"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime
from decimal import Decimal

import structlog
from sqlalchemy import Connection

from positions.domain.breaks import Break, BreakKind, Cause, breaks_of
from positions.domain.events import LegName, PositionKey
from positions.domain.numbers import ZERO, exact, plain
from positions.domain.reconciliation import Statement, judge
from positions.domain.times import utc_text
from positions.handlers.rebuild_position import Comparison, Differences, compared, repaired
from positions.handlers.reconcile_position import Reconciled
from positions.handlers.write_changes import Rules
from positions.messages.outbound import BreakView
from positions.storage import breaks
from positions.storage.validations import Outcome

log = structlog.get_logger(__name__)

REFOLDED = "refolded"
ROUNDED = Decimal("1e-8")
"""A stored figure that is off by no more was rounded by whoever wrote it."""

Place = tuple[LegName, BreakKind]

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
    """Whether the position was set right, wholly or in part."""

    @property
    def outcome(self) -> Outcome:
        """What it is counted as."""
        return "valid" if self.is_valid else "repaired" if self.updated else "invalid"


def validate_position(
    connection: Connection,
    key: PositionKey,
    *,
    rules: Rules,
    now: datetime,
    fix: bool,
    reconciled: Reconciled | None = None,
) -> Validation:
    """Compare a position with the fold of its whole ledger, and with the newest reports it knows.

    To ``fix`` is to write what the ledger folds to where something else was stored; each figure that was
    wrong is kept as a break with both values. A break with the venue is reported and stays as it is: what
    reports may overrule they have overruled already. The position is locked only once it seems to differ.

    Without ``fix`` nothing is written, and the connection should see one moment (REPEATABLE READ): else
    a position that changes meanwhile may seem to differ.

    Args:
        connection: in a transaction.
        key: which position.
        rules: who wins.
        now: the time, UTC.
        fix: whether anything is written.
        reconciled: what the venue was found to say of it just before.

    Raises:
        NotFound: there is no such position.
        ConcurrencyConflict: the position changed meanwhile.
    """
    found = compared(connection, key, rules=rules, lock=False)
    standing = _standing(found, rules, now)
    if fix and (found.differences or standing):
        found = compared(connection, key, rules=rules, lock=True)
        standing = _standing(found, rules, now)
        _keep(connection, found, standing, now=now)
        if found.differences:
            repaired(connection, found, rules=rules, now=now)
    updated = fix and bool(found.differences)
    rows = breaks.listed(connection, found.stored.id, open_only=True)
    known = {(row["leg"], row["kind"]): row for row in rows}
    seen: dict[Place, BreakView] = {
        place: _view(place, each, now) for place, each in standing.items() if place not in known
    }
    ended: frozenset[Place] = frozenset()
    if reconciled is not None:
        ended = reconciled.ended
        for place, each in reconciled.found.items():
            if place in ended:
                seen[place] = _view(place, each, now, resolution=reconciled.resolution)
            elif place not in known:
                seen[place] = _view(place, each, now)
    with_venue = [*(BreakView(**{name: row[name] for name in _FIELDS}) for row in rows), *seen.values()]
    stored = [
        _view((LegName.NET, kind), each, now, resolution=REFOLDED if updated else None)
        for kind, each in _stored(found.differences).items()
    ]
    words = [
        *(_in_words(each) for each in with_venue if each.cause != Cause.ROUNDING),
        *(
            f"{name}: stored {_text(was)}, the ledger folds to {_text(folded)}"
            for name, (was, folded) in found.differences.items()
        ),
    ]
    return Validation(
        is_valid=not words,
        error_message="; ".join(words) or None,
        breaks=(*with_venue, *stored),
        updated=updated or bool(ended),
    )


def _standing(found: Comparison, rules: Rules, now: datetime) -> dict[Place, Break]:
    """Return the breaks with the venue that the position knows of and that were not taken over."""
    return {
        place: _with_cause(found, place, each, rules, now)
        for place, each in breaks_of(found.state).items()
        if each.taken_over_at is None
    }


def _with_cause(found: Comparison, place: Place, each: Break, rules: Rules, now: datetime) -> Break:
    """Return a break with its cause, as far as the ledger alone tells it."""
    report = next(
        (known for known in found.state.reports if (known.id, known.leg) == (each.report_id, place[0])), None
    )
    if report is None:
        return each
    with exact():
        judgement = judge(
            found.state, found.entries, [Statement(report=report)], None, policy=rules.policy, now=now
        )
    judged = judgement.breaks.get(place)
    return replace(each, cause=judged.cause, detail=judged.detail) if judged else each


def _stored(differences: Differences) -> dict[str, Break]:
    """Return stored figures that differ, as breaks by their kinds; what is no number is left to the words."""
    found = {}
    for name, (was, folded) in differences.items():
        ours, theirs = _number(folded), _number(was)
        cause = Cause.ROUNDING if 0 < abs(ours - theirs) <= ROUNDED else Cause.UNKNOWN
        found[f"stored_{name}"] = Break(ours=ours, theirs=theirs, cause=cause)
    return found


def _keep(
    connection: Connection, found: Comparison, standing: Mapping[Place, Break], *, now: datetime
) -> None:
    """Keep what stands as seen now, and what was stored wrong as set right; the position must be locked."""
    id_ = found.stored.id
    wrong = [(id_, str(LegName.NET), kind, each) for kind, each in _stored(found.differences).items()]
    breaks.keep(connection, [*((id_, *place, each) for place, each in standing.items()), *wrong], now=now)
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


def _view(place: tuple[str, str], each: Break, now: datetime, *, resolution: str | None = None) -> BreakView:
    leg, kind = place
    return BreakView(
        kind=kind,
        leg=leg,
        ours=each.ours,
        theirs=each.theirs,
        cause=each.cause,
        detail=each.detail,
        report_id=each.report_id,
        first_seen_at=now,
        last_seen_at=now,
        resolved_at=now if resolution else None,
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
