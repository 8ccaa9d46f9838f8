"""Experts and dispatch: the plain loop against Python, every fast kernel against the loop."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.expert_kernels import Bucket
from models.initialize import initialize
from models.moe import (
    ROW_MULTIPLE,
    Dispatched,
    ExpertKernel,
    Experts,
    LocalDispatcher,
    MoE,
    MoEConfig,
    make_buckets,
    padded_length,
)
from models.router import RouterConfig
from tests.tiny import CPU_KERNELS, relative_error

# (tokens, experts, top_k, d_model, d_expert): odd sizes, one token, more experts than tokens, K = E, one expert, and a
# size whose padded groups need more than one 64-row unit
SIZES = [(63, 7, 3, 24, 40), (1, 4, 2, 8, 8), (5, 11, 2, 16, 24), (9, 3, 3, 8, 16), (6, 1, 1, 8, 8), (300, 4, 2, 8, 16)]
ROUTES = ["random", "one_expert", "empty_experts"]


def choose(route: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """(T, K) distinct expert ids."""
    if route == "random":
        return torch.rand(tokens, experts).topk(top_k).indices
    if route == "one_expert":  # every token takes the same K experts, the last one first
        return torch.arange(experts - 1, experts - 1 - top_k, -1).expand(tokens, -1).contiguous()
    allowed = max(top_k, experts // 2)  # the upper half stays empty
    return torch.rand(tokens, allowed).topk(top_k).indices


def brute_force(experts: Experts, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k, expert in enumerate(expert_ids[t].tolist()):
            gate, up = (x[t] @ experts.gate_up[expert]).chunk(2)
            row = row + weights[t, k] * ((F.silu(gate) * up) @ experts.down[expert])
        rows.append(row)
    return torch.stack(rows)


def run(
    kernel: ExpertKernel | None, size: tuple[int, ...], route: str, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Output and every gradient of one kernel (None: brute force), on inputs that depend on size and route alone."""
    tokens, num_experts, top_k, d_model, d_expert = size
    torch.manual_seed(tokens)
    experts = Experts(num_experts, d_model, d_expert, kernel or ExpertKernel.loop)
    initialize(experts, seed=1, init_std=0.5)
    expert_ids = choose(route, tokens, num_experts, top_k)
    x = torch.randn(tokens, d_model).to(dtype).requires_grad_()
    weights = torch.rand(tokens, top_k).requires_grad_()
    upstream = torch.randn(tokens, d_model)
    if kernel is None:
        out = brute_force(experts, x, expert_ids, weights)
    else:
        dispatcher = LocalDispatcher(num_experts, padded=kernel is ExpertKernel.padded)
        dispatched = dispatcher.dispatch(x, expert_ids, weights)
        assert dispatched.counts.tolist() == torch.bincount(expert_ids.flatten(), minlength=num_experts).tolist()
        out = dispatcher.combine(experts(dispatched), dispatched)
    (out.float() * upstream).sum().backward()
    return {
        "output": out,
        "x": x.grad,
        "weights": weights.grad,
        "gate_up": experts.gate_up.grad,
        "down": experts.down.grad,
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", SIZES[:5])
def test_loop_equals_brute_force(size, route):
    actual, expected = run(ExpertKernel.loop, size, route), run(None, size, route)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [ExpertKernel.padded, ExpertKernel.grouped_mm])
def test_fast_kernels_equal_the_loop(kernel, size, route):
    actual, expected = run(kernel, size, route), run(ExpertKernel.loop, size, route)
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_bf16_kernels_are_as_close_as_bf16_allows(kernel):
    size = SIZES[0]
    actual, expected = run(kernel, size, "random", torch.bfloat16), run(ExpertKernel.loop, size, "random")
    for name in expected:
        assert relative_error(actual[name], expected[name]) < 1.5e-2, name


def test_padding_is_inert_even_where_token_zero_has_a_huge_gradient():
    experts = Experts(4, 8, 8, ExpertKernel.padded)
    initialize(experts, seed=0, init_std=0.5)
    dispatcher = LocalDispatcher(4, padded=True)
    x = torch.randn(5, 8, requires_grad=True)
    expert_ids = torch.tensor([[0]] + [[1]] * 4)
    dispatched = dispatcher.dispatch(x, expert_ids, torch.ones(5, 1))
    out = dispatcher.combine(experts(dispatched), dispatched)
    out.backward(torch.full_like(out, 1e6))
    assert torch.count_nonzero(experts.down.grad[2:]) == 0
    assert torch.count_nonzero(experts.gate_up.grad[2:]) == 0
    expected = Experts(4, 8, 8, ExpertKernel.loop)
    initialize(expected, seed=0, init_std=0.5)
    brute_force(expected, x.detach(), expert_ids, torch.ones(5, 1)).backward(torch.full_like(out, 1e6))
    assert relative_error(experts.down.grad, expected.down.grad) < 1e-5


