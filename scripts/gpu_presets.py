"""The shapes of conf/model/{small,small_engram,medium,medium_engram}.yaml, for a machine without a reader of them."""

from dataclasses import replace

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.router import RouterConfig
from models.transformer import TransformerConfig

SMALL = TransformerConfig(
    seq_len=1024,
    num_layers=6,
    num_dense_layers=1,
    d_model=320,
    d_ff=1280,
    embedding_init_std=1.0,
    init_std=0.04,
    attention=AttentionConfig(num_heads=5, num_kv_heads=5, head_dim=64, qk_norm=True),
    moe=MoEConfig(d_expert=160, router=RouterConfig(top_k=6)),
)
MEDIUM = TransformerConfig(
    seq_len=2048,
    num_layers=12,
    num_dense_layers=1,
    d_model=768,
    d_ff=3072,
    init_std=0.02,
    attention=AttentionConfig(num_heads=12, num_kv_heads=12, head_dim=64, qk_norm=True),
    moe=MoEConfig(d_expert=384, router=RouterConfig(top_k=6)),
)
PRESETS = {
    "small": SMALL,
    "small_engram": replace(
        SMALL,
        moe=MoEConfig(num_experts=50, d_expert=160, router=RouterConfig(top_k=6)),
        engram=EngramConfig(layers=[1, 3], num_hash_heads=8, d_memory=320, table_size=16_800),
    ),
    "medium": MEDIUM,
    "medium_engram": replace(
        MEDIUM,
        moe=MoEConfig(num_experts=50, d_expert=384, router=RouterConfig(top_k=6)),
        engram=EngramConfig(layers=[1, 5], num_hash_heads=8, d_memory=768, table_size=88_800),
    ),
}
