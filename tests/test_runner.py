"""The runner on fake trials: real processes, real signals, no training."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from sweeps.live import read_progress
from sweeps.processes import FolderBusyError, find_processes, folder_lock
from sweeps.runner import (
    DiskSpaceError,
    OccupiedFolderError,
    peak_disk_bytes,
    pretrain_command,
    run_trials,
    visible_gpu,
)
from sweeps.trial import Trial, TrialKind, trial_dir, trial_id
from train.config import Config, to_yaml
from train.files import read_json

FAKE = Path(__file__).with_name("fake_trial.py")
QUICK, SLOW, FAILS, NO_RESULT = range(4)  # seeds of fake_trial.py


def fake_command(folder: Path) -> list[str]:
    return [sys.executable, str(FAKE), "--config-path", str(folder), "--config-name", "config"]


def make_trial(seed: int = QUICK, value: float = 0.5, seconds: float = 1.0) -> Trial:
    config = {"seed": seed, "value": value, "run_dir": ""}
    numbers = dict.fromkeys(("num_experts", "slots", "total_params", "active_params", "memory_params"), 1)
    more = dict.fromkeys(("embedding_params", "flops_per_token", "flops_per_token_no_head", "params_residual"), 1)
    rest = {"flops_residual": 0.0, "tokens": 1, "tokens_per_param": 1.0, "estimated_disk_bytes": 0, "num_threads": 3}
    return Trial(
        trial_id=trial_id(config), kind=TrialKind.arm, rho=value, rho_actual=value, seed=seed, lr_scale=1.0,
        estimated_seconds=seconds, config=config, **numbers, **more, **rest,
    )  # fmt: skip


def expected_loss(value: float) -> float:
    for _ in range(20):
        value = (value * 1.7 + 0.3) % 1.0
    return value


def loss_of(sweep: Path, trial: Trial) -> float:
    return (read_json(trial_dir(sweep, trial) / "result.json") or {})["val_loss"]


def steps_of(sweep: Path, trial: Trial) -> list[int]:
    return [int(line) for line in (trial_dir(sweep, trial) / "steps.log").read_text().split()]


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def start_runner(sweep: Path, trials: list[Trial], jobs: int = 2) -> subprocess.Popen:
    """The runner in its own process, so that it can be killed."""
    arguments = json.dumps([[t.seed, t.config["value"]] for t in trials])
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
        "from pathlib import Path; import tests.test_runner as t\n"
        f"trials = [t.make_trial(s, v) for s, v in json.loads({arguments!r})]\n"
        f"t.run_trials(trials, Path({str(sweep)!r}), {jobs}, 'none', t.fake_command)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_runs_all_trials_and_records_their_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trials = [make_trial(value=value) for value in (0.1, 0.2, 0.3)]
    summary = run_trials(trials, tmp_path, 2, "none", fake_command)
    assert {t.trial_id for t in summary.finished} == {t.trial_id for t in trials}
    assert not summary.failed
    for trial in trials:
        assert loss_of(tmp_path, trial) == expected_loss(trial.config["value"])
        assert steps_of(tmp_path, trial) == list(range(20))
        assert "threads 3" in (trial_dir(tmp_path, trial) / "log.txt").read_text()
        assert yaml.safe_load((trial_dir(tmp_path, trial) / "config.yaml").read_text())["run_dir"] == str(
            trial_dir(tmp_path, trial)
        )
        assert not (trial_dir(tmp_path, trial) / "checkpoints").exists()
    assert "finished arm rho=0.1 seed=0" in capsys.readouterr().out


def test_last_checkpoints_are_kept_when_asked(tmp_path: Path) -> None:
    run_trials([make_trial()], tmp_path, 1, "last", fake_command)
    assert (trial_dir(tmp_path, make_trial()) / "checkpoints" / "state.json").is_file()


def test_longest_trial_starts_first(tmp_path: Path) -> None:
    trials = [make_trial(value=0.1, seconds=1), make_trial(value=0.2, seconds=3), make_trial(value=0.3, seconds=2)]
    summary = run_trials(trials, tmp_path, 1, "none", fake_command)
    assert [trial.rho for trial in summary.finished] == [0.2, 0.3, 0.1]


def test_failure_is_recorded_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, mute, good = make_trial(FAILS), make_trial(NO_RESULT), make_trial(QUICK)
    summary = run_trials([bad, mute, good], tmp_path, 1, "none", fake_command)
    assert [t.seed for t in summary.failed] == [FAILS, NO_RESULT]
    assert [t.seed for t in summary.finished] == [QUICK]
    record = read_json(trial_dir(tmp_path, bad) / "failure.json")
    assert record is not None
    assert record["exit_code"] == 7
    assert record["log_tail"] == ["begins at step 0 threads 3", "about to fail", "last words"]
    no_result = read_json(trial_dir(tmp_path, mute) / "failure.json")
    assert no_result is not None
    assert no_result["reason"] == "ended without writing result.json"
    assert "last words" in capsys.readouterr().out


def test_failed_trial_is_tried_again_and_its_old_log_is_not_blamed(tmp_path: Path) -> None:
    bad = make_trial(FAILS)
    for _ in range(2):
        assert len(run_trials([bad], tmp_path, 1, "none", fake_command).failed) == 1
    record = read_json(trial_dir(tmp_path, bad) / "failure.json")
    assert record is not None
    assert record["log_tail"].count("last words") == 1
    assert (trial_dir(tmp_path, bad) / "log.txt").read_text().count("last words") == 2


def test_finished_trial_is_skipped(tmp_path: Path) -> None:
    trial = make_trial()
    run_trials([trial], tmp_path, 1, "none", fake_command)
    summary = run_trials([trial], tmp_path, 1, "none", lambda folder: ["/does/not/exist"])
    assert [t.trial_id for t in summary.finished] == [trial.trial_id]
    assert steps_of(tmp_path, trial) == list(range(20))


def test_folder_of_another_configuration_is_refused_before_anything_starts(tmp_path: Path) -> None:
    first, second = make_trial(value=0.1), make_trial(value=0.2)
    folder = trial_dir(tmp_path, second)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**second.config, "value": 0.7}))
    with pytest.raises(OccupiedFolderError, match=r"value: 0.7 -> 0.2.*choose another sweep.name"):
        run_trials([first, second], tmp_path, 1, "none", fake_command)
    assert not trial_dir(tmp_path, first).exists()


def test_two_runners_do_not_share_a_folder(tmp_path: Path) -> None:
    trials = [make_trial(SLOW)]
    runner = start_runner(tmp_path, trials)
    try:
        wait_for(lambda: read_progress(trial_dir(tmp_path, trials[0])).step > 0)
        with pytest.raises(FolderBusyError, match=f"in use by another runner \\(process {runner.pid}\\)"):
            run_trials(trials, tmp_path, 1, "none", fake_command)
    finally:
        output, _ = runner.communicate(timeout=30)
    assert runner.returncode == 0, output
    assert steps_of(tmp_path, trials[0]) == list(range(20))


def test_lock_is_free_after_the_body(tmp_path: Path) -> None:
    with folder_lock(tmp_path), pytest.raises(FolderBusyError, match=str(os.getpid())), folder_lock(tmp_path):
        pass
    with folder_lock(tmp_path):
        pass


def test_killed_runner_leaves_no_trial_trained_twice(tmp_path: Path) -> None:
    trials = [make_trial(SLOW, 0.1), make_trial(SLOW, 0.2), make_trial(QUICK, 0.3)]
    runner = start_runner(tmp_path, trials)
    wait_for(lambda: all(read_progress(trial_dir(tmp_path, t)).step > 2 for t in trials[:2]))
    runner.kill()
    runner.communicate()
    orphans = find_processes([trial_dir(tmp_path, trial) for trial in trials])
    assert len(orphans) == 2
    summary = run_trials(trials, tmp_path, 2, "none", fake_command)
    assert not any(orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE for orphan in orphans)
    assert len(summary.finished) == 3
    for trial in trials:
        assert loss_of(tmp_path, trial) == expected_loss(trial.config["value"])
        steps = steps_of(tmp_path, trial)
        # At most the step in which it was killed is done again; an orphan that went on would repeat many.
        assert sorted(set(steps)) == list(range(20))
        assert len(steps) <= 21


def test_killed_trial_is_a_failure_and_resumes(tmp_path: Path) -> None:
    trial = make_trial(SLOW)
    runner = start_runner(tmp_path, [trial])
    wait_for(lambda: read_progress(trial_dir(tmp_path, trial)).step > 2)
    (victim,) = find_processes([trial_dir(tmp_path, trial)])
    victim.kill()
    output, _ = runner.communicate(timeout=30)
    assert "killed by SIGKILL" in output
    begun = len(steps_of(tmp_path, trial))
    assert begun < 20
    summary = run_trials([trial], tmp_path, 1, "none", fake_command)
    assert [t.trial_id for t in summary.finished] == [trial.trial_id]
    assert loss_of(tmp_path, trial) == expected_loss(0.5)
    assert not (trial_dir(tmp_path, trial) / "failure.json").exists()
    assert len(steps_of(tmp_path, trial)) <= 21


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runner_stops_its_trials(tmp_path: Path, number: signal.Signals) -> None:
    trials = [make_trial(SLOW, 0.1), make_trial(SLOW, 0.2)]
    runner = start_runner(tmp_path, trials)
    wait_for(lambda: all(read_progress(trial_dir(tmp_path, t)).step > 0 for t in trials))
    runner.send_signal(number)
    output, _ = runner.communicate(timeout=30)
    assert "stopping 2 running trials" in output
    assert runner.returncode != 0
    assert find_processes([trial_dir(tmp_path, trial) for trial in trials]) == []
    assert not any((trial_dir(tmp_path, trial) / "failure.json").exists() for trial in trials)
    with folder_lock(tmp_path):
        pass


def test_full_disk_is_refused_before_anything_starts(tmp_path: Path) -> None:
    trial = make_trial()
    trial.estimated_disk_bytes = 10**18
    with pytest.raises(DiskSpaceError, match=r"need about .* GB .* are free"):
        run_trials([trial], tmp_path, 1, "none", fake_command)
    assert not trial_dir(tmp_path, trial).exists()


def test_each_place_has_its_gpu_among_those_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [visible_gpu(place, 2) for place in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-ab")
    assert [visible_gpu(place, 2) for place in range(3)] == ["5", "GPU-ab", "5"]


def test_results_can_be_collected_after_every_trial(tmp_path: Path) -> None:
    calls: list[int] = []
    trials = [make_trial(value=0.1), make_trial(FAILS)]
    run_trials(trials, tmp_path, 1, "none", fake_command, on_end=lambda: calls.append(1))
    assert len(calls) == 2


def test_peak_disk_counts_two_checkpoints_of_each_running_trial() -> None:
    trials = [make_trial(value=v) for v in (0.1, 0.2, 0.3)]
    for trial, size in zip(trials, (5, 7, 11), strict=True):
        trial.estimated_disk_bytes = size
    assert peak_disk_bytes(trials, 2, "none") == 2 * (11 + 7)
    assert peak_disk_bytes(trials, 2, "last") == 2 * (11 + 7) + 23
    for trial in trials:
        trial.config["train"] = {"keep_checkpoints": 3}
    assert peak_disk_bytes(trials, 2, "none") == 4 * (11 + 7)
    assert peak_disk_bytes(trials, 2, "last") == 4 * (11 + 7) + 3 * 23


def test_the_real_command_names_the_folder(tmp_path: Path) -> None:
    command = pretrain_command(tmp_path)
    assert command[:3] == [sys.executable, "-m", "train.pretrain"]
    assert command[command.index("--config-path") + 1] == str(tmp_path)


def test_the_real_command_leaves_the_working_directory_alone(tmp_path: Path) -> None:
    """A trial with a setting that the run itself refuses: composed by Hydra, started, ended before any training."""
    trial, cwd = tmp_path / "trial", tmp_path / "cwd"
    trial.mkdir()
    cwd.mkdir()
    config = Config()
    config.train.global_batch_tokens, config.run_dir = 1, str(trial)
    (trial / "config.yaml").write_text(to_yaml(config))
    env = {**os.environ, "PYTHONPATH": str(FAKE.parent.parent)}
    ended = subprocess.run(pretrain_command(trial), cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "train.global_batch_tokens=1 must be" in ended.stderr
    assert list(cwd.iterdir()) == []
    assert [path.name for path in trial.iterdir()] == ["config.yaml"]
