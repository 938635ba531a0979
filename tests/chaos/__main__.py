"""`python -m tests.chaos`: the service under faults, and whether it kept its promises."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.report import as_html, as_text
from tests.chaos.run import run


def main() -> int:
    """Run once, write the report, and return 0 if every promise was kept; of a control, if it lost events."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the market and the faults (default 1)")
    parser.add_argument("--executions", type=int, default=20_000, help="how many (default 20000)")
    parser.add_argument("--seconds", type=float, default=300.0, help="of publishing (default 300)")
    parser.add_argument("--control", action="store_true", help="acknowledge as Celery does by default")
    parser.add_argument("--report", type=Path, default=Path("chaos"), help="folder for the report (./chaos)")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="positions-chaos-"))
    result = run(
        seed=given.seed,
        executions=given.executions,
        seconds=given.seconds,
        control=given.control,
        folder=folder,
    )
    text = as_text(result)
    given.report.mkdir(parents=True, exist_ok=True)
    name = f"{'control' if given.control else 'seed'}-{given.seed}"
    (given.report / f"{name}.txt").write_text(text)
    (given.report / f"{name}.html").write_text(as_html(result))
    sys.stdout.write(f"{text}\nreport: {given.report / name}.html\nlogs: {folder}\n")
    return 0 if (result.lost > 0 if given.control else result.ok) else 1


if __name__ == "__main__":
    sys.exit(main())
