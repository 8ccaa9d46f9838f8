import json
from pathlib import Path

import pytest

from train import run_folder
from train.run_folder import OccupiedRunFolderError, RunFolder, atomic_write


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, "a: 1\n", "id"),
        pytest.raises(OccupiedRunFolderError, match="in use"),
        RunFolder(tmp_path, "a: 1\n", "id"),
    ):
        pass


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "a: 1\n", "first"):
        pass
    with pytest.raises(OccupiedRunFolderError, match="another configuration"), RunFolder(tmp_path, "a: 2\n", "second"):
        pass
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    with RunFolder(tmp_path, "a: 1\n", "first"):  # the lock was given back
        pass


def test_status_is_complete(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "", "id") as folder:
        folder.status("running", 3, 10)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"], status["schema_version"]) == ("running", 3, 10, 1)
    assert status["heartbeat"] > 1e9 and status["pid"] > 0


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
