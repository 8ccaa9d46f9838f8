"""Writing a safetensors file in one pass: bounded memory, and the SHA-256 of the very bytes that go to the disk.

The format: the length of the header (8 bytes, little-endian), the header as JSON, then the tensors' bytes without gaps.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

CHUNK_BYTES = 8 << 20  # hashed, written and, from a GPU, fetched at once; hashing runs at full speed from 1 MiB on


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `data` are its bytes, (num_bytes,) uint8, on any device."""

    key: str
    dtype: str  # as safetensors names it
    item_bytes: int
    shape: tuple[int, ...]
    data: Tensor


def write_safetensors(path: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Write `entries` to a new file, not yet fsynced; {"bytes": its size, "sha256": of its content}.

    Raises:
        OSError: for example on a full disk.
    """
    entries = sorted(entries, key=lambda entry: (-entry.item_bytes, entry.key))  # wide items first keeps all aligned
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for view in _chunks(entries):
            digest.update(view)  # like the write it leaves the interpreter to other threads
            size += len(view)
            while view:  # a raw write may take a part only
                view = view[file.write(view) :]
    return {"bytes": size, "sha256": digest.hexdigest()}


def _chunks(entries: Sequence[Entry]) -> Iterator[memoryview]:
    yield memoryview(_header(entries))
    for entry in entries:
        for chunk in entry.data.split(CHUNK_BYTES):
            yield chunk.cpu().numpy().data


def _header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, Any] = {}
    offset = 0
    for entry in entries:
        end = offset + len(entry.data)
        table[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
