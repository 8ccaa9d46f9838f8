"""The quality ladder: what is compared is comparable, and its intervals are the textbook's."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from sweeps.ladder import main, make_plan, plan_folder, results, run
from sweeps.ladder_settings import SHIPPED, Ladder, configs
from sweeps.plan import Planner
from sweeps.processes import FolderBusyError, folder_lock
from sweeps.settings import SweepConfig
from sweeps.trial import PLAN_FILE, Plan, TrialKind, read_plan, trial_dir, trial_id, write_plan
from tests.test_plan import make, prepared
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


def test_rungs_of_unequal_tokens_are_refused() -> None:
    ladder = small(rungs={**SMALL["rungs"], "longer": ["model=tiny", "train.max_steps=70"]})
    with pytest.raises(
        ValueError, match=r"rungs.longer: trains on .* tokens, b on .*; a ladder compares .* equal tokens"
    ):
        make_plan(ladder, configs(ladder, []), None)


@pytest.mark.parametrize("path", sorted(SHIPPED.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_has_a_plan(path: Path) -> None:
    ladder = Ladder.read(path)
    trials = make_plan(ladder, configs(ladder, ["engine.native_kernels=off"]), None).trials
    assert len({trial.trial_id for trial in trials}) == len(ladder.rungs) * len(ladder.seeds)
    assert {trial.tokens for trial in trials} == {400 * 2048}


def test_the_shipped_file_names_the_rungs_of_other_size() -> None:
    ladder = Ladder.read(SHIPPED)
    trials = make_plan(ladder, configs(ladder, ["engine.native_kernels=off"]), None).trials
    said = dict(re.findall(r"(\w+) (-\d+\.\d) %", SHIPPED.read_text(encoding="utf-8")))
    sizes = {trial.name: f"{100 * trial.params_residual:+.1f}" for trial in trials}
    assert said == {name: size for name, size in sizes.items() if abs(float(size)) > 0.2}


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


def begun(ladder: Ladder, folder: Path, *settings: str) -> Plan:
    """A ladder of which one trial has finished."""
    plan = plan_folder(ladder, configs(ladder, list(settings)), prepared("data"), folder)
    write_plan(plan, folder)
    finish(plan, folder, {("a", ladder.seeds[0]): 4.0})
    return plan


def ids(plan: Plan) -> dict[tuple[str, int], str]:
    return {(trial.name, trial.seed): trial.trial_id for trial in plan.trials}


def test_a_ladder_goes_on_with_other_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_choices = small(settings=[], rungs={"a": ["model=tiny_switch"], "b": ["model=tiny"]})
    monkeypatch.setattr("sweeps.estimate.cpu_cores", lambda: 1)
    first = begun(open_choices, tmp_path / "runs")
    monkeypatch.setattr("sweeps.estimate.cpu_cores", lambda: 64)
    elsewhere = make_plan(open_choices, configs(open_choices, []), prepared("data"))
    assert elsewhere.trials[0].num_threads > 1 and not set(ids(first).values()) & set(ids(elsewhere).values())
    for number, rungs in enumerate((open_choices.rungs, {**open_choices.rungs, "c": ["model=tiny_arm"]})):
        longer = dataclasses.replace(open_choices, rungs=rungs, seeds=[4, 5, 6, 7])
        again = plan_folder(longer, configs(longer, []), prepared("data"), tmp_path / "runs")
        assert ids(first).items() <= ids(again).items() and len(again.trials) == 4 * (2 + number)
        assert {trial.num_threads for trial in again.trials} == {1}


def test_the_kernels_a_ladder_was_started_with_are_kept(tmp_path: Path) -> None:
    ladder = small(settings=["engine.num_threads=1"], rungs={"a": ["model=tiny"], "b": ["model=tiny_switch"]})
    recorded = ["engine.precision=fp32", "engine.native_kernels=off", "model.moe.expert_kernel=loop"]
    first = begun(ladder, tmp_path, *recorded)
    again = plan_folder(ladder, configs(ladder, []), prepared("data"), tmp_path)
    assert ids(again) == ids(first)


def test_changed_settings_are_refused_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sweeps.ladder.prepare", lambda cfg: prepared("data"))
    file, folder = tmp_path / "ladder.yaml", tmp_path / "runs" / "small"
    file.write_text(yaml.safe_dump(SMALL))
    begun(small(), folder)
    before = (folder / PLAN_FILE).read_text()
    for action in ("plan", "run"):
        assert main([action, "--file", str(file), "train.max_steps=70"]) == 2
    message = r"ladder with other settings \(a: train.max_steps: .* 70; b: .*choose another name in the ladder's file"
    with pytest.raises(ValueError, match=message):
        plan_folder(small(), configs(small(), ["train.max_steps=70"]), None, folder)
    with pytest.raises(ValueError, match=r"a: data\.fingerprint: "):
        plan_folder(small(), configs(small(), []), prepared("others"), folder)
    changed = small(rungs={**SMALL["rungs"], "c": ["model=tiny_arm"]})
    with pytest.raises(ValueError, match=r"settings \(c: memory.frozen: [^;]*\): choose"):
        plan_folder(changed, configs(changed, []), None, folder)
    assert (folder / PLAN_FILE).read_text() == before


def test_the_folder_of_a_sweep_is_no_ladders(tmp_path: Path) -> None:
    sweep = make()
    write_plan(sweep, tmp_path)
    trial_dir(tmp_path, sweep.trials[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="holds trials of a sweep: choose another name"):
        plan_folder(small(), configs(small(), []), None, tmp_path)


def test_a_refused_runner_writes_no_plan(tmp_path: Path) -> None:
    begun(small(), tmp_path)
    before = (tmp_path / PLAN_FILE).read_text()
    longer = small(seeds=[4, 5, 6, 7])
    plan = plan_folder(longer, configs(longer, []), prepared("data"), tmp_path)
    with folder_lock(tmp_path), pytest.raises(FolderBusyError):
        run(longer, plan, tmp_path, fake_command)
    assert (tmp_path / PLAN_FILE).read_text() == before


def test_what_another_runner_did_meanwhile_is_seen(tmp_path: Path) -> None:
    late = make_plan(small(), configs(small(), ["train.max_steps=70"]), prepared("data"))
    first = begun(small(), tmp_path)
    with pytest.raises(ValueError, match="ladder with other settings"):
        run(small(), late, tmp_path, fake_command)
    assert ids(read_plan(tmp_path)) == ids(first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "d"}, r"reference=d must be one of the rungs \['a', 'b', 'c'\]"),
        ({"reference": ["a"]}, r"reference=\['a'\] must be one of the rungs"),
        ({"seeds": [1]}, r"seeds=\[1\] must be a list of two or more"),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be a list of two or more different"),
        ({"seeds": 3}, r"seeds=3 must be a list of two or more different whole numbers; usual: \[0, 1, 2\]"),
        ({"seeds": [0, "1"]}, r"seeds=\[0, '1'\] must be"),
        ({"seeds": [[0], [1]]}, r"seeds=\[\[0\], \[1\]\] must be"),
        ({"name": "../other"}, r"name='../other' must be a plain folder name"),
        ({"name": None}, "name=None must be a plain folder name"),
        ({"settings": None}, r"settings=None must be a list of settings, e.g. .*; nearest: \[\]"),
        ({"settings": [{"train.max_steps": 400}]}, r"settings=\[{'train.max_steps': 400}\] must be a list of settings"),
        ({"rungs": {"a": None, "b": []}}, r"rungs.a=None must be a list of settings"),
        ({"rungs": {"a": "model=tiny", "b": []}}, r"rungs.a='model=tiny' must be a list of settings"),
        ({"rungs": ["a", "b"]}, r"rungs=\['a', 'b'\] must be names with the settings of each"),
        ({"rungs": {False: [], "b": []}}, "rungs={False: .* must be names"),
        ({"extra": 1}, "must hold exactly name, reference, rungs, seeds, settings"),
    ],
)
def test_wrong_files(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(ValueError, match=message):
        Ladder.read(path)


@pytest.mark.parametrize("content", [b"name: [small", b"name: \xff", b"rungs:\n\t- a"])
def test_a_broken_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_bytes(content)
    assert main(["plan", "--file", str(path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path} cannot be read" in line


def test_a_rung_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ladder.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "rungs:\n  a: [model=tiny]\n")
    with pytest.raises(ValueError, match=r"ladder.yaml cannot be read: rungs stands twice"):
        Ladder.read(path)
    path.write_text("name: x\nrungs:\n  a: [model=tiny]\n  b: []\n  a: []\n")
    with pytest.raises(ValueError, match=r"ladder.yaml cannot be read: a stands twice; give every rung"):
        Ladder.read(path)


def test_a_wrong_value_names_its_rung() -> None:
    ladder = small(rungs={**SMALL["rungs"], "b": ["model=tiny", "model.attention.num_heads=3"]})
    with pytest.raises(ValueError, match=r"rungs.b .*model.attention.num_kv_heads=2 must divide"):
        configs(ladder, [])


@pytest.mark.parametrize("word", ["seed=5", "+seed=5", "run_dir=foo"])
def test_what_a_ladder_decides_is_no_setting(word: str) -> None:
    name = word.lstrip("+").partition("=")[0]
    rung = {**SMALL["rungs"], "a": ["model=tiny", word]}
    for given, settings in ((small(), [word]), (small(settings=[word]), []), (small(rungs=rung), [])):
        with pytest.raises(ValueError, match=f"a ladder sets {name} of its trials itself; use .* in the ladder's file"):
            configs(given, settings)


def test_settings_may_follow_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ladder.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["plan", "train.max_steps=70", "--file", "ladder.yaml", "train.global_batch_tokens=4096"]) == 0
    assert f"{70 * 4096:,}" in capsys.readouterr().out
    assert main(["--file", "ladder.yaml", "plan"]) == 0


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--file", str(tmp_path / "none.yaml")]) == 2
    assert main(["plan", "model.nope=1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "there is no such file" in lines[0] and "there is no setting model.nope" in lines[1]
