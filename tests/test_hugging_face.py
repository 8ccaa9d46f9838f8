"""Whole models against Hugging Face's DeepSeek-V3 (latent attention) and Dots1 (grouped-query), with equal weights."""

from dataclasses import replace

import pytest
import torch

from models.attention import AttentionConfig
from models.mla import MLAConfig
from models.moe import MoEConfig
from models.rotary import RotaryConfig, YarnConfig
from models.router import RouterConfig
from models.transformer import Transformer, TransformerConfig
from tests.hf_weights import gradients, our_tensors, randomize, their_model
from tests.tiny import relative_error

# Parts with the odd widths that each can have.
MLA = {
    "full_queries": MLAConfig(4, kv_rank=16, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
    "query_rank": MLAConfig(4, kv_rank=16, query_rank=12, nope_head_dim=8, rope_head_dim=4, value_head_dim=8),
    "odd": MLAConfig(3, kv_rank=11, query_rank=7, nope_head_dim=5, rope_head_dim=6, value_head_dim=9),
    "odd_full_queries": MLAConfig(5, kv_rank=7, nope_head_dim=3, rope_head_dim=2, value_head_dim=13),
}
GROUPED = {
    "grouped": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True),
    "odd": AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=6, qk_norm=True),
    # Heads of two coordinates are left out: the norm of a key near zero makes both gradients wrong by more than 5e-5.
    "one_kv_head": AttentionConfig(num_heads=5, num_kv_heads=1, head_dim=4, qk_norm=True),
}
YARN = {
    "no_yarn": None,
    "yarn": YarnConfig(4.0, 64, beta=8.0),
    "yarn_v3": YarnConfig(10.0, 64, beta=8.0, mscale=1.0, mscale_all_dim=1.0),
    "yarn_mscale": YarnConfig(10.0, 64, beta=8.0, mscale=0.707, mscale_all_dim=0.9),
}
FEED_FORWARD = {
    "dense": None,
    "moe": MoEConfig(7, d_expert=16, num_shared_experts=2, router=RouterConfig(top_k=3, route_scale=2.5)),
    "groups": MoEConfig(
        12, 10, num_shared_experts=1, router=RouterConfig(top_k=3, num_groups=4, top_groups=2, route_scale=2.5)
    ),
    "odd_groups": MoEConfig(
        9, 5, num_shared_experts=3, router=RouterConfig(top_k=4, num_groups=3, top_groups=2, normalize=False)
    ),
}
SHAPES = [(3, 33), (1, 33), (3, 1), (1, 1), (2, 16)]


def check_parity(cfg: TransformerConfig, batch: int, seq_len: int) -> None:
    """Logits to 1e-5 and every gradient, by name, to 1e-4."""
    theirs, model = their_model(cfg), Transformer(cfg)
    randomize(theirs)
    model.load_state_dict(our_tensors(theirs.state_dict(), cfg))
    token_ids = torch.randint(0, cfg.vocab_size, (batch, seq_len))
    logits = model(token_ids, torch.zeros_like(token_ids)).logits
    expected = theirs(input_ids=token_ids).logits
    assert relative_error(logits, expected) < 1e-5
    upstream = torch.randn_like(expected)
    logits.backward(upstream)
    expected.backward(upstream)
    reference = our_tensors(gradients(theirs), cfg)
    assert reference.keys() == dict(model.named_parameters()).keys() == gradients(model).keys()
    for key, grad in gradients(model).items():
        assert relative_error(grad, reference[key]) < 1e-4, key


def config(feed_forward: str, yarn: str, **attention: object) -> TransformerConfig:
    moe = FEED_FORWARD[feed_forward]
    return TransformerConfig(
        vocab_size=97,
        seq_len=33,
        num_layers=3,
        d_model=24,
        d_ff=40,
        num_dense_layers=0 if moe is None else 1,
        rotary=RotaryConfig(1000.0, YARN[yarn]),
        moe=moe,
        **attention,
    )


@pytest.mark.parametrize("yarn", YARN)
@pytest.mark.parametrize("feed_forward", FEED_FORWARD)
@pytest.mark.parametrize("name", MLA)
def test_logits_and_gradients_equal_deepseek_v3(name, feed_forward, yarn):
    check_parity(config(feed_forward, yarn, attention=None, mla=MLA[name]), 3, 33)


# Dots1 does not multiply the scores by the temperature of `mscale_all_dim`, as DeepSeek-V3 and we do.
@pytest.mark.parametrize("yarn", ["no_yarn", "yarn"])
@pytest.mark.parametrize("feed_forward", FEED_FORWARD)
@pytest.mark.parametrize("name", GROUPED)
def test_logits_and_gradients_equal_dots1(name, feed_forward, yarn):
    check_parity(config(feed_forward, yarn, attention=GROUPED[name]), 3, 33)


@pytest.mark.parametrize("num_dense_layers", [0, 2])
@pytest.mark.parametrize(("batch", "seq_len"), SHAPES)
def test_deepseek_v3_is_equal_in_every_shape_of_batch(batch, seq_len, num_dense_layers):
    cfg = config("groups", "yarn_mscale", attention=None, mla=MLA["odd"])
    check_parity(replace(cfg, num_dense_layers=num_dense_layers), batch, seq_len)


@pytest.mark.parametrize("num_dense_layers", [0, 2])
@pytest.mark.parametrize(("batch", "seq_len"), SHAPES)
def test_dots1_is_equal_in_every_shape_of_batch(batch, seq_len, num_dense_layers):
    cfg = config("groups", "yarn", attention=GROUPED["odd"])
    check_parity(replace(cfg, num_dense_layers=num_dense_layers), batch, seq_len)
