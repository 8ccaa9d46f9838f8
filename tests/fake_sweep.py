"""Writes a sweep's folder as a real one would leave it: plan.json, results.csv, trials with their run folders."""

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from sweeps.collect import COLUMNS
from sweeps.trial import Trial, trial_id

NUM_LAYERS = 3
TOP_K, BASE_EXPERTS = 4, 64


def valley(rho: float) -> float:
    """A U with its minimum at 0.4: 0.05 above it at rho = 0, 0.11 at rho = 1."""
    return 4.1 + (0.05 * ((0.4 - rho) / 0.4) ** 2 if rho < 0.4 else 0.11 * ((rho - 0.4) / 0.6) ** 2)


class FakeSweep:
    """A sweep folder in the making.

    Args:
        folder: Made if absent.
        curve: Loss against rho.
        sigma: Noise of one trial within its seed, nats.
    """

    def __init__(self, folder: Path, curve: Callable[[float], float] = valley, sigma: float = 0.005, steps: int = 400):
        self.folder, self.curve, self.sigma, self.steps = folder, curve, sigma, steps
        self.rng = np.random.default_rng(0)
        self.rows: list[dict] = []

    def add(self, rho: float, seed: int, kind: str = "arm", offset: float = 0.0, lr_scale: float = 1.0) -> Path:
        """A finished trial with metrics; returns its folder."""
        loss = self.curve(rho) + 0.05 * (seed % 3) + offset + self.sigma * float(self.rng.standard_normal())
        experts = TOP_K + round(rho * (BASE_EXPERTS - TOP_K))
        has_memory = kind == "arm" and rho < 1
        config = {"rho": rho, "seed": seed, "kind": kind, "lr_scale": lr_scale}
        row = {
            "rho": rho,
            "rho_actual": (experts - TOP_K) / (BASE_EXPERTS - TOP_K),
            "seed": seed,
            "kind": kind,
            "val_loss": loss,
            "val_bits_per_byte": loss / math.log(2) / 3.1,
            "num_experts": experts,
            "slots": int(46_000 * (1 - rho)) if has_memory else 0,
            "total_params": 7_840_000 if kind in ("arm", "lr") else 4_310_000,
            "active_params": 1_200_000,
            "memory_params": int(5.9e6 * (1 - rho)) if has_memory else 0,
            "embedding_params": 1_048_576,
            "flops_per_token": 5.1e6,
            "flops_per_token_no_head": 4.0e6,
            "params_residual": 0.0004,
            "flops_residual": -0.002,
            "tokens": 1_638_400,
            "tokens_per_param": 1_638_400 / 7.84e6,
            "lr_scale": lr_scale,
            "status": "finished",
            "train_seconds": 90.0,
            "tokens_per_second": 18_000.0,
            "trial_id": trial_id(config),
        }
        self.rows.append(row)
        folder = self.trial_folder(row["trial_id"])
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        self._write_metrics(folder, row, has_memory)
        result = {
            "schema_version": 1,
            "val_loss": loss,
            "data_fingerprint": "abc123",
            "environment": {"python": "3.11.7", "torch": "2.13.0", "threads": 1, "precision": "bf16", "device": "cpu"},
        }
        (folder / "result.json").write_text(json.dumps(result))
        status = {"schema_version": 1, "state": "finished", "step": self.steps, "max_steps": self.steps, "message": ""}
        (folder / "status.json").write_text(json.dumps(status))
        return folder

    def fail(self, rho: float, seed: int, log: str) -> Path:
        """A failed trial with its log."""
        folder = self.add(rho, seed)
        (folder / "result.json").unlink()
        row = self.rows[-1]
        row.update(status="failed", val_loss="", val_bits_per_byte="", train_seconds="", tokens_per_second="")
        (folder / "log.txt").write_text(log)
        status = {"state": "failed", "step": 120, "max_steps": self.steps, "message": "loss is nan at step 121"}
        (folder / "status.json").write_text(json.dumps(status))
        return folder

    def trial_folder(self, trial_id: str) -> Path:
        folder = self.folder / "trials" / trial_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def write(self) -> Path:
        """plan.json and results.csv; returns the sweep's folder."""
        plan = {
            "schema_version": 1,
            "name": self.folder.name,
            "fingerprint": "abc123",
            "jobs": 2,
            "keep_checkpoints": "none",
            "num_params_base": 7_840_000,
            "trials": [self._planned(row) for row in self.rows],
            "notes": ["2 trials at once with 1 thread(s) each in bf16 (2 CPU cores)"],
            "identity": {"data": {"source": "python", "fingerprint": "abc123"}, "train": {"max_steps": self.steps}},
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))
        with (self.folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        return self.folder

    @staticmethod
    def _planned(row: dict) -> dict:
        """The trial of a row as plan.json holds it."""
        names = {field.name for field in dataclasses.fields(Trial)}
        config = {name: row[name] for name in ("rho", "seed", "kind", "lr_scale")}
        costs = {"estimated_seconds": 90.0, "estimated_disk_bytes": 10**8, "num_threads": 1, "config": config}
        return {**{name: value for name, value in row.items() if name in names}, **costs}

    def _write_metrics(self, folder: Path, row: dict, has_memory: bool) -> None:
        lines = []
        for step in range(10, self.steps + 1, 10):
            counts = self.rng.poisson(200, (NUM_LAYERS, row["num_experts"]))
            record = {
                "schema_version": 1,
                "step": step,
                "train/loss": row["val_loss"] + 4 * math.exp(-step / 60),
                "optim/lr": 3e-3,
                "optim/grad_norm": 1.0 + float(self.rng.random()),
                "perf/tokens_per_second": 18_000.0,
                "moe/max_load": float((counts / counts.mean(axis=1, keepdims=True)).max()),
                "moe/expert_counts": counts.tolist(),
                "moe/router_entropy": [3.0] * NUM_LAYERS,
            }
            if has_memory:
                record |= {
                    "engram/gate_mean_1": 0.5 + 0.1 * step / self.steps,
                    "engram/gate_histogram_1": self.rng.poisson(50, 10).tolist(),
                    "engram/rows_touched_1": 3000,
                    "engram/rows_ever_touched_1": 40 * step,
                    "engram/num_rows_1": 40_000,
                }
            lines.append(record)
            if step % 100 == 0:
                lines.append({"schema_version": 1, "step": step, "val/loss": row["val_loss"] + math.exp(-step / 100)})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def full_sweep(folder: Path, num_seeds: int = 3) -> FakeSweep:
    """Seven arms, all controls, learning-rate trials, one failure."""
    sweep = FakeSweep(folder)
    for seed in range(num_seeds):
        for rho in (0.0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0):
            sweep.add(rho, seed)
        sweep.add(0.4, seed, "no_module", 0.07)
        sweep.add(0.4, seed, "one_row", 0.06)
        sweep.add(1.0, seed, "one_row_pure", -0.01)
        for scale in (0.5, 2.0):
            sweep.add(1.0, seed, "lr", 0.03, scale)
            sweep.add(0.4, seed, "lr", 0.02, scale)
    sweep.fail(0.1, 0, "starting\nValueError: <script>alert('no')</script> broke\n")
    return sweep
