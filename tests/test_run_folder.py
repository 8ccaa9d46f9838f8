import json
from pathlib import Path

import pytest

from train.run_folder import OccupiedRunFolderError, RunFolder


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, "a: 1\n", "id"),
        pytest.raises(OccupiedRunFolderError, match="in use"),
        RunFolder(tmp_path, "a: 1\n", "id"),
    ):
        pass


@pytest.mark.parametrize("thing", ["metrics.jsonl", "result.json", "checkpoints/step_00000001/manifest.json"])
def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path: Path, thing: str) -> None:
    with RunFolder(tmp_path, "a: 1\nb: {c: 2, d: 3}\n", "first"):
        (tmp_path / thing).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / thing).write_text("{}\n")
    refused = pytest.raises(OccupiedRunFolderError, match=r"another configuration \(a: 1 -> 5; b.c: 2 -> 4\)")
    with refused, RunFolder(tmp_path, "a: 5\nb: {c: 4, d: 3}\nrun_dir: x\n", "second"):
        pass
    assert (tmp_path / "config.yaml").read_text() == "a: 1\nb: {c: 2, d: 3}\n"
    assert (tmp_path / thing).exists()
    with RunFolder(tmp_path, "a: 1\n", "first"):  # the lock was given back
        pass


def test_a_start_that_got_nowhere_is_taken_over(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "a: 1\n", "first") as folder:
        folder.status("failed", 0, 10)
        folder.metrics.write_text("")
        folder.checkpoints.mkdir()
    with RunFolder(tmp_path, "a: 2\n", "second"):
        pass
    assert (tmp_path / "config.yaml").read_text() == "a: 2\n"


def test_leftovers_of_killed_processes_are_removed_by_the_owner_alone(tmp_path: Path) -> None:
    unfinished = tmp_path / "checkpoints" / ".step_00000004.123.tmp"
    with RunFolder(tmp_path, "a: 1\n", "id"):
        unfinished.mkdir(parents=True)
        (unfinished / "model.safetensors").write_text("half")
        (tmp_path / ".status.json.123.tmp").write_text("half")
        with pytest.raises(OccupiedRunFolderError), RunFolder(tmp_path, "a: 1\n", "id"):
            pass
        assert unfinished.exists()
    with RunFolder(tmp_path, "a: 1\n", "id"):
        assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OccupiedRunFolderError, match=rf"run_dir={path} is a file"), RunFolder(path, "", "id"):
            pass


def test_status_is_complete(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "", "id") as folder:
        folder.status("running", 3, 10)
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"], status["schema_version"]) == ("running", 3, 10, 1)
    assert status["heartbeat"] > 1e9 and status["pid"] > 0


def test_the_last_step_is_known_at_the_next_start(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "a: 1\n", "id") as folder:
        folder.status("failed", 7, 10)
    with RunFolder(tmp_path, "a: 1\n", "id") as folder:
        assert folder.step == 7
    with RunFolder(tmp_path, "a: 2\n", "other") as folder:
        assert folder.step == 0


def test_a_folder_of_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "setup.cfg").write_text("")
    with (
        pytest.raises(OccupiedRunFolderError, match=r"no run's \(setup.cfg\).*runs/train"),
        RunFolder(tmp_path, "a", "x"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["setup.cfg"]


def test_a_folder_that_cannot_be_made_is_named() -> None:
    path = Path("/proc/nope/run")
    with (
        pytest.raises(OccupiedRunFolderError, match=r"run_dir=/proc/nope/run cannot be made"),
        RunFolder(path, "a", "x"),
    ):
        pass
