"""Tables of every place with equal start values, and steps to take them through."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.lazy_adam import MemoryOptimConfig
from models.memory_table import LocalTable
from train.memory.cache import CachedStore
from train.memory.host import HostTable
from train.memory.place import Place, RowType, TableConfig, array_specs, host_table
from train.memory.start_values import fill
from train.memory.store import PlainStore, anonymous_arrays, file_arrays

ROWS, WIDTH, LR, CPU = 53, 3, 0.01, torch.device("cpu")


def local(rows: int = ROWS, width: int = WIDTH, **optim: Any) -> LocalTable:
    return LocalTable(rows, width, 0.5, seed=4, layer=2, optim=MemoryOptimConfig(**optim))


def host(
    tmp_path: Path,
    rows: int = ROWS,
    width: int = WIDTH,
    place: Place = Place.host,
    places: int = 0,
    dtype: RowType = RowType.fp32,
    asynchronous: bool = False,
    **optim: Any,
) -> HostTable:
    """places: rows kept in RAM, which the settings give in MiB only."""
    rule = MemoryOptimConfig(**optim)
    if not places:
        cfg = TableConfig(place, dtype, asynchronous)
        return host_table(cfg, rows, width, 0.5, 4, rule, CPU, tmp_path, layer=2)
    specs = array_specs(rows, width, rule, dtype)
    arrays = file_arrays(specs, tmp_path) if place is Place.file else anonymous_arrays(specs)
    fill(arrays["weight"], 0.5, 4, 2)
    store = CachedStore(arrays, places) if place is Place.file else PlainStore(arrays)
    return HostTable(store, rule, CPU, 4, 2, 0, asynchronous)


def draw(step: int, part: int, rows: int = ROWS) -> Tensor:
    """(2, 4, 3) ids, some of them repeated."""
    generator = torch.Generator().manual_seed(100 * step + part)
    return torch.randint(0, max(1, rows * 2 // 3), (2, 4, 3), generator=generator)


def gradient(rows: Tensor, step: int) -> Tensor:
    """A function of what was read, so that a stale read changes everything after it."""
    return torch.sin(7 * rows.detach() + step)


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
