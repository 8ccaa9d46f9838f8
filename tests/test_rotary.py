"""Rotary positions and YaRN against Hugging Face's, and closed forms."""

import math

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave as turn_neighbours
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from models.rotary import (
    RotaryConfig,
    YarnConfig,
    inverse_frequencies,
    pair_halves,
    rotary_tables,
    rotate,
    softmax_scale,
)
from tests.tiny import relative_error

YARNS = {
    "deepseek_v3": (64, RotaryConfig(10_000.0, YarnConfig(40, 4096, mscale=1.0, mscale_all_dim=1.0))),
    "engram_27b": (64, RotaryConfig(10_000.0, YarnConfig(10, 4096, mscale=0.707, mscale_all_dim=0.707))),
    "paper": (128, RotaryConfig(10_000.0, YarnConfig(16, 2048))),
    "unequal_factors": (32, RotaryConfig(500.0, YarnConfig(4, 300, 2.0, 9.0, mscale=1.3, mscale_all_dim=0.4))),
    "all_dim_alone": (8, RotaryConfig(10_000.0, YarnConfig(2.5, 64, 0.5, 3.0, mscale=1.0, mscale_all_dim=0.7))),
    "steep": (4, RotaryConfig(1e6, YarnConfig(8, 16, 1.0, 1.01))),
    "narrowest": (2, RotaryConfig(10_000.0, YarnConfig(8, 16))),
}


