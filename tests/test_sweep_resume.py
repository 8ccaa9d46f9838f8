"""The whole sweep with real training: killed in mid-step and started again, it gives the same numbers bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.live import read_progress
from sweeps.processes import find_processes
from sweeps.trial import read_plan, trial_dir

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SETTINGS = (
    "sweep=smoke",
    "sweep.rhos=[0.5,1.0]",
    "sweep.controls=[one_row]",
    "sweep.jobs=2",
    f"train.max_steps={STEPS}",
    "train.checkpoint_interval=10",
    "train.ema_decay=0.9",
    "log.interval=1",
)
SAME = ("val_loss", "val_bits_per_byte", "steps", "tokens")


def start(root: Path, name: str) -> subprocess.Popen:
    """The runner as a user starts it."""
    command = [sys.executable, "-m", "sweeps.run", *SETTINGS, f"sweep.root={root}", f"sweep.name={name}"]
    command += [f"data.root={root / 'data'}", "action=run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(runner: subprocess.Popen) -> str:
    output, _ = runner.communicate(timeout=300)
    assert runner.returncode == 0, output
    return output


def wait_until_one_runs(folder: Path, runner: subprocess.Popen, least_step: int) -> None:
    """Until some trial is in the middle of its training."""
    deadline = time.monotonic() + 240
    while True:
        progress = [read_progress(path) for path in folder.glob("trials/*")]
        if any(least_step <= p.step < STEPS - 5 and p.state == "running" for p in progress):
            return
        assert runner.poll() is None, "the runner ended before it could be killed"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def numbers(folder: Path) -> dict[str, tuple[dict, list]]:
    """Result and training losses of every trial, by its id."""
    found = {}
    for trial in read_plan(folder).trials:
        path = trial_dir(folder, trial)
        result = json.loads((path / "result.json").read_text())
        records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
        found[trial.trial_id] = ({key: result[key] for key in SAME}, losses)
    return found


@pytest.mark.slow
def test_killed_sweep_gives_the_same_bits(tmp_path: Path) -> None:
    finish(start(tmp_path, "calm"))
    disturbed = tmp_path / "disturbed"

    runner = start(tmp_path, "disturbed")
    wait_until_one_runs(disturbed, runner, 15)
    victims = find_processes(disturbed.resolve().glob("trials/*"))
    os.kill(victims[0].pid, signal.SIGKILL)  # a trial, in mid-step
    wait_until_one_runs(disturbed, runner, 3)
    runner.kill()  # then the runner
    runner.communicate()

    output = finish(start(tmp_path, "disturbed"))
    assert "resumed" in output
    calm, again = numbers(tmp_path / "calm"), numbers(disturbed)
    assert len(calm) == 3
    assert again == calm
    for _, losses in calm.values():
        assert [step for step, _ in losses] == list(range(1, STEPS + 1))
