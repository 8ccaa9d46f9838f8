"""Where the rows of memory tables lie: the settings, and the table they stand for."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
import torch

from models.lazy_adam import MemoryOptimConfig
from train.memory.cache import CachedStore
from train.memory.host import HostTable
from train.memory.start_values import fill
from train.memory.store import ArraySpec, PlainStore, Specs, Store, anonymous_arrays, file_arrays, row_bytes


class Place(str, Enum):
    """Where the rows of a table and their moments lie."""

    device = "device"  # where the model is: `models.memory_table.LocalTable`
    host = "host"  # in RAM
    file = "file"  # in a file without a name, with a cache in RAM


class RowType(str, Enum):
    """How a row is stored; it is computed with in fp32."""

    fp32 = "fp32"
    bf16 = "bf16"  # rounded stochastically after each update


@dataclass
class TableConfig:
    """Where memory tables lie, and how. All but `folder` and `cache_mib` changes numbers."""

    place: Place = Place.device
    dtype: RowType = RowType.fp32
    asynchronous: bool = False  # rows are read ahead and written behind; the first of a step lack the last update
    folder: str | None = None  # where the file lies; null: in the run's folder
    cache_mib: int = 256  # rows of each table's file kept in RAM, 2^20 bytes

    def __post_init__(self) -> None:
        if self.cache_mib < 1:
            raise ValueError(f"table.cache_mib={self.cache_mib} must be >= 1; nearest: 1")
        idle = {"folder", "cache_mib"} if self.place is not Place.file else set()
        if self.place is Place.device:
            idle |= {"dtype", "asynchronous"}
        for name in sorted(idle):
            value = getattr(self, name)
            if value != getattr(TableConfig, name):
                needed = "file" if name in ("folder", "cache_mib") else "host or file"
                shown = value.value if isinstance(value, Enum) else value
                raise ValueError(
                    f"table.{name}={shown} has no effect with table.place={self.place.value}; it needs "
                    f"table.place={needed}"
                )


def array_specs(num_rows: int, row_dim: int, optim: MemoryOptimConfig, dtype: RowType) -> dict[str, ArraySpec]:
    """Shapes and types of the arrays of a table."""
    trained, widths = 0 if optim.frozen else num_rows, optim.state_widths(row_dim)
    return {
        "weight": ArraySpec((num_rows, row_dim), torch.bfloat16 if dtype is RowType.bf16 else torch.float32),
        "exp_avg": ArraySpec((trained, widths["exp_avg"]), torch.float32),
        "exp_avg_sq": ArraySpec((trained, widths["exp_avg_sq"]), torch.float32),
        "step": ArraySpec((num_rows,), torch.int32),
    }


def host_table(
    cfg: TableConfig,
    num_rows: int,
    row_dim: int,
    init_std: float,
    seed: int,
    optim: MemoryOptimConfig,
    device: torch.device,
    folder: Path,
    layer: int = 0,
    first_row: int = 0,
    total_rows: int = 0,
) -> HostTable:
    """A table with its start values: those of `LocalTable` on a CPU, rounded to the nearest in bf16.

    Args:
        cfg: place and type.
        num_rows: rows of this table.
        row_dim: M.
        init_std: standard deviation of the normal start values.
        seed: of the run.
        optim: hyper-parameters of the update.
        device: where rows are used.
        folder: of the file where `cfg` names none.
        layer: layer the table belongs to.
        first_row: where this table holds rows [first_row, first_row + num_rows) of a larger one, the first of them.
            Its own ids begin at 0.
        total_rows: rows of the larger one; 0: this part ends it.

    Raises:
        OSError: no room for the file.
        ValueError: no room in RAM.
    """
    specs = array_specs(num_rows, row_dim, optim, cfg.dtype)
    store = _open(cfg, specs, folder)
    fill(store.arrays["weight"], init_std, seed, layer, first_row, total_rows)
    return HostTable(store, optim, device, seed, layer, first_row, cfg.asynchronous)


def _open(cfg: TableConfig, specs: Specs, folder: Path) -> Store:
    if cfg.place is not Place.file:
        needed, free = sum(spec.nbytes for spec in specs.values()), psutil.virtual_memory().available
        if needed > free:  # the kernel would promise it and end the run in the middle
            raise ValueError(
                f"table.place=host needs {needed / 2**30:.1f} GiB for one table, this machine has {free / 2**30:.1f} "
                "free; nearest: table.dtype=bf16 with memory.second_moment=row and memory.beta1=0, or table.place=file"
            )
        return PlainStore(anonymous_arrays(specs))
    arrays = file_arrays(specs, Path(cfg.folder) if cfg.folder is not None else folder)
    return CachedStore(arrays, cfg.cache_mib * 2**20 // row_bytes(specs))
