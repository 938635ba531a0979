"""All benchmarks: `make bench`, or `make bench ARGS="intake floors --runs 1"` for some parts.

Starts a PostgreSQL, a RabbitMQ and a Redis of its own; every commit is durable. Prints one table, medians of
several runs, and writes it to `benchmarks/results/` as JSON and as a picture. What can be compared on a
machine that does other things too is processor time an event, and the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import structlog

from benchmarks import floors, growth, intake, latency, load, memory, relay
from benchmarks.machine import Machine
from benchmarks.report import Report

PARTS = ("intake", "floors", "latency", "relay", "growth", "memory", "api")
RESULTS = Path(__file__).parent / "results"


def _intake(machine: Machine, report: Report, given: argparse.Namespace) -> None:
    shapes = [(500, False), (500, True), (10_000, False), (10_000, True)][: 4 if given.all else 1]
    cases = [(kind, assets, skewed) for assets, skewed in shapes for kind in load.KINDS]
    if not given.all:
        cases += [("executions", 500, True), ("executions", 10_000, False)]
    for kind, assets, skewed in cases:
        runs = [
            intake.measured(machine, kind, events=given.events, assets=assets, skewed=skewed)
            for _ in range(given.runs)
        ]
        name = f"{kind}, {assets:,} assets, {'skewed' if skewed else 'uniform'}"
        report.add("intake", name, runs)


def _floors(machine: Machine, report: Report, given: argparse.Namespace) -> None:
    for kind in load.KINDS[:2]:
        runs = [floors.same_sql(machine, kind, events=given.events, assets=500) for _ in range(given.runs)]
        report.add("floor", f"{kind}: the same SQL from memory", runs)
    runs = [floors.consumed(machine, events=given.events, assets=500) for _ in range(given.runs)]
    report.add("floor", "plain kombu, consume and acknowledge", runs)
    runs = [floors.one_task_an_event(machine, events=2000, assets=500) for _ in range(given.runs)]
    report.add("floor", "one Celery task an event", runs)


def _highest_rate(machine: Machine, report: Report, given: argparse.Namespace) -> float:
    runs = [
        {"events/s": latency.highest_rate(machine, events=given.events, assets=500)}
        for _ in range(given.runs)
    ]
    return report.add("latency", "highest rate, published meanwhile", runs).figures["events/s"]


def _growth(machine: Machine, report: Report, given: argparse.Namespace) -> None:
    millions = [float(each) for each in given.ledger_millions.split(",")]
    # What an event costs follows from how many positions a batch has, hardly from how many there are.
    for traded, positions in itertools.product((500, 10_000), (500, 10_000, 100_000)):
        if traded <= positions:
            runs = [growth.measured(machine, positions=positions, traded=traded)]
            report.add("growth", f"{positions:,} positions, {traded:,} of them traded", runs)
    for million in millions:
        runs = [growth.measured(machine, positions=500, ledger_rows=int(million * 1e6))]
        report.add("growth", f"500 positions, {million:g} million ledger rows", runs)


def main() -> None:
    """Run the parts asked for, and write what they found."""
    arguments = argparse.ArgumentParser(prog="make bench", description=__doc__)
    arguments.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all if none is named")
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--events", type=int, default=50_000, help="messages in one run of the intake")
    arguments.add_argument("--all", action="store_true", help="intake: each kind over each set of assets")
    arguments.add_argument("--rate", type=float, help="executions/s that latency takes for the highest rate")
    arguments.add_argument("--ledger-millions", default="1,10", help="growth: rows already there")
    arguments.add_argument("--memory-events", type=int, default=500_000)
    arguments.add_argument("--out", type=Path, default=RESULTS)
    given = arguments.parse_args()
    parts = given.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        arguments.error(f"unknown: {', '.join(sorted(unknown))}")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    report = Report()
    with Machine() as machine:
        if "intake" in parts:
            _intake(machine, report, given)
        if "floors" in parts:
            _floors(machine, report, given)
        if "latency" in parts:
            rate = given.rate or _highest_rate(machine, report, given)
            for share in (0.1, 0.5, 0.9):
                found = latency.measured(machine, rate=rate * share, seconds=20, assets=500)
                report.add("latency", f"publish to visible at {share:.0%}", [found])
        if "relay" in parts:
            runs = [relay.measured(machine, events=given.events) for _ in range(given.runs)]
            report.add("relay", "outbox to broker, confirmed", runs)
        if "growth" in parts:
            _growth(machine, report, given)
        if "memory" in parts:
            found = memory.measured(machine, events=given.memory_events, assets=500)
            report.add("memory", f"worker after {given.memory_events:,} events", [found])
    report.write(given.out)
    if "api" in parts:
        subprocess.run([sys.executable, "-m", "benchmarks.api"], check=True)


if __name__ == "__main__":
    main()
