"""The tasks of a preparation in several processes, over one folder on disk.

A task is a kind and a number; all it needs lies in the folder, and so does what it gives, each file under its final
name only when it is whole. Its record, `<kind>-<number>.json`, is written last: a task with a record is finished,
whoever did it, and is not done again. So it does not matter which process does which task, nor whether one is killed.

A worker is `python -m train.workers <folder>`: it reads "kind number" lines and answers with lines of JSON. It imports
no torch, and ends with the process that started it, because its input then ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.files import read_json, write_json
from train.shards import DataError

ROOT = Path(__file__).resolve().parents[1]  # where the packages lie
# One thread in each: the processes are the parallelism. Freed memory goes back: what is resident is what is used.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "16777216",
}

Advance = Callable[[int], None]  # called with bytes done, for the display


class WorkerError(RuntimeError):
    """A worker process ended or failed for a reason that is not the data's; what is finished stays."""


def record(folder: Path, kind: str, number: int) -> dict[str, Any] | None:
    """The record of a finished task, or None."""
    return read_json(_record_path(folder, kind, number))


def _record_path(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.json"


def perform(folder: Path, kind: str, number: int, advance: Advance) -> None:
    """Do one task in this process."""
    from train.tasks import TASKS  # it imports this file

    write_json(_record_path(folder, kind, number), TASKS[kind](folder, number, advance))


def run_tasks(folder: Path, tasks: list[tuple[str, int]], num_workers: int, advance: Advance) -> None:
    """Do the tasks, (kind, number) each, that are not finished yet.

    Raises:
        DataError: what a task found wrong with its input.
        OSError: of a worker, for example a full disk.
        WorkerError: a worker was killed, or failed otherwise.
    """
    pending = [task for task in tasks if record(folder, *task) is None]
    if len(pending) <= 1 or num_workers == 1:
        for kind, number in pending:
            perform(folder, kind, number, advance)
    else:
        _run_in_processes(folder, pending, min(num_workers, len(pending)), advance)


class _Worker:
    """One process; what it says comes into a queue that all workers share."""

    def __init__(self, folder: Path, said: queue.Queue[tuple[_Worker, dict[str, Any]]]) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "train.workers", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the process that started it
        )
        self._listener = threading.Thread(target=self._listen, args=(said,), daemon=True)
        self._listener.start()

    def _listen(self, said: queue.Queue[tuple[_Worker, dict[str, Any]]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # half a line is the last word of a killed process
                said.put((self, json.loads(line)))
        said.put((self, {"ended": self._process.wait()}))

    def ask(self, kind: str, number: int) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says so
            self._process.stdin.write(f"{kind} {number}\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        self._process.kill()  # nothing is lost: files appear whole or not at all
        self._process.wait()
        self._listener.join()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


def _run_in_processes(folder: Path, pending: list[tuple[str, int]], num_workers: int, advance: Advance) -> None:
    said: queue.Queue[tuple[_Worker, dict[str, Any]]] = queue.Queue()
    workers = [_Worker(folder, said) for _ in range(num_workers)]
    waiting = list(reversed(pending))
    unfinished = len(pending)
    try:
        for worker in workers:
            worker.ask(*waiting.pop())
        while unfinished:
            worker, message = said.get()
            if "advance" in message:
                advance(message["advance"])
            elif "done" in message:
                unfinished -= 1
                if waiting:
                    worker.ask(*waiting.pop())
            elif "ended" in message:
                raise WorkerError(
                    f"a process that prepared data ended with code {message['ended']} (-9: killed, perhaps for want of "
                    "memory); what is finished stays, the same command goes on; data.num_workers=1 needs least memory"
                )
            else:
                raise _error(message)
    finally:
        for worker in workers:
            worker.stop()


def _error(message: dict[str, Any]) -> Exception:
    if message["error"] == "data":
        return DataError(message["text"])
    if message["error"] == "system":
        return OSError(message["number"], message["text"])
    return WorkerError(f"a process that prepared data failed; the same command goes on\n{message['text']}")


def main(folder: Path) -> None:
    """Do what the lines of the input ask for until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    tasks: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)  # nobody waits for the answer

    threading.Thread(target=listen, daemon=True).start()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    while True:
        kind, number = tasks.get().split()
        try:
            perform(folder, kind, int(number), lambda done: answer({"advance": done}))
            answer({"done": int(number)})
        except DataError as error:
            answer({"error": "data", "text": str(error)})
        except OSError as error:
            answer({"error": "system", "number": error.errno or 0, "text": error.strerror or str(error)})
        except Exception:
            answer({"error": "other", "text": traceback.format_exc()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
