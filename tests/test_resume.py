"""The loop end to end on a small corpus: exact resume, bad settings, non-finite losses, averaging, generation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import memory_table, transformer
from models.moe import MoEConfig
from models.router import RouterConfig, RouterKind
from tests.tiny_run import VOCAB, final_tensors, make, run, without_clock
from train import evaluate, loop, pretrain
from train.config import load_config
from train.data import DataConfig, DataSource
from train.dedup import DedupConfig
from train.execution import EngineConfig, Precision
from train.files import read_records
from train.finite import NonFiniteLossError
from train.generate import main as generate_main
from train.loop import Stopped
from train.optim import OptimConfig, OptimizerKind
from train.schedule import ScheduleConfig


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


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
    changes: dict[str, Any] = {
        "optim": OptimConfig(kind=kind, lr=1e-2),
        "engine": EngineConfig(zero_stage=zero_stage, precision=Precision.fp32, num_threads=1),
    }
    base = make(data_root, tmp_path / "a")
    changes["train"] = replace(base.train, ema_decay=ema_decay)
    check_interrupted(data_root, tmp_path, monkeypatch, changes)


@pytest.mark.parametrize(
    ("router", "loss"),
    [
        (RouterConfig(RouterKind.softmax, top_k=2), "train/expert_balance"),
        (RouterConfig(RouterKind.gshard, top_k=2, capacity_factor=0.75), "train/load_balance"),
        (RouterConfig(RouterKind.switch, top_k=1, capacity_factor=0.75), "train/load_balance"),
        (RouterConfig(RouterKind.hash, top_k=1), None),
    ],
    ids=lambda value: value.kind.value if isinstance(value, RouterConfig) else "",
)
def test_every_router_resumes_exactly_and_records_what_it_has(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, router: RouterConfig, loss: str | None
) -> None:
    model = make(data_root, tmp_path / "a").model
    moe = MoEConfig(num_experts=4, d_expert=16, num_shared_experts=1, router=router)
    check_interrupted(data_root, tmp_path, monkeypatch, {"model": replace(model, moe=moe)})
    record = read_records(tmp_path / "a" / "metrics.jsonl")[0]
    known = {"train/sequence_balance", "train/expert_balance", "train/load_balance"}
    assert known & record.keys() == ({loss} if loss else set())
    assert ("moe/router_entropy" in record) == (loss is not None)
    assert ("moe/dropped" in record) == router.can_drop
    assert 0 < record.get("moe/dropped", 0.5) < 1
    assert sum(record["moe/expert_counts"][0]) == 256 * router.top_k


def check_interrupted(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """8 steps = die in the middle of step 6, resume from the checkpoint of step 3: every tensor and metric equal."""
    whole = run(make(data_root, tmp_path / "a", **changes))

    calls = 0
    forward = transformer.linear_cross_entropy

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 11:  # two micro-batches a step: the first half of step 6
            raise Interrupt
        return forward(*args)

    monkeypatch.setattr(transformer, "linear_cross_entropy", dies)
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
    assert without_clock(read_records(tmp_path / "a" / "metrics.jsonl")) == without_clock(
        read_records(tmp_path / "b" / "metrics.jsonl")
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
        cfg.train.max_steps = 4  # later a token may go to another expert by the last bit of its scores
        assert cfg.model.moe is not None
        cfg.model.moe.router.sequence_balance_coef = 0.0
        losses.append(run(cfg)["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_non_finite_loss_stops_before_the_step(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = make(data_root, tmp_path / "run")
    forward = transformer.linear_cross_entropy
    calls = 0

    def explodes(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*args) * (float("nan") if calls == 9 else 1)  # first micro-batch of step 5

    monkeypatch.setattr(transformer, "linear_cross_entropy", explodes)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan.*optim.lr"):
        run(cfg)
    assert [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert all(torch.isfinite(t.float()).all() for t in final_tensors(tmp_path / "run").values())


def test_auxiliary_losses_are_checked_too(data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = make(data_root, tmp_path / "run")
    backward = loop.build_engine

    def with_infinite_auxiliary_loss(*args: Any) -> Any:
        engine = backward(*args)
        forward = engine.forward

        def spoilt(*inputs: Any) -> Any:
            output = forward(*inputs)
            output.aux_losses["balance"] = torch.tensor(float("inf"))
            return output

        engine.forward = spoilt
        engine.step = lambda *_: pytest.fail("a step after an infinite loss")
        return engine

    monkeypatch.setattr(loop, "build_engine", with_infinite_auxiliary_loss)
    with pytest.raises(NonFiniteLossError, match="loss is inf"):
        run(cfg)


def test_a_non_finite_gradient_ends_as_failed_with_its_step(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make(data_root, tmp_path / "run")
    coalesce, calls = memory_table.coalesce, 0

    def explodes(row_ids: torch.Tensor, gradient: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        rows, summed = coalesce(row_ids, gradient)
        return rows, summed * float("inf") if calls == 14 else summed  # three calls a step: the fifth

    monkeypatch.setattr(memory_table, "coalesce", explodes)
    assert pretrain.run(cfg) == pretrain.EXIT_NOT_FINITE
    assert "error: after step 4 of 8: gradient norm is" in capsys.readouterr().err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
    assert all(torch.isfinite(t.float()).all() for t in final_tensors(tmp_path / "run").values())


def test_a_non_finite_validation_is_no_result(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = make(data_root, tmp_path / "run")
    check_finite = evaluate.check_finite
    monkeypatch.setattr(evaluate, "check_finite", lambda name, value: check_finite(name, value * float("inf")))
    assert pretrain.run(cfg) == pretrain.EXIT_NOT_FINITE
    assert "validation loss is inf" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 8)


@pytest.mark.parametrize("moment", ["before_result", "before_validation"])
def test_killed_after_the_last_step_equals_undisturbed(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = run(make(data_root, tmp_path / "a"))

    def dies(*_: Any) -> None:
        raise Interrupt

    with monkeypatch.context() as patch:
        if moment == "before_result":
            patch.setattr(loop, "count_parameters", dies)
        else:
            patch.setattr(loop, "_evaluate", dies)
        with pytest.raises(Interrupt):
            run(make(data_root, tmp_path / "b"))
    resumed = run(make(data_root, tmp_path / "b"))
    clocks = {"train_seconds", "tokens_per_second", "wall_seconds", "mfu_convention"}
    assert {k: v for k, v in resumed.items() if k not in clocks} == {k: v for k, v in whole.items() if k not in clocks}
    assert without_clock(read_records(tmp_path / "a" / "metrics.jsonl")) == without_clock(
        read_records(tmp_path / "b" / "metrics.jsonl")
    )


def test_metrics_reach_the_disk_before_their_checkpoint(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, save = loop.Recorder.sync, loop.save
    monkeypatch.setattr(loop.Recorder, "sync", lambda self: (order.append("metrics"), sync(self)))
    monkeypatch.setattr(loop, "save", lambda *args: (order.append("checkpoint"), save(*args)))
    run(make(data_root, tmp_path / "run"))
    assert order == ["metrics", "checkpoint"] * 3  # steps 3, 6, 8


def test_other_data_than_the_checkpoint_is_refused(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same settings, but the text that they stand for has changed: local files do."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {i} of the first text, {i * 7919 % 1000}" for i in range(800)))
    cfg = make(data_root, tmp_path / "run")
    cfg.data = DataConfig(
        source=DataSource.datasets, root=str(tmp_path / "data"), vocab_size=VOCAB, data_files=[str(text)],
        document_separator="\n", val_fraction=0.2, dedup=DedupConfig(enabled=False),
    )  # fmt: skip
    run(cfg)
    held = json.loads((tmp_path / "run" / "result.json").read_text())["data_fingerprint"]
    (tmp_path / "run" / "result.json").unlink()
    weights = final_tensors(tmp_path / "run")
    text.write_text("\n".join(f"line {i} of another text, {i * 104729 % 1000}" for i in range(900)))
    with pytest.raises(ValueError, match=rf"trained on data of fingerprint {held}.*has [0-9a-f]+.*restore them"):
        run(cfg)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final_tensors(tmp_path / "run").items())
    assert generate_main([str(tmp_path / "run"), "line"]) == 2
    assert held in capsys.readouterr().err


def test_learning_and_records(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.train.max_steps = 60
    cfg.train.eval_interval = 30
    result = run(cfg)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    first, last = records[0], [r for r in records if "train/loss" in r][-1]
    assert last["train/loss"] < first["train/loss"] - 0.8
    assert [r["step"] for r in records if "val/loss" in r] == [30, 60]
    assert sum(last["moe/expert_counts"][0]) == 256 * 2  # tokens x top_k
    assert "moe/dropped" not in last and last["train/sequence_balance"] > 0
    assert 0 < last["engram/gate_mean_1"] < 1
    assert last["engram/rows_ever_touched_1"] >= last["engram/rows_touched_1"] > 0
    assert result["parameters"]["total"] > 0 and result["tokens"] == 60 * 256
    assert result["val_bits_per_byte"] > 0
    assert load_config(tmp_path / "run" / "config.yaml") == cfg


def test_damaged_checkpoint_is_named_and_nothing_is_overwritten(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    run(cfg)
    (tmp_path / "run" / "result.json").unlink()
    victim = tmp_path / "run" / "checkpoints" / "step_00000008" / "table_1.rank00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"no checkpoint that is whole: .*table_1.rank00000.safetensors is not what was written"
    ):
        run(cfg)
    assert victim.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"global_batch_tokens": 300}}, r"train.global_batch_tokens=300.*4 \* 32 = 128.*256 or 384"),
        ({"train": {"eval_tokens": 31}}, r"train.eval_tokens=31 must be >= model.seq_len=32.*nearest: 32"),
        (
            {"schedule": {"warmup_steps": 8}},
            r"schedule.warmup_steps=8 must be < train.max_steps=8; nearest: 7, usual: a tenth",
        ),
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


def test_a_run_without_a_folder_is_refused(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path)
    cfg.run_dir = " "
    with pytest.raises(ValueError, match=r"run_dir= is empty.*runs/mine"):
        run(cfg)


def test_other_data_than_planned_is_refused(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.data.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="fingerprint"):
        run(cfg)
    shutil.rmtree(tmp_path / "run")
