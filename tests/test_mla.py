"""Multi-head latent attention: the layer against Hugging Face's DeepSeek-V3."""

from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from models.attention import AttentionConfig
from models.mla import LatentAttention, MLAConfig
from models.rotary import RotaryConfig, YarnConfig
from models.softmax_attention import attention_bias, attention_mask, causal_mask
from models.transformer import Transformer
from tests.hf_weights import gradients, latent_settings, our_latent_attention, randomize, rope_parameters
from tests.tiny import relative_error, tiny_config
from train.optim import OptimConfig, OptimizerKind, parameter_groups

SEQ, D_MODEL = 19, 24
SHAPES = {
    "plain_queries": MLAConfig(4, kv_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
    "query_rank": MLAConfig(4, kv_rank=16, query_rank=12, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
    "odd": MLAConfig(3, kv_rank=11, query_rank=7, nope_head_dim=5, rope_head_dim=6, value_head_dim=9),
    "one_head": MLAConfig(1, kv_rank=1, nope_head_dim=1, rope_head_dim=2, value_head_dim=1),
    "wide_values": MLAConfig(5, kv_rank=30, query_rank=40, nope_head_dim=3, rope_head_dim=2, value_head_dim=33),
}
YARN = YarnConfig(10, 64, alpha=1.0, beta=8.0, mscale=0.707, mscale_all_dim=0.9)


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("yarn", [None, YARN])
@pytest.mark.parametrize("name", SHAPES)
def test_layer_equals_hugging_face(name, yarn, neighbours):
    mla, rotary = SHAPES[name], RotaryConfig(1000.0, yarn)
    config = DeepseekV3Config(
        hidden_size=D_MODEL,
        **latent_settings(mla),
        max_position_embeddings=640,
        rope_interleave=neighbours,
        rope_parameters=rope_parameters(rotary),
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, layer_idx=0)
    randomize(theirs)
    ours = LatentAttention(mla, rotary, D_MODEL, seq_len=SEQ + 2, norm_eps=1e-6)
    ours.load_state_dict(our_latent_attention(theirs.state_dict(), mla, neighbours))
    document_ids = torch.tensor([[0] * 7 + [1] * 12, [0] * SEQ])
    bias = attention_bias(attention_mask(document_ids), torch.float32)
    x = torch.randn(2, SEQ, D_MODEL, requires_grad=True)
    copy = x.detach().clone().requires_grad_()
    positions = DeepseekV3RotaryEmbedding(config)(copy, torch.arange(SEQ)[None])
    expected, _ = theirs(copy, positions, bias)
    actual = ours(x, causal_mask(document_ids, x))
    assert relative_error(actual, expected) < 1e-5
    upstream = torch.randn(actual.shape)
    actual.backward(upstream)
    expected.backward(upstream)
    assert relative_error(x.grad, copy.grad) < 1e-4
    reference = our_latent_attention(gradients(theirs), mla, neighbours)
    assert reference.keys() == gradients(ours).keys()
    for key, grad in gradients(ours).items():
        assert relative_error(grad, reference[key]) < 1e-4, key


def test_a_layer_has_no_more_parameters_than_the_paper_says():
    """DeepSeek-V3's layer (arXiv 2412.19437, 4.2): every matrix of eqs 1 to 11, none with a bias."""
    mla = MLAConfig(128, query_rank=1536)
    with torch.device("meta"):
        layer = LatentAttention(mla, RotaryConfig(), 7168, seq_len=4096, norm_eps=1e-6)
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == {
        "kv_down.weight": (512 + 64, 7168),
        "kv_norm.weight": (512,),
        "kv_up.weight": (128 * (128 + 128), 512),
        "query_down.weight": (1536, 7168),
        "query_norm.weight": (1536,),
        "query.weight": (128 * (128 + 64), 1536),
        "output.weight": (7168, 128 * 128),
    }


def test_only_matrices_of_latent_attention_are_decayed_and_go_to_muon():
    groups = parameter_groups(Transformer(tiny_config("dense_mla")), OptimConfig(kind=OptimizerKind.muon))
    names = {group.name: {name for name, _ in group.parameters if ".0.attention." in name} for group in groups}
    norms = {f"blocks.0.attention.{norm}.weight" for norm in ("kv_norm", "query_norm")}
    assert norms == names["vectors"] and len(names["matrices"]) == 5 and names["vocabulary"] == set()


def test_a_model_has_one_kind_of_attention():
    mla = SHAPES["odd"]
    with pytest.raises(ValueError, match=r"model.attention=.* has no effect beside model.mla=.*; set model.attention="):
        tiny_config("dense", mla=mla)
    with pytest.raises(ValueError, match=r"model.attention=null and model.mla=null leave layers without attention"):
        tiny_config("dense", attention=None)
    cfg = replace(tiny_config("dense"), attention=None, mla=mla)
    assert replace(cfg, attention=AttentionConfig(), mla=None).attention == AttentionConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 0}, r"mla.num_heads=0 must be at least 1"),
        ({"query_rank": 0}, r"mla.query_rank=0 must be at least 1"),
        ({"rope_head_dim": 5}, r"mla.rope_head_dim=5 must be even.*nearest: 6"),
    ],
)
def test_bad_shapes_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        MLAConfig(**{"num_heads": 4} | settings)
