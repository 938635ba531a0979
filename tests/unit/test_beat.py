"""Beat's schedule file: kept over restarts, and begun anew whichever way it was damaged."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from celery import Celery

from beat_schedule import SCHEDULE
from celery_app import app as workers
from positions.tasks.beat import Scheduler

AT = datetime(2025, 1, 15, 12, tzinfo=UTC)


def scheduler(path: Path, **every: float) -> Scheduler:
    app = Celery(broker="memory://", set_as_current=False)
    every = {"job": 60.0, **every}
    app.conf.result_expires = None  # else Celery adds a job of its own
    app.conf.beat_schedule = {name: {"task": name, "schedule": seconds} for name, seconds in every.items()}
    return Scheduler(app, schedule_filename=str(path))


def written(folder: Path) -> list[Path]:
    with closing(scheduler(folder / "schedule")) as first:
        first.schedule["job"].last_run_at = AT
    return sorted(folder.iterdir())


def test_when_a_job_was_last_asked_for_is_kept(tmp_path: Path) -> None:
    written(tmp_path)
    with closing(scheduler(tmp_path / "schedule")) as again:
        assert again.schedule["job"].last_run_at == AT


@pytest.mark.parametrize("damage", [b"", b"\xff" * 200, b"no schedule\n", None])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: bytes | None) -> None:
    for file in written(tmp_path):
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        with closing(scheduler(tmp_path / "schedule")) as again:
            assert "job" in again.schedule
        for left in tmp_path.iterdir():
            left.unlink()
        written(tmp_path)


def test_a_clock_that_is_set_back_holds_no_job_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(scheduler(tmp_path / "schedule", often=1.0)) as beat:
        now = AT + timedelta(hours=3)
        monkeypatch.setattr(Celery, "now", lambda _: now)
        asked: list[str] = []
        monkeypatch.setattr(beat, "apply_entry", lambda entry, **_: asked.append(entry.name))
        for entry in beat.schedule.values():
            entry.last_run_at = now
        for begins in (now, AT):
            asked.clear()
            for half in range(130):
                now = begins + timedelta(seconds=half / 2)
                for _ in beat.schedule:  # one tick asks for one job
                    beat.tick()
            assert set(asked) == {"job", "often"}


def test_everything_on_the_schedule_is_a_task_and_is_asked_for_in_time() -> None:
    workers.loader.import_default_modules()
    for name, job in SCHEDULE.items():
        entry = workers.conf.beat_schedule[name]
        assert job["task"] in workers.tasks
        assert entry["options"]["expires"] >= entry["schedule"]
