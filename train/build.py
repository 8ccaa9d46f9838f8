"""From a configuration to the live objects of a run: model, hasher, tables, engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.initialize import initialize
from models.memory_table import LocalTable
from models.ngram_hash import NgramHasher, table_sizes
from models.transformer import Output, Transformer, TransformerConfig
from train.data import Batch
from train.engine import Engine
from train.shards import PreparedData

if TYPE_CHECKING:
    from train.config import Config


@dataclass
class Memory:
    """The hasher and tables of a model's Engram layers; empty for a model without."""

    hasher: NgramHasher | None
    tables: dict[int, LocalTable]

    def row_ids(self, batch: Batch) -> dict[int, Tensor]:
        """{layer: (B, S, R)} rows that each token reads; a function of the token ids alone."""
        return self.hasher(batch.token_ids, batch.document_ids) if self.hasher is not None else {}

    def lookup(self, row_ids: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """{layer: (B, S, R, M)} leaves that require grad."""
        return {layer: self.tables[layer].lookup(ids) for layer, ids in row_ids.items()}


def build_model(cfg: TransformerConfig, seed: int, device: torch.device) -> Transformer:
    """A Transformer with its initial weights."""
    model = Transformer(cfg)
    initialize(model, seed)
    return model.to(device)


def build_memory(config: "Config", prepared: PreparedData, device: torch.device) -> Memory:
    """Hasher and freshly initialised tables of `config.model.engram`."""
    engram = config.model.engram
    if engram is None:
        return Memory(None, {})
    hasher = NgramHasher(engram, torch.as_tensor(prepared.compression_table), prepared.pad_id, device)
    tables = {
        layer: LocalTable(
            num_rows=sum(sum(order) for order in sizes),
            row_dim=engram.row_dim,
            init_std=config.model.init_std,
            seed=config.seed,
            layer=layer,
            optim=config.memory,
            device=device,
        )
        for layer, sizes in table_sizes(engram).items()
    }
    return Memory(hasher, tables)


def build_engine(config: "Config", memory: Memory, device: torch.device) -> Engine:
    """The engine over a fresh model and `memory`."""
    model = build_model(config.model, config.seed, device)
    return Engine(model, dict(memory.tables), config.optim, config.engine, config.train.micro_batch_size, device)


@torch.no_grad()
def forward(engine: Engine, memory: Memory, batch: Batch) -> Output:
    """Forward without gradients, as evaluation and generation need it."""
    rows = {layer: ids_rows.detach() for layer, ids_rows in memory.lookup(memory.row_ids(batch)).items()}
    return engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)
