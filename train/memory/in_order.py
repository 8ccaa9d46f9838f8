"""Tasks done one after another in the order they were given, at once or in a thread beside the caller."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class InOrder:
    """One thread and a queue, or neither.

    A task that fails is the last one that counts: its error is raised by the next call, and by every call after it.
    The thread waits without computing, ends with the object or with the process, and tasks that were given are
    finished first.

    Args:
        in_thread: False does each task at once.
        name: of the thread.
    """

    def __init__(self, in_thread: bool, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name) if in_thread else None
        self._last: Future[Any] | None = None
        self._error: BaseException | None = None

    def submit(self, task: Callable[[], T]) -> "Future[T]":
        """Queues a task.

        Raises:
            RuntimeError: an earlier task failed.
        """
        self.check()
        future: Future[T] = Future()
        if self._executor is None:
            future.set_result(task())
        else:
            future = self._executor.submit(self._guarded, task)
            self._last = future
        return future

    def _guarded(self, task: Callable[[], T]) -> T:
        if self._error is not None:
            raise self._error
        try:
            return task()
        except BaseException as error:
            self._error = error
            raise

    def result(self, future: "Future[T]") -> T:
        """Waits for a task; what it returned.

        Raises:
            RuntimeError: it or an earlier task failed.
        """
        try:
            return future.result()
        except BaseException as error:
            self.check()
            raise error

    def drain(self) -> None:
        """Waits until every task is done.

        Raises:
            RuntimeError: one failed.
        """
        if self._last is not None:
            self._last.exception()  # waits
        self.check()

    def check(self) -> None:
        """Raises what a task raised, if one has."""
        if self._error is not None:
            raise RuntimeError(
                f"the thread of a memory table failed ({type(self._error).__name__}: {self._error}); its rows are no "
                "longer those of any step; resume from the last checkpoint"
            ) from self._error

    def close(self) -> None:
        """Finishes the tasks and ends the thread."""
        if self._executor is not None:
            self._executor.shutdown()
