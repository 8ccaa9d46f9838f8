"""The grouped SwiGLU in Triton: interpreted on this CPU against the loop, and compiled for a GPU that is not here."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from models import expert_kernels
from models.expert_kernels import swiglu_loop, swiglu_triton
from models.initialize import initialize
from models.kernels import grouped_gemm_triton as kernels
from models.kernels.grouped_swiglu import HIDDEN_COLUMNS, _backward, _forward, bytes_moved, flops, grouped_swiglu
from models.moe import ExpertKernel, Experts, LocalDispatcher, MoE, MoEConfig
from models.router import RouterConfig
from tests.interpreted import interpreted_kernels
from tests.tiny import relative_error

ROOT = Path(__file__).resolve().parent.parent
SHARED_BYTES = 227 * 1024  # that a program may use on Hopper (CUDA C guide, compute capability 9.0)
F32, BF16 = torch.float32, torch.bfloat16
# fp32 sums in another order. To bf16 the interpreter rounds towards zero, by at most 2^-7 of a value: pre, the hidden
# layer, its gradient and the result once each.
TOLERANCE = {F32: 5e-6, BF16: 2e-2}
NAMES = ("tokens", "weights", "gate_up", "down")
TUNED = {
    kernels.gate_up_kernel: kernels.GATE_UP_CONFIGS,
    kernels.rows_kernel: kernels.ROWS_CONFIGS,
    kernels.hidden_backward_kernel: kernels.HIDDEN_CONFIGS,
    kernels.weight_gradient_kernel: kernels.WEIGHT_CONFIGS,
}


def set_blocks(monkeypatch: pytest.MonkeyPatch, blocks: int | str) -> None:
    """Of the type's own configurations the first one, or `blocks` rows, columns and inner values."""
    for kernel, configs in TUNED.items():
        config = configs[-1] if blocks == "fp32" else configs[0]
        if isinstance(blocks, int):
            config = triton.Config(dict.fromkeys(config.kwargs, blocks))
        monkeypatch.setattr(kernel, "configs", [config])


