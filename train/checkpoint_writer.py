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
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import MANIFEST, SCHEMA_VERSION, STATE
from train.checkpoint_commit import UnfinishedCheckpointError, commit, give_up, was_committed, write_record
from train.checkpoint_folder import checkpoints, prune, remove_leftovers
from train.files import sha256, sync
from train.pieces import DTYPE_NAMES, Piece, as_bytes, cut
from train.safetensors_writer import Entry, write_safetensors

_ALIGNMENT = 64  # bytes between the starts of buffered pieces: a cache line, and a multiple of every item


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


@dataclass
class _File:
    """A file to be written: pieces of one stem, all buffered or none."""

    name: str
    buffered: bool
    pieces: list[Piece] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class _Attempt:
    """One checkpoint that this rank is writing."""

    step: int
    temporary: Path
    final: Path
    num_bytes: int
    files: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)


class HostBuffer:
    """Host memory that pieces are copied into; pinned where there is a GPU. Made at the first save and used again."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with data in this buffer, valid until the next call."""
        starts, size = [], 0
        for piece in pieces:
            starts.append(size)
            size += -(-piece.num_bytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            place = self._bytes[start : start + piece.num_bytes].view(piece.data.dtype).view(piece.data.shape)
            copies.append(Piece(piece.name, piece.shape, piece.start, place.copy_(piece.data, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


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
        self._last: _Attempt | None = None
        self._count = 0

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()

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
            self._last = attempt = _Attempt(step, temporary, self.folder / name, report.num_bytes)
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
        self, attempt: _Attempt, pieces: list[Piece], state: dict[str, Any], final: bool, report: SaveReport
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
                    _write_file(attempt, file)
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

    def _finish_in_thread(self, attempt: _Attempt, files: list[_File], state: dict[str, Any]) -> None:
        try:
            self._finish(attempt, files, state, final=False)
        except (OSError, UnfinishedCheckpointError) as error:
            self._abandon(attempt, error)
            self._failure = error
        except BaseException as error:  # a mistake of this program: raised by the next call
            self._failure = error

    def _finish(self, attempt: _Attempt, files: list[_File], state: dict[str, Any], final: bool) -> None:
        """Write what is buffered, bring all to the disk, and say so; rank 0 makes a checkpoint of it."""
        for file in files:
            _write_file(attempt, file)
        if self.place.rank == 0:
            path = attempt.temporary / STATE
            path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "step": attempt.step, **state}))
            attempt.files[STATE] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name in attempt.files:
            sync(attempt.temporary / name)
        write_record(attempt.temporary, self.place.rank, {"files": attempt.files, "tensors": attempt.tensors})
        timeout = self.options.timeout_seconds
        if self.place.rank == 0:
            commit(attempt.temporary, attempt.final, attempt.step, self.place.world_size, timeout)
            prune(self.folder, self.options.keep)
        elif final and not was_committed(attempt.temporary, attempt.final, timeout):
            raise UnfinishedCheckpointError("rank 0 gave it up")

    def _abandon(self, attempt: _Attempt, error: BaseException) -> None:
        if self.place.rank == 0:
            give_up(attempt.temporary)
            return
        with suppress(OSError):  # so that rank 0 need not wait, if the disk takes this and rank 0 has not given up
            write_record(attempt.temporary, self.place.rank, {"error": str(error)})

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


def plan_files(pieces: Iterable[Piece], rank: int, file_bytes: int, buffer_bytes: int) -> list[_File]:
    """The file of each piece, by stem, and whether it goes through the buffers: small ones first, while they fit."""
    parts = [part for piece in pieces for part in cut(piece, file_bytes) if part.numel or part.is_whole]
    buffered: set[int] = set()
    for index, part in sorted(enumerate(parts), key=lambda item: item[1].num_bytes):
        size = -(-part.num_bytes // _ALIGNMENT) * _ALIGNMENT
        if not part.in_place and buffer_bytes > 0 and size <= buffer_bytes:
            buffered.add(index)
            buffer_bytes -= size
    files: list[_File] = []
    filling: dict[tuple[str, bool], _File] = {}
    count: dict[str, int] = {}
    for index, part in enumerate(parts):
        stem = part.name.split(".", 1)[0]
        file = filling.get((stem, index in buffered))
        if file is None or file.num_bytes + part.num_bytes > file_bytes:
            number = count[stem] = count.get(stem, -1) + 1
            name = f"{stem}.rank{rank:05d}{f'-{number}' if number else ''}.safetensors"
            file = filling[stem, index in buffered] = _File(name, index in buffered)
            files.append(file)
        file.pieces.append(part)
        file.num_bytes += part.num_bytes
    return files


def _write_file(attempt: _Attempt, file: _File) -> None:
    entries = []
    for piece in file.pieces:
        name = piece.name.split(".", 1)[1]
        key = name if piece.is_whole else f"{name}@{piece.start}"
        dtype = DTYPE_NAMES[piece.data.dtype]
        shape = piece.shape if piece.is_whole else (piece.numel,)
        entries.append(Entry(key, dtype, piece.data.element_size(), shape, as_bytes(piece.data)))
        tensor = attempt.tensors.setdefault(piece.name, {"shape": list(piece.shape), "dtype": dtype, "pieces": []})
        tensor["pieces"].append([file.name, key, piece.start, piece.numel])
    attempt.files[file.name] = write_safetensors(attempt.temporary / file.name, entries)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
