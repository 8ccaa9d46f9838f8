"""The format: any number of writers, any number of readers, and checkpoints of the first schema."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.writing_ranks import STATE, deal, same, tensors, write
from train.checkpoint import MANIFEST, Checkpoint, CheckpointVersionError, DamagedCheckpointError, sign
from train.checkpoint_folder import checkpoints, load_latest, newest, newest_good, verify
from train.checkpoint_writer import CheckpointWriter, WriterOptions
from train.files import sha256
from train.pieces import Piece, share_of, whole


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
def test_every_number_of_writers_and_readers(tmp_path: Path, writers: int) -> None:
    named = tensors()
    found = Checkpoint(write(tmp_path, 7, deal(named, writers, seed=writers)))
    assert (found.step, found.state, found.world_size) == (7, STATE, writers)
    assert same(found, named)
    for readers in (1, 2, 3):
        faults = [verify(found.path, rank, readers) for rank in range(readers)]
        assert faults == [[]] * readers
        for name, tensor in named.items():
            for rank in range(readers):
                share = share_of(name, tensor, rank, readers)
                out = torch.empty_like(share.data)
                assert found.read(name, share.start, share.numel, out) is out
                assert torch.equal(out, share.data)


def test_any_range_of_any_tensor(tmp_path: Path) -> None:
    named = tensors()
    found = Checkpoint(write(tmp_path, 1, deal(named, 4), WriterOptions(file_bytes=200)))
    chance = random.Random(1)
    for name, tensor in named.items():
        for _ in range(30):
            start = chance.randint(0, tensor.numel())
            numel = chance.randint(0, tensor.numel() - start)
            assert torch.equal(found.read(name, start, numel), tensor.reshape(-1)[start : start + numel])
    transposed = torch.empty(8, 31).t()  # not contiguous
    assert torch.equal(found.read("model.embed", out=transposed), named["model.embed"])
    assert found.names("optim") == ["embed.exp_avg", "embed.step"] and found.names("opt") == []
    with pytest.raises(ValueError, match=r"model.embed has 248 elements, not 240 to 250"):
        found.read("model.embed", 240, 10)
    with pytest.raises(ValueError, match=r"do not fit 3 of torch.float32"):
        found.read("model.half", 0, 3, torch.empty(3))
    with pytest.raises(ValueError, match=r"holds no tensor model.b"):
        found.read("model.b")


def test_only_the_range_is_read(tmp_path: Path) -> None:
    """Files that a reader needs nothing of may even be away."""
    tensor = torch.arange(100.0)
    pieces = [[Piece("model.a", (100,), 50 * rank, tensor[50 * rank : 50 * rank + 50])] for rank in range(2)]
    path = write(tmp_path, 1, pieces)
    (path / "model.rank00001.safetensors").unlink()
    assert torch.equal(Checkpoint(path).read("model.a", 10, 40), tensor[10:50])
    with pytest.raises(DamagedCheckpointError, match=r"model.rank00001.safetensors"):
        Checkpoint(path).read("model.a", 10, 41)


def test_whole_tensors_are_ordinary_safetensors(tmp_path: Path) -> None:
    named = tensors()
    path = write(tmp_path, 1, [[whole(name, tensor) for name, tensor in named.items()]])
    for stem in ("model", "optim", "table_1"):
        file = load_file(path / f"{stem}.rank00000.safetensors")
        expected = {name.split(".", 1)[1]: tensor for name, tensor in named.items() if name.startswith(stem)}
        assert file.keys() == expected.keys()
        assert all(torch.equal(file[name], tensor) for name, tensor in expected.items())


def test_large_files_are_cut(tmp_path: Path) -> None:
    named = tensors()
    path = write(tmp_path, 1, deal(named, 2), WriterOptions(file_bytes=256))
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) > 10 and max(sizes) < 256 + 1024  # headers
    assert (path / "model.rank00000-1.safetensors").exists()
    assert same(Checkpoint(path), named)


def test_manifest_lists_every_file_and_nothing_is_left(tmp_path: Path) -> None:
    path = write(tmp_path, 5, deal(tensors(), 3))
    manifest = json.loads((path / MANIFEST).read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {MANIFEST}
    assert all(sha256(path / name) == entry["sha256"] for name, entry in manifest["files"].items())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10, 100, 123_456_789):
        write(tmp_path, step, deal(tensors(), 2), WriterOptions(keep=2))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000100", "step_123456789"]
    assert len(list(tmp_path.iterdir())) == 2
    found = newest(tmp_path)
    assert found is not None and Checkpoint(found).step == 123_456_789


def test_nothing_there(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None and newest(tmp_path) is None


def test_one_tensor_may_have_two_names_and_views_share_storage(tmp_path: Path) -> None:
    """As the step count of a ZeRO partition has, under each parameter."""
    step, flat = torch.tensor(3.0), torch.arange(12.0)
    named = {"optim.a.step": step, "optim.b.step": step, "optim.a": flat[:6].view(2, 3), "optim.b": flat[6:]}
    named["optim.turned"] = flat.view(3, 4).t()
    path = write(tmp_path, 1, [[whole(name, tensor) for name, tensor in named.items()]])
    assert same(Checkpoint(path), named)


def first_schema(folder: Path, step: int, named: dict[str, torch.Tensor], state: dict[str, object]) -> Path:
    """A checkpoint as the first schema was written: by one process, a file for each stem."""
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True)
    for stem in {name.split(".")[0] for name in named}:
        of_stem = {name.split(".", 1)[1]: tensor for name, tensor in named.items() if name.split(".")[0] == stem}
        save_file(of_stem, path / f"{stem}.safetensors")
    (path / "state.json").write_text(json.dumps({"schema_version": 1, "step": step, **state}))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in path.iterdir()}
    (path / MANIFEST).write_text(json.dumps({"schema_version": 1, "files": files}, indent=1))
    return path


def test_the_first_schema_is_read(tmp_path: Path) -> None:
    named = tensors()
    path = first_schema(tmp_path, 5, named, dict(STATE))
    found = load_latest(tmp_path)
    assert found is not None and (found.path, found.step, found.state) == (path, 5, STATE)
    assert same(found, named)
    assert torch.equal(found.read("model.embed", 9, 20), named["model.embed"].view(-1)[9:29])
    (path / "optim.safetensors").write_bytes(b"short")
    with pytest.raises(DamagedCheckpointError, match=r"optim.safetensors is not what was written"):
        load_latest(tmp_path)


def test_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    """A later version's checkpoint is no damaged one: going on from an older one would lose it."""
    write(tmp_path, 4, deal(tensors(), 1))
    path = write(tmp_path, 5, deal(tensors(), 1))
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["schema_version"] = 99
    for body in (manifest, sign(manifest)):
        (path / MANIFEST).write_text(json.dumps(body))
        with pytest.raises(CheckpointVersionError, match="schema_version 99, this code reads 1 and 2"):
            newest_good(tmp_path, set_aside=True)
    assert path.exists()


