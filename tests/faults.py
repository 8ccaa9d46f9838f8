"""Faults for tests of checkpoints: damaged files, a full disk, a process that is killed while it writes."""

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Moments of a save at which `kill_at` ends the process, each by the function that would come next.
KILL_MOMENTS: dict[str, tuple[str, str]] = {
    "before_files": ("train.rank_files", "write_safetensors"),
    "before_record": ("train.checkpoint_writer", "write_rank_record"),
    "before_manifest": ("train.checkpoint_commit", "write_manifest"),
    "before_rename": ("train.checkpoint_commit", "publish"),
    "before_removal": ("train.checkpoint_writer", "prune"),
}


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    """Cut a file to `size` bytes; a negative size is what is cut off."""
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def remove(path: Path) -> None:
    """Remove a file."""
    path.unlink()


@contextmanager
def full_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """A folder that takes about `num_bytes`: a small tmpfs; where mounting is not allowed, files of at most that size.

    Writing more fails with ENOSPC, or EFBIG in the second case.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if _mount(folder, num_bytes):
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))  # Python ignores the signal that comes with it
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _mount(folder: Path, num_bytes: int) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def kill_at(moment: str, countdown: int = 1) -> None:
    """Let this process end itself by SIGKILL at the `countdown`-th time that it comes to a moment of KILL_MOMENTS."""
    import importlib

    module_name, name = KILL_MOMENTS[moment]
    module: ModuleType = importlib.import_module(module_name)
    original: Callable[..., Any] = getattr(module, name)
    left = countdown

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, dies)


def in_child(work: Callable[[], None]) -> int:
    """Do `work` in a forked process; its exit code, -9 where it was killed. To be waited for in the same call."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)  # no clean-up of the parent's tests
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