def experts_case(counts: list[int], d_model: int, d_expert: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    num_rows, num_experts = sum(counts), len(counts)
    return {
        "tokens": torch.randn(num_rows, d_model),
        "weights": torch.rand(num_rows, 1),
        "gate_up": torch.randn(num_experts, d_model, 2 * d_expert) * d_model**-0.5,
        "down": torch.randn(num_experts, d_expert, d_model) * d_expert**-0.5,
    }


def check(counts: list[int], case: dict[str, Tensor], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Output and every gradient; `dtypes` are those of rows and weights, and of matrices."""
    rows, matrices = dtypes
    leaves = [case[name].to(rows if i < 2 else matrices).requires_grad_() for i, name in enumerate(NAMES)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sizes = torch.tensor(counts)
    with interpreted_kernels():
        actual = grouped_swiglu(leaves[0], leaves[1], sizes, leaves[2], leaves[3])
        upstream = torch.randn(actual.shape).to(rows)
        gradients = torch.autograd.grad(actual, leaves, upstream)
    expected = swiglu_loop(exact[0], exact[1], sizes, exact[2], exact[3])
    references = torch.autograd.grad(expected, exact, upstream.double())
    assert actual.dtype == rows and relative_error(actual, expected) < TOLERANCE[rows]
    for name, leaf, gradient, reference in zip(NAMES, leaves, gradients, references, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
        assert relative_error(gradient, reference) < TOLERANCE[rows], name
    for expert, count in enumerate(counts):
        if count == 0:
            assert all(gradient[expert].count_nonzero() == 0 for gradient in gradients[2:])


@pytest.mark.parametrize(
    ("counts", "sizes", "blocks"),
    [
        ([0, 3, 0, 17, 5, 0], (48, 80), 32),  # no rows for the first, a middle and the last expert; nothing divides
        ([1], (16, 16), 16),  # one token, one expert
        ([7, 7, 7], (64, 32), 32),  # every token to every expert; blocks divide both widths
        ([0, 150, 0], (16, 32), 16),  # all rows to one expert: more tiles of rows than run side by side
        ([5, 0, 6], (16, HIDDEN_COLUMNS + 16), "fp32"),  # two parts of the gradient of w
        ([129, 2], (80, 48), "bf16"),  # more rows than the largest block
    ],
)
def test_outputs_and_gradients(monkeypatch, counts, sizes, blocks):
    set_blocks(monkeypatch, blocks)
    check(counts, experts_case(counts, *sizes), (F32, F32))


@triton.jit
def record_tiles(bounds, found, NUM_EXPERTS: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    expert, first, num_rows, column_tile = kernels._tile(bounds, NUM_EXPERTS, COLUMN_TILES, BLOCK_M)
    found += 4 * tl.program_id(0)
    tl.store(found, expert)
    tl.store(found + 1, first)
    tl.store(found + 2, num_rows)
    tl.store(found + 3, column_tile)


@pytest.mark.parametrize("counts", [[5], [0, 0, 0], [4, 8, 4], [0, 9, 0, 0, 1, 3, 0], [1] * 11, [0, 0, 30, 7]])
def test_tiles_cover_every_row_once(counts):
    block, column_tiles, num_experts = 4, 3, len(counts)
    bounds = torch.tensor([0, *counts]).cumsum(0)
    found = torch.full(((sum(counts) // block + num_experts) * column_tiles, 4), -1)
    record_tiles[(len(found),)](bounds, found, num_experts, column_tiles, block)
    covered = [
        (expert, column, row)
        for expert, first, num_rows, column in found.tolist()
        for row in range(first, first + min(num_rows, block))
    ]
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert sorted(covered) == sorted((owner, c, row) for row, owner in enumerate(owners) for c in range(column_tiles))


@pytest.mark.parametrize("matrices", [BF16, F32])
def test_bf16(monkeypatch, matrices):
    set_blocks(monkeypatch, "bf16")
    counts = [0, 33, 4]
    check(counts, experts_case(counts, 48, 80), (BF16, matrices))


def test_without_a_gradient_pre_is_not_stored(monkeypatch):
    set_blocks(monkeypatch, 32)
    case = experts_case([4, 1], 16, 32)
    tokens, weights, gate_up, down = case.values()
    case["down"].requires_grad_()
    with interpreted_kernels(), torch.no_grad():
        actual = grouped_swiglu(tokens, weights, torch.tensor([4, 1]), gate_up, down)
    assert relative_error(actual, swiglu_loop(tokens, weights, torch.tensor([4, 1]), gate_up, down)) < TOLERANCE[F32]


def test_no_rows_at_all():
    leaves = [tensor.requires_grad_() for tensor in experts_case([0, 0], 16, 32).values()]
    with interpreted_kernels():
        actual = grouped_swiglu(leaves[0], leaves[1], torch.tensor([0, 0]), leaves[2], leaves[3])
        gradients = torch.autograd.grad(actual.sum(), leaves)
    assert actual.shape == (0, 16)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.count_nonzero() == 0


def test_equal_runs_are_equal_to_the_bit(monkeypatch):
    set_blocks(monkeypatch, "fp32")
    leaves = [tensor.requires_grad_() for tensor in experts_case([3, 18], 16, 16).values()]
    results = []
    for _ in range(2):
        with interpreted_kernels():
            actual = grouped_swiglu(leaves[0], leaves[1], torch.tensor([3, 18]), leaves[2], leaves[3])
            results.append([actual, *torch.autograd.grad(actual.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses operators for which the host would wait for a GPU, to read a number or the size of a result."""

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        waiting = ("_local_scalar_dense", "bincount", "nonzero", "masked_select", "_unique2", "repeat_interleave")
        assert operator.overloadpacket.__name__ not in waiting, operator
        return operator(*arguments, **(keywords or {}))


def test_the_host_never_waits_for_the_device(monkeypatch):
    set_blocks(monkeypatch, 16)
    experts, dispatcher = Experts(3, 16, 16, ExpertKernel.triton), LocalDispatcher(3, padded=False)
    initialize(experts, seed=0, init_std=0.3)
    x, weights = torch.randn(5, 16, requires_grad=True), torch.rand(5, 2, requires_grad=True)
    expert_ids = torch.tensor([[0, 2]] * 5)
    listed: list[Tensor] = []  # tolist passes by the operators
    with interpreted_kernels(), NoWaiting(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", listed.append)
        dispatched = dispatcher.dispatch(x, expert_ids, weights)
        dispatcher.combine(experts(dispatched), dispatched).sum().backward()
    assert not listed
    assert dispatched.counts.tolist() == [5, 0, 5] and weights.grad.isfinite().all()
    for waits in (expert_ids.flatten().bincount, dispatched.counts[0].item, lambda: int(dispatched.counts[0])):
        with pytest.raises(AssertionError, match=r"bincount|_local_scalar_dense"), NoWaiting():
            waits()


@pytest.mark.parametrize("num_rows", [0, 5])
def test_shapes_without_values_are_right(monkeypatch, num_rows):
    """What torch.compile is told of both operators equals what they give."""
    set_blocks(monkeypatch, 16)
    tokens, weights, gate_up, down = experts_case([num_rows, 0], 16, 32).values()
    bounds, checks = torch.tensor([0, num_rows, num_rows]), ("test_schema", "test_faketensor")
    for keep_pre in (False, True):
        torch.library.opcheck(_forward, (tokens, weights, bounds, gate_up, down, keep_pre), test_utils=checks)
    arguments = (tokens, tokens, weights, bounds, gate_up, down, torch.randn(num_rows, 64))
    torch.library.opcheck(_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("bf16", [False, True])
def test_layer_equals_the_one_with_the_loop(monkeypatch, bf16):
    set_blocks(monkeypatch, "bf16")
    cfg = MoEConfig(num_experts=5, d_expert=32, expert_kernel=ExpertKernel.triton, router=RouterConfig(top_k=2))
    results, calls = [], []
    spy = lambda *tensors: (calls.append(tensors), grouped_swiglu(*tensors))[1]  # noqa: E731
    monkeypatch.setattr(expert_kernels, "grouped_swiglu", spy)
    for kernel in (ExpertKernel.triton, ExpertKernel.loop):
        moe = MoE(replace(cfg, expert_kernel=kernel), d_model=48, shared_width=16)
        initialize(moe, seed=0, init_std=0.3)
        torch.manual_seed(0)
        x = torch.randn(2, 9, 48, requires_grad=True)
        with interpreted_kernels(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            update, _ = moe(x)
            update.float().square().sum().backward()
        assert len(calls) == 1  # of the layer with the kernel, not of the other
        results.append({"update": update, "x": x.grad, **{name: p.grad for name, p in moe.named_parameters()}})
    for name, expected in results[1].items():
        assert results[0][name].dtype == expected.dtype
        assert relative_error(results[0][name], expected) < TOLERANCE[BF16 if bf16 else F32], name


def compiled(*arguments: str) -> list[dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compile_experts", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def check_compiled(kernel: dict) -> None:
    name = kernel["name"]
    assert kernel["shared"] <= SHARED_BYTES, name
    assert kernel["registers"] * 32 * kernel["num_warps"] <= 2**16, name
    assert kernel["stack"] == kernel["local"] == 0, f"{name} spills"
    assert (kernel["wgmma"] > 0) == (kernel["rows"] == "*bf16"), name  # Hopper's tensor cores
    assert kernel["async_copies"] > 0, name  # 16-byte loads that run ahead of the products
    assert not kernel["tf32"], name


def test_compiled_for_hopper():
    results = compiled()
    assert len(results) == 9
    for kernel in results:
        check_compiled(kernel)


@pytest.mark.slow
def test_every_configuration_compiles_for_hopper():
    results = compiled("all")
    assert len(results) == sum(map(len, TUNED.values())) + len(kernels.ROWS_CONFIGS)
    for kernel in results:
        check_compiled(kernel)


def test_on_a_cpu_the_loop_runs_and_triton_is_not_imported():
    command = (
        "import sys, torch; import models.transformer;"
        "from models.moe import ExpertKernel, MoE, MoEConfig;"
        "moe = MoE(MoEConfig(d_expert=16, expert_kernel=ExpertKernel.triton), 16, 0);"
        "moe(torch.zeros(1, 2, 16));"
        "print(any(name.split('.')[0] == 'triton' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    torch.manual_seed(0)
    tokens, weights, counts = torch.randn(5, 16), torch.rand(5, 1), torch.tensor([2, 0, 3])
    gate_up, down = torch.randn(3, 16, 64), torch.randn(3, 32, 16)
    expected = swiglu_loop(tokens, weights, counts, gate_up, down)
    assert torch.equal(swiglu_triton(tokens, weights, counts, gate_up, down), expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((24, 32), r"model.d_model=24 must be a multiple of 16 with model.moe.expert_kernel=triton.*nearest: 32.*loop"),
        ((32, 40), r"model.moe.d_expert=40 must be a multiple of 16 with model.moe.expert_kernel=triton.*nearest: 32"),
    ],
)
def test_widths_that_blocks_do_not_cover_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Experts(2, *sizes, ExpertKernel.triton)


def test_flops_equal_the_counter():
    tokens, weights = torch.randn(12, 16, requires_grad=True), torch.rand(12, 1)
    gate_up, down = torch.randn(2, 16, 64, requires_grad=True), torch.randn(2, 32, 16, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out = swiglu_loop(tokens, weights, torch.tensor([5, 7]), gate_up, down)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert flops(12, 16, 32) == (forward.get_total_flops(), backward.get_total_flops())


def test_bytes_equal_those_of_the_tensors():
    x, pre, hidden = 12 * 16, 12 * 64, 12 * 32  # values; gate values and sums of parts are left out
    gate_up, down = 2 * 16 * 64, 2 * 32 * 16
    forward = [x, gate_up, pre, hidden, hidden, down, x]
    hidden_backward = [x, down, pre, hidden, pre]
    gradients = [pre, gate_up, x, x, pre, gate_up, hidden, x, down]
    assert bytes_moved(12, 2, 16, 32) == (2 * sum(forward), 2 * sum(hidden_backward + gradients))
