"""Pieces: flat contiguous ranges of named global tensors, in which any number of ranks hands over what it owns.

ZeRO's fragment of a parameter, the experts of one expert-parallel rank and the rows of one table shard are all of this
form: in row-major order a range along the first dimension is one flat range. A global tensor is the union of its
pieces, each element owned by exactly one rank; who reads need not know how it was cut.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The names of safetensors for the types that a run saves.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of the flattened global tensor `name`.

    Attributes:
        name: `<stem>.<rest>`; the stem, such as `model`, `optim` or `table_1`, chooses the file.
        shape: of the global tensor.
        start: flat offset of the first element.
        data: the elements, contiguous, of any shape and on any device; not copied.
        in_place: write from where it lies while training waits, never through a copy in memory.

    Raises:
        ValueError: the data are not contiguous, of an unknown type, or reach beyond the global tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    in_place: bool = False

    def __post_init__(self) -> None:
        if not self.data.is_contiguous():
            raise ValueError(f"piece of {self.name}: its data of shape {tuple(self.data.shape)} are not contiguous")
        if self.data.dtype not in DTYPE_NAMES:
            raise ValueError(f"piece of {self.name}: {self.data.dtype} is not saved; saved are {', '.join(DTYPES)}")
        if not 0 <= self.start <= self.start + self.numel <= math.prod(self.shape):
            raise ValueError(
                f"piece of {self.name}: elements {self.start} to {self.start + self.numel} do not lie in a tensor of "
                f"shape {self.shape}"
            )

    @property
    def numel(self) -> int:
        """Elements of this piece."""
        return self.data.numel()

    @property
    def num_bytes(self) -> int:
        """Bytes of this piece."""
        return self.data.numel() * self.data.element_size()

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its global tensor."""
        return self.numel == math.prod(self.shape)


def whole(name: str, tensor: Tensor, in_place: bool = False) -> Piece:
    """All of a tensor, as one piece."""
    return Piece(name, tuple(tensor.shape), 0, tensor.detach().contiguous(), in_place)


def rows_of(name: str, num_rows: int, first_row: int, tensor: Tensor, in_place: bool = False) -> Piece:
    """Rows [first_row, first_row + len(tensor)) of a global tensor of `num_rows` rows: a shard along dimension 0."""
    width = math.prod(tensor.shape[1:])
    shape = (num_rows, *tensor.shape[1:])
    return Piece(name, shape, first_row * width, tensor.detach().contiguous(), in_place)


def share_of(name: str, tensor: Tensor, rank: int, world_size: int) -> Piece:
    """The part that `rank` writes of a tensor that all ranks hold alike: ranges of numel / world_size, rounded down."""
    flat = tensor.detach().contiguous().view(-1)
    start, end = (flat.numel() * index // world_size for index in (rank, rank + 1))
    return Piece(name, tuple(tensor.shape), start, flat[start:end])


def cut(piece: Piece, max_bytes: int) -> list[Piece]:
    """The same elements in pieces of at most `max_bytes` (and at least one element)."""
    flat = piece.data.view(-1)
    size = max(1, max_bytes // piece.data.element_size())
    if flat.numel() <= size:
        return [piece]
    parts = flat.split(size)
    return [replace(piece, start=piece.start + size * index, data=part) for index, part in enumerate(parts)]


def coverage_fault(numel: int, ranges: Iterable[tuple[int, int]]) -> str | None:
    """What is wrong where (start, numel) ranges do not cover [0, numel) exactly once; None where they do."""
    end = 0
    for start, length in sorted(ranges):
        if start > end:
            return f"elements {end} to {start} are in no piece"
        if start < end and length:
            return f"elements {start} to {min(end, start + length)} are in two pieces"
        end = max(end, start + length)
    if end != numel:
        return f"elements {end} to {numel} are in no piece" if end < numel else f"pieces reach to {end} of {numel}"
    return None


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, (num_bytes,) uint8, without a copy."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
