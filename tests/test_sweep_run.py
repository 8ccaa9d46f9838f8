"""The command line of a sweep, with fake trials instead of training and a fake report."""

import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweeps import run
from sweeps.processes import FolderBusyError, folder_lock
from sweeps.run import Action, SweepRoot, act, compose_sweep
from sweeps.trial import TrialKind, read_plan, trial_dir
from tests.test_plan import prepared
from tests.test_runner import fake_command

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["sweep.seeds=[10,11]", "sweep.jobs=4", "engine.num_threads=1", "engine.precision=fp32"]


def composed(*overrides: str, sweep: str = "default") -> SweepRoot:
    return compose_sweep([f"sweep={sweep}", *overrides])


def started(tmp_path: Path, *overrides: str, action: Action = Action.run) -> SweepRoot:
    root = composed(f"sweep.root={tmp_path}", "sweep.name=s", *QUICK, *overrides)
    root.action = action
    return root


@pytest.fixture(autouse=True)
def no_data_and_no_report(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Prepared data out of nothing, and a report that only notes its call."""
    reports: list[Path] = []

    def report(folder: Path) -> Path:
        reports.append(folder)
        return folder / "report.html"

    monkeypatch.setattr(run, "prepare", lambda cfg: prepared())
    monkeypatch.setattr(run, "open_prepared", lambda cfg: prepared())
    monkeypatch.setattr(run, "build_report", report)
    monkeypatch.setattr(run, "read_conclusion", lambda folder: "the conclusion\nin words")
    return reports


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("sweep", ["default", "smoke", "long"])
def test_shipped_sweeps_have_a_strict_plan(sweep: str, tmp_path: Path) -> None:
    root = composed(f"sweep.root={tmp_path}", sweep=sweep)
    _, plan = run.make_plan(root, None, tmp_path / "none")
    for trial in plan.trials:
        assert abs(trial.flops_residual) <= 5e-3
        if trial.kind in (TrialKind.arm, TrialKind.lr, TrialKind.one_row_pure):
            assert abs(trial.params_residual) <= 1e-3


def test_default_sweep_is_what_the_readme_promises(tmp_path: Path) -> None:
    _, plan = run.make_plan(composed(f"sweep.root={tmp_path}"), None, tmp_path / "none")
    arms = [trial for trial in plan.trials if trial.kind is TrialKind.arm]
    rhos = {trial.rho for trial in arms}
    assert {0.0, 1.0} <= rhos
    assert len(rhos) >= 6
    assert len({trial.seed for trial in arms}) >= 2
    controls = {trial.kind for trial in plan.trials} - {TrialKind.arm}
    assert {TrialKind.no_module, TrialKind.one_row} <= controls


def test_plan_prints_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert act(started(tmp_path, action=Action.plan), fake_command) == 0
    assert "no_module" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


def test_run_ends_with_the_conclusion_and_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_data_and_no_report: list[Path]
) -> None:
    assert act(started(tmp_path), fake_command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == ["the conclusion", "in words", f"report: {tmp_path / 's' / 'report.html'}"]
    assert no_data_and_no_report == [tmp_path / "s"]
    assert {row["status"] for row in table(tmp_path / "s")} == {"finished"}
    assert len(table(tmp_path / "s")) == len(read_plan(tmp_path / "s").trials)


def test_learning_rates_at_the_best_rho_follow_the_arms(tmp_path: Path) -> None:
    assert act(started(tmp_path, "sweep.lr_scales=[0.5]", "sweep.controls=[]"), fake_command) == 0
    rows = table(tmp_path / "s")
    assert {row["status"] for row in rows} == {"finished"}
    arms = [row for row in rows if row["kind"] == "arm" and row["rho"] != "1.0"]
    sums: dict[str, float] = {}
    for row in arms:
        sums[row["rho"]] = sums.get(row["rho"], 0.0) + float(row["val_loss"])
    lr_rhos = [row["rho"] for row in rows if row["kind"] == "lr"]
    assert lr_rhos == ["1.0", "1.0", *[min(sums, key=sums.__getitem__)] * 2]
    # The same command again knows all of it from the folders and starts nothing.
    again = act(started(tmp_path, "sweep.lr_scales=[0.5]", "sweep.controls=[]"), lambda folder: ["/does/not/exist"])
    assert again == 0
    assert table(tmp_path / "s") == rows


def test_failed_trials_are_reported_with_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], no_data_and_no_report: list[Path]
) -> None:
    assert act(started(tmp_path, "sweep.seeds=[10,2]"), fake_command) == 1  # seed 2 fails in fake_trial.py
    assert no_data_and_no_report
    assert "the same command tries them again" in capsys.readouterr().err
    rows = table(tmp_path / "s")
    assert {row["status"] for row in rows if row["seed"] == "2"} == {"failed"}
    assert {row["status"] for row in rows if row["seed"] == "10"} == {"finished"}


def test_nothing_to_report_when_all_fail(tmp_path: Path, no_data_and_no_report: list[Path]) -> None:
    assert act(started(tmp_path, "sweep.seeds=[2]"), fake_command) == 1
    assert no_data_and_no_report == []


def test_more_seeds_join_a_sweep(tmp_path: Path) -> None:
    act(started(tmp_path, "sweep.seeds=[10]"), fake_command)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/trials/*/result.json")}
    act(started(tmp_path, "sweep.seeds=[10,11]"), fake_command)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("s/trials/*/result.json")}
    assert len(after) == 2 * len(before)
    assert all(after[path] == before[path] for path in before)


def test_another_base_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    act(started(tmp_path), fake_command)
    plan = (tmp_path / "s" / "plan.json").read_text()
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 -> 0.001.*choose another sweep.name"):
        act(started(tmp_path, "optim.lr=0.001"), fake_command)
    assert (tmp_path / "s" / "plan.json").read_text() == plan


def test_changed_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act(started(tmp_path), fake_command)
    monkeypatch.setattr(run, "prepare", lambda cfg: prepared("other"))
    with pytest.raises(ValueError, match=r"data\.fingerprint: 'abc' -> 'other'"):
        act(started(tmp_path), fake_command)


def test_interrupted_run_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, on_start: Callable[[], None], **__: object) -> None:
        on_start()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_trials", interrupted)
    assert act(started(tmp_path), fake_command) == 130
    assert "The same command goes on where this stopped" in capsys.readouterr().out
    assert {row["status"] for row in table(tmp_path / "s")} == {"waiting"}


def test_a_refused_runner_writes_no_plan(tmp_path: Path) -> None:
    act(started(tmp_path, "sweep.seeds=[10]"), fake_command)
    plan = (tmp_path / "s" / "plan.json").read_text()
    with folder_lock(tmp_path / "s"), pytest.raises(FolderBusyError):
        act(started(tmp_path), fake_command)
    assert (tmp_path / "s" / "plan.json").read_text() == plan


def test_report_needs_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep was started here"):
        act(started(tmp_path, action=Action.report), fake_command)


def test_report_of_an_unfinished_sweep(tmp_path: Path, no_data_and_no_report: list[Path]) -> None:
    act(started(tmp_path), fake_command)
    victim = trial_dir(tmp_path / "s", read_plan(tmp_path / "s").trials[0])
    (victim / "result.json").unlink()
    no_data_and_no_report.clear()
    assert act(started(tmp_path, action=Action.report), fake_command) == 0
    assert no_data_and_no_report == [tmp_path / "s"]
    assert [row["status"] for row in table(tmp_path / "s")].count("finished") == len(table(tmp_path / "s")) - 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.max_stepps=3", r"no setting train.max_stepps; did you mean train.max_steps\?"),
        ("swep.jobs=0", r"no setting swep.jobs; did you mean sweep.jobs\?"),
        ("sweep.rhos=[a,1.0]", r"sweep.rhos.*'a'"),
        ("sweep.rhos=0.5", r"sweep.rhos"),
        ("sweep.rhos=[0,0.5", r"sweep.rhos=\[0,0.5"),
        ("sweep.rhos=[0.0,1.5,1.0]", r"1\.5 must lie in \[0, 1\]"),
        ("sweep=huge", r"huge.*there are: default, long, smoke"),
        ("model.moe.num_experts=notint", r"model.moe.num_experts.*notint"),
        ("seed=1", r"seed=1: a sweep sets seed .* sweep.seeds"),
        ("run_dir=x", r"run_dir=x: a sweep sets run_dir .* sweep.root"),
    ],
)
def test_bad_settings_on_the_command_line(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        composed(word)
    assert "\n" not in str(raised.value)


def test_error_is_one_line_and_a_nonzero_exit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sweeps.run", "sweep.seeds=[]", f"sweep.root={tmp_path}", "action=run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: sweep.seeds=[] must name at least one seed")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