def huggingface(width: int, cfg: RotaryConfig, nope_head_dim: int = 16) -> DeepseekV3Config:
    yarn = cfg.yarn
    parameters = {"rope_type": "default", "rope_theta": cfg.theta}
    if yarn is not None:
        parameters |= {
            "rope_type": "yarn",
            "factor": float(yarn.scale),
            "original_max_position_embeddings": yarn.original_seq_len,
            "beta_slow": yarn.alpha,
            "beta_fast": yarn.beta,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
        }
    return DeepseekV3Config(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        qk_rope_head_dim=width,
        qk_nope_head_dim=nope_head_dim,
        max_position_embeddings=yarn.original_seq_len * math.ceil(yarn.scale) if yarn is not None else 4096,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("name", YARNS)
def test_yarn_equals_hugging_face(name):
    width, cfg = YARNS[name]
    config = huggingface(width, cfg)
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    assert relative_error(inverse_frequencies(width, cfg), frequencies) < 1e-6
    positions = torch.arange(200)
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), positions[None])
    tables = rotary_tables(200, width, cfg)
    assert relative_error(tables[0], cos[0]) < 1e-5
    assert relative_error(tables[1, :, width // 2 :], sin[0, :, width // 2 :]) < 1e-5
    assert torch.equal(tables[1, :, : width // 2], -tables[1, :, width // 2 :])
    assert tables[0, 0].tolist() == pytest.approx([factor] * width, rel=1e-6)  # position 0: cos = 1 times the factor


@pytest.mark.parametrize("name", YARNS)
def test_softmax_scale_equals_hugging_face(name):
    width, cfg = YARNS[name]
    theirs = DeepseekV3Attention(huggingface(width, cfg, nope_head_dim=10), layer_idx=0).scaling
    assert softmax_scale(10 + width, cfg) == pytest.approx(theirs, rel=1e-12)


def test_yarn_of_the_papers():
    """The 27B models of Engram (arXiv 2601.07372, 5): s = 10, f = 0.707, so m(f) = 1.163, all of it on the scores."""
    width, cfg = YARNS["engram_27b"]
    assert softmax_scale(192, cfg) * math.sqrt(192) == pytest.approx(1.1628**2, rel=1e-4)
    assert float(rotary_tables(1, width, cfg)[0].max()) == pytest.approx(1.0, rel=1e-6)
    plain, stretched = inverse_frequencies(width, RotaryConfig()), inverse_frequencies(width, cfg)
    turns = plain * cfg.yarn.original_seq_len / (2 * math.pi)
    assert torch.equal(stretched[turns > 32 * 1.4], plain[turns > 32 * 1.4])  # one pair of the ramp is a factor of 1.33
    assert torch.allclose(stretched[turns < 1 / 1.4], plain[turns < 1 / 1.4] / 10)
    assert bool((stretched.diff() < 0).all())


def test_without_yarn_only_the_width_scales():
    assert softmax_scale(48, RotaryConfig(123.0)) == pytest.approx(48**-0.5, rel=1e-15)


def test_neighbours_become_halves():
    """Rows in DeepSeek's order, permuted and turned by halves, give the scores that the neighbours gave."""
    heads, width, seq_len, d_model = 3, 6, 7, 5
    query_rows, key_rows = torch.randn(heads, width, d_model), torch.randn(1, width, d_model)
    x = torch.randn(2, seq_len, d_model)
    config = huggingface(width, RotaryConfig(100.0))
    cos, sin = DeepseekV3RotaryEmbedding(config)(x, torch.arange(seq_len)[None])
    query, key = (torch.einsum("bsd,hcd->bhsc", x, rows) for rows in (query_rows, key_rows))
    query, key = turn_neighbours(query, key, cos, sin)
    expected = query @ key.transpose(2, 3)

    tables = rotary_tables(seq_len, width, RotaryConfig(100.0))
    query, key = (
        rotate(torch.einsum("bsd,hcd->bshc", x, pair_halves(rows)), tables).transpose(1, 2)
        for rows in (query_rows, key_rows)
    )
    assert relative_error(query @ key.transpose(2, 3), expected) < 1e-5
    assert pair_halves(torch.arange(6)[:, None]).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_rotation_equals_llama(theta):
    heads, width, seq_len = 3, 8, 11
    x = torch.randn(2, seq_len, heads, width)
    tables = rotary_tables(seq_len, width, RotaryConfig(theta))
    config = LlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    positions = torch.arange(seq_len)[None]
    llama_cos, llama_sin = LlamaRotaryEmbedding(config)(x, positions)
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), llama_cos, llama_sin)
    assert relative_error(rotate(x, tables), expected.transpose(1, 2)) < 1e-6


@pytest.mark.parametrize("yarn", [None, YarnConfig(4, 64)])
def test_rotation_gradient_is_the_rotation_back(yarn):
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotate(t, rotary_tables(5, 4, RotaryConfig(10.0, yarn))), (x,))


def test_scores_depend_on_the_distance_only():
    tables = rotary_tables(32, 8, RotaryConfig(100.0))
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    turned_query, turned_key = rotate(query.expand(1, 32, 1, 8), tables), rotate(key.expand(1, 32, 1, 8), tables)
    at_5 = (turned_query[0, 5] * turned_key[0, 2]).sum()
    at_25 = (turned_query[0, 25] * turned_key[0, 22]).sum()
    assert torch.allclose(at_5, at_25, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 1.0}, r"scale=1.0 must be more than 1.*leave model.rotary.yarn null"),
        ({"alpha": 32.0}, r"alpha=32.0 must lie between 0 and model.rotary.yarn.beta=32.0"),
        ({"alpha": 0.0}, r"alpha=0.0 must lie between 0"),
        ({"original_seq_len": 6}, r"original_seq_len=6 is too short.*nearest: 7"),
        ({"mscale": 0.0}, r"mscale=0.0 must be positive"),
        ({"mscale": 0.707}, r"mscale=0.707 means nothing certain.*set mscale_all_dim=0.707"),
    ],
)
def test_bad_yarn_is_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        YarnConfig(**{"scale": 4.0, "original_seq_len": 128} | settings)


def test_bad_theta_is_refused():
    with pytest.raises(ValueError, match=r"rotary.theta=0.0 must be positive"):
        RotaryConfig(0.0)
    for wrong in ("nan", "inf"):
        with pytest.raises(ValueError, match=rf"rotary.theta={wrong} must be positive and finite"):
            RotaryConfig(float(wrong))
        with pytest.raises(ValueError, match=rf"rotary.yarn.scale={wrong} must be more than 1"):
            YarnConfig(float(wrong), 64)
    with pytest.raises(ValueError, match=r"rotary.theta=1.0 must be more than 1 with model.rotary.yarn"):
        RotaryConfig(1.0, YarnConfig(2.0, 64))
