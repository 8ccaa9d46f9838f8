"""Where the arrays of a table lie: memory of this process, memory of several processes, or a file on a disk.

All of them are views of one mapping, which lives as long as a tensor shows it. Files have no name that could stay
behind: a file on a disk is unlinked as it is made, memory of several processes is a memfd. Both are gone with the last
process that holds them, however it ends.
"""

import mmap
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

_ALIGNMENT = 4096  # bytes: every array begins a page


@dataclass(frozen=True)
class ArraySpec:
    """Shape and type of one array."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return prod(self.shape) * self.dtype.itemsize


Specs = Mapping[str, ArraySpec]


def anonymous_arrays(specs: Specs) -> dict[str, Tensor]:
    """Zeros in memory of this process, in pages of 2 MiB where the kernel has them."""
    mapping = mmap.mmap(-1, _total(specs), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        mapping.madvise(mmap.MADV_HUGEPAGE)  # rows lie anywhere: with small pages every look-up misses the TLB
    return _views(mapping, specs)


def file_arrays(specs: Specs, folder: Path) -> dict[str, Tensor]:
    """Zeros in a file without a name below `folder`, whose whole size is reserved at once.

    Raises:
        OSError: the folder cannot be written, or the disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = _total(specs)
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, total)  # a full disk would otherwise be a signal in mid-training
        except OSError as error:
            raise OSError(
                f"{folder} has no room for a memory table of {total / 2**30:.2f} GiB ({error.strerror}); set "
                "table.folder to a folder on a larger disk, or table.dtype=bf16 and memory.second_moment=row"
            ) from error
        mapping = mmap.mmap(file.fileno(), total)
    mapping.madvise(mmap.MADV_RANDOM)  # the neighbours of a row are no likelier to be read than others
    return _views(mapping, specs)


class SharedArrays:
    """Arrays in memory that the processes of one machine open together.

    Attributes:
        tensors: by name; zeros at first.
        handle: what other processes give to `open_shared_arrays`, until `release`.
    """

    def __init__(self, specs: Specs) -> None:
        name = f"memory_table_{secrets.token_hex(8)}"  # a number of a descriptor may come back, this name does not
        self._descriptor = os.memfd_create(name)
        os.ftruncate(self._descriptor, _total(specs))
        self.tensors = _views(mmap.mmap(self._descriptor, _total(specs)), specs)
        self.handle = f"{os.getpid()} {self._descriptor} {name}"

    def release(self) -> None:
        """Takes the handle back, once all have opened it; the memory stays until the last of them ends."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def open_shared_arrays(handle: str, specs: Specs) -> dict[str, Tensor]:
    """The arrays that another process of this machine made with the same specs.

    Raises:
        ValueError: that process has ended or released them, or their size is another.
    """
    process, number, name = handle.split()
    path = f"/proc/{process}/fd/{number}"
    try:
        target = os.readlink(path)
        descriptor = os.open(path, os.O_RDWR) if target.startswith(f"/memfd:{name}") else -1
    except OSError:
        descriptor = -1
    if descriptor < 0:
        raise ValueError(f"the shared memory {name} is gone: process {process} has ended or released it")
    try:
        size = os.fstat(descriptor).st_size
        if size != _total(specs):
            raise ValueError(f"the shared memory {name} has {size} bytes, these arrays need {_total(specs)}")
        return _views(mmap.mmap(descriptor, size), specs)
    finally:
        os.close(descriptor)


def row_bytes(specs: Specs) -> int:
    """Bytes of one row over all arrays."""
    return sum(prod(spec.shape[1:]) * spec.dtype.itemsize for spec in specs.values())


def _offsets(specs: Specs) -> Iterable[tuple[str, ArraySpec, int]]:
    offset = 0
    for name, spec in specs.items():
        yield name, spec, offset
        offset += -(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT


def _total(specs: Specs) -> int:
    return max(_ALIGNMENT, sum(-(-spec.nbytes // _ALIGNMENT) * _ALIGNMENT for spec in specs.values()))


def _views(mapping: mmap.mmap, specs: Specs) -> dict[str, Tensor]:
    return {
        name: torch.frombuffer(mapping, dtype=spec.dtype, count=prod(spec.shape), offset=offset).view(spec.shape)
        if spec.nbytes
        else torch.empty(spec.shape, dtype=spec.dtype)
        for name, spec, offset in _offsets(specs)
    }


class Store(Protocol):
    """Rows by id over several arrays of equal length."""

    arrays: dict[str, Tensor]  # whole after `flush`

    def lookup(self, rows: Tensor, out: Tensor) -> None:
        """Copies the rows (n,) int64, repeats allowed, of `weight` to `out` (n, M)."""
        ...

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """(u,) distinct ids -> copies of these rows of every array that has rows."""
        ...

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Puts values (u, ...) by name into these rows."""
        ...

    def flush(self) -> None:
        """Brings `arrays` up to date."""
        ...

    def forget(self) -> None:
        """To be called after `arrays` were written to directly."""
        ...


class PlainStore:
    """A store that is its arrays."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self.arrays = arrays

    def lookup(self, rows: Tensor, out: Tensor) -> None:
        """Copies rows of `weight`."""
        torch.index_select(self.arrays["weight"], 0, rows, out=out)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Copies of rows of every array."""
        return {name: array.index_select(0, rows) for name, array in self.arrays.items()}

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Puts values into rows."""
        for name, value in values.items():
            self.arrays[name].index_copy_(0, rows, value)

    def flush(self) -> None:
        """Nothing: the arrays are always whole."""

    def forget(self) -> None:
        """Nothing is remembered."""
