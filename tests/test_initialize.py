"""Start values: every parameter visited, keyed by name, shared between arms where shapes agree."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from models.initialize import initialize, seed_from_name
from models.over_encoding import OverEncodingConfig
from models.transformer import Transformer
from tests.tiny import ROUTERS, tiny_config


def fresh(cfg, seed: int = 0) -> dict[str, torch.Tensor]:
    model = Transformer(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed)
    return dict(model.named_parameters())


@pytest.mark.parametrize("kind", ["dense", "moe", "engram", "moe_engram", "moe_engram_mla", "over_encoding", *ROUTERS])
def test_every_parameter_gets_a_finite_value(kind):
    over_encoding = OverEncodingConfig(d_memory=64) if kind == "over_encoding" else None
    cfg = tiny_config(kind, over_encoding=over_encoding)
    if cfg.attention is not None:
        cfg = replace(cfg, attention=replace(cfg.attention, qk_norm=True))
    if cfg.engram is not None:
        cfg = replace(cfg, engram=replace(cfg.engram, use_bias=True))
    for name, parameter in fresh(cfg).items():
        assert bool(parameter.isfinite().all()), name
        if name.endswith(("norm", "norm.weight")):
            assert bool((parameter == 1).all()), name
        elif name.endswith(("taps", "bias")):
            assert bool((parameter == 0).all()), name
        else:
            assert parameter.std().item() == pytest.approx(cfg.init_std, rel=0.25), name


def test_the_embedding_may_start_wider():
    parameters = fresh(replace(tiny_config(), embedding_init_std=1.0))
    assert parameters["embedding.weight"].std().item() == pytest.approx(1.0, rel=0.1)
    assert parameters["head.weight"].std().item() == pytest.approx(tiny_config().init_std, rel=0.25)


def test_same_seed_same_values_other_seed_other_values():
    first, again, other = fresh(tiny_config()), fresh(tiny_config()), fresh(tiny_config(), seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert "head.weight" in differing and "blocks.1.moe.experts.gate_up" in differing


def test_arms_share_values_where_shapes_agree():
    base = tiny_config("moe")
    fewer = replace(tiny_config("moe_engram"), moe=replace(base.moe, num_experts=3))
    left, right = fresh(base), fresh(fewer)
    for name in left.keys() & right.keys():
        if left[name].shape == right[name].shape:
            assert torch.equal(left[name], right[name]), name
    for name in ("blocks.1.moe.experts.gate_up", "blocks.2.moe.experts.down"):
        assert left[name].shape[0] == 5 and right[name].shape[0] == 3
        assert torch.equal(left[name][:3], right[name])
        assert not torch.equal(left[name][0], left[name][1])


def test_a_parameter_without_a_rule_is_an_error():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mystery = nn.Parameter(torch.empty(3))

    with pytest.raises(RuntimeError, match="no rule for the parameter 'mystery'"):
        initialize(Odd(), seed=0, init_std=0.02)


def test_seeds_are_63_bit_and_differ_by_name_and_seed():
    seeds = {seed_from_name(seed, name) for seed in range(20) for name in ("a", "b", "1:a")}
    assert len(seeds) == 60 and all(0 <= seed < 2**63 for seed in seeds)
