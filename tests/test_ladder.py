"""The quality ladder: what is compared is comparable, and its intervals are the textbook's."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from sweeps.ladder import SHIPPED, Ladder, configs, main, make_plan, results, run
from sweeps.plan import Planner
from sweeps.settings import SweepConfig
from sweeps.trial import Plan, TrialKind, trial_dir, trial_id
from tests.test_plan import prepared
from tests.test_runner import fake_command
from train.compose import compose
from train.config import Config, resolve, to_plain
from train.files import atomic_write

SMALL = {
    "name": "small",
    "seeds": [4, 5, 6],
    "reference": "b",
    "settings": ["engine.precision=fp32", "engine.num_threads=1", "engine.native_kernels=off"],
    "rungs": {"a": ["model=tiny_switch"], "b": ["model=tiny"], "c": ["model=tiny_arm", "memory.frozen=true"]},
}


def small(**changes) -> Ladder:
    return Ladder(**{**SMALL, **changes})


def finish(plan: Plan, folder: Path, losses: dict[tuple[str, int], float]) -> None:
    """Trial folders with these losses, as training leaves them."""
    for trial in plan.trials:
        if (trial.name, trial.seed) in losses:
            place = trial_dir(folder, trial)
            place.mkdir(parents=True)
            (place / "config.yaml").write_text(yaml.safe_dump(trial.config))
            atomic_write(place / "result.json", f'{{"val_loss": {losses[trial.name, trial.seed]}}}')


def test_the_shipped_ladder_compares_equals() -> None:
    ladder = Ladder.read(SHIPPED)
    plan = make_plan(ladder, configs(ladder, ["engine.native_kernels=off"]), None)
    assert len(plan.trials) == len(ladder.rungs) * len(ladder.seeds) and len(ladder.seeds) >= 3
    assert len({trial.trial_id for trial in plan.trials}) == len(plan.trials)
    smaller = {"dense", "one_row", "no_module", "extra_shared"}  # by design: what they leave out is the question
    for trial in plan.trials:
        assert abs(trial.flops_residual) < 0.003 and trial.tokens == plan.trials[0].tokens
        assert trial.name in smaller or abs(trial.params_residual) < 0.025


def test_a_rung_is_a_run_that_can_be_repeated() -> None:
    ladder = small()
    plan = make_plan(ladder, configs(ladder, ["train.max_steps=70"]), None)
    (trial,) = (trial for trial in plan.trials if (trial.name, trial.seed) == ("c", 5))
    words = [*ladder.settings, *ladder.rungs["c"], "train.max_steps=70", "seed=5", "run_dir=elsewhere"]
    alone = resolve(compose(Config, "train_schema", "train", words))
    assert alone.memory.frozen and trial_id(to_plain(alone)) == trial.trial_id


def test_a_rung_costs_what_the_same_run_costs_in_a_sweep() -> None:
    data = prepared("data", num_val_tokens=1000)
    ladder = small()
    rungs = configs(ladder, ["train.eval_interval=100"])
    sweep = SweepConfig(name="small", rhos=[1.0], seeds=[5], control_rho=1.0)
    (expected,) = Planner(rungs["b"], sweep, data).first_stage().trials
    (rung,) = (trial for trial in make_plan(ladder, rungs, data).trials if (trial.name, trial.seed) == ("b", 5))
    assert dataclasses.replace(rung, kind=TrialKind.arm, name="") == expected


def test_gains_and_intervals_by_hand(tmp_path: Path) -> None:
    ladder = small()
    plan = make_plan(ladder, configs(ladder, []), None)
    rng = np.random.default_rng(0)
    table = rng.normal(4.0, 0.01, (3, 3)) + np.array([0.0, 0.3, -0.2])  # rungs x seeds
    finish(
        plan, tmp_path, {(name, seed): table[i, j] for i, name in enumerate("abc") for j, seed in enumerate((4, 5, 6))}
    )
    rungs, sigma = results(plan, tmp_path, "b")
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    expected = math.sqrt((residual**2).sum() / 4)
    assert sigma == pytest.approx(expected)
    half = stats.t.ppf(0.95, 4) * expected * math.sqrt(2 / 3)
    for i, rung in enumerate(rungs):
        gain = table[1].mean() - table[i].mean()
        wide = 0.0 if rung.trial.name == "b" else half
        assert (rung.trial.name, rung.mean) == ("abc"[i], pytest.approx(table[i].mean()))
        assert [rung.gain.estimate, rung.gain.low, rung.gain.high] == pytest.approx([gain, gain - wide, gain + wide])


def test_nothing_finished_and_a_missing_reference(tmp_path: Path) -> None:
    ladder = small()
    plan = make_plan(ladder, configs(ladder, []), None)
    with pytest.raises(ValueError, match="no trial has finished"):
        results(plan, tmp_path, "b")
    finish(plan, tmp_path, {("a", 4): 4.0, ("a", 5): 4.1, ("c", 4): 4.0, ("c", 5): 4.2})
    with pytest.raises(ValueError, match="too few trials have finished for a comparison with b"):
        results(plan, tmp_path, "b")


def test_a_ladder_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    ladder = small(seeds=[10, 11])
    plan = make_plan(ladder, configs(ladder, []), None)
    text, failed = run(ladder, plan, tmp_path, fake_command)
    assert failed == 0 and text == (tmp_path / "ladder.md").read_text()
    assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == ["| a", "| b", "| c"]
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/steps.log")}
    assert len(logs) == 6 and run(ladder, plan, tmp_path, fake_command) == (text, 0)
    assert logs == {path: path.stat().st_mtime_ns for path in logs}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "d"}, r"reference=d must be one of the rungs \['a', 'b', 'c'\]"),
        ({"seeds": [1]}, r"seeds=\[1\] must be two or more"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be two or more different"),
        ({"extra": 1}, "must hold exactly name, reference, rungs, seeds, settings"),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(ValueError, match=message):
        Ladder.read(path)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--file", str(tmp_path / "none.yaml")]) == 2
    assert main(["plan", "model.nope=1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "there is no such file" in lines[0] and "there is no setting model.nope" in lines[1]
