"""Runs that go on from checkpoints of other layouts, of the first schema, and from the last good one."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.faults import flip_bit, full_disk
from tests.test_checkpoint import first_schema
from tests.test_export import write_state
from tests.tiny_run import final_tensors, make, run
from tests.writing_ranks import deal, write
from train.checkpoint import Checkpoint
from train.checkpoint_folder import checkpoints
from train.config import config_hash
from train.engine import EngineConfig, Precision
from train.loop import TrainConfig
from train.optim import OptimConfig, OptimizerKind
from train.snapshot import _refuse_other_listings


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run that kept every checkpoint: of steps 3, 6 and 8."""
    cfg = make(data_root, tmp_path_factory.mktemp("whole") / "run")
    cfg.train.keep_checkpoints, cfg.train.ema_decay = 3, 0.9
    run(cfg)
    return Path(cfg.run_dir)


def again(data_root: Path, run_dir: Path) -> None:
    """Go on as if the run had been killed."""
    (run_dir / "result.json").unlink()
    cfg = make(data_root, run_dir)
    cfg.train.keep_checkpoints, cfg.train.ema_decay = 3, 0.9
    run(cfg)


def ends_alike(run_dir: Path, whole: Path) -> bool:
    one, other = final_tensors(run_dir), final_tensors(whole)
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("layout", ["three ranks", "first schema"])
def test_resume_from_another_layout(data_root: Path, whole: Path, tmp_path: Path, layout: str) -> None:
    run_dir = shutil.copytree(whole, tmp_path / "run")
    source = Checkpoint(whole / "checkpoints" / "step_00000003")
    named = {name: source.tensor(name) for name in source.tensors}
    shutil.rmtree(run_dir / "checkpoints")
    if layout == "first schema":
        named["extra.rng.cpu"] = named.pop("extra.rng.cpu.rank00000")
        first_schema(run_dir / "checkpoints", 3, named, source.state)
    else:
        write(run_dir / "checkpoints", 3, deal(named, 3))
        shutil.copytree(whole / "checkpoints" / "step_00000003", tmp_path / "like" / "checkpoints" / "step_00000003")
        write_state(run_dir, tmp_path / "like")
    again(data_root, run_dir)
    assert ends_alike(run_dir, whole)


def test_a_run_goes_on_from_its_last_good_checkpoint(
    data_root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(whole, tmp_path / "run")
    (run_dir / "checkpoints" / ".step_00000009.1-1.tmp").mkdir()
    flip_bit(run_dir / "checkpoints" / "step_00000008" / "optim.rank00000.safetensors", -5)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    again(data_root, run_dir)
    err = capsys.readouterr().err
    assert "step_00000008/optim.rank00000.safetensors is not what was written" in err
    assert "going on from" in err and "step_00000003" in err and "kept as step_00000008.damaged" in err
    assert ends_alike(run_dir, whole)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000006", "step_00000008", "step_00000008.damaged"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_how_checkpoints_are_written_changes_no_number(
    data_root: Path, whole: Path, tmp_path: Path, asynchronous: bool
) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.train.ema_decay, cfg.train.async_checkpoint = 0.9, asynchronous
    cfg.train.checkpoint_buffer_gib = 1e-5  # 10 kB
    identity = config_hash(cfg)
    cfg.train.async_checkpoint, cfg.train.checkpoint_buffer_gib = True, 2.0
    assert config_hash(cfg) == identity
    cfg.train.async_checkpoint, cfg.train.checkpoint_buffer_gib = asynchronous, 1e-5
    run(cfg)
    assert ends_alike(tmp_path / "run", whole)
    assert len(checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_checkpoints_on_the_way_change_no_number(
    data_root: Path, tmp_path: Path, kind: OptimizerKind, zero_stage: int
) -> None:
    """Buffers are made for moments that are not there before the first step."""
    for name, interval in (("none", 0), ("every", 1)):
        cfg = make(data_root, tmp_path / name, optim=OptimConfig(kind=kind, lr=1e-2))
        cfg.engine = EngineConfig(zero_stage=zero_stage, precision=Precision.fp32, num_threads=1)
        cfg.train.max_steps, cfg.train.checkpoint_interval = 3, interval
        run(cfg)
    assert ends_alike(tmp_path / "none", tmp_path / "every")


def test_training_goes_on_without_room_and_fails_at_its_end(
    data_root: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole.exists()  # its data are prepared: only the run itself has no room
    cfg = make(data_root, tmp_path / "disk" / "run")
    with full_disk(tmp_path / "disk", 300_000):  # a checkpoint takes about 800 kB
        with pytest.raises(OSError, match=r"step_00000008 could not be written .* bytes free"):
            run(cfg)
        err = capsys.readouterr().err
        assert err.count("training goes on") == 2  # steps 3 and 6
        assert not list((tmp_path / "disk" / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_buffers_of_no_size_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"train.checkpoint_buffer_gib=.* must be >= 0 and finite; usual: 2"):
        TrainConfig(checkpoint_buffer_gib=value)


def test_ranks_that_see_other_checkpoints_do_not_go_on(whole: Path) -> None:
    folder = SimpleNamespace(path=whole, checkpoints=whole / "checkpoints")
    for others, named in ((["step_00000003"], "rank 1 sees step_00000003;"), (["none"], "rank 1 sees none;")):
        ranks = SimpleNamespace(join_lists=lambda lines, others=others: lines + others)
        with pytest.raises(ValueError, match=f"rank 0 sees the checkpoints step_00000003, .*step_00000008, {named}"):
            _refuse_other_listings(folder, ranks)
    _refuse_other_listings(folder, SimpleNamespace(join_lists=lambda lines: lines * 3))
