"""The chunked cross-entropy against the definition in fp64, with its kernel interpreted and in torch."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels import cross_entropy as chunked
from models.kernels import cross_entropy_triton
from models.loss import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from tests.interpreted import interpreted_kernels
from tests.tiny import relative_error

F32, BF16 = torch.float32, torch.bfloat16
# fp32 sums in another order; in bf16 the logits' gradient is rounded, by the interpreter towards zero (2^-7).
TOLERANCE = {F32: 2e-6, BF16: 2**-7}
Way = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["kernel", "torch"])
def way(request) -> Way:
    return interpreted_kernels if request.param == "kernel" else nullcontext


def head_case(tokens: int, width: int, vocab: int, dtype: torch.dtype, scale: float = 3.0) -> list[Tensor]:
    """Hidden states and weights whose logits are exact in `dtype`: whole numbers of an eighth up to a few `scale`."""
    torch.manual_seed(0)
    hidden = torch.zeros(tokens, width)
    hidden[torch.arange(tokens), torch.randint(0, width, (tokens,))] = 1.0
    weight = (8 * scale * torch.randn(vocab, width)).clamp(-120, 120).round() / 8
    targets = torch.randint(0, vocab, (tokens,))
    targets[1::3] = IGNORE_INDEX
    return [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets]


def check(case: list[Tensor], way: Way) -> None:
    *leaves, targets = case
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = cross_entropy(F.linear(*exact), targets)[0]
    references = torch.autograd.grad(expected / 7, exact)
    with way():
        nats = linear_cross_entropy(*leaves, targets)
        assert "ChunkedCrossEntropy" in type(nats.grad_fn).__name__ and nats.dtype == F32 and nats.shape == ()
        gradients = torch.autograd.grad(nats / 7, leaves)
    assert relative_error(nats, expected) < 1e-6
    for leaf, gradient, reference in zip(leaves, gradients, references, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert relative_error(gradient, reference) < TOLERANCE[leaf.dtype]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("sizes", [(1, 8, 3), (7, 33, 64), (5, 24, 301)])
def test_loss_and_gradients(sizes, dtype, way, monkeypatch):
    monkeypatch.setattr(cross_entropy_triton, "BLOCK", 128)  # the last size takes three blocks, the last one not full
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2 * 301 * 4)  # and two to four tokens a chunk
    monkeypatch.setattr(chunked, "CPU_ROWS", 3)
    check(head_case(*sizes, dtype), way)


def test_the_blocks_that_gpus_take(way):
    check(head_case(2, 8, cross_entropy_triton.BLOCK + 77, BF16), way)


def test_logits_far_apart(way):
    hidden, weight = torch.ones(2, 1, requires_grad=True), torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    check([hidden, weight, torch.tensor([1, 0])], way)


def test_everything_ignored_costs_nothing_whatever_the_logits(way):
    hidden = torch.full((3, 4), float("inf"), requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    with way():
        nats = linear_cross_entropy(hidden, weight, torch.full((3,), IGNORE_INDEX))
        grad_hidden, _ = torch.autograd.grad(nats, (hidden, weight))
    assert nats.item() == 0.0 and not grad_hidden.any()


@pytest.mark.parametrize("target", [-1, 70, 1000])
def test_a_target_outside_the_vocabulary_gives_a_broken_loss(target, way):
    hidden, weight = torch.randn(3, 32), torch.randn(70, 32)
    with way():
        assert linear_cross_entropy(hidden, weight, torch.tensor([1, target, 2])).isnan()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy sees infinities cancel
def test_a_broken_hidden_state_gives_a_broken_loss(way):
    hidden, weight = torch.randn(3, 32), torch.randn(70, 32)
    hidden[1, 3] = float("nan")
    with way():
        assert linear_cross_entropy(hidden, weight, torch.tensor([1, 1, 2])).isnan()


def test_without_gradients_none_are_computed(monkeypatch):
    wanted = []
    kernel = cross_entropy_triton.softmax_cross_entropy_
    monkeypatch.setattr(
        cross_entropy_triton, "softmax_cross_entropy_", lambda *args: (wanted.append(args[-1]), kernel(*args))[1]
    )
    hidden, weight, targets = head_case(4, 8, 20, F32)
    with interpreted_kernels():
        with torch.no_grad():
            without = linear_cross_entropy(hidden, weight, targets)
        frozen = linear_cross_entropy(hidden, weight.detach(), targets)
        nats = linear_cross_entropy(hidden, weight, targets)
        (only_hidden,) = torch.autograd.grad(frozen, hidden)
        grad_hidden, _ = torch.autograd.grad(nats, (hidden, weight), retain_graph=True)
        again, _ = torch.autograd.grad(nats, (hidden, weight))
    assert wanted == [False, True, True] and not without.requires_grad
    assert torch.equal(without, nats) and torch.equal(frozen, nats)
    assert torch.equal(only_hidden, grad_hidden) and torch.equal(again, grad_hidden)


def test_autocast_decides_the_type_of_the_matmuls(way):
    hidden, weight, targets = head_case(5, 8, 40, F32)
    with way():
        with torch.autocast("cpu", BF16):
            nats = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(nats, (hidden, weight))
        expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
        references = torch.autograd.grad(expected, (hidden, weight))
    assert torch.equal(nats, expected) and [gradient.dtype for gradient in gradients] == [F32, F32]
    assert torch.equal(gradients[0], references[0])
    assert torch.equal(gradients[1].bfloat16().float(), references[1])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_upstream_gradient_is_not_rounded(way, dtype):
    """1 / 2043 lies 0.24 % off the nearest bf16 number: rounded, it would be a common factor of all gradients."""
    hidden, weight, targets = head_case(5, 8, 40, F32)
    hidden, weight = (leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, weight))
    with way(), torch.autocast("cpu", BF16):
        nats = linear_cross_entropy(hidden, weight, targets)
        whole = torch.autograd.grad(nats, (hidden, weight), retain_graph=True)
        parts = torch.autograd.grad(nats / 2043, (hidden, weight))
    scale = torch.tensor(1 / 2043)
    assert torch.equal(parts[0], (whole[0].float() * scale).to(dtype))
    if dtype == F32:  # what is kept of the weight's is fp32: that of a bf16 weight was rounded after the first scale
        assert torch.equal(parts[1], whole[1] * scale)


def test_the_weights_gradient_is_summed_in_fp32(way, monkeypatch):
    """One chunk adds 128, the others a quarter each: in bf16 the sum would not grow."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)
    monkeypatch.setattr(chunked, "CPU_ROWS", 1)
    hidden = torch.full((33, 1), 0.5, dtype=BF16)
    hidden[0] = 256.0
    weight = torch.zeros(2, 1, dtype=BF16, requires_grad=True)
    with way():
        nats = linear_cross_entropy(hidden, weight, torch.ones(33, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(nats, weight)
    assert gradient.tolist() == [[136.0], [-136.0]]  # (256 + 32 * 0.5) * (softmax 0.5 - onehot)


def test_torch_compile_takes_the_chunks_as_one_operator(way):
    *leaves, targets = head_case(4, 8, 20, F32)
    with way():
        expected = linear_cross_entropy(*leaves, targets)
        references = torch.autograd.grad(expected, leaves)
        actual = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)(*leaves, targets)
        gradients = torch.autograd.grad(actual, leaves)
    assert torch.equal(actual, expected)
    for a, b in zip(gradients, references, strict=True):
        assert torch.equal(a, b)


def test_chunks_are_whole_tiles_and_never_above_their_size():
    assert chunked.chunk_rows(129_280, 2) == 4096
    for vocab, element_size in ((50_000, 4), (1 << 20, 4), (4096, 2), (1 << 24, 4)):
        rows = chunked.chunk_rows(vocab, element_size)
        assert rows * vocab * element_size <= chunked.CHUNK_BYTES and (rows % chunked.ROW_TILE == 0 or rows < 128)
    assert chunked.chunk_rows(1 << 40, 4) == 1


def test_shapes_that_do_not_belong_together():
    with pytest.raises(ValueError, match=r"hidden \(3, 4\), weight \(5, 6\) and targets \(3,\) must have"):
        chunked.chunked_cross_entropy(torch.zeros(3, 4), torch.zeros(5, 6), torch.zeros(3, dtype=torch.int64), -100)


def test_bytes_moved():
    assert chunked.bytes_moved(10, 30, 2, with_gradient=False) == 600
    assert chunked.bytes_moved(10, 30, 2, with_gradient=True) == 1800
