"""The folder of one run: who owns it, what it says of itself, and writing that never leaves half a file.

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
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SCHEMA_VERSION = 1  # of every file in a run's folder


class OccupiedRunFolderError(ValueError):
    """The folder belongs to another run, or another process is training in it."""


def atomic_write(path: Path, text: str) -> None:
    """Write through a temporary name, fsync and rename: readers see the old file or the new one, never a part.

    Raises:
        OSError: for example on a full disk; the old file is untouched and the temporary one removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Atomically write `record` with the schema version."""
    atomic_write(path, json.dumps({"schema_version": SCHEMA_VERSION, **record}, indent=1) + "\n")


class RunFolder:
    """One run's files. Use as a context manager: holds the folder's lock.

    Args:
        path: the folder; made if absent.
        config_yaml: resolved configuration of the run that wants it.
        identity: hash of what defines the run (see `train.config.config_hash`).
    """

    def __init__(self, path: Path, config_yaml: str, identity: str) -> None:
        self.path = path
        self.config_yaml = config_yaml
        self.identity = identity
        self._lock = FileLock(path / "lock")

    def __enter__(self) -> "RunFolder":
        """Take the folder.

        Raises:
            OccupiedRunFolderError: if a live process holds it, or it holds a run of another configuration.
        """
        self.path.mkdir(parents=True, exist_ok=True)
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
        self._lock.release()

    def _claim(self) -> None:
        identity_file = self.path / "identity.json"
        if identity_file.exists():
            held = json.loads(identity_file.read_text())["identity"]
            if held != self.identity:
                raise OccupiedRunFolderError(
                    f"run_dir={self.path} holds a run of another configuration (identity {held[:12]}, wanted "
                    f"{self.identity[:12]}); choose another run_dir, or remove that folder"
                )
        elif any(self.path.glob("checkpoints/step_*")):
            raise OccupiedRunFolderError(
                f"run_dir={self.path} holds checkpoints of an unknown run; choose another run_dir"
            )
        atomic_write(self.path / "config.yaml", self.config_yaml)
        write_json(identity_file, {"identity": self.identity})

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
        write_json(
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
