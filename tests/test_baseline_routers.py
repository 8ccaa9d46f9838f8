"""Softmax, GShard, Switch and Hash against float64 loops over sequences, tokens and experts, gradients included."""

import math
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.baseline_routers import (
    CapacityRouter,
    HashRouter,
    SoftmaxRouter,
    expert_balance_loss,
    expert_capacity,
    make_router,
    places,
)
from models.initialize import initialize
from models.moe import ExpertKernel, MoE, MoEConfig
from models.router import RouterConfig, RouterKind
from tests.tiny import CPU_KERNELS, ROUTERS, TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model

VOCAB = 37
SOFTMAX, GSHARD, SWITCH, HASH = RouterKind.softmax, RouterKind.gshard, RouterKind.switch, RouterKind.hash
# (kind, batch, seq_len, experts, top_k, capacity_factor): odd sizes, one token, E = K, tight and ample capacities
CASES = [
    (SOFTMAX, 3, 7, 6, 3, None),
    (SOFTMAX, 1, 1, 5, 2, None),
    (SOFTMAX, 2, 5, 3, 3, None),
    (GSHARD, 3, 11, 5, 2, 1.0),
    (GSHARD, 2, 7, 4, 2, 0.5),
    (GSHARD, 2, 9, 3, 2, 1.5),
    (GSHARD, 2, 5, 2, 2, 0.75),
    (GSHARD, 1, 1, 4, 2, 1.0),
    (SWITCH, 3, 11, 5, 1, 1.0),
    (SWITCH, 2, 8, 4, 1, 0.5),
    (SWITCH, 2, 9, 4, 1, 4.0),
    (SWITCH, 2, 5, 1, 1, 0.5),
    (SWITCH, 1, 1, 4, 1, 1.0),
    (HASH, 3, 11, 5, 1, None),
    (HASH, 2, 5, 1, 1, None),
    (HASH, 1, 1, 4, 1, None),
]
ROUTES = ["random", "one_expert"]
Choice = tuple[int, Tensor]  # an expert and its gate value


class Routed(NamedTuple):
    """What a loop decides for one batch."""

    choices: list[list[list[Choice]]]  # of every sequence and token; dropped ones are left out
    loss: Tensor | None
    counts: list[int]
    num_dropped: int


def make_moe(case: tuple, kernel: ExpertKernel, route: str) -> MoE:
    kind, _, _, num_experts, top_k, factor = case
    router = RouterConfig(kind, top_k)
    if kind is not HASH:
        router = replace(router, balance_coef=0.3)
    if factor is not None:
        router = replace(router, capacity_factor=factor)
    cfg = MoEConfig(num_experts, d_expert=24, expert_kernel=kernel, router=router)
    moe = MoE(cfg, d_model=16, shared_width=8, vocab_size=VOCAB, layer=3)
    initialize(moe, seed=0, init_std=0.4)
    if route == "one_expert" and kind is not HASH:
        with torch.no_grad():
            moe.router.weight *= 0.25
            moe.router.weight[num_experts - 1, 0] += 1.0  # see `inputs`
    return moe


def inputs(case: tuple, route: str) -> tuple[Tensor, Tensor]:
    """x (B, S, D) and token ids (B, S)."""
    torch.manual_seed(1)
    batch, seq_len = case[1:3]
    x, token_ids = torch.randn(batch, seq_len, 16), torch.randint(0, VOCAB, (batch, seq_len))
    if route == "one_expert":
        x[..., 0] = 3.0
        token_ids[:] = 5
    return x, token_ids


def best(scores: Tensor, number: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -float(scores[i].detach()))[:number]


