"""Runs the trials of a plan as processes: skips what is finished, resumes what was interrupted, records what fails.

The state of a sweep is its folders, nothing else. A trial is finished when its folder holds the planned `config.yaml`
and a whole `result.json`; in any other case it is started, and the trial itself goes on from its last checkpoint.
Hence the same command is right after Ctrl-C, after `kill -9` of the runner or of a trial, and after a reboot.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil
import yaml

from sweeps.collect import trial_result
from sweeps.live import SweepView, duration, label
from sweeps.processes import find_processes, folder_lock, start_process, stop_processes
from sweeps.trial import Trial, pretrain_arguments, read_config, trial_dir, trial_id
from train.files import atomic_write, read_json, tail_lines
from train.identity import differing_settings
from train.run_folder import write_record

POLL_SECONDS = 0.2  # between two looks at the running trials
LOG_TAIL_LINES = 20  # of log.txt, kept in failure.json and shown
FAILURE_FILE = "failure.json"
Command = Callable[[Path], list[str]]


class OccupiedFolderError(ValueError):
    """A trial folder holds a run of another configuration."""


class DiskSpaceError(OSError):
    """The disk has less room than the plan needs."""


@dataclass
class Summary:
    """How a call of the runner ended."""

    finished: list[Trial] = field(default_factory=list)  # those found finished included
    failed: list[Trial] = field(default_factory=list)


@dataclass
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    place: int  # 0-based; also the GPU it uses
    log_start: int  # bytes of log.txt from earlier starts
    began: float


def pretrain_command(folder: Path) -> list[str]:
    """The command that starts, or continues, the run of a folder."""
    return [sys.executable, *pretrain_arguments(str(folder))]


def is_finished(folder: Path, trial: Trial) -> bool:
    """Whether the folder holds this trial's result.

    Raises:
        OccupiedFolderError: the folder was made for another configuration.
    """
    found = read_config(folder)
    if found is not None and trial_id(found) != trial.trial_id:
        changes = "; ".join(differing_settings(found, {**trial.config, "run_dir": found.get("run_dir")})[:5])
        raise OccupiedFolderError(
            f"{folder} holds a run of another configuration ({changes or 'config.yaml was altered'}): "
            "move this folder away, or choose another sweep.name"
        )
    return trial_result(folder, trial) is not None


def run_trials(
    trials: Sequence[Trial],
    sweep_dir: Path,
    jobs: int,
    keep_checkpoints: str = "none",
    command: Command = pretrain_command,
    num_gpus: int = 0,
    on_end: Callable[[], object] = lambda: None,
    on_start: Callable[[], object] = lambda: None,
) -> Summary:
    """Run every trial that is not finished, `jobs` at once, the longest first; returns when all have ended.

    Args:
        trials: what to run; the order of starts has no influence on any result.
        sweep_dir: folder of the sweep; trials lie in `trials/<trial id>`.
        jobs: processes at once.
        keep_checkpoints: `none` removes a finished trial's checkpoints, `last` leaves them.
        command: trial folder -> command line.
        num_gpus: above 0, the trial in place i sees only GPU i modulo `num_gpus`.
        on_end: called after each trial has ended, well or not.
        on_start: called once the folder is locked and before anything else: what a refused runner must not write.

    Raises:
        FolderBusyError: another runner works here.
        OccupiedFolderError: a trial folder belongs to another configuration; nothing has been started.
        DiskSpaceError: the disk cannot hold the checkpoints; nothing has been started.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after all trials were stopped.
    """
    with folder_lock(sweep_dir), _sigterm_as_interrupt():
        on_start()
        finished = [trial for trial in trials if is_finished(trial_dir(sweep_dir, trial), trial)]
        done = {trial.trial_id for trial in finished}
        waiting = sorted((t for t in trials if t.trial_id not in done), key=lambda trial: -trial.estimated_seconds)
        _check_disk(waiting, sweep_dir, jobs, keep_checkpoints)
        with SweepView(sweep_dir, trials, jobs) as view:
            for trial in finished:
                view.ended(trial, "finished")
                _remove_checkpoints(trial_dir(sweep_dir, trial), keep_checkpoints)
            if finished:
                view.say(f"{len(finished)} of {len(trials)} trials are finished already")
            _stop_left_over(waiting, sweep_dir, view)
            loop = _Loop(sweep_dir, jobs, keep_checkpoints, command, num_gpus, view)
            summary = loop.run(waiting, on_end)
        return Summary([*finished, *summary.finished], summary.failed)


class _Loop:
    """Starts, watches and ends the trial processes of one call."""

    def __init__(
        self, sweep_dir: Path, jobs: int, keep_checkpoints: str, command: Command, num_gpus: int, view: SweepView
    ) -> None:
        self._sweep_dir = sweep_dir
        self._jobs = jobs
        self._keep_checkpoints = keep_checkpoints
        self._command = command
        self._num_gpus = num_gpus
        self._view = view
        self._running: list[_Running] = []
        self._summary = Summary()

    def run(self, trials: Sequence[Trial], on_end: Callable[[], object]) -> Summary:
        waiting = list(trials)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    self._running.append(self._start(waiting.pop(0)))
                for entry in [entry for entry in self._running if entry.process.poll() is not None]:
                    self._running.remove(entry)
                    self._end(entry)
                    on_end()
                self._view.update([entry.trial for entry in self._running], waiting)
                time.sleep(POLL_SECONDS)
        finally:
            self._stop()  # nothing runs any more unless an exception passes through
        return self._summary

    def _start(self, trial: Trial) -> _Running:
        folder = trial_dir(self._sweep_dir, trial)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        resumes = (folder / "config.yaml").is_file()
        if not resumes:
            config = {**trial.config, "run_dir": str(folder)}
            atomic_write(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        log = folder / "log.txt"
        log_start = log.stat().st_size if log.is_file() else 0
        place = min(set(range(self._jobs)) - {entry.place for entry in self._running})
        extra = {"CUDA_VISIBLE_DEVICES": visible_gpu(place, self._num_gpus)} if self._num_gpus else {}
        process = start_process(self._command(folder), log, trial.num_threads, extra)
        self._view.say(f"{'resumed' if resumes else 'started'}  {label(trial)}  ({trial.trial_id})")
        return _Running(trial, process, place, log_start, time.monotonic())

    def _end(self, entry: _Running) -> None:
        folder = trial_dir(self._sweep_dir, entry.trial)
        took = duration(time.monotonic() - entry.began)
        if entry.process.returncode == 0 and is_finished(folder, entry.trial):
            _remove_checkpoints(folder, self._keep_checkpoints)
            loss = (read_json(folder / "result.json") or {})["val_loss"]
            self._view.say(f"finished {label(entry.trial)}  val_loss {loss:.4f}  in {took}")
            self._view.ended(entry.trial, "finished")
            self._summary.finished.append(entry.trial)
            return
        tail = [line for line in tail_lines(folder / "log.txt", entry.log_start) if line.strip()][-LOG_TAIL_LINES:]
        reason = _reason(entry.process.returncode)
        record = {
            "exit_code": entry.process.returncode,
            "reason": reason,
            "log_tail": tail,
            "command": self._command(folder),
            "time": time.time(),
        }
        write_record(folder / FAILURE_FILE, record)
        self._view.say(f"FAILED   {label(entry.trial)}  {reason} after {took}; the last lines of {folder / 'log.txt'}:")
        for line in tail:
            self._view.say(f"    {line}")
        self._view.ended(entry.trial, "failed")
        self._summary.failed.append(entry.trial)

    def _stop(self) -> None:
        """Stop every running trial and wait for it."""
        if not self._running:
            return
        self._view.say(f"stopping {len(self._running)} running trials ...")
        processes = []
        for entry in self._running:
            if entry.process.poll() is None and psutil.pid_exists(entry.process.pid):
                processes.append(psutil.Process(entry.process.pid))
        stop_processes(processes)
        for entry in self._running:
            entry.process.wait()
        self._running.clear()


def visible_gpu(place: int, num_gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of the trial in this place: one of the GPUs that the sweep itself may use."""
    allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return allowed[place % len(allowed)] if allowed else str(place % num_gpus)


