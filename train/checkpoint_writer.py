"""Writing checkpoints beside the training: the pieces are copied, then a thread hashes, writes and fsyncs them.

The copy into buffers that are made once is all that training waits for. Pieces that are marked `in_place`, and those
that exceed the buffers, are written from where they lie before `save` returns: memory is bounded, at the price of that
time. The format is in `train.checkpoint`, what ranks agree on in `train.checkpoint_commit`.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.checkpoint import MANIFEST, SCHEMA_VERSION, STATE
from train.checkpoint_commit import UnfinishedCheckpointError, commit, give_up, was_committed, write_rank_record
from train.checkpoint_folder import checkpoints, prune, remove_leftovers
from train.files import sha256, sync
from train.host_buffer import HostBuffer, aligned
from train.pieces import Piece
from train.rank_files import Attempt, RankFile, plan_files, write_file


@dataclass(frozen=True)
class WriterOptions:
    """How checkpoints are written."""

    keep: int = 1  # newest ones kept
    asynchronous: bool = True  # write in a thread; False: training waits, and nothing is copied
    buffer_bytes: int = 2 << 30  # of host memory for the copies, at most; pieces beyond it are written in place
    file_bytes: int = 4 << 30  # of one file, about; larger ones are cut
    timeout_seconds: float = 600.0  # how long rank 0 waits for the others


@dataclass(frozen=True)
class Place:
    """Which of the writing ranks this is; `attempt` names this start of the run, alike on all ranks."""

    rank: int = 0
    world_size: int = 1
    attempt: str = field(default_factory=lambda: str(os.getpid()))


@dataclass
class SaveReport:
    """What one call of `save` did, as far as training had to wait for it."""

    step: int
    num_bytes: int  # of this rank's pieces
    in_place_bytes: int  # of those, written before `save` returned
    waited_seconds: float  # for the save before, which was still being written; 0 where it was not
    pause_seconds: float  # of the whole call, waiting included


class CheckpointWriter:
    """Writes the checkpoints of one rank below `folder`, one at a time. A context manager that drains at its end.

    All ranks make the same calls in the same order. A checkpoint that cannot be written (a full disk, a rank that
    ended) is a warning and the one before it stays, unless it is the final one.

    Args:
        folder: of the checkpoints; made if absent.
        options: how to write.
        place: which rank this is.
    """

    def __init__(self, folder: Path, options: WriterOptions | None = None, place: Place | None = None) -> None:
        self.folder = folder
        self.options = options if options is not None else WriterOptions()
        self.place = place if place is not None else Place()
        self._buffer = HostBuffer()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last: Attempt | None = None
        self._count = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()

    def prepare(self, pieces: Iterable[Piece]) -> None:
        """Make the buffers for pieces such as these, in a thread, so that the first save need not wait for them."""
        files = plan_files(pieces, self.place.rank, self.options.file_bytes, self.options.buffer_bytes)
        buffered = [piece for file in files if file.buffered for piece in file.pieces]
        self._buffer.reserve(sum(aligned(piece.num_bytes) for piece in buffered))

    def save(self, step: int, pieces: Iterable[Piece], state: Mapping[str, Any], final: bool = False) -> SaveReport:
        """Write the checkpoint of `step`, unless it is there already, and remove all but the newest.

        Args:
            step: number of applied optimizer steps.
            pieces: what this rank owns; over all ranks, every element of every tensor exactly once.
            state: plain JSON values; those of rank 0 count.
            final: write it before returning, and fail where that cannot be done.

        Raises:
            OSError: the final checkpoint cannot be written; earlier ones are untouched.
        """
        started = time.perf_counter()
        waited = self.drain()
        pieces = list(pieces)
        report = SaveReport(step, sum(piece.num_bytes for piece in pieces), 0, waited, 0.0)
        if not self._is_there(step):
            self._count += 1
            name = f"step_{step:08d}"
            temporary = self.folder / f".{name}.{self.place.attempt}-{self._count}.tmp"
            self._last = attempt = Attempt(step, temporary, self.folder / name, report.num_bytes)
            self._write(attempt, pieces, dict(state), final, report)
        report.pause_seconds = time.perf_counter() - started
        return report

    def drain(self) -> float:
        """Wait until nothing is being written; the seconds waited. A failure is then said in a warning."""
        started = time.perf_counter()
        thread, self._thread = self._thread, None
        if thread is None:
            return 0.0
        was_busy = thread.is_alive()
        thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            self._report(failure, final=False)
        return time.perf_counter() - started if was_busy else 0.0

    def _is_there(self, step: int) -> bool:
        """Whether the checkpoint of `step` is whole: stopped on its last step, a run saves it twice."""
        last = self._last
        if last is not None and last.step == step and self.place.rank:
            try:  # rank 0 may still be at it
                return was_committed(last.temporary, last.final, self.options.timeout_seconds)
            except UnfinishedCheckpointError:
                return False
        return (self.folder / f"step_{step:08d}" / MANIFEST).exists()

    def _write(
        self, attempt: Attempt, pieces: list[Piece], state: dict[str, Any], final: bool, report: SaveReport
    ) -> None:
        """What has to be done now; the rest in a thread, or now as well."""
        now = final or not self.options.asynchronous
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.place.rank == 0:
                remove_leftovers(self.folder, keep=attempt.temporary.name)
            attempt.temporary.mkdir(exist_ok=True)
            files = plan_files(
                pieces, self.place.rank, self.options.file_bytes, 0 if now else self.options.buffer_bytes
            )
            later = [file for file in files if file.buffered]
            copies = iter(self._buffer.copy([piece for file in later for piece in file.pieces]) if later else [])
            for file in later:
                file.pieces = [next(copies) for _ in file.pieces]
            for file in files:
                if not file.buffered:
                    write_file(attempt, file)
                    report.in_place_bytes += file.num_bytes
            if now:
                self._finish(attempt, later, state, final)
        except (OSError, UnfinishedCheckpointError) as error:
            self._abandon(attempt, error)
            self._report(error, final)
            return
        if not now:
            self._thread = threading.Thread(
                target=self._finish_in_thread, args=(attempt, later, state), name="checkpoint"
            )
            self._thread.start()

    def _finish_in_thread(self, attempt: Attempt, files: list[RankFile], state: dict[str, Any]) -> None:
        try:
            self._finish(attempt, files, state, final=False)
        except (OSError, UnfinishedCheckpointError) as error:
            self._abandon(attempt, error)
            self._failure = error
        except BaseException as error:  # a mistake of this program: raised by the next call
            self._failure = error

    def _finish(self, attempt: Attempt, files: list[RankFile], state: dict[str, Any], final: bool) -> None:
        """Write what is buffered, bring all to the disk, and say so; rank 0 makes a checkpoint of it."""
        for file in files:
            write_file(attempt, file)
        if self.place.rank == 0:
            path = attempt.temporary / STATE
            path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "step": attempt.step, **state}))
            attempt.files[STATE] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name in attempt.files:
            sync(attempt.temporary / name)
        write_rank_record(attempt.temporary, self.place.rank, {"files": attempt.files, "tensors": attempt.tensors})
        timeout = self.options.timeout_seconds
        if self.place.rank == 0:
            commit(attempt.temporary, attempt.final, attempt.step, self.place.world_size, timeout)
            prune(self.folder, self.options.keep)
        elif final and not was_committed(attempt.temporary, attempt.final, timeout):
            raise UnfinishedCheckpointError("rank 0 gave it up")

    def _abandon(self, attempt: Attempt, error: BaseException) -> None:
        if self.place.rank == 0:
            give_up(attempt.temporary, self.place.world_size)
            return
        with suppress(OSError):  # so that rank 0 need not wait, if the disk takes this and rank 0 has not given up
            write_rank_record(attempt.temporary, self.place.rank, {"error": str(error)})

    def _report(self, error: BaseException, final: bool) -> None:
        """Raise where the final checkpoint failed, or for a mistake of this program; else warn."""
        if not isinstance(error, OSError | UnfinishedCheckpointError):
            raise error
        assert self._last is not None
        good = [path.name for path in checkpoints(self.folder)]
        message = (
            f"checkpoint {self._last.final} could not be written ({error}); the disk has {_free_bytes(self.folder):,} "
            f"bytes free, the checkpoint needs {self._last.num_bytes:,}; earlier checkpoints are untouched"
            f"{f', {good[-1]} is the newest' if good else ''}"
        )
        if final:
            raise OSError(message) from error
        print(f"warning: {message}; training goes on", file=sys.stderr, flush=True)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
