"""From the files of every rank to one checkpoint, by the file system alone: no collectives, so any thread may do it.

Each rank writes its files into one temporary folder, then a record of them, `rank_00000.json`. Rank 0 waits for all
records, sees that their pieces cover every tensor exactly once, writes the manifest and renames the folder.
"""

import json
import math
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.checkpoint import MANIFEST, SCHEMA_VERSION, Stored, sign
from train.checkpoint_folder import move_aside
from train.files import atomic_write, sync
from train.pieces import coverage_fault

POLL_SECONDS = 0.02  # between two looks at the folder: short beside any fsync, and nothing beside a training step


class UnfinishedCheckpointError(Exception):
    """A rank did not write its part, or the parts do not make a whole."""


def record_path(temporary: Path, rank: int) -> Path:
    """Where a rank says what it wrote."""
    return temporary / f"rank_{rank:05d}.json"


def write_rank_record(temporary: Path, rank: int, record: dict[str, Any]) -> None:
    """Say what a rank wrote ("files", "tensors"), or why it could not ("error"); its files are on the disk by now."""
    atomic_write(record_path(temporary, rank), json.dumps(record))


def wait_for_records(temporary: Path, world_size: int, timeout_seconds: float) -> list[dict[str, Any]]:
    """The records of all ranks.

    Raises:
        UnfinishedCheckpointError: a rank says that it failed, or says nothing for `timeout_seconds`.
    """
    records: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout_seconds
    while True:
        for rank in range(world_size):
            path = record_path(temporary, rank)
            if rank not in records and path.exists():
                records[rank] = json.loads(path.read_text())
                if "error" in records[rank]:
                    raise UnfinishedCheckpointError(f"rank {rank}: {records[rank]['error']}")
        if len(records) == world_size:
            return [records[rank] for rank in range(world_size)]
        if time.monotonic() > deadline:
            silent = ", ".join(str(rank) for rank in range(world_size) if rank not in records)
            raise UnfinishedCheckpointError(
                f"no record of rank {silent} (of {world_size}) came within {timeout_seconds:g} s; that process ended, "
                "its disk is slow, or it does not see this folder"
            )
        time.sleep(POLL_SECONDS)


def join_records(temporary: Path, records: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """("files", "tensors") of the manifest.

    Raises:
        UnfinishedCheckpointError: ranks disagree about a tensor, an element has no owner or two, a file is not there.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for rank, record in enumerate(records):
        for name, entry in record["files"].items():
            size = (temporary / name).stat().st_size
            if name in files or size != entry["bytes"]:
                raise UnfinishedCheckpointError(f"{name} of rank {rank} is not what its record says")
            files[name] = entry
        for name, own in record["tensors"].items():
            known = tensors.setdefault(name, {"shape": own["shape"], "dtype": own["dtype"], "pieces": []})
            if (known["shape"], known["dtype"]) != (own["shape"], own["dtype"]):
                raise UnfinishedCheckpointError(
                    f"{name} is {own['dtype']} of shape {own['shape']} on rank {rank}, {known['dtype']} of shape "
                    f"{known['shape']} on another"
                )
            known["pieces"] += own["pieces"]
    for name, tensor in tensors.items():
        pieces = sorted((Stored(*piece) for piece in tensor["pieces"]), key=lambda piece: (piece.start, piece.numel))
        fault = coverage_fault(math.prod(tensor["shape"]), [(piece.start, piece.numel) for piece in pieces])
        if fault is not None:
            raise UnfinishedCheckpointError(f"{name} of shape {tensor['shape']}: {fault}")
        tensor["pieces"] = [[piece.file, piece.key, piece.start, piece.numel] for piece in pieces]
    return files, tensors


def manifest_body(step: int, world_size: int, files: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it is written, its own SHA-256 included."""
    body = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "world_size": world_size,
        "files": files,
        "tensors": dict(sorted(tensors.items())),
    }
    return sign(body)


def write_manifest(folder: Path, body: dict[str, Any]) -> None:
    """The last file of a checkpoint: the others are on the disk by now."""
    atomic_write(folder / MANIFEST, json.dumps(body))


def commit(temporary: Path, final: Path, step: int, world_size: int, timeout_seconds: float) -> None:
    """Rank 0: make the checkpoint `final` of everything in `temporary`.

    Raises:
        UnfinishedCheckpointError: see `wait_for_records` and `join_records`.
        OSError: the manifest cannot be written.
    """
    records = wait_for_records(temporary, world_size, timeout_seconds)
    files, tensors = join_records(temporary, records)
    for rank in range(world_size):
        record_path(temporary, rank).unlink()
    write_manifest(temporary, manifest_body(step, world_size, files, tensors))
    publish(temporary, final)


def publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name."""
    if final.exists():
        move_aside(final)  # one that lost its manifest: good ones are not written again
    sync(temporary)
    os.replace(temporary, final)
    sync(final.parent)


def was_committed(temporary: Path, final: Path, timeout_seconds: float) -> bool:
    """Other ranks: wait until rank 0 has renamed the temporary folder or given it up; whether the checkpoint is there.

    Raises:
        UnfinishedCheckpointError: neither happened for `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while temporary.exists() and not was_given_up(temporary):
        if time.monotonic() > deadline:
            raise UnfinishedCheckpointError(f"rank 0 did not complete {final.name} within {timeout_seconds:g} s")
        time.sleep(POLL_SECONDS)
    return (final / MANIFEST).exists()


def give_up(temporary: Path, world_size: int = 1) -> None:
    """Rank 0: remove what was written of a checkpoint that will not be whole.

    It loses its name first: a rank that is still writing then fails. For ranks that come later, and would make the
    folder anew, an empty one stays under the other name until the next save.
    """
    nameless = _given_up(temporary)
    with suppress(OSError):
        temporary.rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)
    if world_size > 1:
        with suppress(OSError):
            nameless.mkdir()


def was_given_up(temporary: Path) -> bool:
    """Whether rank 0 has removed this attempt."""
    return _given_up(temporary).exists()


def _given_up(temporary: Path) -> Path:
    return temporary.with_name(f"{temporary.name.removesuffix('.tmp')}.given-up.tmp")
