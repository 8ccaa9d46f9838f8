"""The folder of one run: who owns it, and what it says of itself.

config.yaml      resolved configuration; the run can be repeated from it alone
ds_config.json   the generated DeepSpeed configuration
status.json      state, step, heartbeat (replaced atomically)
metrics.jsonl    one record a line; the truth that dashboards and reports read
result.json      written once, when the run has finished
checkpoints/     see train/checkpoint.py
log.txt          what the process printed, when a runner started it
lock             held while a process trains here
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from train.files import atomic_write, write_json
from train.identity import differ_in_layout_alone, differing_settings, identity_settings

SCHEMA_VERSION = 1  # of every file in a run's folder


# Everything that may lie in a run's folder before the run has claimed it: a runner leaves some, a killed start others.
_NAMES = {
    "config.yaml", "ds_config.json", "identity.json", "status.json", "metrics.jsonl", "result.json", "checkpoints",
    "log.txt", "lock", "failure.json", "wandb", "tensorboard",
}  # fmt: skip


class OccupiedRunFolderError(ValueError):
    """The folder belongs to another run, or another process is training in it."""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Atomically write a JSON file of a run, with its schema version."""
    write_json(path, {"schema_version": SCHEMA_VERSION, **record})


def _first(changes: list[str], count: int = 6) -> str:
    more = f"; and {len(changes) - count} more" if len(changes) > count else ""
    return "; ".join(changes[:count]) + more


class RunFolder:
    """One run's files. Use as a context manager: holds the folder's lock.

    Args:
        path: the folder; made if absent.
        config_yaml: resolved configuration of the run that wants it.
        identity: hash of what defines the run (see `train.config.config_hash`).
        writes: whether this process claims the folder and writes records; of several ranks, rank 0 alone does.

    Attributes:
        step: last applied optimizer step, also of earlier starts.
    """

    def __init__(self, path: Path, config_yaml: str, identity: str, writes: bool = True) -> None:
        self.path = path
        self.writes = writes
        self.config_yaml = config_yaml
        self.identity = identity
        self.step = 0
        self._lock = FileLock(path / "lock")

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Raises:
            OccupiedRunFolderError: if a live process holds it, it holds a run of another configuration, or the path
                is no folder.
        """
        if not self.writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise OccupiedRunFolderError(
                f"run_dir={self.path} is a file, or lies below one; choose another run_dir, e.g. runs/train"
            ) from error
        except OSError as error:
            raise OccupiedRunFolderError(
                f"run_dir={self.path} cannot be made ({error.strerror}); choose a folder that you own, e.g. runs/train"
            ) from error
        self._refuse_foreign_folder()
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OccupiedRunFolderError(
                f"run_dir={self.path} is in use by a running process; wait for it, stop it, or choose another run_dir"
            ) from None
        try:
            self._claim()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.writes:
            self._lock.release()

    def _claim(self) -> None:
        """Refuse a folder with something of another run in it; take over one of a start that got nowhere."""
        held = self._read("identity.json").get("identity")
        if held != self.identity and self._holds_something():
            was = identity_settings(yaml.safe_load((self.path / "config.yaml").read_text()) if held else {})
            now = identity_settings(yaml.safe_load(self.config_yaml))
            changes = differing_settings(was, now)
            if not held or not differ_in_layout_alone(was, now):
                raise OccupiedRunFolderError(
                    f"run_dir={self.path} holds a run of another configuration "
                    f"({_first(changes) if held else 'an unknown one'}); choose another run_dir, or remove that folder"
                )
            print(f"{self.path} goes on in another layout ({_first(changes)}): sums are rounded otherwise from here on")
            held = self.identity
        for leftover in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".step_*.tmp")]:  # of killed processes
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.step = self._read("status.json").get("step", 0) if held == self.identity else 0
        atomic_write(self.path / "config.yaml", self.config_yaml)
        write_record(self.path / "identity.json", {"identity": self.identity})

    def _refuse_foreign_folder(self) -> None:
        """A folder with other things in it, such as a project's own, is no place for a run."""
        if (self.path / "identity.json").exists():
            return
        foreign = sorted(entry.name for entry in self.path.iterdir() if entry.name not in _NAMES)
        foreign = [name for name in foreign if not name.startswith(".")]
        if foreign:
            raise OccupiedRunFolderError(
                f"run_dir={self.path} holds files that are no run's ({', '.join(foreign[:4])}): a run needs a folder "
                "of its own; choose another run_dir, e.g. runs/train"
            )

    def _holds_something(self) -> bool:
        """Whether anything was computed here: a checkpoint, a metrics record or a result."""
        recorded = self.metrics.exists() and self.metrics.stat().st_size > 0
        return recorded or (self.path / "result.json").exists() or any(self.checkpoints.glob("step_*"))

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return record

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.jsonl"

    def status(self, state: str, step: int, max_steps: int, message: str = "") -> None:
        """Replace `status.json`; `state` is starting, running, finished, failed or stopped."""
        if self.writes:
            self._write_status(state, step, max_steps, message)

    def record(self, name: str, values: dict[str, Any]) -> None:
        """Write one of the run's JSON files."""
        if self.writes:
            write_record(self.path / name, values)

    def _write_status(self, state: str, step: int, max_steps: int, message: str) -> None:
        write_record(
            self.path / "status.json",
            {
                "state": state,
                "step": step,
                "max_steps": max_steps,
                "heartbeat": time.time(),  # unix seconds
                "pid": os.getpid(),
                "message": message,
            },
        )

    def result(self) -> dict[str, Any] | None:
        """The finished run's result, or None."""
        path = self.path / "result.json"
        return json.loads(path.read_text()) if path.exists() else None
