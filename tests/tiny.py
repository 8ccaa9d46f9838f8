"""Smallest models that still have every part, and what several test files need to run them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.hyper_connections import HyperConnectionsConfig
from models.initialize import initialize
from models.memory_table import LocalTable
from models.mla import MLAConfig
from models.moe import Dispatcher, ExpertKernel, MoEConfig
from models.ngram_hash import NgramHasher, num_rows
from models.router import RouterConfig, RouterKind
from models.transformer import Transformer, TransformerConfig

VOCAB_SIZE = 61
# Those that run on a CPU; tests/test_kernels_experts.py has the other one.
CPU_KERNELS = [ExpertKernel.loop, ExpertKernel.padded, ExpertKernel.grouped_mm]
# One of each kind; a capacity of 5 / 2 and 5 times an even share makes room for all tokens in any one of 5 experts.
ROUTERS = {
    "moe_softmax": RouterConfig(RouterKind.softmax, top_k=2),
    "moe_gshard": RouterConfig(RouterKind.gshard, top_k=2, capacity_factor=2.5),
    "moe_switch": RouterConfig(RouterKind.switch, top_k=1, capacity_factor=5.0),
    "moe_hash": RouterConfig(RouterKind.hash, top_k=1),
}


def tiny_config(kind: str = "moe_engram", **changes: Any) -> TransformerConfig:
    """kind: dense | moe | engram | moe_engram, or a key of ROUTERS; `changes` are fields of TransformerConfig.

    With "mla" in it, latent attention; with "hyper", three residual streams; with "fused" too, one Engram gate for all.
    """
    router = replace(ROUTERS.get(kind, RouterConfig(top_k=2)))
    moe = MoEConfig(num_experts=5, d_expert=8, num_shared_experts=1, router=router)
    engram = EngramConfig(layers=[1], max_ngram_size=3, num_hash_heads=2, d_memory=16, table_size=23)
    engram.multi_branch = "fused" not in kind
    mla = MLAConfig(num_heads=3, kv_rank=10, query_rank=9, nope_head_dim=4, rope_head_dim=2, value_head_dim=5)
    cfg = TransformerConfig(
        vocab_size=VOCAB_SIZE,
        seq_len=24,
        num_layers=3,
        d_model=16,
        d_ff=24,
        num_dense_layers=1 if "moe" in kind else 0,
        init_std=0.1,
        attention=None if "mla" in kind else AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        mla=mla if "mla" in kind else None,
        moe=moe if "moe" in kind else None,
        engram=engram if "engram" in kind else None,
        hyper_connections=HyperConnectionsConfig(num_streams=3) if "hyper" in kind else None,
    )
    return replace(cfg, **changes)


def tiny_model(cfg: TransformerConfig, seed: int = 0, dispatcher: Dispatcher | None = None) -> Transformer:
    """Initialised model; what starts at zero is moved off it, so that it matters: taps, routers' biases, mappings."""
    model = Transformer(cfg, dispatcher)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("taps"):
                tensor.normal_(0, 0.5, generator=generator)
            if name.endswith("expert_bias"):
                tensor.normal_(0, 0.05, generator=generator)
            if name.endswith(("connection.projection", "connection.gates")):
                tensor.normal_(0, 0.5, generator=generator)
    return model


class TinyMemory:
    """Hasher and tables of a configuration; by default every token is its own in the compression table."""

    def __init__(self, cfg: TransformerConfig, seed: int = 0, compression_table: Tensor | None = None):
        self.tables: dict[int, LocalTable] = {}
        self.hasher = None
        if cfg.memory is not None:
            table = torch.arange(cfg.vocab_size) if compression_table is None else compression_table
            self.hasher = NgramHasher(cfg.memory, table, pad_id=0)
            for layer, rows in num_rows(cfg.memory).items():
                self.tables[layer] = LocalTable(rows, cfg.memory.row_dim, 1.0, seed, layer=layer)

    def row_ids(self, token_ids: Tensor, document_ids: Tensor) -> dict[int, Tensor]:
        return {} if self.hasher is None else self.hasher(token_ids, document_ids)

    def rows(self, token_ids: Tensor, document_ids: Tensor) -> dict[int, Tensor]:
        row_ids = self.row_ids(token_ids, document_ids)
        return {layer: self.tables[layer].lookup(ids) for layer, ids in row_ids.items()}


def tiny_batch(cfg: TransformerConfig, batch: int = 2, boundary: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and document ids (batch, seq_len); every row holds two documents, the second from `boundary` on."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, cfg.vocab_size, (batch, cfg.seq_len), generator=generator)
    document_ids = (torch.arange(cfg.seq_len) >= boundary).long().expand(batch, -1).contiguous()
    return token_ids, document_ids


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
