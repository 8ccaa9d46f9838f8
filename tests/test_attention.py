"""Grouped-query attention against a brute-force loop over positions and heads."""

import math

import pytest
import torch

from models.attention import Attention, AttentionConfig
from models.initialize import initialize
from models.norm import RMSNorm
from models.rotary import RotaryConfig
from models.softmax_attention import causal_mask
from tests.tiny import relative_error


def make(cfg: AttentionConfig, theta: float) -> Attention:
    attention = Attention(cfg, RotaryConfig(theta), d_model=12, seq_len=16, norm_eps=1e-6)
    initialize(attention, seed=0, init_std=0.5)
    if cfg.qk_norm:
        with torch.no_grad():
            attention.query_norm.weight.normal_(1, 0.2)
            attention.key_norm.weight.normal_(1, 0.2)
    return attention


def brute_force(attention: Attention, theta: float, x: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
    """Position by position, head by head, in fp64."""
    cfg = attention.cfg
    heads, kv_heads, width = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    x = x.double()
    projected = x @ attention.qkv.weight.double().t()

    def norm(vector: torch.Tensor, module: RMSNorm | None) -> torch.Tensor:
        if module is None:
            return vector
        return vector / (vector.square().mean() + module.eps).sqrt() * module.weight.double()

    def turn(vector: torch.Tensor, position: int) -> torch.Tensor:
        turned = vector.clone()
        for i in range(width // 2):
            angle = position * theta ** (-2 * i / width)
            a, b = vector[i], vector[i + width // 2]
            turned[i] = a * math.cos(angle) - b * math.sin(angle)
            turned[i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def head(b: int, s: int, index: int) -> torch.Tensor:
        return projected[b, s, index * width : (index + 1) * width]

    out = torch.zeros(*x.shape[:2], heads * width, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            visible = [s for s in range(t + 1) if document_ids[b, s] == document_ids[b, t]]
            for h in range(heads):
                kv = h // (heads // kv_heads)
                query = turn(norm(head(b, t, h), attention.query_norm), t)
                scores = torch.stack(
                    [
                        query @ turn(norm(head(b, s, heads + kv), attention.key_norm), s) / math.sqrt(width)
                        for s in visible
                    ]
                ).softmax(0)
                values = torch.stack([head(b, s, heads + kv_heads + kv) for s in visible])
                out[b, t, h * width : (h + 1) * width] = scores @ values
    return out @ attention.output.weight.double().t()


@pytest.mark.parametrize(
    ("cfg", "theta"),
    [
        (AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4), 10_000.0),
        (AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=6, qk_norm=True), 100.0),
        (AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=2), 10_000.0),
    ],
)
def test_attention_equals_a_loop_over_positions_and_heads(cfg, theta):
    attention = make(cfg, theta)
    x = torch.randn(2, 7, 12)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 5]])
    out = attention(x, causal_mask(document_ids, x))
    assert relative_error(out, brute_force(attention, theta, x, document_ids)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads=3 must divide model.attention.num_heads=4; nearest: 2"),
        ({"head_dim": 5}, r"head_dim=5 must be even.*nearest: 6"),
        ({"num_heads": 0}, r"num_heads=0 must be at least 1"),
    ],
)
def test_bad_shapes_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**settings)
