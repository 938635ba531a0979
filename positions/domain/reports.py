"""The newest exchange reports of a leg: last writer wins, field by field, whatever the arrival order."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Literal

from positions.domain.events import Report, TimeSource

Field = Literal["size", "average", "unrealized", "realized", "mark"]
FIELDS: tuple[Field, ...] = ("size", "average", "unrealized", "realized", "mark")


_Ranked = tuple[tuple[int, datetime, str], Report]


class Newest:
    """Of the reports it has seen, those that decide a field.

    The venue's sequence orders the reports that have one; time, then id, the others. A comparison that
    used the sequence only where both have it would not be transitive, so the newest of each group is
    found first and the two are compared by time: any order of arrival gives the same answer.
    """

    def __init__(self, reports: Iterable[Report] = (), fields: Sequence[Field] = FIELDS) -> None:
        self._fields = fields
        self._sequenced: dict[Field, _Ranked] = {}
        self._timed: dict[Field, _Ranked] = {}
        for report in reports:
            self.see(report)

    def see(self, report: Report) -> bool:
        """Return whether ``report`` decides a field now."""
        if report.seq is None:
            group, ranked = self._timed, ((-1, report.at, report.id), report)
        else:
            group, ranked = self._sequenced, ((report.seq, report.at, report.id), report)
        decides = False
        for field in self._fields:
            if getattr(report, field) is None:
                continue
            best = group.get(field)
            if best is None or ranked[0] > best[0]:
                group[field] = ranked
                decides = decides or self.of(field) is report
        return decides

    def of(self, field: Field) -> Report | None:
        """Return the report that decides ``field``, or None where no report has it."""
        sequenced, timed = self._sequenced.get(field), self._timed.get(field)
        if sequenced is None or timed is None:
            best = sequenced or timed
            return best and best[1]
        return timed[1] if timed[0][1:] > sequenced[0][1:] else sequenced[1]

    def of_each_group(self) -> set[str]:
        """Return the ids of the newest with a sequence and of the newest without one, of every field."""
        return {report.id for group in (self._sequenced, self._timed) for _, report in group.values()}


def newest(reports: Iterable[Report], field: Field) -> Report | None:
    """Return the report that decides ``field``, or None where no report has it."""
    return Newest(reports, (field,)).of(field)


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
    kept = Newest(reports).of_each_group()
    able = [report for report in sized(reports) if report.id not in refused]
    kept.update(report.id for report in able[-SIZED_KEPT:])
    return tuple(report for report in reports if report.id in kept or report.id == in_effect)
