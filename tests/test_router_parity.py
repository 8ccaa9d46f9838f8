"""Routers and expert layers against Hugging Face's: DeepSeek-V3, DeepSeek-V2 (softmax), Switch, NLLB (GShard's)."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV2Config, DeepseekV3Config, NllbMoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
    load_balancing_loss_func,
)

from models.baseline_routers import CapacityRouter, expert_capacity
from models.initialize import initialize
from models.moe import MoE, MoEConfig
from models.router import RouterConfig, RouterKind
from tests.tiny import relative_error

D_MODEL, D_EXPERT = 24, 16


def make_moe(num_experts: int, router: RouterConfig) -> MoE:
    moe = MoE(MoEConfig(num_experts, D_EXPERT, num_shared_experts=2, router=router), D_MODEL, 2 * D_EXPERT)
    initialize(moe, seed=0, init_std=0.3)
    return moe


@torch.no_grad()
def copy_into(moe: MoE, theirs: nn.Module) -> None:
    """Our weights under Hugging Face's names and in its layouts; fails if any of theirs is left over."""
    gate, up = moe.shared_expert.gate_up.weight.chunk(2)
    state = {
        "gate.weight": moe.router.weight,
        "experts.gate_up_proj": moe.experts.gate_up.transpose(1, 2),
        "experts.down_proj": moe.experts.down.transpose(1, 2),
        "shared_experts.gate_proj.weight": gate,
        "shared_experts.up_proj.weight": up,
        "shared_experts.down_proj.weight": moe.shared_expert.down.weight,
    }
    if moe.router.cfg.kind is RouterKind.sigmoid:
        state["gate.e_score_correction_bias"] = moe.router.expert_bias
    theirs.load_state_dict(state, strict=True)


def compare(moe: MoE, theirs: nn.Module) -> None:
    """Output and every gradient of one layer."""
    copy_into(moe, theirs)
    x = torch.randn(3, 7, D_MODEL, requires_grad=True)
    same_x = x.detach().clone().requires_grad_()
    update, expected = moe(x)[0], theirs(same_x)
    assert relative_error(update, expected) < 1e-5
    upstream = torch.randn_like(expected)
    (update * upstream).sum().backward()
    (expected * upstream).sum().backward()
    gate, up = theirs.shared_experts.gate_proj.weight.grad, theirs.shared_experts.up_proj.weight.grad
    for name, gradient, reference in (
        ("x", x.grad, same_x.grad),
        ("router", moe.router.weight.grad, theirs.gate.weight.grad),
        ("gate_up", moe.experts.gate_up.grad.transpose(1, 2), theirs.experts.gate_up_proj.grad),
        ("down", moe.experts.down.grad.transpose(1, 2), theirs.experts.down_proj.grad),
        ("shared gate_up", moe.shared_expert.gate_up.weight.grad, torch.cat([gate, up])),
        ("shared down", moe.shared_expert.down.weight.grad, theirs.shared_experts.down_proj.weight.grad),
    ):
        assert relative_error(gradient, reference) < 1e-5, name


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_groups", "top_groups"),
    [(16, 4, 4, 2), (12, 3, 3, 2), (8, 4, 4, 2), (6, 2, 3, 1), (9, 3, 1, 1), (5, 5, 1, 1)],
)
def test_deepseek_v3_layer(num_experts, top_k, num_groups, top_groups, normalize):
    router = RouterConfig(
        top_k=top_k, num_groups=num_groups, top_groups=top_groups, route_scale=2.5, normalize=normalize
    )
    moe = make_moe(num_experts, router)
    moe.router.expert_bias.normal_(0, 0.2)
    config = DeepseekV3Config(
        hidden_size=D_MODEL,
        moe_intermediate_size=D_EXPERT,
        n_routed_experts=num_experts,
        n_shared_experts=2,
        num_experts_per_tok=top_k,
        n_group=num_groups,
        topk_group=top_groups,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    compare(moe, DeepseekV3MoE(config))


@pytest.mark.parametrize(("num_experts", "top_k"), [(9, 3), (4, 4), (7, 1)])
def test_softmax_layer_is_deepseek_v2s(num_experts, top_k):
    config = DeepseekV2Config(
        hidden_size=D_MODEL,
        num_attention_heads=4,
        moe_intermediate_size=D_EXPERT,
        n_routed_experts=num_experts,
        n_shared_experts=2,
        num_experts_per_tok=top_k,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        experts_implementation="eager",
    )
    compare(make_moe(num_experts, RouterConfig(RouterKind.softmax, top_k)), DeepseekV2Moe(config))


def combine_weights(router: CapacityRouter, x: Tensor) -> tuple[Tensor, Tensor]:
    """Our gate values spread over the experts, (B, S, E), and the balance loss."""
    routing = router(x)
    spread = torch.zeros(len(routing.weights), router.num_experts).scatter(1, routing.expert_ids, routing.weights)
    return spread.view(*x.shape[:2], -1), routing.aux_losses["load_balance"]


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 4.0])
def test_switch_router(capacity_factor):
    router = CapacityRouter(RouterConfig(RouterKind.switch, 1, balance_coef=1.0, capacity_factor=capacity_factor), 8, 4)
    initialize(router, seed=0, init_std=1.0)
    capacity = expert_capacity(capacity_factor, 13, 1, 4)
    theirs = SwitchTransformersTop1Router(
        SwitchTransformersConfig(hidden_size=8, num_experts=4, expert_capacity=capacity, router_jitter_noise=0.0)
    )
    theirs.classifier.weight = router.weight
    x = torch.randn(3, 13, 8)
    weights, loss = combine_weights(router, x)
    mask, probability, logits = theirs(x)
    assert relative_error(weights, mask * probability) < 1e-6
    assert int(mask.sum()) < 39 or capacity_factor == 4.0
    expected = load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    assert relative_error(loss, expected) < 1e-6


@pytest.mark.parametrize(("num_tokens", "capacity_factor"), [(3, 1.0), (13, 0.5), (13, 1.0), (24, 2.5)])
def test_gshard_router_is_nllbs_top_2(num_tokens, capacity_factor):
    """With its policy "all": the second expert is always asked."""
    router = CapacityRouter(RouterConfig(RouterKind.gshard, 2, balance_coef=1.0, capacity_factor=capacity_factor), 8, 5)
    initialize(router, seed=0, init_std=1.0)
    theirs = NllbMoeTop2Router(
        NllbMoeConfig(
            hidden_size=8,
            num_experts=5,
            expert_capacity=expert_capacity(capacity_factor, num_tokens, 2, 5),
            router_bias=False,
            second_expert_policy="all",
            normalize_router_prob_before_dropping=True,
            batch_prioritized_routing=False,
            moe_eval_capacity_token_fraction=-1.0,
        )
    )
    theirs.classifier.weight = router.weight
    x = torch.randn(1, num_tokens, 8)
    weights, loss = combine_weights(router, x)
    _, expected, logits = theirs(x[0])
    assert relative_error(weights[0], expected) < 1e-6
    assert (int((weights > 0).sum()) < 2 * num_tokens) == (num_tokens == 13)  # some are dropped
    assert relative_error(loss, load_balancing_loss_func(logits.softmax(-1)[None], logits.argmax(-1)[None])) < 1e-6
