"""The routed experts' SwiGLU as grouped matmuls in Triton; the definition is `expert_kernels.swiglu_loop`.

Forward, two kernels: pre = x @ gate_up with w * silu(gate) * up made in registers, then hidden @ down. Backward, four:
the gradient of the hidden layer with all that follows row by row, then of x, gate_up and down.

`pre` (R, 2F) is kept for the backward pass: 4 F bytes per row in bf16. Making it again would cost 4 D F of the 18 D F
FLOPs of forward and backward (22 %); where memory is short, activation checkpointing drops it with all else.
At D = 2560, F = 1536, 49,152 rows that is 0.30 GB per layer against 0.77 TFLOP. `hidden` is made again from `pre`.

Weights may be fp32 under bf16 rows. They are rounded once in each pass instead of being kept rounded (the copies of
all layers would live until the backward pass), and their gradients leave the kernel in fp32 without a rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import launch

# Columns of F per program of the hidden layer's backward pass; fixed, because it sets the shape of a partial sum.
HIDDEN_COLUMNS = 128


class Work(NamedTuple):
    """FLOPs or bytes of one pass over a layer's routed experts."""

    forward: int
    backward: int


def flops(num_rows: int, d_model: int, d_expert: int) -> Work:
    """Matmul FLOPs, 2 per multiply-add: 6 R D F forward, twice that backward.

    Args:
        num_rows: R = T * K.
        d_model: D.
        d_expert: F.
    """
    forward = 2 * 3 * num_rows * d_model * d_expert
    return Work(forward, 2 * forward)


def bytes_moved(num_rows: int, num_experts: int, d_model: int, d_expert: int, element_size: int = 2) -> Work:
    """Least traffic of the kernels with device memory, each operand of each kernel once; gate values are left out.

    Args:
        num_rows: R = T * K.
        num_experts: E.
        d_model: D.
        d_expert: F.
        element_size: bytes of a value of rows, weights and their gradients.
    """
    wide, narrow = num_rows * d_model, num_rows * d_expert
    matrix = num_experts * d_model * d_expert
    gate_up, down = wide + 2 * matrix + 3 * narrow, narrow + matrix + wide
    hidden_backward = wide + matrix + 5 * narrow
    grad_x = 2 * narrow + 2 * matrix + wide
    grad_gate_up, grad_down = wide + 2 * narrow + 2 * matrix, narrow + wide + matrix
    backward = hidden_backward + grad_x + grad_gate_up + grad_down
    return Work(element_size * (gate_up + down), element_size * backward)