def test_a_manifest_that_does_not_cover_a_tensor_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 5, deal(tensors(), 2))
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    manifest["tensors"]["model.embed"]["pieces"].pop()
    (path / MANIFEST).write_text(json.dumps(sign(manifest)))
    with pytest.raises(DamagedCheckpointError, match=r"model.embed: elements \d+ to 248 are in no piece"):
        Checkpoint(path)


def test_ranks_that_disagree_make_no_checkpoint(tmp_path: Path) -> None:
    one, other = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64)
    for pieces, message in (
        ([whole("model.a", one)], "elements 0 to 12 are in two pieces"),
        ([Piece("model.a", (5, 3), 12, one[:1])], r"model.a is F32 of shape \[5, 3\] on rank 1, F32 of shape \[4, 3\]"),
        ([whole("model.a", other)], r"model.a is F64 of shape .* on rank 1"),
    ):
        with pytest.raises(OSError, match=message):
            write(tmp_path, 1, [[whole("model.a", one)], pieces])
    with pytest.raises(OSError, match="elements 3 to 12 are in no piece"):
        write(tmp_path, 1, [[Piece("model.a", (4, 3), 0, one[:1])]])
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal on the last step saves it twice; the second must not put the only checkpoint at risk."""
    path = write(tmp_path, 8, deal(tensors(), 1))
    inode = path.stat().st_ino
    monkeypatch.setattr("train.rank_files.write_safetensors", lambda *_: pytest.fail("written again"))
    CheckpointWriter(tmp_path).save(8, deal(tensors(1), 1)[0], STATE, final=True)
    assert path.stat().st_ino == inode and same(Checkpoint(path), tensors())
