"""The oracle of the chaos runs: it finds nothing where all was applied, and what is missing where not."""

from __future__ import annotations

import json
from collections import defaultdict

from sqlalchemy import Engine

from tests.chaos.market import make
from tests.chaos.oracle import differences
from tests.integration.support import apply, stored


def test_every_exchange_report_that_is_dropped_shows_but_those_that_newer_ones_replace(
    engine: Engine,
) -> None:
    market = make(seed=1, executions=600)
    good = [json.loads(each.body) for each in market.messages if each.body not in market.poison]
    reports: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for each in good:
        if each["event_type"] == "position":
            reports[each["data"]["symbol"]][each["data"]["updatedTime"]] = each["event_id"]
    # Of each position one. Where there is nothing but reports, any but the oldest, else the newest.
    dropped = set()
    for number, (asset, of_time) in enumerate(reports.items()):
        newest = [of_time[at] for at in sorted(of_time, reverse=True)]
        dropped.add(newest[number % 4 if asset.startswith("R") else 0])
    apply(engine, [each for each in good if each.get("event_id") not in dropped])

    def found() -> list[str]:
        rows = {(key.asset, key.mode.value): row for key, row in stored(engine).items()}
        return list(differences(market.positions, rows))

    assert {line.split("'")[1] for line in found()} == reports.keys()
    assert len(reports) > 50
    apply(engine, [each for each in good if each.get("event_id") in dropped])
    assert found() == []
