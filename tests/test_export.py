"""Exports of a run: whole tensors, averages, shards, and what can be started from them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults import full_disk, truncate
from tests.tiny_run import final_tensors, make, run
from tests.writing_ranks import deal, write
from train.checkpoint import Checkpoint
from train.checkpoint_folder import newest, verify
from train.config import compose_config, load_config, resolve
from train.export import INDEX, export, main
from train.generate import load as load_run
from train.importing.build import import_model
from train.importing.source import SafetensorsFolder, check_index, huggingface_files
from train.start import recorded_tokenizer, weights_sha256


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a memory and averages; rows that rest have averages of earlier steps."""
    cfg = make(data_root, tmp_path_factory.mktemp("finished") / "run")
    cfg.train.ema_decay, cfg.train.max_steps = 0.9, 4
    run(cfg)
    return Path(cfg.run_dir)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def expected(run_dir: Path) -> dict[str, torch.Tensor]:
    trained = final_tensors(run_dir)
    model = {name.removeprefix("model."): tensor for name, tensor in trained.items() if name.startswith("model.")}
    return model | {"table_1.weight": trained["table_1.weight"]}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_whole_tensors_by_name(finished: Path, tmp_path: Path) -> None:
    assert main([str(finished), str(tmp_path / "to")]) == 0
    to = tmp_path / "to"
    assert equal(weights(to), expected(finished))
    assert verify(to) == [] and Checkpoint(to).step == 4
    names = {path.name for path in to.iterdir()}
    assert {"config.yaml", "tokenizer.json", "manifest.json", "state.json", INDEX} < names
    assert [path.name for path in tmp_path.iterdir()] == ["to"]


def test_shards_have_an_index_as_on_the_hub(finished: Path, tmp_path: Path) -> None:
    to = export(finished, tmp_path / "to", shard_gib=20e3 / 2**30)
    files = huggingface_files(to)
    assert len(files) > 5 and max(file.stat().st_size for file in files) < 60e3  # the largest tensor has its own
    check_index(to, SafetensorsFolder(files))
    assert equal(weights(to), expected(finished))
    total = sum(tensor.nbytes for tensor in weights(to).values())
    assert json.loads((to / INDEX).read_text())["metadata"]["total_size"] == total


def test_averages_are_those_that_validation_used(finished: Path, tmp_path: Path) -> None:
    to = export(finished, tmp_path / "to", average=True)
    model, memory, _ = load_run(finished)
    assert equal(weights(to), {**model.state_dict(), "table_1.weight": memory.tables[1].weight})
    plain = expected(finished)
    assert not torch.equal(weights(to)["table_1.weight"], plain["table_1.weight"])
    assert not torch.equal(weights(to)["embedding.weight"], plain["embedding.weight"])


def test_a_checkpoint_of_three_ranks_gives_the_same_export(finished: Path, tmp_path: Path) -> None:
    one = export(finished, tmp_path / "one", average=True)
    moved = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(moved / "checkpoints")
    write(moved / "checkpoints", 4, deal(final_tensors(finished), 3))
    write_state(moved, finished)
    three = export(moved, tmp_path / "three", average=True)
    assert equal(weights(one), weights(three))


def write_state(run_dir: Path, like: Path) -> None:
    """The tests' ranks write a state of their own: replace it by that of a run."""
    from train.checkpoint import MANIFEST, sign
    from train.files import sha256

    path, source = newest(run_dir / "checkpoints"), newest(like / "checkpoints")
    assert path is not None and source is not None
    shutil.copy(source / "state.json", path / "state.json")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["manifest_sha256"]
    size = (path / "state.json").stat().st_size
    manifest["files"]["state.json"] = {"bytes": size, "sha256": sha256(path / "state.json")}
    (path / MANIFEST).write_text(json.dumps(sign(manifest)))


def continued(data_root: Path, start: Path, run_dir: Path, cfg_of: Path) -> float:
    small = make(data_root, run_dir)
    cfg = load_config(cfg_of / "config.yaml")
    cfg.data, cfg.train = small.data, small.train
    cfg.train.max_steps, cfg.schedule.warmup_steps = 3, 1
    cfg.run_dir, cfg.init_from, cfg.init_sha256 = str(run_dir), str(start), None
    loss: float = run(resolve(cfg))["val_loss"]
    return loss


def test_a_run_starts_from_an_export_as_from_its_run(data_root: Path, finished: Path, tmp_path: Path) -> None:
    to = export(finished, tmp_path / "to", shard_gib=50e3 / 2**30)
    assert continued(data_root, to, tmp_path / "a", to) == continued(data_root, finished, tmp_path / "b", finished)
    assert equal_tensors(tmp_path / "a", tmp_path / "b")
    truncate(next(to.glob("model-00002*")), -1)
    with pytest.raises(ValueError, match=r"model-00002-of-\d+.safetensors is not what was written"):
        continued(data_root, to, tmp_path / "c", to)


def equal_tensors(one: Path, other: Path) -> bool:
    return equal(final_tensors(one), final_tensors(other))


def test_an_export_brings_its_tokenizer(data_root: Path, finished: Path, tmp_path: Path) -> None:
    """Where the prepared data are not at hand."""
    to = export(finished, tmp_path / "to")
    recorded = recorded_tokenizer(to, [])
    assert recorded is not None and recorded.path == to / "tokenizer.json"
    settings = (to / "config.yaml").read_text()
    (to / "config.yaml").write_text(settings.replace(str(data_root), str(tmp_path / "elsewhere")))
    cfg = compose_config(to, "config", ["data.max_documents=50"])  # another text: its own tokenizer would be another
    assert resolve(cfg).data.tokenizer == str(to / "tokenizer.json")
    assert cfg.run_dir == f"{to}-continued"
    (to / "tokenizer.json").write_text("{}")
    recorded = recorded_tokenizer(to, [])
    assert recorded is not None and recorded.path is None
    moved = to.rename(tmp_path / "moved")
    assert len(weights_sha256(moved)) == 64


def test_an_import_adds_a_memory_to_an_export(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.model.engram, cfg.train.max_steps = None, 3
    run(cfg)
    to = export(tmp_path / "run", tmp_path / "to", shard_gib=50e3 / 2**30)
    words = ["model.engram.table_size=97", "model.engram.d_memory=32"]
    for source, name in ((to, "a"), (tmp_path / "run", "b")):
        import_model(source, tmp_path / name, "tiny_engram", words=words)
    assert weights_sha256(tmp_path / "a") == weights_sha256(tmp_path / "b")


def test_what_cannot_be_exported_is_said(
    finished: Path, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    bare = make(data_root, tmp_path / "bare")
    bare.train.max_steps = 3
    run(bare)
    no_checkpoint = shutil.copytree(tmp_path / "bare", tmp_path / "no_checkpoint")
    shutil.rmtree(no_checkpoint / "checkpoints")
    for arguments, message in (
        ([finished, tmp_path / "full"], "is there already and not empty"),
        ([tmp_path / "full", tmp_path / "to"], "is not a run's folder"),
        ([no_checkpoint, tmp_path / "to"], "holds no checkpoint"),
        ([tmp_path / "bare", tmp_path / "to", "--average"], "has no weight average"),
        ([finished, tmp_path / "to", "--shard-gib", "0"], "--shard-gib=0.0 must be positive"),
    ):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "to").exists()


def test_a_full_disk_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    with full_disk(tmp_path / "disk", 100_000) as folder:
        with pytest.raises(OSError):
            export(finished, folder / "to")
        assert not list(folder.iterdir())
