"""Mask and softmax attention: the paths of the CPU against torch's own, outputs and every gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from models import softmax_attention
from models.softmax_attention import (
    CausalMask,
    attention_bias,
    attention_mask,
    causal_mask,
    masked_attention,
    serves_grouped_heads,
)
from tests.tiny import relative_error

# Batch, query heads, key heads, positions, width of queries and keys, width of values, scale.
SHAPES = [
    (2, 4, 2, 33, 6, 6, 6**-0.5),
    (1, 3, 3, 1, 2, 2, 0.7),
    (3, 6, 1, 150, 8, 8, 8**-0.5),
    (2, 2, 1, 128, 4, 4, 0.5),
    (2, 3, 3, 40, 12, 8, 0.3),
    (1, 4, 2, 131, 3, 7, 1.0),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_cpu_path_equals_torch_in_output_and_gradients(shape, dtype, tolerance):
    batch, heads, kv_heads, seq_len, width, value_width, scale = shape
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    exact = [torch.randn(batch, n, seq_len, columns).to(dtype).float() for n, columns in sizes]
    document_ids = torch.randint(0, 3, (batch, seq_len)).sort(dim=1).values
    upstream = torch.randn(batch, seq_len, heads, value_width)

    def definition(query, key, value, mask, scale):
        bias = attention_bias(attention_mask(mask.document_ids), torch.float64)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2)

    results = []
    for cast, function in ((dtype, masked_attention), (torch.float64, definition)):
        inputs = [tensor.detach().clone().to(cast).requires_grad_() for tensor in exact]
        out = function(*inputs, causal_mask(document_ids, inputs[0]), scale)
        out.backward(upstream.to(cast))
        results.append([out, *(tensor.grad for tensor in inputs)])
    for name, actual, expected in zip(("output", "query", "key", "value"), *results, strict=True):
        if expected.abs().max() > 1e-12:  # a single position has no gradient in query and key
            assert relative_error(actual, expected) < tolerance, name


def test_long_sequences_take_torchs_kernel_with_the_same_result(monkeypatch):
    query, key, value = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 5)
    mask = causal_mask(torch.zeros(2, 20, dtype=torch.int64), query)
    short = masked_attention(query, key, value, mask, 0.6)
    monkeypatch.setattr(softmax_attention, "MATERIALIZE_UP_TO", 19)
    assert relative_error(masked_attention(query, key, value, mask, 0.6), short) < 1e-5


def test_a_mask_without_bias_serves_every_path():
    query, key, value = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 5)
    mask = causal_mask(torch.arange(20).expand(2, -1) // 7, query)
    assert mask.bias is not None
    bare = CausalMask(mask.document_ids, None)
    assert torch.equal(masked_attention(query, key, value, bare, 0.6), masked_attention(query, key, value, mask, 0.6))


def test_on_a_gpu_no_grouped_heads_reach_torchs_kernel(monkeypatch):
    """With a mask they would take the kernel that holds all probabilities."""
    leaves = [torch.randn(2, heads, 20, width, requires_grad=True) for heads, width in ((6, 8), (2, 8), (2, 5))]
    mask = causal_mask(torch.arange(20).expand(2, -1) // 7, leaves[0])
    monkeypatch.setattr(softmax_attention, "MATERIALIZE_UP_TO", 0)
    results, calls = [], []
    fused = F.scaled_dot_product_attention

    def seen(query, key, value, **settings):
        calls.append((key.shape[1], value.shape[1], settings["enable_gqa"]))
        return fused(query, key, value, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    for serves in (True, False):
        monkeypatch.setattr(softmax_attention, "serves_grouped_heads", lambda query, serves=serves: serves)
        out = masked_attention(*leaves, mask, 0.6)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert calls == [(2, 2, True), (6, 6, False)]
    for actual, expected in zip(results[1], results[0], strict=True):
        assert actual.shape == expected.shape and relative_error(actual, expected) < 1e-6
    assert not serves_grouped_heads(SimpleNamespace(device=torch.device("cuda")))
    assert serves_grouped_heads(leaves[0])


def test_mask_is_causal_and_ends_at_documents():
    mask = attention_mask(torch.tensor([[7, 7, 9]]))
    assert mask.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]
