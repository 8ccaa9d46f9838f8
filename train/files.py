"""Reading and writing small files so that nobody sees half of one. Imports neither torch nor a config framework."""

import hashlib
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

TAIL_BYTES = 1 << 16  # of a log or a metrics file: hundreds of lines


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write through a temporary name, fsync and rename: readers see the old file or the new one, never a part.

    Raises:
        OSError: for example on a full disk; the old file is untouched and the temporary one removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_through(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a large file piece by piece through a temporary name, fsync and rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file through a temporary name, fsync and rename."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_through(path, [buffer.getbuffer()])


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Atomically write `record`; numbers that are not finite are refused, because JSON has none."""
    atomic_write(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file, or None where there is none or it is not whole."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; lines that are not whole, such as the last one of a killed process, are left out."""
    if not path.is_file():
        return []
    return parse_records(path.read_text(encoding="utf-8", errors="replace").splitlines())


def parse_records(lines: list[str]) -> list[dict[str, Any]]:
    """The lines that are JSON objects."""
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def tail_lines(path: Path, start: int = 0, num_bytes: int = TAIL_BYTES) -> list[str]:
    """The last lines of a text file, reading at most `num_bytes` and nothing before offset `start`."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - num_bytes, 0))
        return file.read().decode("utf-8", errors="replace").splitlines()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Bring a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
