"""A run that is killed and goes on at another number of ranks, with experts, rows and ZeRO's partitions dealt anew."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, torchrun
from tests.tiny_run import make
from train.config import Config, to_yaml
from train.files import read_records

STEPS = 12
FLOOR = 3e-4  # relative difference of two losses that only rounding has parted


def start(cfg: Config, ranks: int, folder: Path, *settings: str) -> subprocess.Popen[str]:
    """The run of `cfg` on so many ranks."""
    source = folder / f"source{ranks}_{len(settings)}"
    source.mkdir(exist_ok=True)
    (source / "config.yaml").write_text(to_yaml(cfg))
    arguments = ["-m", "train.pretrain", "--config-path", str(source), "--config-name", "config", *settings]
    command = [sys.executable, *arguments] if ranks == 1 else torchrun(ranks, *arguments)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def kill_after(run: subprocess.Popen[str], checkpoint: Path) -> None:
    """kill -9 of launcher and ranks as soon as the checkpoint is there."""
    deadline = time.monotonic() + 180
    while not checkpoint.exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def losses(run_dir: Path) -> dict[int, float]:
    """{step: training loss}, and the validation loss as step 0."""
    records = read_records(run_dir / "metrics.jsonl")
    curve = {record["step"]: record["train/loss"] for record in records if "train/loss" in record}
    return curve | {0: json.loads((run_dir / "result.json").read_text())["val_loss"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_killed_on_four_ranks_goes_on_on_two_and_on_one(tmp_path: Path, kind: str) -> None:
    cfg = make(tmp_path / "data", tmp_path / "whole")
    cfg.train.max_steps, cfg.train.checkpoint_interval, cfg.train.keep_checkpoints = STEPS, 3, 9
    cfg.train.micro_batch_size, cfg.train.ema_decay = 2, 0.9 if kind == "adamw" else 0.0
    settings = [f"optim.kind={kind}"]
    whole = start(cfg, 1, tmp_path, *settings)
    output = whole.communicate()[0]
    assert whole.returncode == 0, output
    last = ("engine.zero_stage=3",) if kind == "muon" else ("engine.zero_stage=2",)
    moved = [*settings, f"run_dir={tmp_path / 'moved'}"]
    checkpoints = tmp_path / "moved" / "checkpoints"
    kill_after(
        start(cfg, 4, tmp_path, *moved, "engine.expert_parallel=4", "engine.zero_stage=1"),
        checkpoints / "step_00000003",
    )
    kill_after(
        start(cfg, 2, tmp_path, *moved, "engine.expert_parallel=2", "engine.zero_stage=2"),
        checkpoints / "step_00000006",
    )
    kill_after(start(cfg, 2, tmp_path, *moved, "engine.zero_stage=0"), checkpoints / "step_00000009")
    final = start(cfg, 1, tmp_path, *moved, *last)
    output = final.communicate()[0]
    assert final.returncode == 0, output
    assert "goes on in another layout" in output
    expected, actual = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert expected.keys() == actual.keys()
    assert max(abs(actual[step] / expected[step] - 1) for step in expected) < FLOOR
