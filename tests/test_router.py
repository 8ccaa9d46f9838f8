"""Router decisions and balance against plain Python loops."""

import math
from typing import Any

import pytest
import torch

from models.initialize import initialize
from models.moe import MoEConfig
from models.router import Router, RouterConfig, RouterKind, sequence_balance_loss
from tests.tiny import relative_error


def make(num_experts: int = 6, top_k: int = 2, d_model: int = 5, **settings: Any) -> Router:
    router = Router(RouterConfig(top_k=top_k, **settings), d_model, num_experts)
    initialize(router, seed=0, init_std=1.0)
    return router


def balance_loss(router: Router, x: torch.Tensor) -> torch.Tensor:
    (loss,) = router(x).aux_losses.values()
    return loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("route_scale", [1.0, 2.5])
def test_choice_and_gate_equal_a_loop(route_scale):
    router = make(route_scale=route_scale)
    router.expert_bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.3, -0.3, 0.1]))
    x = torch.randn(2, 7, 5)
    routing = router(x)
    counts = [0] * 6
    for t, token in enumerate(x.flatten(0, 1).tolist()):
        scores = [sigmoid(sum(a * b for a, b in zip(token, row, strict=True))) for row in router.weight.tolist()]
        biased = [s + b for s, b in zip(scores, router.expert_bias.tolist(), strict=True)]
        chosen = sorted(range(6), key=lambda i: -biased[i])[:2]
        assert sorted(routing.expert_ids[t].tolist()) == sorted(chosen)
        for slot, expert in enumerate(routing.expert_ids[t].tolist()):
            expected = route_scale * scores[expert] / sum(scores[i] for i in chosen)
            assert routing.weights[t, slot].item() == pytest.approx(expected, rel=1e-5)
            counts[expert] += 1
    assert routing.counts.tolist() == counts
    assert routing.counts.dtype == torch.int64


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "top_groups", "top_k"),
    [(8, 4, 2, 3), (8, 2, 1, 4), (9, 3, 2, 5), (12, 4, 3, 1), (6, 3, 1, 2)],  # also: all of the chosen groups' experts
)
def test_groups_equal_a_loop(num_experts, num_groups, top_groups, top_k):
    router = make(num_experts, top_k, num_groups=num_groups, top_groups=top_groups)
    router.expert_bias.normal_(0, 0.3)
    x = torch.randn(3, 11, 5)
    routing, limited = router(x), 0
    size = num_experts // num_groups
    for token, ids, gates in zip(x.flatten(0, 1), routing.expert_ids.tolist(), routing.weights, strict=True):
        scores = [sigmoid(float(token @ row)) for row in router.weight.detach()]
        biased = [s + b for s, b in zip(scores, router.expert_bias.tolist(), strict=True)]
        groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
        best = sorted(range(num_groups), key=lambda g: -groups[g])[:top_groups]
        allowed = [i for g in best for i in range(g * size, (g + 1) * size)]
        chosen = sorted(allowed, key=lambda i: -biased[i])[:top_k]
        assert sorted(ids) == sorted(chosen)
        limited += sorted(chosen) != sorted(sorted(range(num_experts), key=lambda i: -biased[i])[:top_k])
        total = sum(scores[i] for i in chosen)
        assert gates.tolist() == pytest.approx([scores[i] / total for i in ids], rel=1e-5)
    assert limited > 0


def test_without_normalisation_the_gate_is_the_score():
    router = make(normalize=False, route_scale=2.0)
    x = torch.randn(1, 4, 5)
    routing = router(x)
    scores = (x[0] @ router.weight.t()).sigmoid()
    assert relative_error(routing.weights, 2 * scores.gather(1, routing.expert_ids)) < 1e-6


def test_bias_changes_the_choice_but_never_the_gate_and_gets_no_gradient():
    router = make()
    x = torch.randn(1, 4, 5)
    router.expert_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]))
    routing = router(x)
    assert all(sorted(ids) == [0, 1] for ids in routing.expert_ids.tolist())
    scores = (x[0] @ router.weight.t()).sigmoid()[:, :2]
    expected = (scores / scores.sum(-1, keepdim=True)).gather(1, routing.expert_ids)
    assert torch.allclose(routing.weights, expected, atol=1e-6)
    routing.weights[:, 0].sum().backward()
    assert router.expert_bias.grad is None and not router.expert_bias.requires_grad
    assert "expert_bias" in router.state_dict()


def test_scores_stay_fp32_under_autocast():
    router = make(num_experts=32, top_k=3, d_model=64)
    x = torch.randn(2, 9, 64)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert cast.weights.dtype == torch.float32
    assert torch.equal(plain.expert_ids, cast.expert_ids) and torch.equal(plain.weights, cast.weights)


def brute_force_balance(scores: torch.Tensor, top_k: int) -> float:
    """V3 eqs 17 to 20, sequence by sequence."""
    total = 0.0
    batch, seq_len, num_experts = scores.shape
    for sequence in scores.tolist():
        for expert in range(num_experts):
            chosen = sum(expert in sorted(range(num_experts), key=lambda i: -row[i])[:top_k] for row in sequence)
            fraction = num_experts / (top_k * seq_len) * chosen
            share = sum(row[expert] / sum(row) for row in sequence) / seq_len
            total += fraction * share
    return total / batch


def test_balance_loss_equals_a_loop_over_sequences():
    scores = torch.rand(3, 8, 5)
    assert float(sequence_balance_loss(scores, 2)) == pytest.approx(brute_force_balance(scores, 2), rel=1e-5)


