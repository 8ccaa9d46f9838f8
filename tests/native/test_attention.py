"""The attention kernel in C against plain torch: outputs and every gradient, documents, sizes, threads."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import native
from models.attention import Attention, AttentionConfig
from models.initialize import initialize
from models.mla import LatentAttention, MLAConfig
from models.rotary import RotaryConfig, YarnConfig
from models.softmax_attention import attention_bias, attention_mask, causal_mask, masked_attention
from tests.tiny import relative_error

pytestmark = pytest.mark.usefixtures("calls")  # on every form of the kernels

# One rounding to bf16 is at most 2^-9 of a value; the kernel rounds probabilities and gradients once.
BF16 = 8e-3


# Batch, query heads, key heads, positions, width of queries and keys, width of values.
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 2, 2), (2, 3, 1, 37, 6, 6), (2, 4, 2, 70, 40, 40), (1, 2, 2, 96, 32, 32),
        (1, 1, 1, 1, 6, 3), (2, 3, 3, 45, 48, 32), (1, 4, 2, 70, 20, 71), (1, 2, 2, 33, 192, 128),
    ],
)  # fmt: skip
def test_attention_kernel(sizes, calls):
    batch, num_heads, num_kv_heads, seq_len, width, value_width = sizes
    scale = 1.3 * width**-0.5
    torch.manual_seed(0)
    query = torch.randn(batch, num_heads, seq_len, width).bfloat16().requires_grad_()
    key = torch.randn(batch, num_kv_heads, seq_len, width).bfloat16().requires_grad_()
    value = torch.randn(batch, num_kv_heads, seq_len, value_width).bfloat16().requires_grad_()
    documents = (torch.rand(batch, seq_len) < 0.1).long().cumsum(1)
    bias = attention_bias(attention_mask(documents), torch.bfloat16)
    out = masked_attention(query, key, value, causal_mask(documents, query), scale)
    assert calls == ["attention_forward"]
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(*exact, attn_mask=bias.double(), scale=scale, enable_gqa=True)
    expected = expected.transpose(1, 2)
    assert relative_error(out, expected) < BF16
    upstream = torch.randn(out.shape).bfloat16()
    gradients = torch.autograd.grad(out, (query, key, value), upstream)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, exact, upstream.double()), strict=True):
        # a softmax over one key has no gradient
        assert relative_error(gradient, reference) < BF16 or not (gradient.any() or reference.any())


def attention_case(sizes: tuple[int, ...], documents: Tensor, spread: float = 1.0) -> list[Tensor]:
    """Output and gradients of the kernel, then those of the definition in double precision; `spread` of the scores."""
    batch, num_heads, num_kv_heads, seq_len, width, value_width = sizes
    query = (spread * torch.randn(batch, num_heads, seq_len, width)).bfloat16().requires_grad_()
    key = torch.randn(batch, num_kv_heads, seq_len, width).bfloat16().requires_grad_()
    value = torch.randn(batch, num_kv_heads, seq_len, value_width).bfloat16().requires_grad_()
    upstream = torch.randn(batch, seq_len, num_heads, value_width).bfloat16()
    out = masked_attention(query, key, value, causal_mask(documents, query), width**-0.5)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    bias = attention_bias(attention_mask(documents), torch.float64)
    expected = F.scaled_dot_product_attention(*exact, attn_mask=bias, enable_gqa=True).transpose(1, 2)
    gradients = torch.autograd.grad(out, (query, key, value), upstream)
    return [out, *gradients, expected, *torch.autograd.grad(expected, exact, upstream.double())]


DOCUMENTS = {
    "one": lambda batch, seq: torch.full((batch, seq), 2**40),
    "many": lambda batch, seq: torch.arange(seq).expand(batch, -1) // 5 + 2**40,
    "long": lambda batch, seq: torch.arange(seq).expand(batch, -1) // 90,  # whole blocks of keys are left out
    "alternating": lambda batch, seq: torch.arange(seq).expand(batch, -1) % 3,
    "falling": lambda batch, seq: -(torch.arange(seq).expand(batch, -1) // 40),
    "of its own each": lambda batch, seq: torch.arange(seq).flip(0).expand(batch, -1),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("seq_len", [65, 200])
def test_attention_ends_at_documents(documents, seq_len):
    torch.manual_seed(0)
    results = attention_case((2, 4, 2, seq_len, 24, 40), DOCUMENTS[documents](2, seq_len))
    for actual, expected in zip(results[:4], results[4:], strict=True):
        # a softmax over one key has no gradient, and the kernel gives none
        assert relative_error(actual, expected) < BF16 or not (actual.any() or expected.abs().max() > 1e-12)


@pytest.mark.parametrize("spread", [30.0, 300.0])
def test_attention_of_scores_beyond_the_range_of_exponentials(spread):
    """Scores of hundreds, some of a query all far below 0: their greatest has to be subtracted."""
    torch.manual_seed(0)
    results = attention_case((2, 2, 1, 100, 32, 32), torch.arange(100).expand(2, -1) // 60, spread)
    assert all(bool(torch.isfinite(result).all()) for result in results)
    assert relative_error(results[0], results[4]) < BF16 and relative_error(results[3], results[7]) < BF16
    for actual, expected in zip(results[1:3], results[5:7], strict=True):
        assert relative_error(actual, expected) < 4 * BF16  # nearly all probabilities are 0 or 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_query_breaks_its_own_output(broken):
    query, key = torch.randn(1, 2, 40, 8).bfloat16(), torch.randn(1, 2, 40, 8).bfloat16()
    mask = causal_mask(torch.zeros(1, 40, dtype=torch.int64), query)
    sound = masked_attention(query, key, key, mask, 1.0)
    query[0, 1, 35, 2] = broken
    out = masked_attention(query, key, key, mask, 1.0)
    assert out[0, 35, 1].isnan().all()
    out[0, 35, 1] = sound[0, 35, 1]
    assert relative_error(out, sound) < BF16


@pytest.mark.parametrize("sizes", [(3, 4, 2, 70, 20, 40), (1, 3, 3, 96, 32, 32), (5, 2, 1, 33, 8, 8)])
def test_attention_is_the_same_with_any_number_of_threads(sizes):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results.append(attention_case(sizes, DOCUMENTS["long"](sizes[0], sizes[3]))[:4])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def attention_results(kind: str, seq_len: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    rotary = RotaryConfig(yarn=None if kind == "grouped" else YarnConfig(4, 32, mscale=1.5, mscale_all_dim=0.8))
    rest = {"rotary": rotary, "d_model": 24, "seq_len": seq_len + 3, "norm_eps": 1e-6}
    attention = (
        LatentAttention(MLAConfig(3, 10, 9, nope_head_dim=7, rope_head_dim=4, value_head_dim=5), **rest)
        if kind == "latent"
        else Attention(AttentionConfig(4, 2, 16, qk_norm=kind == "qk_norm"), **rest)
    )
    initialize(attention, 0, 0.4)
    for name, parameter in attention.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    x = torch.randn(3, seq_len, 24, requires_grad=True)
    documents = (torch.arange(seq_len) > seq_len // 3).long().expand(3, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        out = attention(x, causal_mask(documents, x))
    (out.float() * torch.randn(out.shape)).sum().backward()
    return {"out": out, "x": x.grad, **{name: p.grad for name, p in attention.named_parameters()}}


@pytest.mark.parametrize("kind", ["grouped", "qk_norm", "latent"])
@pytest.mark.parametrize("seq_len", [1, 9, 64, 150])
def test_attention(kind, seq_len, monkeypatch, calls):
    actual = attention_results(kind, seq_len, torch.bfloat16)
    assert {"attention_forward", "attention_backward"} <= set(calls)
    expected = attention_results(kind, seq_len, torch.float32)
    monkeypatch.setattr(native, "_level", native.Level.off)
    torchs_own = attention_results(kind, seq_len, torch.bfloat16)
    for name, exact in expected.items():
        # as close to fp32 as torch's own bf16 operations are, up to the luck of single roundings
        assert relative_error(actual[name], exact) < max(1.5 * relative_error(torchs_own[name], exact), BF16), name


def test_attention_takes_one_mask_for_all_sequences():
    query, key = torch.randn(3, 4, 20, 8).bfloat16(), torch.randn(3, 2, 20, 8).bfloat16()
    mask = causal_mask(torch.zeros(1, 20, dtype=torch.int64), query)
    assert mask.bias is None
    bias = attention_bias(attention_mask(mask.document_ids), torch.float64)
    expected = F.scaled_dot_product_attention(query.double(), key.double(), key.double(), bias, enable_gqa=True)
    assert relative_error(masked_attention(query, key, key, mask, 8**-0.5), expected.transpose(1, 2)) < BF16


def test_weights_in_bf16_take_torchs_path(calls):
    """The kernels read norms and rotary tables in fp32."""
    attention = Attention(AttentionConfig(4, 2, 16, True), RotaryConfig(), d_model=24, seq_len=9, norm_eps=1e-6)
    initialize(attention, 0, 0.4)
    x = torch.randn(1, 9, 24)
    documents = torch.zeros(1, 9, dtype=torch.int64)
    exact = attention(x, causal_mask(documents, x))
    calls.clear()
    assert relative_error(attention.bfloat16()(x.bfloat16(), causal_mask(documents, x.bfloat16())), exact) < 5e-2
    assert "split_heads_forward" not in calls
