"""The Engram gate, its kernels interpreted and in torch, against the definition in fp64: output, gates, gradients."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.engram import GATE_NORM_EPS, Engram, EngramConfig
from models.initialize import initialize
from models.kernels import gate as gate_module
from models.kernels import gate_torch, gate_triton, launch
from models.kernels.gate import MAX_WIDTH, bytes_moved, engram_gate, engram_gate_definition
from tests.interpreted import interpreted_kernels
from tests.tiny import relative_error

F32, BF16 = torch.float32, torch.bfloat16
NAMES = ("hidden", "value_keys", "hidden_norm", "key_norm")
# Every result is rounded once, from fp32. To bf16 the interpreter rounds towards zero, by at most 2^-7 of a value.
TOLERANCE = {F32: 5e-6, BF16: 2**-7}
Way = Callable[[], AbstractContextManager[None]]


@pytest.fixture(params=["kernel", "torch"])
def way(request, monkeypatch) -> Way:
    monkeypatch.setattr(gate_torch, "CHUNK_ELEMENTS", 3 * 4 * 33)  # three tokens a part, or fewer
    return interpreted_kernels if request.param == "kernel" else nullcontext


def gate_case(tokens: tuple[int, ...], branches: int, width: int, *dtypes: torch.dtype) -> dict[str, Tensor]:
    """Random inputs; `dtypes` are those of hidden, of value_keys and of both norms."""
    hidden_dtype, rows_dtype, norm_dtype = dtypes
    torch.manual_seed(0)
    inputs = {
        "hidden": (2 * torch.randn(*tokens, branches, width)).to(hidden_dtype),
        "value_keys": torch.randn(*tokens, 1 + branches, width).to(rows_dtype),
        "hidden_norm": (1 + 0.3 * torch.randn(branches, width)).to(norm_dtype),
        "key_norm": (1 + 0.3 * torch.randn(branches, width)).to(norm_dtype),
    }
    # Keys that agree with the hidden state or oppose it: gates on both sides, none near the kink at 0, where the slope
    # of the square root makes a large difference of a small one.
    signs = torch.tensor([0.7, -0.7]).repeat(inputs["hidden"].numel() // width)[: inputs["hidden"].numel() // width]
    inputs["value_keys"][..., 1:, :] += (signs.view(*tokens, branches, 1) * inputs["hidden"].float()).to(rows_dtype)
    return inputs


def check(inputs: dict[str, Tensor], residual: bool, way: Way) -> None:
    leaves = [inputs[name].clone().requires_grad_() for name in NAMES]
    exact = [inputs[name].double().requires_grad_() for name in NAMES]
    expected = engram_gate_definition(*exact, GATE_NORM_EPS, residual)
    upstream = [torch.randn(result.shape) for result in expected]
    with way():
        actual = engram_gate(*leaves, GATE_NORM_EPS, residual)
        upstream[0] = upstream[0].to(actual[0].dtype)
        gradients = torch.autograd.grad(actual, leaves, upstream)
    references = torch.autograd.grad(expected, exact, [grad.double() for grad in upstream])
    assert "_EngramGate" in str(actual[1].grad_fn.next_functions) and actual[1].dtype == torch.float32
    promoted = engram_gate_definition(*(leaf.detach() for leaf in leaves), GATE_NORM_EPS, residual)
    assert actual[0].dtype == promoted[0].dtype
    for name, a, b in (("out", actual[0], expected[0]), ("gate", actual[1], expected[1])):
        assert a.shape == b.shape and relative_error(a, b) < TOLERANCE[a.dtype], name
    for name, leaf, a, b in zip(NAMES, leaves, gradients, references, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        assert relative_error(a, b) < TOLERANCE[a.dtype], name


@pytest.mark.parametrize(
    ("tokens", "branches", "width", "dtypes", "residual"),
    [
        ((1, 1), 1, 33, (F32, F32, F32), False),  # one token, one branch, an odd width
        ((1, 1), 4, 100, (BF16, BF16, BF16), True),  # fewer tokens than programs
        ((2, 2), 4, 33, (BF16, BF16, BF16), False),  # more tokens than programs: each sums over several
        ((2, 2), 4, 33, (F32, F32, F32), True),
        ((1, 4), 3, 100, (F32, BF16, F32), False),  # a residual stream in fp32 under autocast
        ((1, 4), 3, 100, (F32, BF16, F32), True),
        ((2, 2), 1, 1280, (BF16, BF16, BF16), True),
        ((1, 3), 2, 1280, (F32, F32, F32), False),
        ((1, 2), 4, 4096, (BF16, BF16, F32), False),  # the widest row; bf16 rows under norms in fp32
    ],
)
def test_gate(tokens, branches, width, dtypes, residual, way):
    check(gate_case(tokens, branches, width, *dtypes), residual, way)


def test_a_similarity_of_zero_has_a_gate_of_one_half_and_no_gradient(way):
    inputs = gate_case((1, 3), 2, 40, F32, F32, F32)
    inputs["value_keys"][:, :, 1:] = 0
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    with way():
        out, gate = engram_gate(*leaves, GATE_NORM_EPS)
        gradients = torch.autograd.grad(out.sum() + gate.sum(), leaves)
    assert torch.equal(gate, torch.full((1, 3, 2), 0.5))
    assert torch.equal(out, (inputs["value_keys"][:, :, :1] * 0.5).expand_as(out))
    assert not gradients[0].any() and not gradients[2].any() and not gradients[1][:, :, 1:].any()
    assert torch.equal(gradients[1][:, :, 0], torch.ones(1, 3, 40))


@pytest.mark.parametrize("name", ["hidden", "value_keys"])
def test_a_broken_row_breaks_its_own_token_only(name, way):
    inputs = gate_case((1, 3), 2, 40, F32, F32, F32)
    inputs[name][0, 1, -1, 7] = float("nan")
    with way():
        out, gate = engram_gate(*inputs.values(), GATE_NORM_EPS)
    assert out[0, 1, 1].isnan().all() and gate[0, 1, 1].isnan()
    assert out.isfinite().sum() == out.numel() - 40 and gate.isfinite().sum() == gate.numel() - 1


def test_strides_do_not_matter(way):
    inputs = gate_case((2, 2), 2, 40, F32, F32, F32)
    strided = {name: x.transpose(-1, 0).contiguous().transpose(-1, 0) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    with way():
        expected = engram_gate(*inputs.values(), GATE_NORM_EPS, True)
        for a, b in zip(engram_gate(*strided.values(), GATE_NORM_EPS, True), expected, strict=True):
            assert torch.equal(a, b)


def test_the_module_with_kernels_equals_the_module_without():
    module = Engram(EngramConfig(d_memory=48), d_model=24, layer=1, num_branches=3)
    initialize(module, seed=0, init_std=0.5)
    hidden, rows = torch.randn(2, 3, 3, 24, requires_grad=True), torch.randn(2, 3, 8, 6, requires_grad=True)
    leaves = [hidden, rows, *module.parameters()]
    expected = module(hidden, rows)
    upstream = torch.randn(expected.update.shape)
    references = torch.autograd.grad(expected.update, leaves, upstream)
    with interpreted_kernels():
        actual = module(hidden, rows)
        gradients = torch.autograd.grad(actual.update, leaves, upstream)
    assert not torch.equal(actual.update, expected.update)  # that they differ in the last bits shows two ways
    for a, b in zip((*actual, *gradients), (*expected, *references), strict=True):
        assert relative_error(a, b) < 1e-5


def test_torch_compile_takes_the_kernels_as_operators():
    inputs = gate_case((1, 2), 2, 40, F32, F32, F32)
    leaves = [inputs[name].requires_grad_() for name in NAMES]
    with interpreted_kernels():
        expected = engram_gate(*leaves, GATE_NORM_EPS)
        upstream = [torch.randn(result.shape) for result in expected]
        references = torch.autograd.grad(expected, leaves, upstream)
        actual = torch.compile(engram_gate, backend="aot_eager", fullgraph=True)(*leaves, GATE_NORM_EPS)
        gradients = torch.autograd.grad(actual, leaves, upstream)
    for a, b in zip((*actual, *gradients), (*expected, *references), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [MAX_WIDTH, MAX_WIDTH + 1])
def test_rows_too_wide_for_the_kernels_take_the_passes_in_torch(width):
    with interpreted_kernels():
        passes = gate_module._passes(torch.zeros(1, 1, width))
    assert passes is (gate_triton if width == MAX_WIDTH else gate_torch)


def test_fp64_is_not_rounded_on_its_way():
    inputs = {name: x.double() for name, x in gate_case((1, 3), 2, 8, F32, F32, F32).items()}
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: engram_gate(*x, GATE_NORM_EPS, True), leaves)


def test_shapes_that_do_not_belong_together():
    hidden, norm = torch.zeros(2, 3, 4, 8), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"have shapes \(\(2, 3, 4, 8\).*must have \(\(2, 3, 5, 8\)"):
        engram_gate(hidden, hidden, norm, norm, GATE_NORM_EPS)


def test_the_backward_loop_is_as_deep_as_shared_memory_allows():
    sizes = gate_triton.backward_sizes(branches=4, width=2560, stream_size=2, rows_size=2)
    assert sizes["BLOCK"] == 4096 and sizes["num_warps"] == 16 and sizes["STAGES"] == 3  # 2 tokens of 13 rows of 8 KiB
    assert gate_triton.backward_sizes(4, 2560, 4, 4)["STAGES"] == 2
    assert gate_triton.backward_sizes(4, 2560, 4, 4, shared_memory=164 * 1024)["STAGES"] == 1  # an A100
    assert gate_triton.backward_sizes(1, 33, 2, 2) | {"BLOCK": 64, "num_warps": 1, "STAGES": 4} == (
        gate_triton.backward_sizes(1, 33, 2, 2)
    )


def test_bytes_moved():
    hidden, value_keys = torch.zeros(6, 4, 10), torch.zeros(6, 5, 10, dtype=BF16)
    read_forward, read_backward = 4 * 240 + 2 * 300, 4 * 240 + 2 * 300 + 4 * 240
    assert bytes_moved(hidden, value_keys, hidden) == (read_forward + 4 * 240, read_backward + 4 * 240 + 2 * 300)


def test_without_triton_the_models_run():
    command = (
        "import sys; sys.modules['triton'] = None;"  # every import of it fails
        "import torch; from models import transformer; from models.engram import *; from models.kernels import launch;"
        "assert not launch.INSTALLED; launch.interpret_on_cpu = True;"
        "Engram(EngramConfig(d_memory=16), 8, 1)(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 8, 2));"
        "transformer.linear_cross_entropy(torch.zeros(2, 8), torch.zeros(5, 8), torch.tensor([1, 2]))"
    )
    subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parent.parent, check=True)


def test_without_kernels_what_torch_compile_fuses_is_the_definition():
    inputs = gate_case((1, 2), 2, 40, F32, F32, F32).values()
    assert not launch.can_run(torch.zeros(1)) and not launch.can_run(torch.zeros(1, device="meta"))
    compiled = torch.compile(engram_gate, backend="eager", fullgraph=True)(*inputs, GATE_NORM_EPS)
    for a, b in zip(compiled, engram_gate_definition(*inputs, GATE_NORM_EPS), strict=True):
        assert torch.equal(a, b)
