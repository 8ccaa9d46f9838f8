import json
from pathlib import Path

import pytest
import torch

from train import checkpoint
from train.checkpoint import Checkpoint, DamagedCheckpointError


def make(step: int) -> Checkpoint:
    flat = torch.arange(12.0)
    return Checkpoint(
        step,
        {"model": {"a": flat[:6].view(2, 3), "b": flat[6:]}, "optim": {"step": torch.tensor(3.0)}},  # shared storage
        {"train_seconds": 1.5},
    )


def test_round_trip(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(7), keep=1)
    back = checkpoint.load_latest(tmp_path)
    assert back is not None
    assert (back.step, back.state) == (7, {"train_seconds": 1.5})
    assert torch.equal(back.tensors["model"]["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(back.tensors["model"]["b"], torch.arange(6.0, 12.0))


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, make(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal on the last step saves it twice; the second must not put the only checkpoint at risk."""
    first = checkpoint.save(tmp_path, make(8), keep=1)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: pytest.fail("written again"))
    assert checkpoint.save(tmp_path, make(8), keep=1) == first
    assert checkpoint.load_latest(tmp_path) is not None


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "absent") is None


def test_unfinished_checkpoint_does_not_exist(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, make(5), keep=3)
    (checkpoint.save(tmp_path, make(6), keep=3) / checkpoint.MANIFEST).unlink()
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.step == 5


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = checkpoint.save(tmp_path, make(5), keep=1)
    victim = path / "model.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "truncate":
        victim.write_bytes(data[:-4])
    elif damage == "remove":
        victim.unlink()
    else:
        victim = path / checkpoint.MANIFEST
        victim.write_text("{")
    with pytest.raises(DamagedCheckpointError, match=victim.name):
        checkpoint.load_latest(tmp_path)


def test_full_disk_keeps_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make(5), keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="earlier checkpoints are untouched"):
        checkpoint.save(tmp_path, make(6), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000005"]
    found = checkpoint.load_latest(tmp_path)
    assert found is not None and found.step == 5


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SCHEMA_VERSION", 99)
        checkpoint.save(tmp_path, make(5), keep=1)
    with pytest.raises(DamagedCheckpointError, match="schema_version 99, this code reads 1"):
        checkpoint.load_latest(tmp_path)


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(5), keep=1)
    listed = set(json.loads((path / checkpoint.MANIFEST).read_text())["files"])
    assert listed == {file.name for file in path.iterdir()} - {checkpoint.MANIFEST}


def test_one_tensor_may_have_two_names(tmp_path: Path) -> None:
    """As the step count of a ZeRO partition has, under each parameter."""
    step, whole = torch.tensor(3.0), torch.arange(6.0)
    tensors = {"optim": {"a.step": step, "b.step": step, "whole": whole, "turned": whole.view(2, 3).t()}}
    checkpoint.save(tmp_path, Checkpoint(1, tensors, {}), keep=1)
    back = checkpoint.load_latest(tmp_path)
    assert back is not None
    assert all(torch.equal(tensor, back.tensors["optim"][name]) for name, tensor in tensors["optim"].items())