def test_balance_loss_ignores_the_bias_and_pushes_load_down():
    router = make(sequence_balance_coef=0.5)
    x = torch.randn(2, 6, 5)
    before = balance_loss(router, x)
    router.expert_bias.copy_(torch.tensor([9.0, 9.0, 0, 0, 0, 0]))
    assert torch.equal(balance_loss(router, x), before)
    scores = (x @ router.weight.t()).sigmoid()
    assert before.item() == pytest.approx(0.5 * brute_force_balance(scores.detach(), 2), rel=1e-5)
    even = torch.full((1, 6, 4), 0.5)
    assert float(sequence_balance_loss(even, 4)) == pytest.approx(1.0)
    crowded = torch.tensor([0.9, 0.8, 0.1, 0.1]).expand(1, 6, 4)
    assert float(sequence_balance_loss(crowded, 2)) > 1.5


def test_balance_coefficient_zero_switches_the_loss_off():
    loss = balance_loss(make(sequence_balance_coef=0.0), torch.randn(1, 3, 5))
    assert loss.item() == 0.0


def test_entropy_is_that_of_the_normalised_scores():
    router = make()
    x = torch.randn(1, 4, 5)
    scores = (x[0] @ router.weight.t()).sigmoid()
    expected = 0.0
    for row in scores.tolist():
        expected -= sum(s / sum(row) * math.log(s / sum(row)) for s in row) / 4
    entropy = router(x).entropy
    assert float(entropy) == pytest.approx(expected, rel=1e-5)
    assert not entropy.requires_grad


def test_bias_moves_against_the_load_once_by_gamma():
    router = make(num_experts=4, top_k=1, bias_update_rate=0.01)
    router.update_expert_bias(torch.tensor([10, 0, 5, 5]))
    assert router.expert_bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])


def test_bias_update_evens_out_a_skewed_load():
    router = make(num_experts=4, top_k=1, bias_update_rate=0.005)
    x = torch.randn(4, 64, 5) + torch.tensor([1.0, 0, 0, 0, 0])
    first = router(x).counts
    for _ in range(300):
        router.update_expert_bias(router(x).counts)
    assert router(x).counts.max() < first.max() and router(x).counts.max() <= 1.25 * 64


def test_bias_rests_where_every_expert_is_always_chosen():
    router = make(num_experts=3, top_k=3)
    routing = router(torch.randn(1, 5, 5))
    router.update_expert_bias(routing.counts + torch.tensor([5, 0, 0]))
    assert router.expert_bias.tolist() == [0.0, 0.0, 0.0]
    assert routing.counts.tolist() == [5, 5, 5]
    assert relative_error(routing.weights.sum(-1), torch.ones(5)) < 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"bias_update_rate": -1.0}, "bias_update_rate=-1.0 must not be negative"),
        ({"route_scale": 0.0}, "route_scale=0.0 must be positive"),
        ({"route_scale": float("nan")}, "route_scale=nan must be positive and finite"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate=nan must not be negative, and finite"),
        ({"capacity_factor": 0.0}, r"capacity_factor=0.0 must be at least 0.5"),
        (
            {"kind": RouterKind.switch, "top_k": 1, "capacity_factor": 1e-9},
            r"capacity_factor=1e-09 must be at least 0.5 .*nearest: 0.5",
        ),
        (
            {"kind": RouterKind.switch, "top_k": 1, "capacity_factor": float("nan")},
            r"capacity_factor=nan must be at least 0.5 and finite",
        ),
        ({"num_groups": 0}, "num_groups=0 must be at least 1"),
        ({"top_groups": 2}, r"top_groups=2 must be between 1 and 1 with model.moe.router.num_groups=1.*nearest: 1"),
        ({"num_groups": 4, "top_groups": 4}, r"top_groups=4 must be between 1 and 3.*limits nothing; nearest: 3"),
        ({"kind": RouterKind.gshard}, r"top_k=4 must be 2 with model.moe.router.kind=gshard; nearest: 2"),
        ({"kind": RouterKind.hash, "top_k": 2}, r"top_k=2 must be 1 with model.moe.router.kind=hash; nearest: 1"),
        ({"balance_coef": 0.5}, r"balance_coef=0.5 has no effect with model.moe.router.kind=sigmoid; .* default 0.01"),
        (
            {"kind": RouterKind.switch, "bias_update_rate": 0.01, "normalize": False},
            r"top_k=4 must be 1 .*router.bias_update_rate=0.01 has no effect.*router.normalize=False has no effect",
        ),
        ({"kind": RouterKind.softmax, "bias_update_rate": 0.01}, r"bias_update_rate=0.01 has no effect"),
        ({"kind": RouterKind.softmax, "capacity_factor": 1.0}, r"capacity_factor=1.0 has no effect"),
        ({"kind": RouterKind.switch, "top_k": 1, "normalize": False}, r"normalize=False has no effect"),
        ({"kind": RouterKind.hash, "top_k": 1, "balance_coef": 0.0}, r"balance_coef=0.0 has no effect"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig(**settings)


@pytest.mark.parametrize(
    ("num_experts", "groups", "nearest"),
    [(10, (4, 2), 8), (11, (4, 2), 12), (4, (4, 3), 8), (16, (8, 1), 32)],
)
def test_experts_that_do_not_fit_their_groups_are_refused(num_experts, groups, nearest):
    router = RouterConfig(num_groups=groups[0], top_groups=groups[1])
    with pytest.raises(ValueError, match=rf"num_experts={num_experts} must be a multiple .*nearest: {nearest}$"):
        MoEConfig(num_experts=num_experts, router=router)
    MoEConfig(num_experts=nearest, router=router)