def softmax_by_loop(cfg: RouterConfig, scores: Tensor) -> Routed:
    """DeepSeekMoE eqs 9 to 14; scores (B, S, E)."""
    num_experts, num_tokens = scores.shape[2], scores.shape[0] * scores.shape[1]
    chosen = [[best(token, cfg.top_k) for token in sequence] for sequence in scores]
    flat = [i for sequence in chosen for token in sequence for i in token]
    loss = scores.new_zeros(())
    for i in range(num_experts):
        f = num_experts / (cfg.top_k * num_tokens) * flat.count(i)
        p = sum(token[i] for sequence in scores for token in sequence) / num_tokens
        loss = loss + cfg.balance_coef * f * p
    choices = [
        [[(i, scores[b, s, i]) for i in token] for s, token in enumerate(sequence)] for b, sequence in enumerate(chosen)
    ]
    return Routed(choices, loss, [flat.count(i) for i in range(num_experts)], 0)


def gshard_by_loop(cfg: RouterConfig, scores: Tensor) -> Routed:
    """Algorithm 1 of GShard line by line, with the second expert always used; the loss times E^2."""
    batch, seq_len, num_experts = scores.shape
    capacity = math.ceil(Fraction(cfg.capacity_factor) * 2 * seq_len / num_experts)
    choices, counts, loss, dropped = [], [0] * num_experts, scores.new_zeros(()), 0
    for sequence in scores:
        of_token: list[list[Choice]] = [[] for _ in range(seq_len)]
        c = [0] * num_experts
        m = [sum(token[e] for token in sequence) / seq_len for e in range(num_experts)]
        for s, g in enumerate(sequence):
            e1, e2 = best(g, 2)
            if c[e1] < capacity:
                of_token[s].append((e1, g[e1] / (g[e1] + g[e2])))
            else:
                dropped += 1
            c[e1] += 1
            counts[e1] += 1
        l_aux = sum(c[e] / seq_len * m[e] for e in range(num_experts)) / num_experts
        loss = loss + cfg.balance_coef * num_experts**2 * l_aux / batch
        for s, g in enumerate(sequence):
            e1, e2 = best(g, 2)
            if c[e2] < capacity:
                of_token[s].append((e2, g[e2] / (g[e1] + g[e2])))
            else:
                dropped += 1
            c[e2] += 1
            counts[e2] += 1
        choices.append(of_token)
    return Routed(choices, loss, counts, dropped)


def switch_by_loop(cfg: RouterConfig, scores: Tensor) -> Routed:
    """Switch eqs 1 to 6; a batch of the paper is one sequence."""
    batch, seq_len, num_experts = scores.shape
    capacity = math.ceil(Fraction(cfg.capacity_factor) * seq_len / num_experts)
    choices, counts, loss, dropped = [], [0] * num_experts, scores.new_zeros(()), 0
    for sequence in scores:
        of_token: list[list[Choice]] = []
        taken = [0] * num_experts
        for token in sequence:
            (i,) = best(token, 1)
            of_token.append([(i, token[i])] if taken[i] < capacity else [])
            dropped += taken[i] >= capacity
            taken[i] += 1
        for i in range(num_experts):
            p = sum(token[i] for token in sequence) / seq_len
            loss = loss + cfg.balance_coef * num_experts * taken[i] / seq_len * p / batch
            counts[i] += taken[i]
        choices.append(of_token)
    return Routed(choices, loss, counts, dropped)


def hash_by_loop(router: HashRouter, token_ids: Tensor) -> Routed:
    one = torch.ones((), dtype=torch.float64)
    experts = [[int(router.expert_of_token[i]) for i in sequence] for sequence in token_ids.tolist()]
    flat = [i for sequence in experts for i in sequence]
    choices = [[[(i, one)] for i in sequence] for sequence in experts]
    return Routed(choices, None, [flat.count(i) for i in range(router.num_experts)], 0)


