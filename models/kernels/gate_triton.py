"""The Engram gate as two Triton kernels; `models.kernels.gate` holds the definition and the public function.

WIDTH (D) and BRANCHES (J) never change during a run and are compile-time constants. Rows are padded to a power of two,
BLOCK columns, of which those beyond the width are neither read nor written. All sums are in fp32, in a fixed order.
"""

# Triton types what it compiles by itself.
# mypy: disable-error-code="no-untyped-def, assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.kernels import launch

# Columns per warp. Forward 16 per lane, two 16-byte loads in bf16. Backward 8, because the weights and their gradient
# of every branch stay in registers: with 4 branches of more than 2048 columns all of a multiprocessor's, and a few
# values are spilled (see tests/test_kernels_compile.py).
FORWARD_COLUMNS, BACKWARD_COLUMNS = 512, 256
# Warps of backward programs on one multiprocessor, and the registers that leaves per thread, of 65536.
BACKWARD_WARPS, BACKWARD_REGISTERS = 16, 128
# Shared memory that each program costs beside its own, bytes (CUDA C++ programming guide, from sm_80 on).
SHARED_PER_PROGRAM = 1024
# Tokens whose rows are on the way from memory while a backward program works on one: at most, if they fit.
MAX_PREFETCHED = 3


@triton.jit
def _load(pointer, row, columns, WIDTH: tl.constexpr):
    """Row `row` of a matrix of rows of WIDTH values, in fp32, with zeros beyond the width."""
    return tl.load(pointer + row * WIDTH + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, row, columns, x, WIDTH: tl.constexpr):
    """Write row `row`, rounded to the type of the matrix."""
    tl.store(pointer + row * WIDTH + columns, x.to(pointer.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _signed_sqrt_gate(similarity):
    """sigmoid( sign(s) sqrt(max(|s|, 1e-6)) ) and its derivative by s; NaN stays NaN."""
    magnitude = tl.abs(similarity)
    root = tl.sqrt(tl.where(magnitude < 1e-6, 1e-6, magnitude))
    sign = tl.where(similarity > 0, 1.0, 0.0) - tl.where(similarity < 0, 1.0, 0.0)
    gate, shut = 1.0 / (1.0 + tl.exp(-sign * root)), 1.0 / (1.0 + tl.exp(sign * root))  # 1 - gate without cancellation
    return gate, tl.where(magnitude < 1e-6, 0.0, gate * shut * 0.5 / root)


@triton.jit
def gate_forward_kernel(
    hidden, value_keys, hidden_norm, key_norm, out, gates, statistics, eps, scale,
    WIDTH: tl.constexpr, BRANCHES: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: the value is read once for all branches."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    value = _load(value_keys, token * (1 + BRANCHES), columns, WIDTH)
    for branch in tl.static_range(BRANCHES):
        row = token * BRANCHES + branch
        x = _load(hidden, row, columns, WIDTH)
        key = _load(value_keys, token * (1 + BRANCHES) + 1 + branch, columns, WIDTH)
        weight = _load(hidden_norm, branch, columns, WIDTH) * _load(key_norm, branch, columns, WIDTH)
        inverse_x = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
        inverse_key = tl.rsqrt(tl.sum(key * key, 0) / WIDTH + eps)
        similarity = tl.sum(x * weight * key, 0) * (inverse_x * inverse_key * scale)
        gate, _ = _signed_sqrt_gate(similarity)
        update = gate * value
        if RESIDUAL:
            update += x
        _store(out, row, columns, update, WIDTH)
        tl.store(gates + row, gate)
        tl.store(statistics + row * 3, inverse_x)
        tl.store(statistics + row * 3 + 1, inverse_key)
        tl.store(statistics + row * 3 + 2, similarity)


@triton.jit
def gate_backward_kernel(
    hidden, value_keys, hidden_norm, key_norm, statistics, grad_out, grad_gates,
    grad_hidden, grad_value_keys, partial_sums, num_tokens, scale,
    WIDTH: tl.constexpr, BRANCHES: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th token and sums the gradient of the weights over them, in fp32."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    weights = ()
    sums = ()
    for branch in tl.static_range(BRANCHES):
        weights += (_load(hidden_norm, branch, columns, WIDTH) * _load(key_norm, branch, columns, WIDTH),)
        sums += (tl.full((BLOCK,), 0.0, tl.float32),)
    for step in tl.range(program, num_tokens, tl.num_programs(0), num_stages=STAGES):
        token = tl.cast(step, tl.int64)
        value = _load(value_keys, token * (1 + BRANCHES), columns, WIDTH)
        grad_value = tl.full((BLOCK,), 0.0, tl.float32)
        new_sums = ()
        for branch in tl.static_range(BRANCHES):
            row = token * BRANCHES + branch
            key_row = token * (1 + BRANCHES) + 1 + branch
            grad = _load(grad_out, row, columns, WIDTH)
            inverse_x, inverse_key = tl.load(statistics + row * 3), tl.load(statistics + row * 3 + 1)
            similarity = tl.load(statistics + row * 3 + 2)
            gate, slope = _signed_sqrt_gate(similarity)
            grad_similarity = (tl.sum(grad * value, 0) + tl.load(grad_gates + row)) * slope
            grad_value += gate * grad
            x = _load(hidden, row, columns, WIDTH)
            key = _load(value_keys, key_row, columns, WIDTH)
            # similarity = product * sum(x weight key), product = scale * inverse_x * inverse_key
            product = grad_similarity * inverse_x * inverse_key * scale
            along = grad_similarity * similarity / WIDTH
            grad_x = product * weights[branch] * key - along * inverse_x * inverse_x * x
            if RESIDUAL:
                grad_x += grad
            _store(grad_hidden, row, columns, grad_x, WIDTH)
            grad_key = product * weights[branch] * x - along * inverse_key * inverse_key * key
            _store(grad_value_keys, key_row, columns, grad_key, WIDTH)
            new_sums += (sums[branch] + product * x * key,)
        _store(grad_value_keys, token * (1 + BRANCHES), columns, grad_value, WIDTH)
        sums = new_sums
    for branch in tl.static_range(BRANCHES):
        _store(partial_sums, program * BRANCHES + branch, columns, sums[branch], WIDTH)


def forward_sizes(width: int) -> dict[str, int]:
    """How gate_forward_kernel is compiled for rows of `width`."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": _num_warps(block, FORWARD_COLUMNS)}


def backward_sizes(
    branches: int, width: int, stream_size: int, rows_size: int, shared_memory: int = launch.SHARED_MEMORY_SM90
) -> dict[str, int]:
    """How gate_backward_kernel is compiled. Its loop is pipelined as deep as a program's part of the memory allows.

    Args:
        branches: J.
        width: D.
        stream_size: bytes of a value of hidden or of the output's gradient, the larger.
        rows_size: bytes of a value of value_keys.
        shared_memory: of a multiprocessor, bytes.
    """
    block = triton.next_power_of_2(width)
    warps = _num_warps(block, BACKWARD_COLUMNS)
    token_bytes = block * (branches * (2 * stream_size + rows_size) + rows_size)
    free = shared_memory * warps // BACKWARD_WARPS - SHARED_PER_PROGRAM - 4 * block  # lanes exchange one row in fp32
    stages = 1 + min(free // token_bytes, MAX_PREFETCHED)
    return {"BLOCK": block, "STAGES": stages, "num_warps": warps, "maxnreg": BACKWARD_REGISTERS}


def _num_warps(block: int, columns: int) -> int:
    """Warps of a program over `block` columns, `columns` for each; between 1 and 16."""
    return min(max(block // columns, 1), 16)


def forward(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill `out`; returns the gates (T, J) and what the backward pass needs of every row (T, J, 3), both fp32."""
    num_tokens, branches, width = hidden.shape
    gates = torch.empty(num_tokens, branches, dtype=torch.float32, device=hidden.device)
    statistics = torch.empty(num_tokens, branches, 3, dtype=torch.float32, device=hidden.device)
    with launch.device_of(hidden):
        gate_forward_kernel[(num_tokens,)](
            hidden, value_keys, hidden_norm, key_norm, out, gates, statistics, eps, width**-0.5,
            WIDTH=width, BRANCHES=branches, RESIDUAL=residual, **forward_sizes(width),
        )  # fmt: skip
    return gates, statistics


def backward(
    grad_out: Tensor, grad_gates: Tensor, hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor,
    statistics: Tensor, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and value_keys, and that of the product of the two norm weights (J, D) in fp32."""
    num_tokens, branches, width = hidden.shape
    grad_hidden, grad_value_keys = torch.empty_like(hidden), torch.empty_like(value_keys)
    stream_size = max(hidden.element_size(), grad_out.element_size())
    shared_memory = launch.shared_memory(hidden.device)
    sizes = backward_sizes(branches, width, stream_size, value_keys.element_size(), shared_memory)
    per_multiprocessor = BACKWARD_WARPS // sizes["num_warps"]
    programs = min(num_tokens, launch.num_multiprocessors(hidden.device) * per_multiprocessor)
    partial_sums = torch.empty(programs, branches, width, dtype=torch.float32, device=hidden.device)
    with launch.device_of(hidden):
        gate_backward_kernel[(programs,)](
            hidden, value_keys, hidden_norm, key_norm, statistics, grad_out, grad_gates,
            grad_hidden, grad_value_keys, partial_sums, num_tokens, width**-0.5,
            WIDTH=width, BRANCHES=branches, RESIDUAL=residual, **sizes,
        )  # fmt: skip
    return grad_hidden, grad_value_keys, partial_sums.sum(0)
