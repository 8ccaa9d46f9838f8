"""From a configuration to the live objects of a run: model, hasher, tables, engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.initialize import initialize
from models.memory_table import LocalTable, MemoryTable
from models.ngram_hash import NgramHasher, table_sizes
from models.transformer import Output, Transformer, TransformerConfig
from train.data import Batch
from train.engine import Engine
from train.memory.place import Place, host_table
from train.shards import PreparedData
from train.start import load_weights

if TYPE_CHECKING:
    from train.config import Config


@dataclass
class Memory:
    """The hasher and tables of a model's Engram layers or OverEncoding; empty for a model without."""

    hasher: NgramHasher | None
    tables: Mapping[int, MemoryTable]
    _ahead: tuple[Batch, dict[int, Tensor]] | None = field(default=None, repr=False)  # the announced batch, its ids

    def prefetch(self, batch: Batch) -> None:
        """Announces the batch that is trained on next, so that tables can read its rows meanwhile."""
        self._ahead = batch, self.row_ids(batch)
        for layer, ids in self._ahead[1].items():
            self.tables[layer].prefetch(ids)

    def row_ids(self, batch: Batch) -> dict[int, Tensor]:
        """{layer: (B, S, R)} rows that each token reads; a function of the batch's token ids alone."""
        if self._ahead is not None and self._ahead[0] is batch:
            return self._ahead[1]
        return self.hasher(batch.token_ids, batch.document_ids) if self.hasher is not None else {}

    def lookup(self, row_ids: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """{layer: (B, S, R, M)} leaves that require grad unless their table is frozen."""
        return {layer: self.tables[layer].lookup(ids) for layer, ids in row_ids.items()}


def build_model(cfg: TransformerConfig, seed: int, device: torch.device) -> Transformer:
    """A Transformer with its initial weights."""
    model = Transformer(cfg)
    initialize(model, seed)
    return model.to(device)


def build_memory(config: "Config", prepared: PreparedData, device: torch.device) -> Memory:
    """Hasher and freshly initialised tables of `config.model.memory`."""
    cfg = config.model.memory
    if cfg is None:
        return Memory(None, {})
    hasher = NgramHasher(cfg, torch.as_tensor(prepared.compression_table), prepared.pad_id, device)
    rows = table_sizes(cfg)
    return Memory(hasher, {layer: _table(config, layer, sum(map(sum, sizes)), device) for layer, sizes in rows.items()})


def _table(config: "Config", layer: int, num_rows: int, device: torch.device) -> MemoryTable:
    """A table of one layer, where `config.table` wants it."""
    assert config.model.memory is not None  # the caller has its layers from there
    common: dict[str, Any] = {
        "num_rows": num_rows,
        "row_dim": config.model.memory.row_dim,
        "init_std": config.model.init_std,
        "seed": config.seed,
        "layer": layer,
        "optim": config.memory,
        "device": device,
    }
    if config.table.place is Place.device:
        return LocalTable(**common)
    return host_table(config.table, **common, folder=Path(config.run_dir))


def build_engine(config: "Config", memory: Memory, device: torch.device, start: Path | None = None) -> Engine:
    """The engine over a fresh model and `memory`, both with the weights of the folder `start` if one is given.

    Raises:
        ValueError: the weights in `start` are damaged, others than `config.init_sha256`, or of another shape.
    """
    model = build_model(config.model, config.seed, device)
    if start is not None:  # before the engine: it makes copies of the weights
        load_weights(start, config.init_sha256, model, memory.tables)
    return Engine(model, dict(memory.tables), config.optim, config.engine, config.train.micro_batch_size, device)


@torch.no_grad()
def forward(engine: Engine, memory: Memory, batch: Batch) -> Output:
    """Forward without gradients, as evaluation and generation need it."""
    rows = {layer: ids_rows.detach() for layer, ids_rows in memory.lookup(memory.row_ids(batch)).items()}
    return engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)
