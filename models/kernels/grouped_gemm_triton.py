"""Triton kernels that multiply rows sorted by expert with that expert's matrix, launched by `grouped_swiglu`.

Expert e owns the rows bounds[e] to bounds[e + 1]; the bounds stay on the device, and no kernel needs the host to know
them. A tile of BLOCK_M rows belongs to one expert. The grid is an upper bound of the number of tiles, and programs
without rows return at once: expert e starts at slot bounds[e] // BLOCK_M + e, which leaves room for all its tiles,
because ceil(count / m) <= end // m - start // m + 1. All sums run in a fixed order, in fp32; there are no atomics.

Shape letters: R = T * K rows; D, F, E as in `models`. Matrices are row-major. D, F and E are compile-time constants
(they never change during a run), so that bounds checks vanish where blocks divide them; R is not. Addresses are an
int64 scalar per tile plus int32 offsets: whole tiles of int64 would not fit into the registers.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from typing import Any

import torch
import triton
import triton.language as tl

# The interpreter's tl.dot misreads bf16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Tiles of this many rows below each other run side by side and share the weights they read in L2.
_ROW_TILES_PER_GROUP = tl.constexpr(8)


def _config(rows: int, columns: int, inner: int, num_warps: int, num_stages: int) -> triton.Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": inner}
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages)


def _hidden_config(rows: int, inner: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_K": inner}, num_warps=num_warps, num_stages=num_stages)


# Sized for Hopper: 227 KiB of shared memory and 64 Ki registers per multiprocessor. The last one of each list is for
# fp32, which runs on the plain units (no TF32, so that it equals the definition); the others are for bf16.
GATE_UP_CONFIGS = [
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 64, 8, 4),
    _config(128, 128, 32, 8, 4),
    _config(128, 64, 64, 4, 3),
    _config(64, 32, 32, 4, 2),
]
ROWS_CONFIGS = [
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 64, 4, 3),
    _config(64, 256, 64, 4, 3),
    _config(64, 64, 32, 4, 2),
]
HIDDEN_CONFIGS = [
    _hidden_config(128, 64, 8, 3),
    _hidden_config(128, 64, 8, 4),
    _hidden_config(128, 32, 8, 4),
    _hidden_config(64, 64, 4, 4),
    _hidden_config(32, 32, 4, 2),
]
WEIGHT_CONFIGS = [
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4),
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 64, 4, 3),
    _config(128, 128, 32, 4, 4),
    _config(64, 64, 32, 4, 2),
]


def _configs_of_type(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """The configurations for the type of the first matrix."""
    rows = next(value for value in arguments.values() if isinstance(value, torch.Tensor))
    return configs[-1:] if rows.dtype == torch.float32 else configs[:-1]


def _autotune(configs: list[triton.Config], sizes: list[str]) -> Any:
    """Times the configurations once per machine, type and sizes.

    The choice is kept on disk, so that a resumed run makes the same one.
    """
    prune = {"early_config_prune": _configs_of_type}
    return triton.autotune(configs, sizes, prune_configs_by=prune, cache_results=True)


@triton.jit
def _tile(bounds, NUM_EXPERTS: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of this program: expert and first row, int64, the number of the expert's rows from there, and column tile."""
    program = tl.program_id(0)
    slots = tl.num_programs(0) // COLUMN_TILES
    slot, column_tile = tl.swizzle2d(
        program // COLUMN_TILES, program % COLUMN_TILES, slots, COLUMN_TILES, _ROW_TILES_PER_GROUP
    )
    experts = tl.arange(0, triton.next_power_of_2(NUM_EXPERTS))
    starts = tl.load(bounds + experts, mask=experts < NUM_EXPERTS, other=0)
    begun = (starts // BLOCK_M + experts <= slot) & (experts < NUM_EXPERTS)
    expert = tl.sum(begun.to(tl.int64), axis=0) - 1
    start = tl.load(bounds + expert)
    first = start + (slot - start // BLOCK_M - expert) * BLOCK_M
    return expert, first, (tl.load(bounds + expert + 1) - first).to(tl.int32), column_tile


@triton.jit
def _load(pointers, inside, WHOLE: tl.constexpr):
    """A tile, 0 where not `inside`; WHOLE says that all of it is."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _dot(left, right, sums):
    """The fp32 `sums` plus left @ right."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def _product(
    left, right, row_stride, column_stride, columns, INNER: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `left` (BLOCK_M,) pointers, of INNER values, times the columns (BLOCK_N,) of an (INNER, WIDTH) matrix."""
    inner = tl.arange(0, BLOCK_K)
    left = left[:, None] + inner[None, :]  # (BLOCK_M, BLOCK_K)
    right = right + inner[:, None] * row_stride + columns[None, :] * column_stride  # (BLOCK_K, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, INNER, BLOCK_K):
        inside = inner < INNER - start
        a = _load(left, inside[None, :], INNER % BLOCK_K == 0)
        b = _load(right, inside[:, None] & (columns < WIDTH)[None, :], INNER % BLOCK_K == 0 and WIDTH % BLOCK_N == 0)
        sums = _dot(a, b, sums)
        left += BLOCK_K
        right += BLOCK_K * row_stride
    return sums


@_autotune(GATE_UP_CONFIGS, ["NUM_EXPERTS", "D_MODEL", "D_EXPERT"])
@triton.jit
def gate_up_kernel(
    x, weights, bounds, gate_up, pre, hidden, NUM_EXPERTS: tl.constexpr, D_MODEL: tl.constexpr, D_EXPERT: tl.constexpr,
    KEEP_PRE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x_r @ gate_up_e = pre (R, 2F), which is stored if kept, and w_r * silu(gate) * up = hidden (R, F).

    One program computes the same columns of gate and up, so that their product needs no pass over memory.
    """
    expert, first, num_rows, column_tile = _tile(bounds, NUM_EXPERTS, tl.cdiv(D_EXPERT, BLOCK_N), BLOCK_M)
    if num_rows <= 0:
        return
    rows = tl.arange(0, BLOCK_M)
    readable = tl.minimum(rows, num_rows - 1)  # rows below the expert's last one repeat it and are not stored
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    left = x + first * D_MODEL + readable[:, None] * D_MODEL + inner[None, :]
    right = gate_up + expert * (D_MODEL * 2 * D_EXPERT) + inner[:, None] * (2 * D_EXPERT) + columns[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    WHOLE: tl.constexpr = D_MODEL % BLOCK_K == 0
    for start in range(0, D_MODEL, BLOCK_K):
        inside = inner < D_MODEL - start
        a = _load(left, inside[None, :], WHOLE)
        valid = inside[:, None] & (columns < D_EXPERT)[None, :]
        gate = _dot(a, _load(right, valid, WHOLE and D_EXPERT % BLOCK_N == 0), gate)
        up = _dot(a, _load(right + D_EXPERT, valid, WHOLE and D_EXPERT % BLOCK_N == 0), up)
        left += BLOCK_K
        right += BLOCK_K * 2 * D_EXPERT
    stored = (rows < num_rows)[:, None] & (columns < D_EXPERT)[None, :]
    if KEEP_PRE:
        pre_gate = pre + first * (2 * D_EXPERT) + rows[:, None] * (2 * D_EXPERT) + columns[None, :]
        tl.store(pre_gate, gate.to(pre.dtype.element_ty), mask=stored)
        tl.store(pre_gate + D_EXPERT, up.to(pre.dtype.element_ty), mask=stored)
    product = gate * tl.sigmoid(gate) * up * tl.load(weights + first + readable).to(tl.float32)[:, None]
    hidden += first * D_EXPERT + rows[:, None] * D_EXPERT + columns[None, :]
    tl.store(hidden, product.to(hidden.dtype.element_ty), mask=stored)


@_autotune(ROWS_CONFIGS, ["NUM_EXPERTS", "INNER", "WIDTH", "TRANSPOSED"])
@triton.jit
def rows_kernel(
    x, bounds, matrices, out, NUM_EXPERTS: tl.constexpr, INNER: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of INNER values times the expert's (INNER, WIDTH) matrix: out (R, WIDTH).

    TRANSPOSED: the matrices are stored as (WIDTH, INNER).
    """
    expert, first, num_rows, column_tile = _tile(bounds, NUM_EXPERTS, tl.cdiv(WIDTH, BLOCK_N), BLOCK_M)
    if num_rows <= 0:
        return
    rows = tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_stride: tl.constexpr = 1 if TRANSPOSED else WIDTH
    column_stride: tl.constexpr = INNER if TRANSPOSED else 1
    left, right = x + first * INNER + tl.minimum(rows, num_rows - 1) * INNER, matrices + expert * (INNER * WIDTH)
    sums = _product(left, right, row_stride, column_stride, columns, INNER, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K)
    stored = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    out += first * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    tl.store(out, sums.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _hidden_backward(grad, weight, pre, hidden, grad_pre, rows, num_rows, columns, D_EXPERT: tl.constexpr):
    """Stores the gradient of pre, and hidden once more; returns the sums over these columns of grad * hidden / w."""
    stored = (rows < num_rows)[:, None] & (columns < D_EXPERT)[None, :]
    place = rows[:, None] * (2 * D_EXPERT) + columns[None, :]
    gate = tl.load(pre + place, mask=stored, other=0.0).to(tl.float32)
    up = tl.load(pre + place + D_EXPERT, mask=stored, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    unweighted = silu * up
    part = tl.sum(grad * unweighted, axis=1)
    product = (unweighted * weight).to(hidden.dtype.element_ty)
    tl.store(hidden + rows[:, None] * D_EXPERT + columns[None, :], product, mask=stored)
    grad *= weight
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))  # silu' = sigmoid (1 + gate (1 - sigmoid))
    tl.store(grad_pre + place, grad_gate.to(grad_pre.dtype.element_ty), mask=stored)
    tl.store(grad_pre + place + D_EXPERT, (grad * silu).to(grad_pre.dtype.element_ty), mask=stored)
    return part


@_autotune(HIDDEN_CONFIGS, ["NUM_EXPERTS", "D_MODEL", "D_EXPERT"])
@triton.jit
def hidden_backward_kernel(
    grad, weights, bounds, down, pre, hidden, grad_pre, partial, NUM_EXPERTS: tl.constexpr, D_MODEL: tl.constexpr,
    D_EXPERT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From grad @ down_e^T, the gradient (R, F) of the hidden layer before w, all that follows row by row.

    hidden (R, F) once more, with w; grad_pre (R, 2F); and partial (R, column tiles) fp32, the part of each tile of
    BLOCK_N columns in the gradient of w.
    """
    expert, first, num_rows, column_tile = _tile(bounds, NUM_EXPERTS, tl.cdiv(D_EXPERT, BLOCK_N), BLOCK_M)
    if num_rows <= 0:
        return
    rows = tl.arange(0, BLOCK_M)
    readable = tl.minimum(rows, num_rows - 1)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = grad + first * D_MODEL + readable * D_MODEL, down + expert * (D_EXPERT * D_MODEL)
    sums = _product(left, right, 1, D_MODEL, columns, D_MODEL, D_EXPERT, BLOCK_M, BLOCK_N, BLOCK_K)
    weight = tl.load(weights + first + readable).to(tl.float32)[:, None]
    pre += first * (2 * D_EXPERT)
    grad_pre += first * (2 * D_EXPERT)
    hidden += first * D_EXPERT
    # Half of the columns at a time: the whole tile does not fit into the registers.
    lower, upper = sums.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    part = _hidden_backward(lower, weight, pre, hidden, grad_pre, rows, num_rows, columns, D_EXPERT)
    columns += BLOCK_N // 2
    part += _hidden_backward(upper, weight, pre, hidden, grad_pre, rows, num_rows, columns, D_EXPERT)
    partial += (first + rows) * tl.cdiv(D_EXPERT, BLOCK_N) + column_tile
    tl.store(partial, part, mask=rows < num_rows)


@_autotune(WEIGHT_CONFIGS, ["NUM_EXPERTS", "HEIGHT", "WIDTH"])
@triton.jit
def weight_gradient_kernel(
    left, right, bounds, out, NUM_EXPERTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out_e = left_e^T @ right_e (HEIGHT, WIDTH), summed over the rows of expert e; zeros where it has none."""
    TILES_M: tl.constexpr = tl.cdiv(HEIGHT, BLOCK_M)
    TILES_N: tl.constexpr = tl.cdiv(WIDTH, BLOCK_N)
    program = tl.program_id(0)
    expert = (program // (TILES_M * TILES_N)).to(tl.int64)
    tile = program % (TILES_M * TILES_N)
    tile_m, tile_n = tl.swizzle2d(tile // TILES_N, tile % TILES_N, TILES_M, TILES_N, _ROW_TILES_PER_GROUP)
    lines = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(bounds + expert)
    num_rows = (tl.load(bounds + expert + 1) - first).to(tl.int32)
    rows = tl.arange(0, BLOCK_K)
    left += first * HEIGHT + rows[:, None] * HEIGHT + lines[None, :]  # (BLOCK_K, BLOCK_M)
    right += first * WIDTH + rows[:, None] * WIDTH + columns[None, :]  # (BLOCK_K, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_rows, BLOCK_K):
        inside = (rows < num_rows - start)[:, None]
        a = tl.load(left, mask=inside & (lines < HEIGHT)[None, :], other=0.0)
        b = tl.load(right, mask=inside & (columns < WIDTH)[None, :], other=0.0)
        sums = _dot(tl.trans(a), b, sums)
        left += BLOCK_K * HEIGHT
        right += BLOCK_K * WIDTH
    stored = (lines < HEIGHT)[:, None] & (columns < WIDTH)[None, :]
    out += expert * (HEIGHT * WIDTH)
    tl.store(out + lines[:, None] * WIDTH + columns[None, :], sums.to(out.dtype.element_ty), mask=stored)
