"""The newest exchange reports of a leg: last writer wins, field by field, whatever the arrival order."""

from bisect import insort
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import Literal

from positions.domain.events import Report, TimeSource

Field = Literal["size", "average", "unrealized", "realized", "mark"]
FIELDS: tuple[Field, ...] = ("size", "average", "unrealized", "realized", "mark")


class Newest:
    """Of the reports it has seen, those that decide a field.

    The venue's sequence orders the reports that have one; time, then id, the others. A comparison that
    used the sequence only where both have it would not be transitive, so the newest of each group is
    found first and the two are compared by time: any order of arrival gives the same answer.
    """

    def __init__(self, reports: Iterable[Report] = ()) -> None:
        self._sequenced: list[Report] = []
        self._timed: list[Report] = []
        for report in reports:
            (self._timed if report.seq is None else self._sequenced).append(report)
        self._sequenced.sort(key=_sequence)
        self._timed.sort(key=_time)

    def see(self, report: Report) -> bool:
        """Return whether ``report`` decides a field now."""
        if report.seq is None:
            insort(self._timed, report, key=_time)
        else:
            insort(self._sequenced, report, key=_sequence)
        return any(self.of(field) is report for field in FIELDS)

    def of(self, field: Field) -> Report | None:
        """Return the report that decides ``field``, or None where no report has it."""
        sequenced, timed = _last_with(field, self._sequenced), _last_with(field, self._timed)
        if sequenced is None or timed is None:
            return sequenced or timed
        return timed if _time(timed) > _time(sequenced) else sequenced

    def of_each_group(self) -> set[str]:
        """Return the ids of the newest with a sequence and of the newest without one, of every field."""
        groups = (self._sequenced, self._timed)
        return {found.id for group in groups for field in FIELDS if (found := _last_with(field, group))}


# Both legs of a hedge may be told of in one report.
_time = attrgetter("at", "id", "leg")
_sequence = attrgetter("seq", "at", "id", "leg")


def _last_with(field: Field, reports: Sequence[Report]) -> Report | None:
    for report in reversed(reports):
        if getattr(report, field) is not None:
            return report
    return None


def newest(reports: Iterable[Report], field: Field) -> Report | None:
    """Return the report that decides ``field``, or None where no report has it."""
    return Newest(reports).of(field)


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