def layer_by_loop(moe: MoE, leaves: dict[str, Tensor], token_ids: Tensor) -> tuple[Tensor, Routed]:
    """Output of the layer in float64, token by token and expert by expert."""
    x = leaves["x"]
    if isinstance(moe.router, HashRouter):
        routed = hash_by_loop(moe.router, token_ids)
    else:
        logits = torch.stack([torch.stack([leaves["router.weight"] @ token for token in row]) for row in x])
        scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
        loops = {SOFTMAX: softmax_by_loop, GSHARD: gshard_by_loop, SWITCH: switch_by_loop}
        routed = loops[moe.router.cfg.kind](moe.router.cfg, scores)
    rows = []
    for b, sequence in enumerate(routed.choices):
        for s, choices in enumerate(sequence):
            gate, up = (leaves["shared_expert.gate_up.weight"] @ x[b, s]).chunk(2)
            row = leaves["shared_expert.down.weight"] @ (F.silu(gate) * up)
            for expert, weight in choices:
                gate, up = (x[b, s] @ leaves["experts.gate_up"][expert]).chunk(2)
                row = row + weight * ((F.silu(gate) * up) @ leaves["experts.down"][expert])
            rows.append(row)
    return torch.stack(rows).view_as(x), routed


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_layer_equals_a_loop(kernel, case, route):
    moe = make_moe(case, kernel, route)
    x, token_ids = inputs(case, route)
    exact = {"x": x, **dict(moe.named_parameters())}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in exact.items()}
    expected, routed = layer_by_loop(moe, exact, token_ids)
    x.requires_grad_()
    update, stats = moe(x, token_ids)
    assert relative_error(update, expected) < 1e-5
    assert stats.counts.tolist() == routed.counts and sum(routed.counts) == token_ids.numel() * case[4]
    if route == "one_expert":
        assert max(routed.counts) == token_ids.numel()

    upstream = torch.randn(update.shape)
    objective, reference = (update * upstream).sum(), (expected * upstream.double()).sum()
    if routed.loss is None:
        assert stats.aux_losses == {} and stats.entropy is None
    else:
        (loss,) = stats.aux_losses.values()
        assert relative_error(loss, routed.loss) < 1e-5
        objective, reference = objective + loss, reference + routed.loss
    if case[0] in (GSHARD, SWITCH):
        assert float(stats.dropped) == pytest.approx(routed.num_dropped / sum(routed.counts), rel=1e-6)
    else:
        assert stats.dropped is None and routed.num_dropped == 0
    objective.backward()
    reference.backward()
    for name, tensor in {"x": x, **dict(moe.named_parameters())}.items():
        if name == "router.weight" and case[3] == 1:  # a softmax over one expert is constant
            assert not tensor.grad.any() and float(exact[name].grad.norm()) < 1e-12
        else:
            assert relative_error(tensor.grad, exact[name].grad) < 1e-5, name


def test_the_cases_meet_every_situation():
    """Drops of none, some and nearly all choices, and experts that are full to the last place."""
    parts = {}
    for case in CASES:
        if case[0] in (GSHARD, SWITCH):
            for route in ROUTES:
                moe = make_moe(case, ExpertKernel.loop, route)
                parts[case, route] = float(moe(*inputs(case, route))[1].dropped)
    assert {case[0] for (case, _), part in parts.items() if part == 0} == {GSHARD, SWITCH}
    assert {case[0] for (case, _), part in parts.items() if 0 < part < 0.4} == {GSHARD, SWITCH}
    assert max(parts.values()) > 0.7


def routed_by(cfg: RouterConfig, logits: list[list[float]]) -> tuple[list[list[int]], list[list[float]], float]:
    """Expert ids, gate values and dropped part for one sequence with these logits (S, E)."""
    x = torch.tensor([logits])
    router = CapacityRouter(cfg, x.shape[2], x.shape[2])
    with torch.no_grad():
        router.weight.copy_(torch.eye(x.shape[2]))
    routing = router(x)
    return routing.expert_ids.tolist(), routing.weights.tolist(), float(routing.dropped)


