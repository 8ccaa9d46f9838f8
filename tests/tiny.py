"""Smallest models that still have every part, and what several test files need to run them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.initialize import initialize
from models.memory_table import LocalTable
from models.moe import MoEConfig
from models.ngram_hash import NgramHasher, num_rows
from models.router import RouterConfig
from models.transformer import Transformer, TransformerConfig

VOCAB_SIZE = 61


def tiny_config(kind: str = "moe_engram", **changes: Any) -> TransformerConfig:
    """kind: dense | moe | engram | moe_engram; `changes` are fields of TransformerConfig."""
    moe = MoEConfig(num_experts=5, d_expert=8, num_shared_experts=1, router=RouterConfig(top_k=2))
    engram = EngramConfig(layers=[1], max_ngram_size=3, num_hash_heads=2, d_memory=16, table_size=23)
    cfg = TransformerConfig(
        vocab_size=VOCAB_SIZE,
        seq_len=24,
        num_layers=3,
        d_model=16,
        d_ff=24,
        num_dense_layers=1 if "moe" in kind else 0,
        init_std=0.1,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        moe=moe if "moe" in kind else None,
        engram=engram if "engram" in kind else None,
    )
    return replace(cfg, **changes)


def tiny_model(cfg: TransformerConfig, seed: int = 0) -> Transformer:
    """Initialised model; the convolution's taps and the router's biases are moved off zero, so that they matter."""
    model = Transformer(cfg)
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("taps"):
                tensor.normal_(0, 0.5, generator=generator)
            if name.endswith("expert_bias"):
                tensor.normal_(0, 0.05, generator=generator)
    return model


class TinyMemory:
    """Hasher and tables of a configuration, over an identity compression table."""

    def __init__(self, cfg: TransformerConfig, seed: int = 0):
        self.tables: dict[int, LocalTable] = {}
        self.hasher = None
        if cfg.engram is not None:
            self.hasher = NgramHasher(cfg.engram, torch.arange(cfg.vocab_size), pad_id=0)
            for layer, rows in num_rows(cfg.engram).items():
                self.tables[layer] = LocalTable(rows, cfg.engram.row_dim, 1.0, seed, layer=layer)

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