def _reason(returncode: int) -> str:
    """An exit status in words."""
    if returncode == 0:
        return "ended without writing result.json"
    if returncode > 0:
        return f"exit code {returncode}"
    name = signal.Signals(-returncode).name
    hint = ", possibly by the kernel for want of memory: see docs on out-of-memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _stop_left_over(trials: Sequence[Trial], sweep_dir: Path, view: SweepView) -> None:
    """Stop trials that outlived a killed runner, so that none is trained twice; they are resumed from checkpoints."""
    left_over = find_processes(trial_dir(sweep_dir, trial) for trial in trials)
    if left_over:
        pids = ", ".join(str(process.pid) for process in left_over)
        view.say(f"stopping trials that an interrupted runner left behind (processes {pids}); they will be resumed")
        stop_processes(left_over)


def _remove_checkpoints(folder: Path, keep_checkpoints: str) -> None:
    if keep_checkpoints == "none" and (folder / "checkpoints").is_dir():
        shutil.rmtree(folder / "checkpoints")


def _check_disk(waiting: Sequence[Trial], sweep_dir: Path, jobs: int, keep_checkpoints: str) -> None:
    needed = peak_disk_bytes(waiting, jobs, keep_checkpoints)
    free = shutil.disk_usage(sweep_dir).free
    if needed > free:
        raise DiskSpaceError(
            f"{sweep_dir}: the trials need about {needed / 1e9:.2f} GB for checkpoints and {free / 1e9:.2f} GB are "
            "free; make room, lower sweep.jobs, or set sweep.keep_checkpoints=none"
        )


def peak_disk_bytes(trials: Sequence[Trial], jobs: int, keep_checkpoints: str) -> int:
    """Checkpoint bytes at the worst moment: of each running trial those it keeps and a new one, of others what stays.

    A new checkpoint is complete before the oldest is removed, so a trial that keeps one has two for a moment.
    """
    sizes = sorted((_kept_bytes(trial) + trial.estimated_disk_bytes for trial in trials), reverse=True)
    kept = sum(_kept_bytes(trial) for trial in trials) if keep_checkpoints == "last" else 0
    return kept + sum(sizes[:jobs])


def _kept_bytes(trial: Trial) -> int:
    """Bytes of the checkpoints that a trial keeps (`train.keep_checkpoints`) between two saves."""
    return trial.estimated_disk_bytes * int(trial.config.get("train", {}).get("keep_checkpoints", 1))


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C while trials run, so that batch systems end a sweep cleanly."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