def test_switch_fills_an_expert_to_the_last_place_and_no_further():
    cfg = RouterConfig(SWITCH, top_k=1, capacity_factor=1.0)
    first, second = [math.log(3.0), 0.0], [0.0, math.log(3.0)]
    ids, weights, dropped = routed_by(cfg, [first, second, first, second])  # two places each, all taken
    assert ids == [[0], [1], [0], [1]] and dropped == 0.0
    assert [w for (w,) in weights] == pytest.approx([0.75] * 4)
    ids, weights, dropped = routed_by(cfg, [first, first, first, second])
    assert [w for (w,) in weights] == pytest.approx([0.75, 0.75, 0.0, 0.75]) and dropped == 0.25


def test_gshard_serves_all_first_choices_before_any_second():
    """Two tokens, one place per expert: a later token's first choice takes the place of an earlier second choice."""
    cfg = RouterConfig(GSHARD, top_k=2, capacity_factor=0.75)
    high, low = math.log(6.0), math.log(3.0)
    ids, weights, dropped = routed_by(cfg, [[high, low, 0.0], [0.0, high, low]])
    assert ids == [[0, 1], [1, 2]]
    assert weights[0] == pytest.approx([2 / 3, 0.0])  # not raised to 1 for the lost one
    assert weights[1] == pytest.approx([2 / 3, 1 / 3]) and dropped == 0.25
    ids, weights, dropped = routed_by(cfg, [[high, low, 0.0], [low, 0.0, high]])
    assert ids == [[0, 1], [2, 0]]
    assert weights[0] == pytest.approx([2 / 3, 1 / 3])
    assert weights[1] == pytest.approx([2 / 3, 0.0]) and dropped == 0.25


def test_places_are_queues_by_priority():
    expert_ids = torch.tensor([[[0, 1], [0, 2], [1, 0], [0, 1]], [[2, 1], [1, 2], [2, 0], [2, 1]]])
    assert places(expert_ids, 3).tolist() == [
        [[0, 1], [1, 0], [0, 3], [2, 2]],
        [[0, 1], [0, 3], [1, 0], [2, 2]],
    ]


@pytest.mark.parametrize(
    ("factor", "seq_len", "top_k", "num_experts", "capacity"),
    [(1.0, 8, 1, 4, 2), (1.25, 8, 1, 4, 3), (1.0, 9, 2, 4, 5), (0.5, 1, 1, 64, 1), (1.0, 2048, 2, 16, 256)],
)
def test_capacity_is_an_even_share_times_the_factor_rounded_up(factor, seq_len, top_k, num_experts, capacity):
    assert expert_capacity(factor, seq_len, top_k, num_experts) == capacity


def test_capacity_and_loss_of_a_sequence_do_not_depend_on_the_others():
    for kind, top_k in ((GSHARD, 2), (SWITCH, 1)):
        router = make_router(RouterConfig(kind, top_k, capacity_factor=0.75), 16, 4)
        initialize(router, seed=0, init_std=1.0)
        x = torch.randn(3, 8, 16)
        together, alone = router(x), [router(row[None]) for row in x]
        assert torch.equal(together.weights, torch.cat([routing.weights for routing in alone]))
        losses = torch.stack([routing.aux_losses["load_balance"] for routing in alone])
        assert relative_error(together.aux_losses["load_balance"], losses.mean()) < 1e-6


def test_an_even_router_has_balance_loss_one():
    scores = torch.full((2, 6, 3), 1 / 3)
    for expert_ids in (
        torch.tensor([0, 1, 2, 0, 1, 2]).view(1, 6, 1),
        torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)[None],
    ):
        assert float(expert_balance_loss(scores, expert_ids.expand(2, -1, -1))) == pytest.approx(1.0)
    crowded = torch.tensor([0.8, 0.1, 0.1]).expand(2, 6, 3)
    assert float(expert_balance_loss(crowded, torch.zeros(2, 6, 1, dtype=torch.int64))) == pytest.approx(2.4)


