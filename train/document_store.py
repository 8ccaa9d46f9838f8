"""Documents between reading and tokenising, in parts on disk, so that a corpus may be larger than memory.

A part is three files: the texts one after another, where they begin, and what their source says of the split. Parts end
at fixed sizes, whoever writes them, so the work on them is the same work however many processes share it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.corpus import Document
from train.files import write_array, write_through

PART_DOCUMENTS = 2**16  # after which a part ends too: 65,536 signatures of 512 bytes are 32 MiB
_OPEN_PARTS = 64  # files that a reader keeps open
LOCATION = np.dtype([("part", "<i8"), ("row", "<i8"), ("offset", "<i8"), ("size", "<i8")])  # where a document lies


@dataclass(frozen=True)
class PartRecord:
    """One part of the documents."""

    name: str
    num_documents: int
    num_bytes: int


def write_parts(folder: Path, prefix: str, documents: Iterable[Document], part_bytes: int) -> Iterator[PartRecord]:
    """Write documents into parts named `<prefix>-00000`, ... of about `part_bytes`; yield each when it is whole."""
    texts: list[bytes] = []
    held_out: list[int] = []
    pending = number = 0

    def part() -> PartRecord:
        name = f"{prefix}-{number:05d}"
        write_through(folder / f"{name}.text", texts)
        write_array(folder / f"{name}.offsets.npy", np.cumsum([0, *map(len, texts)], dtype=np.int64))
        write_array(folder / f"{name}.decided.npy", np.array(held_out, dtype=np.int8))
        return PartRecord(name, len(texts), pending)

    for document in documents:
        texts.append(document.text)
        held_out.append(-1 if document.held_out is None else int(document.held_out))
        pending += len(document.text)
        if pending >= part_bytes or len(texts) == PART_DOCUMENTS:
            yield part()
            texts, held_out, pending, number = [], [], 0, number + 1
    if texts:
        yield part()


class PartReader:
    """Read documents of parts by their place; nothing is mapped, so resident memory is what is held."""

    def __init__(self, folder: Path, parts: list[str], suffix: str = "text") -> None:
        self._folder, self._parts, self._suffix = folder, parts, suffix
        self._open: OrderedDict[int, int] = OrderedDict()

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, part: int, offset: int, size: int) -> bytes:
        """`size` bytes of a part from `offset`."""
        if part not in self._open:
            if len(self._open) == _OPEN_PARTS:
                os.close(self._open.popitem(last=False)[1])
            path = self._folder / f"{self._parts[part]}.{self._suffix}"
            self._open[part] = os.open(path, os.O_RDONLY)
        self._open.move_to_end(part)
        pieces = []
        while size > 0:
            piece = os.pread(self._open[part], min(size, 2**30), offset)
            if not piece:
                raise OSError(f"{self._folder / self._parts[part]}.{self._suffix} ends before byte {offset + size}")
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class DocumentIndex:
    """Where every document lies: 8 bytes a document of offsets, and a few numbers a part."""

    def __init__(self, folder: Path, parts: list[PartRecord]) -> None:
        self.folder, self.parts = folder, parts
        self.first = np.cumsum([0, *(part.num_documents for part in parts)], dtype=np.int64)  # of each part
        starts = np.cumsum([0, *(part.num_bytes for part in parts)], dtype=np.int64)
        # Bytes before each document, over all parts; a part's own offsets are these less its start.
        self._offsets = np.empty(len(self) + 1, dtype=np.int64)
        for i, part in enumerate(parts):
            offsets = np.load(folder / f"{part.name}.offsets.npy", allow_pickle=False)
            self._offsets[self.first[i] : self.first[i + 1] + 1] = offsets + starts[i]
        self._offsets[-1] = starts[-1]
        self._starts = starts

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self._offsets[-1])

    def sizes(self, documents: np.ndarray) -> np.ndarray:
        """Bytes of each of some documents."""
        sizes: np.ndarray = self._offsets[documents + 1] - self._offsets[documents]
        return sizes

    def locations(self, documents: np.ndarray) -> np.ndarray:
        """(n,) LOCATION of some documents."""
        result = np.empty(len(documents), dtype=LOCATION)
        result["part"] = np.searchsorted(self.first, documents, side="right") - 1
        result["row"] = documents - self.first[result["part"]]
        result["offset"] = self._offsets[documents] - self._starts[result["part"]]
        result["size"] = self.sizes(documents)
        return result

    def reader(self) -> PartReader:
        """A reader of the texts."""
        return PartReader(self.folder, [part.name for part in self.parts])
