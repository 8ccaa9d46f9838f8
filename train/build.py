"""From a configuration to the live objects of a run: model, hasher, tables, engine."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.initialize import initialize
from models.memory_table import LocalTable, MemoryTable
from models.moe import is_padded
from models.ngram_hash import NgramHasher, table_sizes
from models.transformer import Output, Transformer, TransformerConfig
from train.data import Batch
from train.ema import WeightAverage
from train.engine import Engine
from train.expert_parallel import AllToAllDispatcher
from train.memory.place import Place, host_table
from train.memory.sharded import ShardedTable
from train.ranks import ALONE, Ranks
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

    @property
    def local_tables(self) -> dict[int, MemoryTable]:
        """{layer: the rows that lie on this rank}."""
        return {
            layer: table.local if isinstance(table, ShardedTable) else table for layer, table in self.tables.items()
        }

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

    def averaged_rows(self, row_ids: Mapping[int, Tensor], average: WeightAverage) -> dict[int, Tensor]:
        """{layer: (B, S, R, M)} rows of the weight average."""
        rows = {}
        for layer, ids in row_ids.items():
            table, read = self.tables[layer], partial(average.read, layer)
            rows[layer] = table.read(ids, read) if isinstance(table, ShardedTable) else read(ids)
        return rows


def build_model(cfg: TransformerConfig, seed: int, device: torch.device, ranks: Ranks = ALONE) -> Transformer:
    """A Transformer with its initial weights; of spread experts, those of this rank."""
    dispatcher = None
    if cfg.moe is not None and ranks.expert_group is not None:
        dispatcher = AllToAllDispatcher(cfg.moe.num_experts, is_padded(cfg.moe), ranks.expert_group)
    model = Transformer(cfg, dispatcher)
    initialize(model, seed)
    return model.to(device)


def build_memory(config: "Config", prepared: PreparedData, device: torch.device, ranks: Ranks = ALONE) -> Memory:
    """Hasher and freshly initialised tables of `config.model.memory`, sharded over several ranks."""
    cfg = config.model.memory
    if cfg is None:
        return Memory(None, {})
    hasher = NgramHasher(cfg, torch.as_tensor(prepared.compression_table), prepared.pad_id, device)
    tables: dict[int, MemoryTable] = {}
    for layer, sizes in table_sizes(cfg).items():
        num_rows = sum(map(sum, sizes))
        if ranks.world_size == 1:
            tables[layer] = _table(config, layer, num_rows, device)
        else:
            local = _table(config, layer, num_rows, device, ranks.share(num_rows))
            tables[layer] = ShardedTable(local, num_rows, ranks, config.memory.frozen)
    return Memory(hasher, tables)


def _table(config: "Config", layer: int, num_rows: int, device: torch.device, rows: range | None = None) -> MemoryTable:
    """A table of one layer, or some rows of it, where `config.table` wants it."""
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
        return LocalTable(**common, rows=rows)
    assert rows is None  # refused by `train.config.validate`
    return host_table(config.table, **common, folder=Path(config.run_dir))


def build_engine(
    config: "Config", memory: Memory, device: torch.device, ranks: Ranks, start: Path | None = None
) -> Engine:
    """The engine over a fresh model and `memory`, both with the weights of the folder `start` if one is given.

    Raises:
        ValueError: the weights in `start` are damaged, others than `config.init_sha256`, or of another shape.
    """
    model = build_model(config.model, config.seed, device, ranks)
    if start is not None:  # before the engine: it makes copies of the weights
        load_weights(start, config.init_sha256, model, memory.local_tables)
    return Engine(model, memory.tables, config.optim, config.engine, config.train.micro_batch_size, device, ranks)


@torch.no_grad()
def forward(engine: Engine, memory: Memory, batch: Batch) -> Output:
    """Forward without gradients, as evaluation and generation need it."""
    rows = {layer: ids_rows.detach() for layer, ids_rows in memory.lookup(memory.row_ids(batch)).items()}
    return engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)
