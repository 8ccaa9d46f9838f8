from pathlib import Path

import pytest
import torch

from train.metrics import LogConfig, Recorder, WandbMode, peak_flops, read_metrics


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
    records = read_metrics(path)
    assert [(r["step"], r["train/loss"]) for r in records] == [(10, 10.0), (20, 20.0), (30, 3.5)]
    assert all(record["schema_version"] == 1 for record in records)


@pytest.mark.filterwarnings("ignore")
def test_dashboards_get_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard and offline wandb, read back through TensorBoard's own reader."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
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
