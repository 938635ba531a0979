"""What Prometheus and Grafana are given: rules and dashboards that ask for figures that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from positions import metrics

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/positions.json").read_text())
RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
EXPOSED = {
    f"{family.exposed_as}{suffix}"
    for family in metrics.FAMILIES
    for suffix in (("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",))
}


def asked(expression: str) -> set[str]:
    return set(re.findall(r"\bpositions_\w+", expression))


def expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    return [*panels, *(rule["expr"] for rule in RULES)]


def test_every_alert_is_tested_and_has_its_section_in_the_runbook() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(names) == len(set(names)) > 15
    tested = {
        group["name"] for group in yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text())["tests"]
    }
    assert set(names) <= tested
    runbook = (ROOT / "docs/runbook.md").read_text()
    sections = re.split(r"^## (Positions\w+)\n", runbook, flags=re.MULTILINE)[1:]
    by_name = dict(zip(sections[::2], sections[1::2], strict=True))
    assert by_name.keys() == set(names)
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"
        section = by_name[rule["alert"]]
        assert [part for part in ("**Means**", "**Look**", "**Do**") if part not in section] == []


def test_only_figures_that_exist_are_asked_for_and_every_kind_of_them_is_shown() -> None:
    every = expressions()
    assert [(each, asked(each) - EXPOSED) for each in every if asked(each) - EXPOSED] == []
    shown = {name for each in every for name in asked(each)}
    unused = [
        family.name for family in metrics.FAMILIES if not any(name.startswith(family.name) for name in shown)
    ]
    assert unused == []


def test_only_label_values_that_exist_are_asked_for() -> None:
    known = {
        (f"{family.exposed_as}{suffix}", label): set(values)
        for family in metrics.FAMILIES
        for suffix in (("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",))
        for label, values in family.labels.items()
        if values
    }
    matched = 0
    for expression in expressions():
        for name, matchers in re.findall(r"(positions_\w+)\{([^}]*)\}", expression):
            for label, pattern in re.findall(r'(\w+)=~?"([^"]*)"', matchers):
                if (name, label) in known:
                    matched += 1
                    assert set(pattern.split("|")) <= known[name, label], expression
    assert matched > 5


def test_the_dashboard_is_what_grafana_s_schema_allows() -> None:
    # What the schema does not know would be lost on the way through its types.
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(DASHBOARD)))
    assert list(_lost(DASHBOARD, read)) == []
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    used = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    assert used == {each["uid"] for each in source["datasources"]}


def _lost(given: Any, read: Any, place: str = "") -> Any:
    if isinstance(given, dict) and isinstance(read, dict):
        for name, value in given.items():
            if name not in read:
                yield f"{place}/{name}"
            else:
                yield from _lost(value, read[name], f"{place}/{name}")
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for number, (one, other) in enumerate(zip(given, read, strict=True)):
            yield from _lost(one, other, f"{place}[{number}]")
    elif given != read:
        yield place
