"""Which tensors go to the Triton kernels, and on which device these are launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.interpreter import GridExecutor

from models.engram import GATE_NORM_EPS
from models.expert_kernels import swiglu_loop, swiglu_triton
from models.kernels import grouped_gemm_triton, launch
from models.kernels.gate import engram_gate, engram_gate_definition
from models.loss import cross_entropy, linear_cross_entropy
from tests.interpreted import interpreted_kernels

F16, F32, F64 = torch.float16, torch.float32, torch.float64
TARGETS = torch.tensor([1, 4, 0])
COUNTS = torch.tensor([1, 0, 2])


@pytest.fixture(autouse=True)
def one_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing is timed."""
    for name in ("gate_up_kernel", "rows_kernel", "hidden_backward_kernel", "weight_gradient_kernel"):
        kernel = getattr(grouped_gemm_triton, name)
        monkeypatch.setattr(kernel, "configs", [triton.Config(dict.fromkeys(kernel.configs[0].kwargs, 16))])


def gate_leaves(dtype: torch.dtype = F32) -> list[Tensor]:
    shapes = ((1, 2, 2, 24), (1, 2, 3, 24), (2, 24), (2, 24))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def expert_leaves(dtype: torch.dtype = F32) -> list[Tensor]:
    shapes = ((3, 16), (3, 1), (3, 16, 32), (3, 16, 16))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def head_leaves(dtype: torch.dtype = F32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((3, 8), (5, 8))]


def experts(kernel, leaves: list[Tensor]) -> Tensor:
    tokens, weights, gate_up, down = leaves
    return kernel(tokens, weights, COUNTS, gate_up, down)


def assert_equal(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    gradients, references = (torch.autograd.grad(result.sum(), leaves) for result in (actual, expected))
    assert all(torch.equal(a, b) for a, b in zip(gradients, references, strict=True))


def test_fp64_is_computed_in_fp64():
    with interpreted_kernels():
        leaves = head_leaves(F64)
        assert_equal(linear_cross_entropy(*leaves, TARGETS), cross_entropy(F.linear(*leaves), TARGETS)[0], leaves)
        leaves = gate_leaves(F64)
        definition = engram_gate_definition(*leaves, GATE_NORM_EPS)
        assert_equal(engram_gate(*leaves, GATE_NORM_EPS)[0], definition[0], leaves)
        leaves = expert_leaves(F64)
        assert_equal(experts(swiglu_triton, leaves), experts(swiglu_loop, leaves), leaves)


@pytest.mark.parametrize("wide", range(4))
def test_one_operand_in_fp64_is_enough(wide):
    with interpreted_kernels():
        leaves = [leaf.detach().to(F64 if i == wide else F32) for i, leaf in enumerate(gate_leaves())]
        for a, b in zip(
            engram_gate(*leaves, GATE_NORM_EPS), engram_gate_definition(*leaves, GATE_NORM_EPS), strict=True
        ):
            assert a.dtype == F64 and torch.equal(a, b)


def test_fp16_is_left_to_torch():
    with interpreted_kernels():
        leaves = gate_leaves(F16)
        assert torch.equal(engram_gate(*leaves, GATE_NORM_EPS)[0], engram_gate_definition(*leaves, GATE_NORM_EPS)[0])
        hidden, weight = head_leaves()
        with torch.autocast("cpu", F16):
            nats, expected = linear_cross_entropy(hidden, weight, TARGETS), F.linear(hidden, weight)
        assert expected.dtype == F16 and torch.equal(nats, cross_entropy(expected, TARGETS)[0])


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton asks for the current device alone."""
    inside, launched = [False], []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    run = GridExecutor.__call__

    def guarded(self, *args, **kwargs):
        assert inside[0], f"{self.fn.__name__} is launched on the current device"
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(launch, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", guarded)
    with interpreted_kernels():
        linear_cross_entropy(*head_leaves(), TARGETS).backward()
        engram_gate(*gate_leaves(), GATE_NORM_EPS)[0].sum().backward()
        experts(swiglu_triton, expert_leaves()).sum().backward()
    assert set(launched) == {
        "softmax_cross_entropy_kernel", "gate_forward_kernel", "gate_backward_kernel", "gate_up_kernel", "rows_kernel",
        "hidden_backward_kernel", "weight_gradient_kernel",
    }  # fmt: skip


def test_the_device_of_a_tensor_becomes_the_current_one(monkeypatch):
    entered = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    with launch.device_of(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 3))):
        assert entered == [torch.device("cuda", 3)]
    with launch.device_of(torch.zeros(1)):
        assert len(entered) == 1
