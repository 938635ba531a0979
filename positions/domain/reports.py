"""The newest exchange reports of a leg: last writer wins, field by field, whatever the arrival order."""

from collections.abc import Iterable
from typing import Literal

from positions.domain.events import Report

Field = Literal["size", "average", "unrealized", "realized", "mark"]
FIELDS: tuple[Field, ...] = ("size", "average", "unrealized", "realized", "mark")


def newest(reports: Iterable[Report], field: Field) -> Report | None:
    """Return the report that decides ``field``, or None where no report has it.

    The venue's sequence orders the reports that have one; time, then id, the others. A comparison that
    used the sequence only where both have it would not be transitive, so the newest of each group is
    found first and the two are compared by time: any order of arrival gives the same answer.
    """
    sequenced: Report | None = None
    timed: Report | None = None
    for report in reports:
        if getattr(report, field) is None:
            continue
        if report.seq is not None:
            if sequenced is None or (report.seq, report.at, report.id) > (
                sequenced.seq or 0,
                sequenced.at,
                sequenced.id,
            ):
                sequenced = report
        elif timed is None or (report.at, report.id) > (timed.at, timed.id):
            timed = report
    if sequenced is None or timed is None:
        return sequenced or timed
    return max(sequenced, timed, key=lambda report: (report.at, report.id))


def merged(known: tuple[Report, ...], new: Report) -> tuple[Report, ...]:
    """Return ``known`` with ``new``, without the reports that decide no field any more.

    Returns ``known`` itself where ``new`` is a duplicate or stale in every field. Reports with and without
    a sequence are kept apart, so at most ten stay: in practice it is one.
    """
    if any(report.id == new.id for report in known):
        return known
    candidates = (*known, new)
    groups = [
        [report for report in candidates if report.seq is not None],
        [report for report in candidates if report.seq is None],
    ]
    winners = {id(winner) for group in groups for field in FIELDS if (winner := newest(group, field))}
    if id(new) not in winners:
        return known
    return tuple(report for report in candidates if id(report) in winners)
