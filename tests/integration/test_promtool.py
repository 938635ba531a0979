"""Prometheus' own tool on the rules, their tests and the names of the figures."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from positions import metrics
from tests.install_services import promtool

PROMETHEUS = Path(__file__).resolve().parents[2] / "deploy/prometheus"


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "--lint-fatal", "alerts.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_accepts_its_configuration_and_each_alert_fires_when_it_should(
    check: tuple[str, ...],
) -> None:
    done = subprocess.run(
        [promtool(), *check], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_names_follow_the_conventions_of_prometheus() -> None:
    text = "\n".join(
        f"# HELP {family.exposed_as} {family.about}\n# TYPE {family.exposed_as} {family.kind}"
        + "".join(
            f"\n{family.exposed_as}{suffix} 1"
            for suffix in (('_bucket{le="+Inf"}', "_sum", "_count") if family.kind == "histogram" else ("",))
        )
        for family in metrics.FAMILIES
    )
    done = subprocess.run(
        [promtool(), "check", "metrics"], input=text + "\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
