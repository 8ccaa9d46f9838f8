"""results.csv from folders in every state a sweep can be in."""

import csv
import json
from pathlib import Path

import yaml

from sweeps.collect import COLUMNS, collect, rows, speeds, val_losses
from sweeps.trial import Plan, Trial, trial_dir, write_plan
from tests.test_runner import make_trial

RESULT = {"val_loss": 4.25, "val_bits_per_byte": 1.75, "train_seconds": 61.5, "tokens_per_second": 5000.0}
# docs/plan.md: the columns other tools may rely on
DOCUMENTED = (
    "rho, rho_actual, seed, kind, val_loss, val_bits_per_byte, num_experts, slots, total_params, active_params, "
    "memory_params, embedding_params, flops_per_token, flops_per_token_no_head, params_residual, flops_residual, "
    "tokens, tokens_per_param, lr_scale, status, train_seconds, tokens_per_second, trial_id"
)


def make_plan(trials: list[Trial]) -> Plan:
    return Plan("test", "abc", 1, "none", 1, {}, trials)


def fill(sweep: Path, trial: Trial, result: str | None = None, config: dict | None = None, **files: dict) -> None:
    folder = trial_dir(sweep, trial)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config or trial.config))
    if result is not None:
        (folder / "result.json").write_text(result)
    for name, record in files.items():
        (folder / f"{name}.json").write_text(json.dumps(record))


def test_columns_are_the_documented_ones() -> None:
    assert tuple(DOCUMENTED.split(", ")) == COLUMNS


def test_every_state(tmp_path: Path) -> None:
    trials = [make_trial(value=v / 10) for v in range(8)]
    finished, running, failed, broken, altered, endless, fake_end, _ = trials
    fill(tmp_path, finished, json.dumps(RESULT), status={"state": "finished", "step": 9, "max_steps": 9})
    fill(tmp_path, running, status={"state": "running", "step": 3, "max_steps": 9})
    fill(tmp_path, failed, status={"state": "running"}, failure={"exit_code": 1})
    fill(tmp_path, broken, json.dumps(RESULT)[:-9], status={"state": "stopped"})
    fill(tmp_path, altered, json.dumps(RESULT), config={**altered.config, "value": 99})
    fill(tmp_path, endless, json.dumps({**RESULT, "val_loss": float("nan")}))
    fill(tmp_path, fake_end, status={"state": "finished"})
    plan = make_plan(trials)
    write_plan(plan, tmp_path)
    path = collect(tmp_path)
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert [row["status"] for row in table] == [
        "finished", "running", "failed", "stopped", "failed", "failed", "failed", "waiting"
    ]  # fmt: skip
    assert [row["val_loss"] for row in table] == ["4.25", *[""] * 7]
    assert table[0]["train_seconds"] == "61.5"
    assert [row["trial_id"] for row in table] == [trial.trial_id for trial in trials]
    assert [float(row["rho"]) for row in table] == [v / 10 for v in range(8)]
    assert list(table[0]) == list(COLUMNS)
    assert val_losses(plan, tmp_path) == {finished.trial_id: 4.25}
    assert speeds(plan, tmp_path) == [5000.0]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    trials = [make_trial(value=0.5)]
    fill(tmp_path, trials[0], json.dumps(RESULT))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert rows(make_plan(trials), tmp_path)[0]["val_loss"] == 4.25
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
