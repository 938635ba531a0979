"""A short chaos run, each kind of fault once, and its control; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.report import as_html, as_text
from tests.chaos.run import run


def test_nothing_is_lost_nor_applied_twice_whatever_dies(tmp_path: Path) -> None:
    result = run(seed=1, executions=3000, seconds=45, folder=tmp_path)
    assert result.ok, as_text(result)
    assert len({fault.name for fault in result.faults}) == 13
    assert result.swallowed
    assert "every promise was kept" in as_html(result)


def test_control_that_acknowledges_as_celery_does_by_default_loses_events(tmp_path: Path) -> None:
    result = run(seed=1, executions=3000, seconds=45, control=True, folder=tmp_path)
    assert result.lost, as_text(result)
