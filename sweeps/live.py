"""What a running sweep shows: state, step, loss and remaining time of every trial, as a table or as plain lines."""

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sweeps.trial import Trial, trial_dir
from train.files import parse_records, read_json, tail_lines

LINE_SECONDS = 60.0  # between two progress lines where there is no terminal
FRAME_SECONDS = 1.0  # between two frames of the table
MAX_ROWS = 30  # of the table; what waits or has ended is summed up beyond


@dataclass
class Progress:
    """What the files of a trial say about it."""

    state: str
    step: int
    max_steps: int
    loss: float | None  # nats per token: training loss while it runs, validation loss when finished


def read_progress(folder: Path) -> Progress:
    """State, step and last loss from `result.json`, `status.json` and `metrics.jsonl`."""
    status = read_json(folder / "status.json") or {}
    result = read_json(folder / "result.json")
    step, max_steps = int(status.get("step", 0)), int(status.get("max_steps", 0))
    if result is not None:
        return Progress("finished", step, max_steps, result.get("val_loss"))
    return Progress(str(status.get("state", "waiting")), step, max_steps, _last_value(folder, "train/loss"))


def _last_value(folder: Path, key: str) -> float | None:
    """The newest value of a metric; an unfinished last line is passed over."""
    for record in reversed(parse_records(tail_lines(folder / "metrics.jsonl"))):
        if key in record:
            return float(record[key])
    return None


class RemainingTime:
    """Remaining seconds of trials and of the sweep, from the steps seen so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: dict[str, tuple[float, int]] = {}  # trial id -> (time, step) when it was first seen moving
        self._ratio: dict[str, float] = {}  # trial id -> real over planned duration

    def of_trial(self, trial: Trial, progress: Progress) -> float:
        """Seconds a running trial still needs: the rest of its steps at the speed seen, or the plan's estimate."""
        now = self._clock()
        if progress.step > 0 and trial.trial_id not in self._first:
            self._first[trial.trial_id] = (now, progress.step)
        began, first_step = self._first.get(trial.trial_id, (now, 0))
        done = progress.step - first_step
        if done <= 0 or progress.max_steps <= 0:
            return self.planned(trial)
        per_step = (now - began) / done
        self._ratio[trial.trial_id] = per_step * progress.max_steps / max(trial.estimated_seconds, 1e-9)
        return per_step * max(0, progress.max_steps - progress.step)

    def planned(self, trial: Trial) -> float:
        """The plan's estimate, corrected by how wrong it was so far."""
        ratio = sum(self._ratio.values()) / len(self._ratio) if self._ratio else 1.0
        return trial.estimated_seconds * ratio

    def of_sweep(self, running: Sequence[float], waiting: Sequence[float], jobs: int) -> float:
        """Seconds until the last trial ends when `waiting` is started in order on `jobs` places."""
        places = [*running, *[0.0] * max(0, jobs - len(running))]
        heapq.heapify(places)
        for seconds in waiting:
            heapq.heapreplace(places, places[0] + seconds)
        return max(places, default=0.0)


class SweepView:
    """Shows a sweep: a live table in a terminal, plain lines elsewhere."""

    def __init__(self, sweep_dir: Path, trials: Sequence[Trial], jobs: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self._sweep_dir = sweep_dir
        self._trials = list(trials)
        self._jobs = jobs
        self._time = RemainingTime()
        self._ended: dict[str, Progress] = {}
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._last_update = 0.0 if self._live is not None else time.monotonic()

    def __enter__(self) -> "SweepView":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, message: str) -> None:
        """One line that stays."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def ended(self, trial: Trial, state: str) -> None:
        """Remember how a trial ended; its files need not be read again."""
        progress = read_progress(trial_dir(self._sweep_dir, trial))
        self._ended[trial.trial_id] = Progress(state, progress.step, progress.max_steps, progress.loss)

    def update(self, running: Sequence[Trial], waiting: Sequence[Trial]) -> None:
        """Draw the state of all trials, not more often than a reader can follow."""
        now = time.monotonic()
        if now - self._last_update < (FRAME_SECONDS if self._live is not None else LINE_SECONDS):
            return
        self._last_update = now
        progress = {trial.trial_id: read_progress(trial_dir(self._sweep_dir, trial)) for trial in running}
        remaining = {trial.trial_id: self._time.of_trial(trial, progress[trial.trial_id]) for trial in running}
        left = self._time.of_sweep(list(remaining.values()), [self._time.planned(t) for t in waiting], self._jobs)
        counts = f"{len(self._ended)} of {len(self._trials)} trials ended, {len(running)} running"
        summary = f"{counts}, about {duration(left)} left"
        if self._live is not None:
            self._live.update(self._table(progress, remaining, summary), refresh=True)
            return
        states = ", ".join(f"{label(t)} {progress[t.trial_id].step}/{progress[t.trial_id].max_steps}" for t in running)
        self.say(f"{summary}: {states}")

    def _table(self, progress: dict[str, Progress], remaining: dict[str, float], summary: str) -> Table:
        table = Table(title=summary, title_justify="left")
        for column in ("trial", "state", "step", "loss", "left"):
            table.add_column(column, justify="left" if column in ("trial", "state") else "right")
        rank = {**dict.fromkeys(self._ended, 1), **dict.fromkeys(progress, 0)}
        shown = sorted(self._trials, key=lambda trial: rank.get(trial.trial_id, 2))
        for trial in shown[:MAX_ROWS]:
            now = progress.get(trial.trial_id) or self._ended.get(trial.trial_id) or Progress("waiting", 0, 0, None)
            steps = f"{now.step}/{now.max_steps}" if now.max_steps else ""
            loss = "" if now.loss is None else f"{now.loss:.4f}"
            left = duration(remaining[trial.trial_id]) if trial.trial_id in remaining else ""
            table.add_row(label(trial), now.state, steps, loss, left)
        if len(shown) > MAX_ROWS:
            table.add_row(f"... and {len(shown) - MAX_ROWS} more", "", "", "", "")
        return table


def label(trial: Trial) -> str:
    """How a trial is called on the screen."""
    if trial.name:
        return f"{trial.name} seed={trial.seed}"
    scale = f" lr x{trial.lr_scale:g}" if trial.lr_scale != 1 else ""
    return f"{trial.kind.value} rho={trial.rho:g}{scale} seed={trial.seed}"


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
