"""The newest exchange reports of a leg: last writer wins, field by field, whatever the arrival order."""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from positions.domain.events import Report, TimeSource

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


SIZED_KEPT = 4
"""So many of the newest reports of a size are kept beside those that decide a field."""


def sized(reports: Iterable[Report]) -> list[Report]:
    """Return the reports of a size that may overrule fills, in the order of their times."""
    own = [each for each in reports if each.size is not None and each.time_source is TimeSource.EVENT]
    return sorted(own, key=lambda each: (each.at, -1 if each.seq is None else each.seq, each.id))


def deciding(
    reports: Sequence[Report], *, in_effect: str | None, refused: Collection[str]
) -> tuple[Report, ...]:
    """Return those of a leg's ``reports`` that decide something, or may yet.

    Beside the winners of each field stay the report ``in_effect`` (by id), whose size was taken over, and the
    `SIZED_KEPT` newest of a size: one of them decides where a newer one turns out to be no newer than a fill.
    Those ``refused`` for an execution are not counted: it is never taken away, so they will never decide.
    """
    groups = [
        [report for report in reports if report.seq is not None],
        [report for report in reports if report.seq is None],
    ]
    kept = {winner.id for group in groups for field in FIELDS if (winner := newest(group, field))}
    able = [report for report in sized(reports) if report.id not in refused]
    kept.update(report.id for report in able[-SIZED_KEPT:])
    return tuple(report for report in reports if report.id in kept or report.id == in_effect)


def stale(reports: Iterable[Report], new: Report) -> bool:
    """Tell whether ``new`` decides no field beside ``reports``."""
    among = (*reports, new)
    return not any(newest(among, field) is new for field in FIELDS)
