"""Metrics: JSONL is the truth; TensorBoard and wandb are fed from the same records.

Names are `group/name`: `train/loss`, `val/loss`, `optim/grad_norm`, `perf/mfu`, ... (docs/metrics.md).
"""

import json
import netrc
import os
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from train.files import atomic_write, read_records
from train.run_folder import SCHEMA_VERSION


class WandbMode(str, Enum):
    """Where wandb writes. `auto`: where WANDB_MODE says; if it is not set, online with an API key, offline without."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class LogConfig:
    """Dashboards; none of it changes what a run computes."""

    wandb: WandbMode = WandbMode.auto
    wandb_project: str = "engram-lab"
    group: str = ""  # wandb group; a sweep sets its own name
    tensorboard: bool = False
    interval: int = 10  # steps between records
    progress: bool = True  # progress bar on a terminal

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"log.interval={self.interval} must be >= 1; nearest: 1")


# Dense bf16 peak of one device, FLOP/s without sparsity (vendors' data sheets).
_PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """(FLOP/s that MFU is measured against, the convention in words); 0 where nothing is known.

    A GPU's data-sheet bf16 peak; on a CPU the rate of a 1024^3 matmul at this precision and thread count, measured now.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, flops in _PEAK_FLOPS.items():
            if key in name:
                return flops, f"data-sheet dense bf16 peak of {name}"
        return 0.0, f"unknown peak of {name}: no MFU"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    left @ right  # first call builds the kernel
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best, f"measured {precision} matmul 1024^3 on {torch.get_num_threads()} CPU thread(s)"


class Recorder:
    """Appends records to `metrics.jsonl` and forwards their scalars to the dashboards that are switched on.

    On resume the file is cut back to the checkpoint's step, and a validation that stands in it already is not written
    again, so that no record stands in it twice. Only rank 0's writes anything; the others' ignore what they are given.
    """

    def __init__(
        self, path: Path, cfg: LogConfig, run_id: str, config: dict[str, Any], resume_step: int, writes: bool = True
    ) -> None:
        self._writes = writes
        if not writes:
            return
        self._validated = {record["step"] for record in _cut_back(path, resume_step) if "val/loss" in record}
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the recorder)
        self._tensorboard = _open_tensorboard(path.parent, resume_step) if cfg.tensorboard else None
        self._wandb = _open_wandb(path.parent, cfg, run_id, config)

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write one record; `step` counts applied optimizer steps. Values are numbers or lists of numbers."""
        if not self._writes or ("val/loss" in values and step in self._validated):
            return
        self._file.write(json.dumps({"schema_version": SCHEMA_VERSION, "step": step, **values}) + "\n")
        self._file.flush()
        scalars = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sync(self) -> None:
        """Bring all records to disk."""
        if not self._writes:
            return
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Bring everything to disk and end the dashboards."""
        if not self._writes:
            return
        self.sync()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _cut_back(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the records after `step`; the others."""
    kept = [record for record in read_records(path) if record["step"] <= step]
    atomic_write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _open_tensorboard(folder: Path, resume_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)


def _has_wandb_key() -> bool:
    """An API key in the environment or in ~/.netrc; asking wandb itself would go to the network."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


_WANDB_SECONDS = 15.0  # for the server's answer at the start; wandb's own limit is 90


def _open_wandb(folder: Path, cfg: LogConfig, run_id: str, config: dict[str, Any]) -> Any:
    """A wandb run, offline where no key is configured or the server cannot be reached; None where that fails too."""
    mode = cfg.wandb.value
    if cfg.wandb is WandbMode.auto:
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode == WandbMode.disabled.value:
        return None
    import wandb

    options: dict[str, Any] = {
        "project": cfg.wandb_project,
        "group": cfg.group or None,
        "id": run_id,
        "dir": str(folder),
        "config": config,
        # silent: thirty lines about files and syncing would hide the run's own last line
        "settings": wandb.Settings(init_timeout=_WANDB_SECONDS, silent=True),
    }
    if mode == "online":
        try:
            run = wandb.init(mode="online", resume="allow", **options)
            print(f"wandb: {run.url}", flush=True)
            return run
        except wandb.errors.Error as error:
            print(
                f"wandb is not reachable ({_first_line(error)}); logging offline: "
                f"`wandb sync {folder}/wandb/offline-run-*` later",
                flush=True,
            )
            wandb.teardown()  # the failed start still holds the run's id
    try:
        return wandb.init(mode="offline", **options)
    except wandb.errors.Error as error:
        print(f"wandb is switched off: it does not work offline either ({_first_line(error)})", flush=True)
        return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
