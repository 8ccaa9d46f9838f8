"""Closed forms against the real module and tables, and against torch's FLOP counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import engram as engram_module
from models.accounting import ParameterRole, bytes_per_parameter, count_parameters, flops_per_token
from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.hyper_connections import HyperConnectionsConfig
from models.mla import MLAConfig
from models.moe import ExpertKernel, MoEConfig
from models.over_encoding import OverEncodingConfig
from models.router import RouterConfig
from models.transformer import Transformer, TransformerConfig
from tests.tiny import ROUTERS, TinyMemory, tiny_config

CONFIGS = {
    "dense": tiny_config("dense"),
    "moe": tiny_config("moe"),
    "engram": tiny_config("engram"),
    "moe_engram": tiny_config("moe_engram"),
    **{kind: tiny_config(kind) for kind in ROUTERS},
    "wide_switch": tiny_config("moe", moe=MoEConfig(3, 24, 0, router=ROUTERS["moe_switch"])),
    "groups": tiny_config("moe", moe=MoEConfig(6, 8, router=RouterConfig(top_k=2, num_groups=3, top_groups=2))),
    "tied": tiny_config("moe_engram", tie_embeddings=True),
    "all_moe": tiny_config("moe_engram", num_dense_layers=0),
    "qk_norm": tiny_config("dense", attention=AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=6, qk_norm=True)),
    "mla": tiny_config("moe_engram_mla"),
    "mla_plain_queries": tiny_config("dense_mla", mla=MLAConfig(5, 12, None, 7, 6, 3)),
    "bias_two_layers": tiny_config(
        "engram", engram=EngramConfig(layers=[0, 2], d_memory=24, num_hash_heads=3, table_size=50, use_bias=True)
    ),
    "four_grams": tiny_config("moe_engram", engram=EngramConfig([2], 4, 1, 9, 11, kernel_size=2)),
    "one_row": tiny_config("moe_engram", engram=EngramConfig(layers=[1], d_memory=16, num_hash_heads=2, table_size=1)),
    "no_gate": tiny_config(
        "engram", engram=EngramConfig(layers=[0, 1], d_memory=16, num_hash_heads=2, table_size=9, gate=False)
    ),
    "no_convolution": tiny_config("engram", engram=EngramConfig([1], 4, 2, 24, 30, kernel_size=0, use_bias=True)),
    "value_alone": tiny_config("moe_engram", engram=EngramConfig([1], 3, 2, 16, 23, kernel_size=0, gate=False)),
    "no_compression": tiny_config("engram", engram=EngramConfig([1], 3, 2, 16, 23, compress=False)),
    "over_encoding": tiny_config("moe", over_encoding=OverEncodingConfig(3, 2, 16, 23)),
    "over_encoding_tied": tiny_config(
        "dense", tie_embeddings=True, over_encoding=OverEncodingConfig(4, 3, 45, 50, compress=True)
    ),
    "no_shared": tiny_config("moe", moe=MoEConfig(4, 8, num_shared_experts=0, router=RouterConfig(top_k=2))),
    "widths": tiny_config("moe", moe=MoEConfig(4, 8, shared_widths=[40, 0], router=RouterConfig(top_k=2))),
    "hyper": tiny_config("moe_engram_hyper"),
    "hyper_fused": tiny_config("moe_engram_hyper_fused"),
    "hyper_two": tiny_config("dense", hyper_connections=HyperConnectionsConfig(num_streams=2)),
    "all_experts_active": tiny_config("moe_engram", moe=MoEConfig(3, 8, router=RouterConfig(top_k=3))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_equal_module_and_tables(name):
    cfg = CONFIGS[name]
    counts = count_parameters(cfg)
    model, memory = Transformer(cfg), TinyMemory(cfg)
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    embedding = sum(size for key, size in sizes.items() if key in ("embedding.weight", "head.weight"))
    experts = sum(size for key, size in sizes.items() if ".moe.experts." in key)
    rows = sum(table.weight.numel() for table in memory.tables.values())
    assert counts.embedding == embedding
    assert counts.experts == experts
    assert counts.memory == rows
    assert counts.total == sum(sizes.values()) - embedding + rows
    assert counts.trained_by_engine == sum(sizes.values())

    read = sum(cfg.memory.num_rows_per_token * cfg.memory.row_dim for _ in memory.tables)
    idle = experts * (cfg.moe.num_experts - cfg.moe.router.top_k) // cfg.moe.num_experts if cfg.moe is not None else 0
    assert counts.inactive_experts == idle
    assert counts.inactive_memory == rows - read
    assert counts.inactive == counts.total - counts.active == idle + rows - read
    assert counts.rho == pytest.approx(idle / counts.inactive if rows > read else 1.0)
    assert counts.to_dict()["rho"] == counts.rho and counts.to_dict()["total"] == counts.total


def test_rho_at_its_ends():
    assert count_parameters(CONFIGS["moe"]).rho == 1.0
    assert count_parameters(CONFIGS["dense"]).rho == 1.0
    assert count_parameters(CONFIGS["one_row"]).rho == 1.0
    assert count_parameters(CONFIGS["all_experts_active"]).rho == 0.0
    assert 0 < count_parameters(CONFIGS["moe_engram"]).rho < 1


def paper_scale(num_experts: int, table_size: int) -> TransformerConfig:
    """The models of arXiv 2601.07372, table 5; expert and head widths from arXiv 2512.24880, table 5, same shape.

    0 experts: all layers dense; 0 rows: no memory. No paper gives the width of the dense layers and the rank of the
    queries: 12288 and none give the printed totals.
    """
    cfg = TransformerConfig(
        vocab_size=129_280,
        seq_len=4096,
        num_layers=30,
        d_model=2560,
        d_ff=12_288,
        attention=None,
        mla=MLAConfig(num_heads=32),
    )
    if num_experts:
        moe = MoEConfig(num_experts=num_experts, d_expert=1536, num_shared_experts=2, router=RouterConfig(top_k=6))
        cfg = replace(cfg, moe=moe, num_dense_layers=1)
    if table_size:
        cfg = replace(cfg, engram=EngramConfig([1, 14], num_hash_heads=8, d_memory=1280, table_size=table_size))
    return cfg


@pytest.mark.parametrize(
    ("num_experts", "table_size", "printed"),
    [(0, 0, 4.1e9), (72, 0, 26.7e9), (55, 2_262_400, 26.7e9), (55, 7_239_680, 39.5e9)],
)
def test_paper_scale_totals(num_experts, table_size, printed):
    """Printed totals count the head but not the embedding, the 3.8 billion active parameters neither."""
    counts = count_parameters(paper_scale(num_experts, table_size))
    assert counts.total + counts.embedding // 2 == pytest.approx(printed, rel=0.01)
    assert counts.active == pytest.approx(3.8e9, rel=0.01)


def test_paper_scale_27b_memory_and_experts():
    """Engram-27B: 55 experts and 5.79 to 5.82 billion rows' parameters (arXiv 2601.07372, table 5)."""
    counts = count_parameters(paper_scale(55, 2_262_400))
    assert 5.79e9 <= counts.memory <= 5.82e9
    assert counts.experts == 55 * 29 * 3 * 2560 * 1536
    assert counts.rho == pytest.approx(49 / 66, abs=0.003)