def test_entropy_is_that_of_the_probabilities():
    for router in (SoftmaxRouter(RouterConfig(SOFTMAX, 2), 5, 4), CapacityRouter(RouterConfig(SWITCH, 1), 5, 4)):
        initialize(router, seed=0, init_std=1.0)
        x = torch.randn(2, 3, 5)
        scores = (x.flatten(0, 1) @ router.weight.t()).softmax(-1).tolist()
        expected = -sum(p * math.log(p) for row in scores for p in row) / len(scores)
        entropy = router(x).entropy
        assert float(entropy) == pytest.approx(expected, rel=1e-5) and not entropy.requires_grad


@pytest.mark.parametrize("kind", [SOFTMAX, GSHARD, SWITCH])
def test_scores_stay_fp32_under_autocast(kind):
    router = make_router(RouterConfig(kind, {SOFTMAX: 3, GSHARD: 2, SWITCH: 1}[kind]), 64, 32)
    initialize(router, seed=0, init_std=1.0)
    x = torch.randn(2, 9, 64)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert cast.weights.dtype == torch.float32
    assert torch.equal(plain.expert_ids, cast.expert_ids) and torch.equal(plain.weights, cast.weights)


def test_hash_is_balanced_fixed_and_another_in_every_layer():
    tables = [HashRouter(vocab_size=103, num_experts=8, layer=layer).expert_of_token for layer in range(4)]
    for table in tables:
        assert sorted(torch.bincount(table, minlength=8).tolist()) == [12] + [13] * 7
    assert torch.equal(tables[1], HashRouter(103, 8, 1).expert_of_token)
    assert len({tuple(table.tolist()) for table in tables}) == 4
    together = int((tables[0][:, None] == tables[0]).logical_and(tables[1][:, None] == tables[1]).sum()) - 103
    assert together < 0.25 * (int((tables[0][:, None] == tables[0]).sum()) - 103)  # who shares, does not share again


def test_hash_has_no_parameters_and_no_state():
    router = HashRouter(vocab_size=10, num_experts=3, layer=0)
    assert list(router.parameters()) == [] and router.state_dict() == {}
    with torch.device("meta"):
        assert make_router(RouterConfig(HASH, 1), 16, 3, 10, 0).num_experts == 3


def changed_outputs(capacity: dict[str, float], kind: str, document: bool) -> tuple[Tensor, int]:
    """Largest change of each position's logits (S,) when the token at the returned position changes."""
    router = replace(ROUTERS[kind], **capacity)
    cfg = tiny_config(kind, num_layers=2, init_std=0.5)
    cfg = replace(cfg, moe=replace(cfg.moe, num_shared_experts=0, router=router))
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, batch=1, boundary=9)
    if not document:
        document_ids = torch.zeros_like(document_ids)
    position, largest = 8 if document else 15, torch.zeros(cfg.seq_len)
    with torch.no_grad():
        before = model(token_ids, document_ids, memory.rows(token_ids, document_ids)).logits
        for other in range(cfg.vocab_size):
            changed = token_ids.clone()
            changed[:, position] = other
            logits = model(changed, document_ids, memory.rows(changed, document_ids)).logits
            largest = torch.maximum(largest, (logits - before).abs().amax(-1)[0])
    return largest, position


@pytest.mark.parametrize(
    ("kind", "factor", "is_causal", "is_separate"),
    [
        ("moe_switch", 5.0, True, True),
        ("moe_gshard", 2.5, True, True),
        ("moe_switch", 0.5, True, False),
        ("moe_gshard", 0.5, False, False),
    ],
)
def test_what_a_capacity_reads(kind, factor, is_causal, is_separate):
    """Ample room: causal and separate by documents. With drops Switch stays causal within the row, GShard does not."""
    largest, position = changed_outputs({"capacity_factor": factor}, kind, document=False)
    assert (float(largest[:position].max()) < 1e-5) == is_causal and float(largest[position]) > 1e-3
    largest, position = changed_outputs({"capacity_factor": factor}, kind, document=True)
    assert (float(largest[position + 1 :].max()) < 1e-5) == is_separate and float(largest[position]) > 1e-3
