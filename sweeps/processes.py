"""Locks and processes of a sweep: one runner per folder, no trial trained twice, nothing left running."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

LOCK_FILE = "lock"
# Seconds between SIGTERM, on which a trial ends its step, and SIGKILL. A trial resumes from its checkpoint either way.
GRACE_SECONDS = 30.0


class FolderBusyError(RuntimeError):
    """Another runner works in this sweep folder."""


def cpu_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `<folder>/lock` while the body runs; the kernel frees it however this process ends.

    Raises:
        FolderBusyError: another process holds it; the message names the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise FolderBusyError(
                f"{folder} is in use by another runner (process {holder}): wait until it ends, stop it with "
                f"`kill {holder}`, or choose another folder with sweep.name=..."
            ) from error
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def start_process(
    command: list[str], log: Path, num_threads: int, extra_env: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a trial in its own process group, with its output appended to `log` and its threads limited."""
    threads = str(num_threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    env = {**os.environ, **dict.fromkeys(names, threads), "TOKENIZERS_PARALLELISM": "false", **extra_env}
    env.setdefault("PYTHONUNBUFFERED", "1")
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )


def find_processes(folders: Iterable[Path]) -> list[psutil.Process]:
    """Living processes that were started for one of these trial folders (its absolute path is an argument).

    A runner that was killed leaves its trials running; a process id from a file could by now be another process's.
    """
    wanted = {str(folder) for folder in folders}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and wanted.intersection(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or belongs to somebody else
    return found


def stop_processes(processes: Iterable[psutil.Process], grace_seconds: float = GRACE_SECONDS) -> None:
    """SIGTERM to each trial's process group, then, after the grace time, SIGKILL to what is left."""
    everything: list[psutil.Process] = []
    for process in processes:
        try:
            everything += [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            continue
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(everything, timeout=grace_seconds)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=grace_seconds)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    """Signal a process, and its whole group where it leads one."""
    try:
        if process.is_running() and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return