def torch_conv(self: engram_module.ShortConv, values: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """The short convolution as torch's conv1d, which the FLOP counter sees; documents play no part in its cost."""
    branches, width = values.shape[2:]
    normed = F.rms_norm(values, (width,), eps=self.eps) * self.norm
    padded = F.pad(normed.flatten(2).transpose(1, 2), ((self.kernel_size - 1) * self.dilation, 0))
    weight = self.taps.flatten(1).t()[:, None]
    mixed = F.conv1d(padded, weight, groups=branches * width, dilation=self.dilation)
    return F.silu(mixed).transpose(1, 2).view_as(values) + values


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_equal_the_counter_on_the_plain_path(name, monkeypatch):
    cfg = CONFIGS[name]
    if cfg.moe is not None:
        cfg = replace(cfg, moe=replace(cfg.moe, expert_kernel=ExpertKernel.loop))
    monkeypatch.setattr(engram_module.ShortConv, "forward", torch_conv)
    model, memory = Transformer(cfg), TinyMemory(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    token_ids = torch.randint(0, cfg.vocab_size, (2, cfg.seq_len))
    rows = memory.rows(token_ids, torch.zeros_like(token_ids))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(token_ids, torch.zeros_like(token_ids), rows)
    counted = counter.get_total_flops() / token_ids.numel()
    flops = flops_per_token(cfg)
    assert flops.with_head == pytest.approx(counted, rel=0.01)
    assert flops.with_head - flops.without_head == 2 * cfg.d_model * cfg.vocab_size
    assert flops.training == 3 * flops.with_head
    parts = [value for key, value in flops.to_dict().items() if key not in ("with_head", "without_head")]
    assert sum(parts) == flops.with_head


def test_bytes_of_each_role():
    adamw, muon = bytes_per_parameter(ParameterRole.adamw), bytes_per_parameter(ParameterRole.muon)
    assert (adamw.weights, adamw.gradients, adamw.optimizer, adamw.total) == (4, 4, 8, 16)
    assert muon.total == 12
    assert bytes_per_parameter(ParameterRole.adamw, bf16_weights=True).total == 16
    assert bytes_per_parameter(ParameterRole.muon, bf16_weights=True).optimizer == 8


def test_bytes_of_a_table_are_those_of_its_state():
    cfg = CONFIGS["moe_engram"]
    table = TinyMemory(cfg).tables[1]
    shards = table.state_shards()
    held = sum(tensor.numel() * tensor.element_size() for name, tensor in shards.items() if name != "global_step")
    per_parameter = bytes_per_parameter(ParameterRole.memory, row_dim=cfg.engram.row_dim)
    assert per_parameter.total * table.weight.numel() == pytest.approx(held)
