"""The file by which probes see whether a process gets on."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from positions import liveness
from positions.settings import Settings
from positions.tasks import alive, resources


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (liveness, alive):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "alive"
    own = resources.Resources(Settings.model_validate({"POSITION_MANAGER_ALIVE_FILE": str(path)}))
    monkeypatch.setattr(resources, "_resources", own)
    return path


def touched(file: Path) -> bool:
    """Tell whether ``file`` was touched since the last call."""
    found = file.stat().st_mtime > 1
    os.utime(file, (1, 1))
    return found


def test_a_worker_touches_the_file_while_batches_come_and_go(file: Path, clock: Clock) -> None:
    step = alive.Alive(None)
    assert touched(file)
    intake = SimpleNamespace(in_flight=frozenset())
    for number in range(50):
        intake.in_flight = frozenset([f"batch-{number}"])
        clock.now += 5
        step.tick(worker_of(intake))
        assert touched(file)


def test_a_worker_with_a_batch_that_never_returns_stops_touching_it(file: Path, clock: Clock) -> None:
    step = alive.Alive(None)
    worker = worker_of(SimpleNamespace(in_flight=frozenset(["stuck"])))
    step.tick(worker)
    touched(file)
    clock.now += alive.STUCK_S + 1
    step.tick(worker)
    assert not touched(file)
    worker.consumer.intake.in_flight = frozenset(["next"])
    step.tick(worker)
    assert touched(file)


def test_a_worker_without_intake_or_without_a_file_is_fine(file: Path, clock: Clock) -> None:
    step = alive.Alive(None)
    touched(file)
    clock.now += 5
    step.tick(SimpleNamespace(consumer=None))
    assert touched(file)
    liveness.touching(None)()


def test_a_file_that_cannot_be_made_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        liveness.touching(str(tmp_path / "missing" / "alive"))


def worker_of(intake: Any) -> Any:
    return SimpleNamespace(consumer=SimpleNamespace(intake=intake))
