"""Every value of the four axes of an architecture, at the smallest size that has the part, and their combinations."""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.hyper_connections import HyperConnectionsConfig
from models.mla import MLAConfig
from models.moe import MoEConfig
from models.over_encoding import OverEncodingConfig
from models.rotary import RotaryConfig, YarnConfig
from models.router import RouterConfig
from models.transformer import TransformerConfig
from tests.tiny import ROUTERS

VOCAB_SIZE = 31
# Three ids each have the same normalised text, so that an Engram with and one without compression differ.
COMPRESSION_TABLE = torch.arange(VOCAB_SIZE) // 3

YARN = RotaryConfig(1000.0, YarnConfig(4.0, 64, beta=8.0))
GROUPED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
LATENT = MLAConfig(num_heads=3, kv_rank=6, query_rank=7, nope_head_dim=3, rope_head_dim=2, value_head_dim=5)
ATTENTION: dict[str, dict[str, Any]] = {
    "grouped": {"attention": GROUPED},
    "grouped_norm_yarn": {"attention": replace(GROUPED, qk_norm=True), "rotary": YARN},
    "mla": {"attention": None, "mla": LATENT},
    "mla_yarn": {"attention": None, "mla": LATENT, "rotary": YARN},
}

# Two iterations and not 20: what a position sees does not depend on their number.
HYPER = HyperConnectionsConfig(num_streams=4, sinkhorn_iterations=2)
RESIDUAL: dict[str, HyperConnectionsConfig | None] = {"plain": None, "hyper": HYPER, "hyper_fused": HYPER}

# Six experts: capacities of 6 / 2 and 6 times an even share make room for all tokens in any one of them.
V3 = RouterConfig(top_k=2, num_groups=3, top_groups=2, route_scale=2.5)
NUM_EXPERTS = 6
FEED_FORWARD: dict[str, tuple[RouterConfig | None, int]] = {  # router, leading dense layers
    "dense": (None, 0),
    "sigmoid": (V3, 0),
    "sigmoid_leading_dense": (V3, 1),
    "softmax": (ROUTERS["moe_softmax"], 0),
    "gshard": (replace(ROUTERS["moe_gshard"], capacity_factor=NUM_EXPERTS / 2), 0),
    "switch": (replace(ROUTERS["moe_switch"], capacity_factor=float(NUM_EXPERTS)), 0),
    "hash": (ROUTERS["moe_hash"], 0),
}

ENGRAM = EngramConfig(layers=[1], num_hash_heads=2, d_memory=12, table_size=23, kernel_size=3)
MEMORY: dict[str, EngramConfig | OverEncodingConfig | None] = {
    "none": None,
    "engram": ENGRAM,
    "engram_no_gate": replace(ENGRAM, gate=False),
    "engram_no_conv": replace(ENGRAM, kernel_size=0),
    "engram_no_compression": replace(ENGRAM, compress=False),
    "engram_orders_234": replace(ENGRAM, max_ngram_size=4),
    "engram_two_modules": replace(ENGRAM, layers=[0, 1]),
    "over_encoding": OverEncodingConfig(num_hash_heads=2, d_memory=12, table_size=23),
}


class Combination(NamedTuple):
    """One value of each axis, by name."""

    attention: str
    residual: str
    feed_forward: str
    memory: str

    def __str__(self) -> str:
        return "-".join(self)


def is_possible(combination: Combination) -> bool:
    """One fused gate needs an Engram that can have several."""
    return combination.residual != "hyper_fused" or combination.memory.startswith("engram")


COMBINATIONS = [
    combination
    for combination in (Combination(*names) for names in product(ATTENTION, RESIDUAL, FEED_FORWARD, MEMORY))
    if is_possible(combination)
]


def make_config(combination: Combination, **changes: Any) -> TransformerConfig:
    """Two layers of the combination; `changes` are fields of TransformerConfig."""
    memory = MEMORY[combination.memory]
    engram = memory if isinstance(memory, EngramConfig) else None
    if engram is not None:
        engram = replace(engram, multi_branch=combination.residual != "hyper_fused")
    router, num_dense_layers = FEED_FORWARD[combination.feed_forward]
    cfg = TransformerConfig(
        vocab_size=VOCAB_SIZE,
        seq_len=12,
        num_layers=2,
        d_model=8,
        d_ff=12,
        num_dense_layers=num_dense_layers,
        init_std=0.5,
        moe=None if router is None else MoEConfig(NUM_EXPERTS, d_expert=8, num_shared_experts=1, router=router),
        engram=engram,
        over_encoding=memory if isinstance(memory, OverEncodingConfig) else None,
        hyper_connections=RESIDUAL[combination.residual],
        **ATTENTION[combination.attention],
    )
    return replace(cfg, **changes)
