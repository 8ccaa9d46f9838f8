"""Host memory for the copies that an asynchronous checkpoint is written from: made once, used again at every save."""

import threading
from collections.abc import Sequence

import torch

from train.pieces import Piece

ALIGNMENT = 64  # bytes between the starts of copies: a cache line, and a multiple of every item
TOUCHED_BYTES = 64 << 20  # of fresh memory at once: 30 ms, after which another thread may have the processor


def aligned(num_bytes: int) -> int:
    """Bytes of buffer that a copy of `num_bytes` takes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """One block of host memory; pinned where there is a GPU."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None

    def reserve(self, num_bytes: int) -> None:
        """Make the memory in a thread. Fresh pages take four times as long to write to as those that are there."""
        self._thread = threading.Thread(target=self._make, args=(num_bytes,), name="checkpoint buffer")
        self._thread.start()

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The same pieces with data in this buffer, valid until the next call."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        starts, size = [], 0
        for piece in pieces:
            starts.append(size)
            size += aligned(piece.num_bytes)
        if size > len(self._bytes):
            self._make(size)
        copies = []
        for piece, start in zip(pieces, starts, strict=True):
            place = self._bytes[start : start + piece.num_bytes].view(piece.data.dtype).view(piece.data.shape)
            copies.append(Piece(piece.name, piece.shape, piece.start, place.copy_(piece.data, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def _make(self, num_bytes: int) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one first
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        for part in self._bytes.split(TOUCHED_BYTES):
            part.zero_()
