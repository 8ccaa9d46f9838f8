"""How far a preparation is: bars with the time left on a terminal, lines where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY = 15.0  # seconds between lines


class Display:
    """One bar a stage, all in one display; use as a context manager."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._what, self._total, self._done, self._before = "", 0, 0, 0
        self._started = self._last_line = 0.0

    def __enter__(self) -> Display:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                Progress,
                TaskProgressColumn,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bars = Progress(*columns, console=Console(stderr=True))
            self._bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, what: str, total: int | None, done: int = 0) -> Callable[[int], None]:
        """Begin a stage over `total` bytes, unknown if None, `done` before; the result is called with bytes done."""
        self._what, self._total, self._done, self._before = what, total or 0, done, done
        self._started = self._last_line = time.monotonic()
        if self._bars is not None:
            self._bar = self._bars.add_task(what, total=total, completed=done)
        else:
            print(f"preparing data: {what}", file=sys.stderr)
        return self._advance

    def finish(self, total: int) -> None:
        """The stage is at its end, which is known now."""
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, total=total, completed=total)

    def _advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        if self._bars is not None and self._bar is not None:
            self._bars.advance(self._bar, num_bytes)
            return
        now = time.monotonic()
        if now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            share = f" of {self._total / 1e6:,.0f}" if self._total else ""
            here = self._done - self._before
            left = max(self._total - self._done, 0) * (now - self._started) / max(here, 1)
            remaining = f", about {left:.0f} s left" if self._total and here else ""
            print(f"preparing data: {self._what}: {self._done / 1e6:,.0f}{share} MB{remaining}", file=sys.stderr)
