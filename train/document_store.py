"""Documents between reading and tokenising, on disk, so that a corpus may be larger than memory."""

from __future__ import annotations

import hashlib
import mmap
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import overload

from train.corpus import Document


class DocumentStore(Sequence[bytes]):
    """Append documents, then read them by index.

    The file disappears when the context ends well; after an error the owner of its folder removes that.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by __exit__
        self._map: mmap.mmap | None = None
        self._offsets = array("q", [0])
        self._held_out: list[bool | None] = []
        self._digest = hashlib.sha256()

    def __enter__(self) -> DocumentStore:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if self._map is not None:
            self._map.close()
        self._file.close()
        if error_type is None:
            self._path.unlink()

    def append(self, document: Document) -> None:
        """Add one document; all are added before the first is read."""
        assert self._map is None, "documents are added before any is read"
        self._file.write(document.text)
        self._offsets.append(self._offsets[-1] + len(document.text))
        self._held_out.append(document.held_out)
        self._digest.update(f"{len(document.text)} {document.held_out}\n".encode())
        self._digest.update(document.text)

    def __len__(self) -> int:
        return len(self._held_out)

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._map is None:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map[self._offsets[index] : self._offsets[index + 1]]

    def size(self, index: int) -> int:
        """Bytes of a document."""
        return self._offsets[index + 1] - self._offsets[index]

    def held_out(self, index: int, val_fraction: float) -> bool:
        """Whether a document validates: as its source says, else when the hash of its text falls below the share.

        The hash is SHA-256's first 64 bits as a fraction of 2**64, so a document keeps its side when others come or go.
        """
        decided = self._held_out[index]
        if decided is not None:
            return decided
        return int.from_bytes(hashlib.sha256(self[index]).digest()[:8], "big") < val_fraction * 2**64

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents."""
        return self._offsets[-1]

    @property
    def content_sha256(self) -> str:
        """Hex SHA-256 of all documents in order, with what their source says of the split."""
        return self._digest.hexdigest()
