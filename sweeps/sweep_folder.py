"""Reads a sweep's folder for the report: plan, results, metrics, failures. Whatever is optional may be absent."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sweeps.noise import Point
from train.files import read_json, read_records, tail_lines

TEXT_COLUMNS = {"kind", "status", "trial_id"}
LOG_TAIL_LINES = 20  # shown of a failed trial
MAX_CURVE_POINTS = 200  # points drawn of one curve


@dataclass
class TrialRecord:
    """One row of results.csv with what its run folder holds."""

    row: dict[str, Any]  # numbers as floats; None where the cell is empty
    metrics: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    log_tail: str = ""

    @property
    def kind(self) -> str:
        """`arm`, a control's kind or `lr`."""
        return str(self.row["kind"])

    @property
    def rho(self) -> float:
        """The planned rho."""
        return float(self.row["rho"])

    @property
    def seed(self) -> int:
        """The trial's seed."""
        return int(self.row["seed"])

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate."""
        scale = self.row.get("lr_scale")
        return 1.0 if scale is None else float(scale)

    @property
    def name(self) -> str:
        """A short name for legends."""
        kind = "" if self.kind == "arm" else f"{self.kind.replace('_', ' ')}, "
        scale = "" if self.lr_scale == 1.0 else f", lr x{self.lr_scale:g}"
        return f"{kind}rho {self.rho:g}, seed {self.seed}{scale}"

    @property
    def finished(self) -> bool:
        """Has a validation loss."""
        return self.row.get("status") == "finished" and self.row.get("val_loss") is not None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a scalar metric, thinned to at most `MAX_CURVE_POINTS` (the last one kept)."""
        pairs = [(r["step"], r[key]) for r in self.metrics if "step" in r and _is_number(r.get(key))]
        return thin(pairs)

    def last(self, key: str) -> Any:
        """The latest value of a metric, or None."""
        return next((record[key] for record in reversed(self.metrics) if record.get(key) is not None), None)

    def keys(self, prefix: str) -> list[str]:
        """Names of recorded metrics that start with `prefix`, sorted."""
        return sorted({key for record in self.metrics for key in record if key.startswith(prefix)})


@dataclass
class SweepRecord:
    """A whole sweep folder."""

    path: Path
    plan: dict[str, Any]
    trials: list[TrialRecord]

    def points(self) -> tuple[list[Point], list[Point]]:
        """Finished arms, and finished trials of other kinds, at the rho that was solved.

        Trials with one planned rho share the solved rho of their arm, so that controls meet it.
        """
        solved: dict[float, float] = {}
        for trial in self.trials:
            actual = trial.row.get("rho_actual")
            if trial.kind == "arm" and actual is not None:
                solved.setdefault(trial.rho, round(float(actual), 6))
        points = [
            Point(solved.get(t.rho, t.rho), t.seed, float(t.row["val_loss"]), t.kind, t.lr_scale)
            for t in self.trials
            if t.finished
        ]
        return [p for p in points if p.kind == "arm"], [p for p in points if p.kind != "arm"]

    def of_kind(self, *kinds: str) -> list[TrialRecord]:
        """Trials of these kinds, by rho and seed."""
        chosen = [trial for trial in self.trials if trial.kind in kinds]
        return sorted(chosen, key=lambda trial: (trial.kind, trial.rho, trial.lr_scale, trial.seed))


def thin(pairs: Sequence[tuple[int, float]], limit: int = MAX_CURVE_POINTS) -> tuple[list[int], list[float]]:
    """At most `limit` of the pairs, evenly spaced, first and last kept."""
    if len(pairs) > limit:
        pairs = [pairs[round(i * (len(pairs) - 1) / (limit - 1))] for i in range(limit)]
    return [int(step) for step, _ in pairs], [float(value) for _, value in pairs]


def read_sweep(sweep_dir: Path) -> SweepRecord:
    """Read everything the report shows.

    Raises:
        FileNotFoundError: No results.csv: not a sweep's folder, or a sweep that has not collected anything.
        ValueError: results.csv lacks a column or has a cell that is no number.
    """
    results = sweep_dir / "results.csv"
    if not results.is_file():
        raise FileNotFoundError(
            f"sweep_dir={str(sweep_dir)!r} has no results.csv: it must be a sweep's folder such as runs/default; "
            "run `make sweep` first or name another folder"
        )
    trials = []
    with results.open(newline="", encoding="utf-8") as file:
        for number, raw in enumerate(csv.DictReader(file), start=2):
            trials.append(_read_trial(sweep_dir, _typed(raw, number, results)))
    return SweepRecord(sweep_dir, read_json(sweep_dir / "plan.json") or {}, trials)


def _typed(raw: dict[str, str], number: int, path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for column in ("rho", "seed", "kind", "val_loss", "status", "trial_id"):
        if raw.get(column) is None:
            raise ValueError(
                f"{path}, line {number}: column {column!r} is missing; collect the sweep again (make report)"
            )
    for column, text in raw.items():
        if column in TEXT_COLUMNS or column is None:
            row[column] = text
            continue
        try:
            row[column] = float(text) if text else None
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {column}={text!r} is no number; collect the sweep again"
            ) from error
    return row


def _read_trial(sweep_dir: Path, row: dict[str, Any]) -> TrialRecord:
    folder = sweep_dir / "trials" / Path(str(row["trial_id"])).name
    record = TrialRecord(row)
    record.metrics = read_records(folder / "metrics.jsonl")
    record.result = read_json(folder / "result.json") or {}
    record.status = read_json(folder / "status.json") or {}
    if row.get("status") == "failed":
        record.log_tail = "\n".join(tail_lines(folder / "log.txt")[-LOG_TAIL_LINES:])
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
