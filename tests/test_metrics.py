import time
from pathlib import Path

import pytest
import torch

from train import metrics
from train.files import read_records
from train.metrics import LogConfig, Recorder, WandbMode, peak_flops


def test_records_are_cut_back_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Recorder(path, LogConfig(), "id", {}, resume_step=0)
    for step in (10, 20, 30):
        first.record(step, {"train/loss": float(step)})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 40, "train/lo')  # killed in mid-line
    second = Recorder(path, LogConfig(), "id", {}, resume_step=20)
    second.record(30, {"train/loss": 3.5, "moe/expert_counts": [[1, 2]]})
    second.close()
    records = read_records(path)
    assert [(r["step"], r["train/loss"]) for r in records] == [(10, 10.0), (20, 20.0), (30, 3.5)]
    assert all(record["schema_version"] == 1 for record in records)


def test_a_validation_stands_in_the_file_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for _ in range(2):
        with Recorder(path, LogConfig(), "id", {}, resume_step=8) as recorder:
            recorder.record(8, {"val/loss": 2.0})
            recorder.record(9, {"val/loss": 1.5})
    assert [(record["step"], record["val/loss"]) for record in read_records(path)] == [(8, 2.0), (9, 1.5)]


def test_sync_brings_records_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with Recorder(tmp_path / "metrics.jsonl", LogConfig(), "id", {}, resume_step=0) as recorder:
        recorder.record(1, {"train/loss": 2.0})
        monkeypatch.setattr(metrics.os, "fsync", lambda _: synced.append(len(read_records(tmp_path / "metrics.jsonl"))))
        recorder.sync()
        assert synced == [1]


def test_interval_is_checked() -> None:
    with pytest.raises(ValueError, match=r"log.interval=0 must be >= 1; nearest: 1"):
        LogConfig(interval=0)


@pytest.fixture
def no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and a server at a closed port."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(metrics, "_WANDB_SECONDS", 2.0)


@pytest.mark.filterwarnings("ignore")
def test_wandb_without_network_goes_on_offline(
    tmp_path: Path, no_server: None, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with Recorder(
        tmp_path / "metrics.jsonl", LogConfig(wandb=WandbMode.auto), "abc124", {"optim": {"lr": 0.1}}, resume_step=0
    ) as recorder:
        recorder.record(5, {"train/loss": 2.5})
        assert dict(recorder._wandb.config) == {"optim": {"lr": 0.1}}
    assert time.monotonic() - started < 60  # wandb itself would wait 90 s
    assert "wandb is not reachable" in capsys.readouterr().out
    assert list((tmp_path / "wandb").glob("offline-run-*/run-abc124.wandb"))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_wandb_that_does_not_work_at_all_is_switched_off(
    tmp_path: Path, no_server: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise wandb.errors.CommError("no service\nand more")

    monkeypatch.setattr(wandb, "init", broken)
    with Recorder(tmp_path / "metrics.jsonl", LogConfig(wandb=WandbMode.online), "id", {}, resume_step=0) as recorder:
        recorder.record(5, {"train/loss": 2.5})
    assert capsys.readouterr().out.splitlines()[-1] == (
        "wandb is switched off: it does not work offline either (no service)"
    )
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_wandb_mode_of_the_environment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Recorder(tmp_path / "metrics.jsonl", LogConfig(), "id", {}, resume_step=0) as recorder:
        assert recorder._wandb is None


@pytest.mark.filterwarnings("ignore")
def test_dashboards_get_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard and offline wandb, read back through TensorBoard's own reader."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    recorder = Recorder(
        tmp_path / "metrics.jsonl", LogConfig(tensorboard=True, wandb=WandbMode.auto), "abc123", {"x": 1}, resume_step=0
    )
    recorder.record(5, {"train/loss": 2.5, "moe/expert_counts": [[1]]})
    recorder.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5)]
    assert list((tmp_path / "wandb").glob("offline-run-*/run-abc123.wandb"))


def test_cpu_peak_is_measured_and_said() -> None:
    flops, convention = peak_flops(torch.device("cpu"), "fp32")
    assert flops > 1e9
    assert "measured fp32 matmul" in convention
