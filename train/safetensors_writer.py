"""Writing a safetensors file in one pass: bounded memory, and the SHA-256 of the very bytes that go to the disk.

The format: the length of the header (8 bytes, little-endian), the header as JSON, then the tensors' bytes without gaps.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.pieces import DTYPE_NAMES, as_bytes

CHUNK_BYTES = 8 << 20  # hashed, written and, from a GPU, fetched at once; hashing runs at full speed from 1 MiB on


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `chunks` gives its bytes, in their order, as uint8 tensors on any device."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(key: str, shape: tuple[int, ...], data: Tensor) -> Entry:
    """The entry of a contiguous tensor, under another shape."""
    return Entry(key, data.dtype, shape, lambda: as_bytes(data).split(CHUNK_BYTES))


def write_safetensors(path: Path, entries: Sequence[Entry]) -> dict[str, Any]:
    """Write `entries` to a new file, not yet fsynced; {"bytes": its size, "sha256": of its content}.

    Raises:
        OSError: for example on a full disk.
    """
    entries = sorted(
        entries, key=lambda entry: (-entry.dtype.itemsize, entry.key)
    )  # wide items first keeps all aligned
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
        size = 0
        for chunk in entry.chunks():
            size += len(chunk)
            yield chunk.cpu().numpy().data
        assert size == entry.num_bytes, f"{entry.key} has {size} bytes, its header says {entry.num_bytes}"


def _header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, Any] = {}
    offset = 0
    for entry in entries:
        end = offset + entry.num_bytes
        table[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