def test_dispatch_groups_tokens_by_expert():
    x = torch.arange(8.0).view(4, 2)
    expert_ids = torch.tensor([[2, 0], [2, 1], [0, 2], [1, 2]])
    weights = torch.arange(8.0).view(4, 2)
    flat = LocalDispatcher(3, padded=False).dispatch(x, expert_ids, weights)
    assert flat.token_of_row.tolist() == [0, 2, 1, 3, 0, 1, 2, 3]
    assert torch.equal(flat.tokens, x[flat.token_of_row])
    assert flat.weights[:, 0].tolist() == [1, 4, 3, 6, 0, 2, 5, 7]
    padded = LocalDispatcher(3, padded=True).dispatch(x, expert_ids, weights)
    assert padded.order is not None and padded.order.tolist() == [2, 0, 1]  # 4, 2 and 2 rows
    assert padded.buckets == [Bucket(0, 1, ROW_MULTIPLE), Bucket(1, 2, ROW_MULTIPLE), Bucket(2, 3, ROW_MULTIPLE)]
    rows, row_weights = padded.tokens.view(3, ROW_MULTIPLE, 2), padded.weights.view(3, ROW_MULTIPLE)
    assert torch.equal(rows[0, :4], x) and torch.equal(rows[2, :2], x[[1, 3]])
    assert row_weights[1].tolist() == [1, 4] + [0] * (ROW_MULTIPLE - 2)


def test_buckets_have_few_shapes_and_leave_out_empty_experts():
    assert make_buckets([2000, 1100, 500, 400, 330, 129, 128, 64, 60, 1] + [0] * 20) == [
        Bucket(0, 1, 2048), Bucket(1, 2, 1152), Bucket(2, 4, 512), Bucket(4, 8, 352), Bucket(8, 12, 64),
    ]  # fmt: skip
    assert make_buckets([3, 2, 1]) == [Bucket(0, 1, 32), Bucket(1, 2, 32), Bucket(2, 3, 32)]
    assert make_buckets([0, 0]) == []
    lengths = {padded_length(count) for count in range(1, 4097)}
    assert len(lengths) == 16 + 3 * 8
    assert all(count <= padded_length(count) <= max(count + 31, 1.125 * count) for count in range(1, 4097))


def make_moe(kernel: ExpertKernel, shared_width: int = 12, num_experts: int = 6) -> MoE:
    cfg = MoEConfig(num_experts=num_experts, d_expert=16, expert_kernel=kernel, router=RouterConfig(top_k=2))
    moe = MoE(cfg, d_model=24, shared_width=shared_width)
    initialize(moe, seed=0, init_std=0.4)
    return moe


@pytest.mark.parametrize("shared_width", [0, 12])
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_layer_is_shared_plus_weighted_routed_experts(kernel, shared_width):
    moe = make_moe(kernel, shared_width)
    x = torch.randn(3, 7, 24)
    update, stats = moe(x)
    routing = moe.router(x)
    expected = brute_force(moe.experts, x.flatten(0, 1), routing.expert_ids, routing.weights).view_as(x)
    if shared_width:
        gate, up = (x @ moe.shared_expert.gate_up.weight.t()).chunk(2, -1)
        expected = expected + (F.silu(gate) * up) @ moe.shared_expert.down.weight.t()
    else:
        assert moe.shared_expert is None
    assert relative_error(update, expected) < 1e-5
    assert int(stats.counts.sum()) == 3 * 7 * 2


@pytest.mark.parametrize("kernel", [ExpertKernel.padded, ExpertKernel.grouped_mm])
def test_layer_gradients_equal_the_loop_under_autocast(kernel):
    results = []
    for choice in (kernel, ExpertKernel.loop):
        torch.manual_seed(0)
        moe = make_moe(choice)
        x = torch.randn(2, 33, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            update, _ = moe(x)
        assert update.dtype == torch.bfloat16
        update.float().square().sum().backward()
        results.append({"x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}})
    for name, expected in results[1].items():
        assert results[0][name].dtype == torch.float32
        assert relative_error(results[0][name], expected) < 2e-2, name


def test_one_expert_is_a_plain_feed_forward():
    cfg = MoEConfig(num_experts=1, d_expert=16, router=RouterConfig(top_k=1))
    moe = MoE(cfg, d_model=24, shared_width=0)
    initialize(moe, seed=0, init_std=0.4)
    x = torch.randn(2, 5, 24)
    gate, up = (x @ moe.experts.gate_up[0]).chunk(2, -1)
    assert relative_error(moe(x)[0], (F.silu(gate) * up) @ moe.experts.down[0]) < 1e-5


def test_equal_runs_are_equal_to_the_bit():
    gradients = []
    for _ in range(2):
        torch.manual_seed(0)
        moe = make_moe(ExpertKernel.padded)
        moe(torch.randn(2, 50, 24))[0].square().sum().backward()
        gradients.append([p.grad for p in moe.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_foreign_dispatcher_may_stand_in():
    class Recording(LocalDispatcher):
        calls = 0

        def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
            self.calls += 1
            return super().dispatch(x, expert_ids, weights)

    dispatcher = Recording(6, padded=False)
    own = make_moe(ExpertKernel.padded)
    foreign = MoE(MoEConfig(6, 16, router=RouterConfig(top_k=2)), 24, 12, dispatcher)
    foreign.load_state_dict(own.state_dict())
    x = torch.randn(2, 5, 24)
    assert relative_error(foreign(x)[0], own(x)[0]) < 1e-6
    assert dispatcher.calls == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 3}, r"num_experts=3 must be at least model.moe.router.top_k=4; nearest: 4"),
        ({"d_expert": 0}, r"d_expert=0 must be at least 1"),
        ({"num_shared_experts": -1}, r"num_shared_experts=-1 must not be negative"),
        ({"shared_widths": [8, -8]}, r"must hold no negative width"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**settings)


def test_grouped_mm_names_the_width_it_cannot_align():
    with pytest.raises(ValueError, match=r"moe.d_expert=12 must be a multiple of 8.*nearest: 16.*padded"):
        Experts(2, 8, 12, ExpertKernel.grouped_mm)
