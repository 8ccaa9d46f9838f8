"""A progress bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_LINE_EVERY = 15.0  # seconds between plain lines


class Progress:
    """Shows steps done, loss and time left of one run."""

    def __init__(self, enabled: bool, name: str, first_step: int, max_steps: int) -> None:
        self.max_steps = max_steps
        self.first_step = first_step
        self._started = self._last_line = time.monotonic()
        self._bar: RichProgress | None = None
        self._enabled = enabled
        if enabled and sys.stderr.isatty():
            columns = (
                TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = RichProgress(*columns, transient=False)
            self._task = self._bar.add_task(name, total=max_steps, completed=first_step, loss=float("nan"))

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, loss: float) -> None:
        """Report `step` applied steps and the loss of the last one (nats)."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss)
            return
        now = time.monotonic()
        if self._enabled and (now - self._last_line >= _LINE_EVERY or step == self.max_steps):
            self._last_line = now
            rate = (step - self.first_step) / max(now - self._started, 1e-9)
            left = (self.max_steps - step) / max(rate, 1e-9)
            print(f"step {step}/{self.max_steps}  loss {loss:.4f}  {rate:.2f} steps/s  {left:.0f} s left", flush=True)
