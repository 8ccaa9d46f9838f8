"""Run folders -> results.csv, by reading alone: works while the sweep runs, and again at any later time."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from sweeps.live import read_progress
from sweeps.trial import Plan, Trial, read_config, read_plan, trial_dir, trial_id
from train.files import atomic_write, read_json

RESULTS_FILE = "results.csv"
# Fixed and documented (docs/run_folder.md): readers may rely on names and order; new columns go to the end.
COLUMNS = (
    "rho",
    "rho_actual",
    "seed",
    "kind",
    "val_loss",
    "val_bits_per_byte",
    "num_experts",
    "slots",
    "total_params",
    "active_params",
    "memory_params",
    "embedding_params",
    "flops_per_token",
    "flops_per_token_no_head",
    "params_residual",
    "flops_residual",
    "tokens",
    "tokens_per_param",
    "lr_scale",
    "status",
    "train_seconds",
    "tokens_per_second",
    "trial_id",
)
_FROM_RESULT = ("val_loss", "val_bits_per_byte", "train_seconds", "tokens_per_second")


def collect(sweep_dir: Path) -> Path:
    """Write results.csv (atomically): one row a planned trial, in the plan's order.

    `status` is finished, failed, running, starting, stopped or waiting; only finished trials have a loss. Lengths are
    tokens, losses nats per token, times seconds; parameters exclude embedding and head except `embedding_params`.
    """
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(read_plan(sweep_dir), sweep_dir))
    path = Path(sweep_dir) / RESULTS_FILE
    atomic_write(path, table.getvalue())
    return path


def rows(plan: Plan, sweep_dir: Path) -> list[dict[str, Any]]:
    """One record a trial, keyed by `COLUMNS`; what is not known yet is an empty string."""
    return [_row(trial, trial_dir(sweep_dir, trial)) for trial in plan.trials]


def val_losses(plan: Plan, sweep_dir: Path) -> dict[str, float]:
    """{trial id: validation loss} of the finished trials."""
    return {row["trial_id"]: row["val_loss"] for row in rows(plan, sweep_dir) if row["status"] == "finished"}


def speeds(plan: Plan, sweep_dir: Path) -> list[float]:
    """Tokens per second of the finished trials."""
    found = (row["tokens_per_second"] for row in rows(plan, sweep_dir) if row["status"] == "finished")
    return [float(speed) for speed in found if speed]


def trial_result(folder: Path, trial: Trial) -> dict[str, Any] | None:
    """The result of a finished trial, or None: no result, a broken one, or one of another configuration."""
    config, result = read_config(folder), read_json(folder / "result.json")
    if config is None or result is None or trial_id(config) != trial.trial_id:
        return None
    loss = result.get("val_loss")
    return result if isinstance(loss, int | float) and math.isfinite(loss) else None


def _row(trial: Trial, folder: Path) -> dict[str, Any]:
    result = trial_result(folder, trial)
    planned = {name: getattr(trial, name) for name in COLUMNS if hasattr(trial, name)}
    measured = {name: result.get(name, "") if result else "" for name in _FROM_RESULT}
    return {**planned, **measured, "kind": trial.kind.value, "status": _status(folder, result)}


def _status(folder: Path, result: dict[str, Any] | None) -> str:
    if result is not None:
        return "finished"
    if (folder / "failure.json").is_file():
        return "failed"
    state = read_progress(folder).state
    return "failed" if state == "finished" else state
