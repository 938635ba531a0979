"""Beat's schedule file: kept over restarts, and begun anew whichever way it was damaged."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from celery import Celery

from beat_schedule import SCHEDULE
from celery_app import app as workers
from positions.tasks.beat import Scheduler

AT = datetime(2025, 1, 15, 12, tzinfo=UTC)


def scheduler(path: Path) -> Scheduler:
    app = Celery(broker="memory://", set_as_current=False)
    app.conf.beat_schedule = {"job": {"task": "job", "schedule": 60.0}}
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


def test_everything_on_the_schedule_is_a_task_and_is_asked_for_in_time() -> None:
    workers.loader.import_default_modules()
    for name, job in SCHEDULE.items():
        entry = workers.conf.beat_schedule[name]
        assert job["task"] in workers.tasks
        assert entry["options"]["expires"] >= entry["schedule"]
