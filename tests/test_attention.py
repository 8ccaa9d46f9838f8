"""Attention against a brute-force loop, rotary positions against Hugging Face's Llama."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models import attention as attention_module
from models.attention import (
    Attention,
    AttentionConfig,
    attention_bias,
    attention_mask,
    masked_attention,
    rotary_tables,
    rotate,
)
from models.initialize import initialize
from models.norm import RMSNorm
from tests.tiny import relative_error


def make(cfg: AttentionConfig, d_model: int = 12, seq_len: int = 16) -> Attention:
    attention = Attention(cfg, d_model, seq_len, norm_eps=1e-6)
    initialize(attention, seed=0, init_std=0.5)
    if cfg.qk_norm:
        with torch.no_grad():
            attention.query_norm.weight.normal_(1, 0.2)
            attention.key_norm.weight.normal_(1, 0.2)
    return attention


def brute_force(attention: Attention, x: torch.Tensor, document_ids: torch.Tensor) -> torch.Tensor:
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
            angle = position * cfg.rope_theta ** (-2 * i / width)
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
    "cfg",
    [
        AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=6, qk_norm=True, rope_theta=100.0),
        AttentionConfig(num_heads=3, num_kv_heads=1, head_dim=2),
    ],
)
def test_attention_equals_a_loop_over_positions_and_heads(cfg):
    attention = make(cfg)
    x = torch.randn(2, 7, 12)
    document_ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [3, 4, 4, 4, 4, 4, 5]])
    out = attention(x, attention_bias(attention_mask(document_ids), x.dtype))
    assert relative_error(out, brute_force(attention, x, document_ids)) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(2, 4, 2, 33, 6), (1, 3, 3, 1, 2), (3, 6, 1, 150, 8), (2, 2, 1, 128, 4)])
def test_cpu_path_equals_torch_in_output_and_gradients(shape, dtype, tolerance):
    batch, heads, kv_heads, seq_len, width = shape
    exact = [torch.randn(batch, n, seq_len, width).to(dtype).float() for n in (heads, kv_heads, kv_heads)]
    mask = attention_mask(torch.randint(0, 3, (batch, seq_len)).sort(dim=1).values)
    bias = attention_bias(mask, torch.float64)
    upstream = torch.randn(batch, seq_len, heads, width)

    def definition(query, key, value, bias):
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        return attended.transpose(1, 2)

    results = []
    for cast, function in ((dtype, masked_attention), (torch.float64, definition)):
        inputs = [tensor.detach().clone().to(cast).requires_grad_() for tensor in exact]
        out = function(*inputs, bias)
        out.backward(upstream.to(cast))
        results.append([out, *(tensor.grad for tensor in inputs)])
    for name, actual, expected in zip(("output", "query", "key", "value"), *results, strict=True):
        if expected.abs().max() > 1e-12:  # a single position has no gradient in query and key
            assert relative_error(actual, expected) < tolerance, name


def test_long_sequences_take_torchs_kernel_with_the_same_result(monkeypatch):
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
    bias = attention_bias(attention_mask(torch.zeros(2, 20, dtype=torch.int64)), torch.float32)
    short = masked_attention(query, key, key, bias)
    monkeypatch.setattr(attention_module, "MATERIALIZE_UP_TO", 19)
    assert relative_error(masked_attention(query, key, key, bias), short) < 1e-5


def test_mask_is_causal_and_ends_at_documents():
    mask = attention_mask(torch.tensor([[7, 7, 9]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_equals_llama(theta):
    heads, width, seq_len = 3, 8, 11
    x = torch.randn(2, seq_len, heads, width)
    tables = rotary_tables(seq_len, width, theta)
    config = LlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.arange(seq_len)[None]
    llama_cos, llama_sin = LlamaRotaryEmbedding(config)(x, positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), llama_cos, llama_sin)
    assert relative_error(rotate(x, tables), expected.transpose(1, 2)) < 1e-6


def test_rotation_gradient_is_the_rotation_back():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rotary_tables(5, 4, 10.0)), (x,))


def test_scores_depend_on_the_distance_only():
    tables = rotary_tables(32, 8, 100.0)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned_query, turned_key = rotate(query.expand(1, 32, 1, 8), tables), rotate(key.expand(1, 32, 1, 8), tables)
    at_5 = (turned_query[0, 5] * turned_key[0, 2]).sum()
    at_25 = (turned_query[0, 25] * turned_key[0, 22]).sum()
    assert torch.allclose(at_5, at_25, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads=3 must divide attention.num_heads=4; nearest: 2"),
        ({"head_dim": 5}, r"head_dim=5 must be even.*nearest: 6"),
        ({"num_heads": 0}, r"num_heads=0 must be at least 1"),
        ({"rope_theta": 0.0}, r"rope_theta=0.0 must be positive"),
    ],
)
def test_bad_shapes_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        AttentionConfig(**settings)
