"""Where the processes of a service keep their figures, on a machine that others use too."""

import os
from pathlib import Path

import pytest

from positions import metrics


def test_figures_of_an_earlier_run_are_taken_out(tmp_path: Path) -> None:
    (tmp_path / "counter_0.db").write_bytes(b"old")
    assert metrics.emptied(tmp_path) == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_user_has_laid_out_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "positions-metrics-0-4801"
    folder.mkdir()
    (folder / "counter_0.db").symlink_to(tmp_path / "target")
    owner = folder.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    used = Path(metrics.emptied(folder))
    assert used != folder
    assert used.is_dir()
    assert (folder / "counter_0.db").is_symlink()
    used.rmdir()
