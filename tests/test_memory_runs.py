"""Training runs with every form of memory: exact resume, frozen tables, shuffled rows, end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import transformer
from models.engram import EngramConfig
from models.memory_table import LocalTable, MemoryOptimConfig
from models.over_encoding import OverEncodingConfig
from tests.tiny_run import final_tensors, make, run, without_clock
from train import loop
from train.build import build_model
from train.config import Config
from train.execution import EngineConfig, Precision
from train.files import read_records
from train.generate import load as load_run
from train.generate import main as generate_main
from train.optim import OptimConfig, OptimizerKind
from train.prepare import open_prepared
from train.shards import DataError

ENGRAM = EngramConfig(layers=[1], num_hash_heads=2, d_memory=32, table_size=101)
OVER_ENCODING = OverEncodingConfig(num_hash_heads=2, d_memory=32, table_size=101)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


class Interrupt(Exception):
    pass


def three_steps(data_root: Path, folder: Path, part: EngramConfig | OverEncodingConfig, **changes: Any) -> Config:
    """A run of three steps of two micro-batches, with a checkpoint after each step."""
    cfg = make(data_root, folder, **changes)
    over_encoding = part if isinstance(part, OverEncodingConfig) else None
    engram = part if isinstance(part, EngramConfig) else None
    cfg.model = replace(cfg.model, engram=engram, over_encoding=over_encoding)
    cfg.train = replace(cfg.train, max_steps=3, checkpoint_interval=1)
    return cfg


SETTINGS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon_zero1": {
        "optim": OptimConfig(kind=OptimizerKind.muon, lr=1e-2),
        "engine": EngineConfig(zero_stage=1, precision=Precision.fp32, num_threads=1),
    },
    "frozen": {"memory": MemoryOptimConfig(frozen=True)},
}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("part", [OVER_ENCODING, replace(ENGRAM, gate=False, kernel_size=0)])
def test_interrupted_equals_undisturbed(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: EngramConfig | OverEncodingConfig,
    settings: str,
    ema_decay: float,
) -> None:
    """3 steps = die in the middle of step 3, resume from the checkpoint of step 2: every tensor and metric equal."""

    def config(name: str) -> Config:
        cfg = three_steps(data_root, tmp_path / name, part, **SETTINGS[settings])
        cfg.train.ema_decay = ema_decay
        return cfg

    whole = run(config("a"))
    calls = 0
    forward = transformer.linear_cross_entropy

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Interrupt
        return forward(*args)

    monkeypatch.setattr(transformer, "linear_cross_entropy", dies)
    with pytest.raises(Interrupt):
        run(config("b"))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_00000002"]
    resumed = run(config("b"))

    assert resumed["val_loss"] == whole["val_loss"]
    a, b = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and f"table_{part.layers[0]}.weight" in a
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    assert without_clock(read_records(tmp_path / "a" / "metrics.jsonl")) == without_clock(
        read_records(tmp_path / "b" / "metrics.jsonl")
    )


@pytest.mark.parametrize("part", [ENGRAM, OVER_ENCODING])
def test_frozen_rows_keep_their_start_values_and_leave_the_norm_alone(
    data_root: Path, tmp_path: Path, part: EngramConfig | OverEncodingConfig
) -> None:
    layer = part.layers[0]
    for name, optim in (("frozen", MemoryOptimConfig(frozen=True)), ("trained", MemoryOptimConfig())):
        run(three_steps(data_root, tmp_path / name, part, memory=optim))
    frozen, trained = (final_tensors(tmp_path / name) for name in ("frozen", "trained"))
    table = frozen[f"table_{layer}.weight"]
    start = LocalTable(len(table), part.row_dim, init_std=0.02, seed=0, layer=layer)
    assert torch.equal(table, start.weight)
    assert not torch.equal(trained[f"table_{layer}.weight"], start.weight)
    assert int(frozen[f"table_{layer}.step"].sum()) == int(frozen[f"table_{layer}.global_step"]) == 0
    prefix = "engram" if part is ENGRAM else "over_encoding"
    records = [r for r in read_records(tmp_path / "frozen" / "metrics.jsonl") if "train/loss" in r]
    assert [r["optim/table_grad_norm"] for r in records] == [0.0] * 3
    assert [r[f"{prefix}/rows_ever_touched_{layer}"] for r in records] == [0] * 3
    records = [r for r in read_records(tmp_path / "trained" / "metrics.jsonl") if "train/loss" in r]
    assert all(r["optim/table_grad_norm"] > 0 for r in records)
    # What reads the rows is trained.
    name = "blocks.1.engram.value_key.weight" if part is ENGRAM else "over_encoding.projection.weight"
    cfg = three_steps(data_root, tmp_path / "frozen", part)
    fresh = build_model(cfg.model, cfg.seed, torch.device("cpu")).state_dict()[name]
    assert not torch.equal(frozen[f"model.{name}"], fresh)


@pytest.mark.parametrize("part", [ENGRAM, OVER_ENCODING])
def test_shuffled_rows_train_validate_and_cannot_generate(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: EngramConfig | OverEncodingConfig,
) -> None:
    apart = []
    original = loop.validation_batches

    def noted(*args: Any) -> Any:
        apart.append(args[4])
        return original(*args)

    monkeypatch.setattr(loop, "validation_batches", noted)
    shuffled = run(three_steps(data_root, tmp_path / "shuffled", replace(part, shuffled=True)))
    straight = run(three_steps(data_root, tmp_path / "straight", part))
    assert apart == [True, False]
    assert shuffled["val_tokens"] == straight["val_tokens"]
    assert shuffled["val_loss"] != straight["val_loss"]
    one, other = (
        [r for r in read_records(tmp_path / name / "metrics.jsonl") if "train/loss" in r]
        for name in ("shuffled", "straight")
    )
    key = f"{'engram' if part is ENGRAM else 'over_encoding'}/rows_touched_{part.layers[0]}"
    assert [r[key] for r in one] == [r[key] for r in other]  # the same rows in every step
    assert generate_main([str(tmp_path / "shuffled"), "a text"]) == 2
    assert "shuffled=true" in capsys.readouterr().err


def test_shuffled_rows_need_two_sequences_and_two_windows(data_root: Path, tmp_path: Path) -> None:
    cfg = three_steps(data_root, tmp_path / "run", replace(ENGRAM, shuffled=True))
    cfg.train.micro_batch_size = 1
    with pytest.raises(ValueError, match=r"train.micro_batch_size=1 must be at least 2.*shuffled=true.*nearest: 2"):
        run(cfg)
    cfg.train.micro_batch_size, cfg.train.eval_tokens = 4, 33
    with pytest.raises(DataError, match=r"two windows of seq_len=32.*nearest: train.eval_tokens=64"):
        run(cfg)


def test_generation_with_rows_at_the_input(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(three_steps(data_root, tmp_path / "run", OVER_ENCODING))
    assert generate_main([str(tmp_path / "run"), "import os", "--max-new-tokens=3", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("import os")


def test_records_of_a_module_without_a_gate_and_without_compression(data_root: Path, tmp_path: Path) -> None:
    memory = replace(ENGRAM, layers=[0, 1], gate=False, compress=False)
    run(three_steps(data_root, tmp_path / "run", memory))
    last = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r][-1]
    assert {key for key in last if key.startswith("engram/")} == {
        f"engram/{name}_{layer}" for name in ("rows_touched", "rows_ever_touched", "num_rows") for layer in (0, 1)
    }
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    cfg = three_steps(data_root, tmp_path / "run", memory)
    hasher = load_run(tmp_path / "run")[1].hasher
    assert hasher is not None
    prepared = open_prepared(cfg.data)
    assert torch.equal(hasher.compression_table, torch.arange(len(prepared.compression_table)))
    assert not torch.equal(hasher.compression_table, torch.as_tensor(prepared.compression_table))
