"""One table of all that was measured, as text, as JSON and as a picture."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """What was measured of one case: the medians of its runs."""

    part: str
    case: str
    figures: Figures
    runs: int = 1


@dataclass
class Report:
    """Rows in the order in which they came; printed as they come."""

    rows: list[Row] = field(default_factory=list)

    def add(self, part: str, case: str, runs: Sequence[Figures]) -> Row:
        """Keep and print the medians of ``runs``."""
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        row = Row(part, case, medians, len(runs))
        self.rows.append(row)
        print(_line(row), flush=True)
        return row

    def write(self, folder: Path) -> None:
        """Write `results.json` and `results.svg`."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": platform.platform(),
        }
        whole = {"about": about, "rows": [asdict(row) for row in self.rows]}
        (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
        (folder / "results.svg").write_text(picture(self.rows))


def _line(row: Row) -> str:
    figures = "  ".join(f"{name} {_short(value)}" for name, value in row.figures.items())
    return f"{row.part:9} {row.case:44} {figures}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def picture(rows: Iterable[Row]) -> str:
    """Return an SVG: for each case with a rate a bar as long as its events a second."""
    shown = [row for row in rows if "events/s" in row.figures]
    longest = max((row.figures["events/s"] for row in shown), default=1)
    height, left, width = 22, 330, 420
    lines = []
    for number, row in enumerate(shown):
        y = 34 + number * height
        rate = row.figures["events/s"]
        lines.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(f"{row.part}: {row.case}")}</text>'
            f'<rect x="{left}" y="{y}" width="{rate / longest * width:.0f}" height="15" fill="#3b6ea5"/>'
            f'<text x="{left + rate / longest * width + 6:.0f}" y="{y + 12}">{rate:,.0f}</text>'
        )
    total = 50 + len(shown) * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 90}" height="{total}"'
        ' font-family="sans-serif" font-size="12">'
        '<rect width="100%" height="100%" fill="white"/>'
        f'<text x="8" y="20" font-weight="bold">Events a second</text>{"".join(lines)}</svg>\n'
    )
