"""The loop end to end on a small corpus: exact resume, bad settings, non-finite losses, averaging, generation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.router import RouterConfig
from models.transformer import TransformerConfig
from train import loop
from train.build import build_memory, build_model
from train.config import Config, config_hash, load_config, to_yaml, validate
from train.data import DataConfig
from train.engine import EngineConfig, Precision
from train.generate import generate
from train.loop import NonFiniteLossError, Stopped, TrainConfig, train
from train.metrics import LogConfig, read_metrics
from train.optim import OptimConfig, OptimizerKind
from train.prepare import open_prepared
from train.run_folder import RunFolder
from train.schedule import ScheduleConfig

VOCAB = 320


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def make(data_root: Path, run_dir: Path, **changes: Any) -> Config:
    cfg = Config(
        model=TransformerConfig(
            vocab_size=VOCAB,
            seq_len=32,
            num_layers=2,
            d_model=32,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
            moe=MoEConfig(num_experts=4, d_expert=16, num_shared_experts=1, router=RouterConfig(top_k=2)),
            engram=EngramConfig(layers=[1], num_hash_heads=2, d_memory=32, table_size=101),
        ),
        data=DataConfig(root=str(data_root), vocab_size=VOCAB, max_documents=60),
        schedule=ScheduleConfig(warmup_steps=2),
        engine=EngineConfig(precision=Precision.fp32, num_threads=1),
        train=TrainConfig(
            max_steps=8, global_batch_tokens=256, micro_batch_size=4, eval_tokens=512, checkpoint_interval=3
        ),
        optim=OptimConfig(lr=1e-2),
        log=LogConfig(interval=1, progress=False),
        run_dir=str(run_dir),
    )
    return replace(cfg, **changes)


def run(cfg: Config) -> dict[str, Any]:
    validate(cfg)
    identity = config_hash(cfg)
    with RunFolder(Path(cfg.run_dir), to_yaml(cfg), identity) as folder:
        return train(cfg, folder, identity)


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = sorted(run_dir.glob("checkpoints/step_*"))[-1]
    return {f"{f.stem}.{k}": v for f in sorted(newest.glob("*.safetensors")) for k, v in load_file(f).items()}


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_interrupted_equals_undisturbed(
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: OptimizerKind,
    ema_decay: float,
    zero_stage: int,
) -> None:
    """8 steps = die in the middle of step 6, resume from the checkpoint of step 3: every tensor and metric equal."""
    changes: dict[str, Any] = {
        "optim": OptimConfig(kind=kind, lr=1e-2),
        "engine": EngineConfig(zero_stage=zero_stage, precision=Precision.fp32, num_threads=1),
    }
    base = make(data_root, tmp_path / "a")
    changes["train"] = replace(base.train, ema_decay=ema_decay)
    whole = run(make(data_root, tmp_path / "a", **changes))

    calls = 0
    forward = loop.cross_entropy

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:  # two micro-batches a step: the first half of step 6
            raise Interrupt
        return forward(*args)

    monkeypatch.setattr(loop, "cross_entropy", dies)
    with pytest.raises(Interrupt):
        run(make(data_root, tmp_path / "b", **changes))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_00000003"]
    resumed = run(make(data_root, tmp_path / "b", **changes))

    assert resumed["val_loss"] == whole["val_loss"]
    a, b = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and any(key.startswith("table_1") for key in a)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
    assert without_clock(read_metrics(tmp_path / "a" / "metrics.jsonl")) == without_clock(
        read_metrics(tmp_path / "b" / "metrics.jsonl")
    )


def test_a_signal_saves_and_stops(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    cfg = make(data_root, tmp_path / "run")
    cfg.train.checkpoint_interval = 0
    original = loop.lr_scale

    def at_step_2(schedule: ScheduleConfig, step: int, max_steps: int) -> float:
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(schedule, step, max_steps)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "lr_scale", at_step_2)
            with pytest.raises(Stopped, match="step 2 of 8"):
                run(cfg)
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"
        stopped = run(cfg)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])
    other = make(data_root, tmp_path / "other")
    other.train.checkpoint_interval = 0
    assert stopped["val_loss"] == run(other)["val_loss"]


def test_accumulation_changes_only_rounding(data_root: Path, tmp_path: Path) -> None:
    losses = []
    for size in (8, 2):
        cfg = make(data_root, tmp_path / str(size))
        cfg.train.micro_batch_size = size
        assert cfg.model.moe is not None
        cfg.model.moe.router.sequence_balance_coef = 0.0
        losses.append(run(cfg)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_non_finite_loss_stops_before_the_step(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make(data_root, tmp_path / "run")
    forward = loop.cross_entropy
    calls = 0

    def explodes(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        nats, count = forward(*args)
        return (nats * float("nan") if calls == 9 else nats), count  # first micro-batch of step 5

    monkeypatch.setattr(loop, "cross_entropy", explodes)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 5.*optim.lr"):
        run(cfg)
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(torch.isfinite(t.float()).all() for t in final_tensors(tmp_path / "run").values())


def test_learning_and_records(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.train.max_steps = 60
    cfg.train.eval_interval = 30
    result = run(cfg)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, last = records[0], [r for r in records if "train/loss" in r][-1]
    assert last["train/loss"] < first["train/loss"] - 0.8
    assert [r["step"] for r in records if "val/loss" in r] == [30, 60]
    assert sum(last["moe/expert_counts"][0]) == 256 * 2  # tokens x top_k
    assert 0 < last["engram/gate_mean_1"] < 1
    assert last["engram/rows_ever_touched_1"] >= last["engram/rows_touched_1"] > 0
    assert result["parameters"]["total"] > 0 and result["tokens"] == 60 * 256
    assert result["val_bits_per_byte"] > 0
    assert load_config(tmp_path / "run" / "config.yaml") == cfg


def test_generation_is_causal_and_uses_the_memory(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.train.max_steps = 30
    run(cfg)
    prepared = open_prepared(cfg.data)
    state = load_file(sorted((tmp_path / "run").glob("checkpoints/step_*"))[-1] / "model.safetensors")
    model = build_model(cfg.model, 0, torch.device("cpu"))
    model.load_state_dict(state)
    memory = build_memory(cfg, prepared, torch.device("cpu"))
    prompt = [5, 6, 7]
    greedy = generate(model, memory, prompt, 40, 0.0, eos_id=-1)
    assert len(greedy) == 40  # longer than the window of 32
    assert generate(model, memory, prompt, 40, 0.0, eos_id=-1) == greedy
    assert generate(model, memory, prompt, 40, 0.0, eos_id=greedy[3]) == greedy[: greedy.index(greedy[3])]
    sampled = generate(model, memory, prompt, 40, 1.0, eos_id=-1)
    assert sampled != greedy and generate(model, memory, prompt, 40, 1.0, eos_id=-1) == sampled
    memory.tables[1].weight.normal_(0, 5.0, generator=torch.Generator().manual_seed(0))
    assert generate(model, memory, prompt, 40, 1.0, eos_id=-1) != sampled


def test_damaged_checkpoint_is_named_and_nothing_is_overwritten(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    run(cfg)
    (tmp_path / "run" / "result.json").unlink()
    victim = tmp_path / "run" / "checkpoints" / "step_00000008" / "table_1.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"table_1.safetensors is not what was written"):
        run(cfg)
    assert victim.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"global_batch_tokens": 300}}, r"train.global_batch_tokens=300.*4 \* 32 = 128.*256 or 384"),
        ({"schedule": {"warmup_steps": 8}}, r"schedule.warmup_steps=8 must be < train.max_steps=8; nearest: 7"),
        ({"model": {"vocab_size": 100}}, r"model.vocab_size=100 must equal data.vocab_size=320"),
    ],
)
def test_settings_that_do_not_fit_each_other(
    data_root: Path, tmp_path: Path, change: dict[str, dict[str, Any]], message: str
) -> None:
    cfg = make(data_root, tmp_path / "run")
    for part, values in change.items():
        for name, value in values.items():
            setattr(getattr(cfg, part), name, value)
    with pytest.raises(ValueError, match=message):
        run(cfg)
    assert not (tmp_path / "run").exists()


def test_other_data_than_planned_is_refused(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.data.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="fingerprint"):
        run(cfg)
    shutil.rmtree(tmp_path / "run")
