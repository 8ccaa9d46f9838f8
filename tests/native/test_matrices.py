"""The matrix kernels in C against plain torch: outputs and every gradient, odd sizes, idle experts, one token."""

import ctypes
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import native
from models.expert_kernels import swiglu_loop, swiglu_native
from models.feed_forward import SwiGLU
from models.initialize import initialize
from models.loss import IGNORE_INDEX, _NativeLinearCrossEntropy, cross_entropy
from models.moe import LocalDispatcher, MoE, MoEConfig
from models.router import RouterConfig, RouterKind
from models.transformer import ActivationCheckpointing
from tests.tiny import VOCAB_SIZE, TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("calls")  # on every form of the kernels

# One rounding to bf16 is at most 2^-9 of a value; the kernels round the hidden layer, probabilities and gradients once.
BF16 = 8e-3


def experts_case(tokens: int, top_k: int, experts: int, width: int, hidden: int) -> dict[str, Tensor]:
    """Inputs, rounded to bf16 where the kernel rounds them; the last expert gets no token if there is a choice."""
    torch.manual_seed(0)
    chosen = max(top_k, experts - 1)
    ids = torch.stack([torch.randperm(chosen)[:top_k] for _ in range(tokens)])
    return {
        "x": torch.randn(tokens, width).bfloat16(),
        "ids": ids,
        "weights": torch.rand(tokens, top_k),
        "gate_up": (torch.randn(experts, width, 2 * hidden) * width**-0.5).bfloat16().float(),
        "down": (torch.randn(experts, hidden, width) * hidden**-0.5).bfloat16().float(),
    }


def by_loop(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    dispatcher = LocalDispatcher(len(gate_up), padded=False)
    sent = dispatcher.dispatch(x, ids, weights)
    return dispatcher.combine(swiglu_loop(sent.tokens, sent.weights, sent.counts, gate_up, down), sent)


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 8, 8), (37, 2, 7, 40, 24), (150, 3, 3, 33, 5), (300, 2, 2, 64, 32), (70, 1, 3, 24, 150),
        (1300, 2, 2, 33, 5), (1056, 1, 1, 32, 24),
    ],
)  # fmt: skip
def test_experts(sizes):
    case = experts_case(*sizes)
    leaves = {name: case[name].clone().requires_grad_() for name in ("x", "weights", "gate_up", "down")}
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    actual = swiglu_native(leaves["x"], case["ids"], *list(leaves.values())[1:])
    expected = by_loop(exact["x"], case["ids"], *list(exact.values())[1:])
    assert actual.dtype == torch.float32 and relative_error(actual, expected) < BF16
    upstream = torch.randn(actual.shape).bfloat16().float()
    gradients = torch.autograd.grad(actual, list(leaves.values()), upstream)
    references = torch.autograd.grad(expected, list(exact.values()), upstream.double())
    for name, gradient, reference in zip(leaves, gradients, references, strict=True):
        assert gradient.dtype == leaves[name].dtype and relative_error(gradient, reference) < BF16, name
    if sizes[2] > sizes[1]:
        assert gradients[2][-1].count_nonzero() == 0 and gradients[3][-1].count_nonzero() == 0


# Parts of an expert (experts.h) that are full, unfinished and empty; rows that are gathered, and that lie as they are.
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 8, 8), (300, 3, 9, 40, 24), (1300, 2, 2, 33, 5), (2080, 1, 1, 32, 24), (2070, 1, 2, 24, 16)]
)
def test_experts_give_the_same_bits_with_any_number_of_threads(sizes):
    case = experts_case(*sizes)
    leaves = {name: case[name].clone().requires_grad_() for name in ("x", "weights", "gate_up", "down")}
    upstream = torch.randn(case["x"].shape)
    swiglu = SwiGLU(sizes[3], sizes[4])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for shared in (None, swiglu):
            out = swiglu_native(leaves["x"], case["ids"], *list(leaves.values())[1:], shared)
            inputs = [*leaves.values(), *(() if shared is None else shared.parameters())]
            results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for alone, others in ((results[0], results[2::2]), (results[1], results[3::2])):
        assert all(torch.equal(*pair) for other in others for pair in zip(alone, other, strict=True))