def _tiles(width: int, block: int) -> int:
    return -(-width // block)


def _row_grid(num_rows: int, num_experts: int, width: int) -> Callable[[dict[str, int]], tuple[int]]:
    """Slots for the tiles of every expert (see `grouped_gemm_triton`), times tiles of `width` columns."""
    return lambda meta: ((num_rows // meta["BLOCK_M"] + num_experts) * _tiles(width, meta["BLOCK_N"]),)


def _multiply_rows(x: Tensor, bounds: Tensor, matrices: Tensor, transposed: bool) -> Tensor:
    """x_r @ matrices_e, or @ matrices_e^T: (R, INNER) -> (R, WIDTH)."""
    from models.kernels.grouped_gemm_triton import rows_kernel

    num_experts, inner, width = matrices.shape
    if transposed:
        inner, width = width, inner
    out = torch.empty((x.shape[0], width), dtype=x.dtype, device=x.device)
    grid = _row_grid(x.shape[0], num_experts, width)
    with launch.device_of(x):
        rows_kernel[grid](x, bounds, matrices, out, num_experts, inner, width, transposed)
    return out


def _weight_gradient(left: Tensor, right: Tensor, bounds: Tensor, like: Tensor) -> Tensor:
    """left_e^T @ right_e, in the shape (E, HEIGHT, WIDTH) and type of `like`."""
    from models.kernels.grouped_gemm_triton import weight_gradient_kernel

    out = torch.empty_like(like)
    num_experts, height, width = like.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (num_experts * _tiles(height, meta["BLOCK_M"]) * _tiles(width, meta["BLOCK_N"]),)

    with launch.device_of(left):
        weight_gradient_kernel[grid](left, right, bounds, out, num_experts, height, width)
    return out


@torch.library.custom_op("engram_lab::grouped_swiglu", mutates_args=())
def _forward(
    tokens: Tensor, weights: Tensor, bounds: Tensor, gate_up: Tensor, down: Tensor, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """Output (R, D), and pre (R, 2F) or, if it is not kept, an empty tensor."""
    from models.kernels.grouped_gemm_triton import gate_up_kernel

    num_rows, (num_experts, d_expert, d_model) = tokens.shape[0], down.shape
    pre = torch.empty((num_rows if keep_pre else 0, 2 * d_expert), dtype=tokens.dtype, device=tokens.device)
    if num_rows == 0:  # nothing to time, and timings are kept
        return torch.empty_like(tokens), pre
    hidden = torch.empty((num_rows, d_expert), dtype=tokens.dtype, device=tokens.device)
    with launch.device_of(tokens):
        gate_up_kernel[_row_grid(num_rows, num_experts, d_expert)](
            tokens, weights, bounds, gate_up.to(tokens.dtype), pre, hidden, num_experts, d_model, d_expert, keep_pre
        )
    return _multiply_rows(hidden, bounds, down.to(tokens.dtype), False), pre


@_forward.register_fake
def _(
    tokens: Tensor, weights: Tensor, bounds: Tensor, gate_up: Tensor, down: Tensor, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), tokens.new_empty(tokens.shape[0] if keep_pre else 0, gate_up.shape[2])


@torch.library.custom_op("engram_lab::grouped_swiglu_backward", mutates_args=())
def _backward(
    grad: Tensor, tokens: Tensor, weights: Tensor, bounds: Tensor, gate_up: Tensor, down: Tensor, pre: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, weights, gate_up and down."""
    from models.kernels.grouped_gemm_triton import hidden_backward_kernel

    num_rows, (num_experts, d_expert, d_model) = tokens.shape[0], down.shape
    if num_rows == 0:
        return torch.zeros_like(tokens), torch.zeros_like(weights), torch.zeros_like(gate_up), torch.zeros_like(down)
    hidden = torch.empty((num_rows, d_expert), dtype=tokens.dtype, device=tokens.device)
    partial = torch.empty((num_rows, _tiles(d_expert, HIDDEN_COLUMNS)), dtype=torch.float32, device=tokens.device)
    grad_pre = torch.empty_like(pre)
    with launch.device_of(tokens):
        hidden_backward_kernel[_row_grid(num_rows, num_experts, d_expert)](
            grad, weights, bounds, down.to(tokens.dtype), pre, hidden, grad_pre, partial, num_experts, d_model,
            d_expert, HIDDEN_COLUMNS,
        )  # fmt: skip
    return (
        _multiply_rows(grad_pre, bounds, gate_up.to(tokens.dtype), True),
        partial.sum(1, keepdim=True).to(weights.dtype),
        _weight_gradient(tokens, grad_pre, bounds, gate_up),
        _weight_gradient(hidden, grad, bounds, down),
    )


@_backward.register_fake
def _(
    grad: Tensor, tokens: Tensor, weights: Tensor, bounds: Tensor, gate_up: Tensor, down: Tensor, pre: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty_like(weights), torch.empty_like(gate_up), torch.empty_like(down)


class _GroupedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, bounds: Tensor, gate_up: Tensor, down: Tensor, keep_pre: bool
    ) -> Tensor:
        out, pre = _forward(tokens, weights, bounds, gate_up, down, keep_pre)
        ctx.save_for_backward(tokens, weights, bounds, gate_up, down, pre)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_tokens, grad_weights, grad_gate_up, grad_down = _backward(grads[0].contiguous(), *ctx.saved_tensors)
        return grad_tokens, grad_weights, None, grad_gate_up, grad_down, None


def grouped_swiglu(tokens: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """y_r = w_r * down_e( silu(gate_e(x_r)) * up_e(x_r) ) for rows grouped by expert; the host never waits.

    The first call with a model's sizes times the configurations, which takes some seconds.

    Args:
        tokens: (R, D) bf16 or fp32, grouped by expert.
        weights: (R, 1) gate values, bf16 or fp32.
        counts: (E,) int64 rows per expert, on the same device; they must sum to R.
        gate_up: (E, D, 2F), the gate's columns first; in the type of `tokens` or fp32. D and F are multiples of 16
            (`expert_kernels.check_triton_widths`).
        down: (E, F, D), likewise.

    Returns:
        (R, D) in the type of `tokens`.

    Raises:
        ValueError: `tokens` have another type.
    """
    if tokens.dtype not in launch.DTYPES:
        raise ValueError(f"the Triton kernels take bf16 or fp32 rows, not {tokens.dtype}; use engine.precision=bf16")
    inputs = (tokens, weights, gate_up, down)
    keep_pre = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    bounds = counts.new_zeros(counts.shape[0] + 1)
    torch.cumsum(counts, 0, out=bounds[1:])
    tokens, weights, gate_up, down = (tensor.contiguous() for tensor in inputs)
    return _GroupedSwiglu.apply(tokens, weights, bounds, gate_up, down, keep_pre)