def moe_results(bf16: bool, router: RouterConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    moe = MoE(MoEConfig(num_experts=9, d_expert=12, router=router), d_model=20, shared_width=8, vocab_size=VOCAB_SIZE)
    initialize(moe, 0, 0.3)
    token_ids = torch.randint(0, VOCAB_SIZE, (3, 11))
    x = torch.randn(3, 11, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out, stats = moe(x, token_ids)
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert int(stats.counts.sum()) == 3 * 11 * router.top_k
    if router.can_drop:
        assert 0 < float(stats.dropped) < 1
    return {"out": out, "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}}


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(top_k=3),
        RouterConfig(RouterKind.softmax, top_k=3),
        RouterConfig(RouterKind.gshard, top_k=2, capacity_factor=0.5),
        RouterConfig(RouterKind.switch, top_k=1, capacity_factor=0.5),
        RouterConfig(RouterKind.hash, top_k=1),
    ],
    ids=lambda router: router.kind.value,
)
def test_moe_layer(monkeypatch, calls, router):
    actual = moe_results(True, router)
    assert {"experts_forward", "experts_backward"} <= set(calls)
    expected = moe_results(False, router)
    monkeypatch.setattr(native, "_level", native.Level.off)
    torchs_own = moe_results(True, router)
    for name, exact in expected.items():
        # as close to fp32 as torch's own bf16 operations are, up to the luck of single roundings
        assert relative_error(actual[name], exact) < max(1.5 * relative_error(torchs_own[name], exact), BF16), name


@pytest.mark.parametrize("sizes", [(1, 8, 8), (37, 40, 24), (150, 33, 5), (300, 64, 96), (560, 32, 24)])
def test_dense_swiglu(sizes, calls):
    tokens, width, hidden = sizes
    torch.manual_seed(0)
    swiglu = SwiGLU(width, hidden)
    initialize(swiglu, 0, width**-0.5)
    with torch.no_grad():
        for parameter in swiglu.parameters():
            parameter.copy_(parameter.bfloat16().float())
    leaves = [torch.randn(2, tokens, width).bfloat16().requires_grad_(), *swiglu.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast("cpu", torch.bfloat16):
        actual = swiglu(leaves[0])
    assert calls == ["experts_forward"] and actual.dtype == torch.float32
    gate, up = (exact[0] @ exact[1].t()).chunk(2, -1)
    expected = (F.silu(gate) * up) @ exact[2].t()
    assert relative_error(actual, expected) < BF16
    upstream = torch.randn(actual.shape).bfloat16().float()
    gradients = torch.autograd.grad(actual, leaves, upstream)
    references = torch.autograd.grad(expected, exact, upstream.double())
    for leaf, gradient, reference in zip(leaves, gradients, references, strict=True):
        assert gradient.dtype == leaf.dtype and relative_error(gradient, reference) < BF16


@pytest.mark.parametrize(
    "sizes", [(1, 8, 3), (5, 24, 61), (133, 40, 701), (260, 32, 1024), (70, 8, 9000), (600, 24, 7000)]
)
def test_head_and_loss(sizes):
    tokens, width, vocab = sizes
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).bfloat16().float().requires_grad_()
    weight = (torch.randn(vocab, width) * 2 * width**-0.5).bfloat16().float().requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    targets[1::3] = IGNORE_INDEX
    nats = _NativeLinearCrossEntropy.apply(hidden, weight, targets, True)
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = F.cross_entropy(F.linear(*exact), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert nats.dtype == torch.float32 and relative_error(nats, expected) < 1e-6
    gradients = torch.autograd.grad(nats / 7, (hidden, weight))
    for gradient, reference in zip(gradients, torch.autograd.grad(expected / 7, exact), strict=True):
        assert relative_error(gradient, reference) < BF16
    assert gradients[0][1::3].count_nonzero() == 0
    with torch.no_grad():
        assert torch.equal(_NativeLinearCrossEntropy.apply(hidden, weight, targets, False), nats)


def test_nats_of_a_sure_and_of_an_impossible_target_keep_their_digits():
    """1 - p = 8e-8, of which ln p in fp32 would keep one digit; and p = e^-50, where exponentials leave bf16."""
    hidden = torch.tensor([[1.0], [1.0]]).expand(2, 8).contiguous().requires_grad_()
    weight = torch.zeros(40, 8)
    weight[0], weight[1] = 10.0, -15.0
    weight = (weight / 4).requires_grad_()
    targets = torch.tensor([0, 1])
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    for target in (targets[:1], targets[1:], targets):
        rows = slice(int(target[0]), int(target[-1]) + 1)
        nats = _NativeLinearCrossEntropy.apply(hidden[rows], weight, target, True)
        expected = F.cross_entropy(F.linear(exact[0][rows], exact[1]), target, reduction="sum")
        assert relative_error(nats, expected) < 1e-6
        gradients = torch.autograd.grad(nats, (hidden, weight))
        for gradient, reference in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
            assert relative_error(gradient, reference) < BF16


@pytest.mark.parametrize("threads", [2, 3])
def test_the_head_gives_the_same_bits_with_any_number_of_threads(threads):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1300, 40, requires_grad=True), torch.randn(5000, 40, requires_grad=True)
    targets = torch.randint(0, 5000, (1300,))
    results = []
    for number in (1, threads):
        torch.set_num_threads(number)
        nats = _NativeLinearCrossEntropy.apply(hidden, weight, targets, True)
        results.append((nats, *torch.autograd.grad(nats, (hidden, weight))))
    assert all(torch.equal(one, several) for one, several in zip(*results, strict=True))


def test_a_broken_hidden_state_gives_a_broken_loss_unless_nothing_is_predicted_there():
    hidden = torch.zeros(3, 32)
    hidden[1, 3] = float("nan")
    weight = torch.ones(70, 32, requires_grad=True)
    assert not torch.isfinite(_NativeLinearCrossEntropy.apply(hidden, weight, torch.tensor([1, 1, 1]), False))
    nats = _NativeLinearCrossEntropy.apply(hidden, weight, torch.tensor([1, IGNORE_INDEX, 1]), True)
    assert float(nats.detach()) == pytest.approx(2 * math.log(70), rel=1e-6)
    nats.backward()
    assert bool(torch.isfinite(weight.grad).all())


@pytest.mark.parametrize("target", [-1, 70, 71, 1000])
def test_a_target_outside_the_vocabulary_gives_a_broken_loss(target):
    hidden, weight = torch.randn(3, 32), torch.randn(70, 32)
    assert torch.isnan(_NativeLinearCrossEntropy.apply(hidden, weight, torch.tensor([1, target, 2]), False))


def test_whole_model_gives_the_loss_of_its_logits(calls):
    cfg = tiny_config("moe")
    model = tiny_model(cfg)
    token_ids, document_ids = tiny_batch(cfg, batch=3)
    targets = token_ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(token_ids, document_ids).logits
        assert "head" not in calls
        nats = model(token_ids, document_ids, targets=targets).nats
    assert "head" in calls
    # the kernel's logits are not rounded to bf16, those of the linear layer are
    assert relative_error(nats, cross_entropy(logits, targets)[0]) < 1e-3


def test_activation_checkpointing_changes_nothing():
    results = []
    for checkpointing in ActivationCheckpointing:
        cfg = tiny_config("moe_engram", activation_checkpointing=checkpointing)
        model, memory = tiny_model(cfg), TinyMemory(cfg)
        token_ids, document_ids = tiny_batch(cfg, batch=3)
        rows = memory.rows(token_ids, document_ids)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(token_ids, document_ids, rows, token_ids.roll(-1, 1))
        (output.nats + sum(output.aux_losses.values())).backward()
        gradients = [*(p.grad for p in model.parameters()), *(row.grad for row in rows.values())]
        results.append([output.nats, *gradients])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_no_memory_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: SimpleNamespace(head=ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)))
    with pytest.raises(MemoryError, match="micro-batches"):
        native.call("head")
