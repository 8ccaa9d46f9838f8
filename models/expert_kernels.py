"""The routed experts' SwiGLU over grouped tokens, five ways. `swiglu_loop` is the definition of the others.

All compute, for every row r of expert e with gate value w_r,

    y_r = w_r * down_e( silu(gate_e(x_r)) * up_e(x_r) ).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native
from models.feed_forward import NativeSwiGLU, SwiGLU, silu_mul, swiglu_hidden, swiglu_hidden_backward
from models.kernels import launch
from models.kernels.grouped_swiglu import grouped_swiglu


def swiglu_loop(tokens: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One expert after the other.

    Args:
        tokens: (rows, D), grouped by expert.
        weights: (rows, 1) gate values.
        counts: (E,) int64, rows per expert.
        gate_up: (E, D, 2F), the gate's columns first.
        down: (E, F, D).

    Returns:
        (rows, D).
    """
    outputs = []
    # The gradient of gate_up[expert] would be as large as that of all experts; that of unbind is put together once.
    for group, into, out_of in zip(tokens.split(counts.tolist()), gate_up.unbind(), down.unbind(), strict=True):
        gate, up = (group @ into).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ out_of)
    return torch.cat(outputs) * weights


def swiglu_grouped_mm(tokens: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same through `torch.nn.functional.grouped_mm`; arguments as in `swiglu_loop`.

    grouped_mm needs rows whose length is a multiple of 16 bytes; `check_grouped_mm_widths` says so beforehand.
    """
    ends = counts.cumsum(0).to(torch.int32)
    hidden = silu_mul(F.grouped_mm(tokens, gate_up, offs=ends))
    return F.grouped_mm(hidden, down, offs=ends) * weights


def check_grouped_mm_widths(d_model: int, d_expert: int) -> None:
    """Raises ValueError where grouped_mm's 16-byte alignment would not hold in bf16 (8 values)."""
    _check_widths(d_model, d_expert, 8, "grouped_mm (rows of 16 bytes in bf16)", "padded")


def _check_widths(d_model: int, d_expert: int, multiple: int, kernel: str, other: str) -> None:
    for name, width in (("model.d_model", d_model), ("model.moe.d_expert", d_expert)):
        if width % multiple:
            raise ValueError(
                f"{name}={width} must be a multiple of {multiple} with model.moe.expert_kernel={kernel}; "
                f"nearest: {max(multiple, round(width / multiple) * multiple)}, or use model.moe.expert_kernel={other}"
            )


def swiglu_triton(tokens: Tensor, weights: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same through Triton (`kernels.grouped_swiglu`), or the loop where that cannot run, as on a CPU or in fp64.

    Arguments as in `swiglu_loop`; gate_up and down may be fp32 under bf16 tokens, and their gradients are then fp32.
    `check_triton_widths` says beforehand which widths the kernels take.
    """
    if launch.can_run(tokens, weights, gate_up, down):
        return grouped_swiglu(tokens, weights, counts, gate_up, down)
    return swiglu_loop(tokens, weights, counts, gate_up.to(tokens.dtype), down.to(tokens.dtype))


def check_triton_widths(d_model: int, d_expert: int) -> None:
    """Raises ValueError where blocks of 16, the smallest of a tensor core, would not cover D or F."""
    _check_widths(d_model, d_expert, 16, "triton (blocks of tensor cores)", "loop")


class Bucket(NamedTuple):
    """Experts of similar load that are multiplied as one batch: order[first:last], each padded to `length` rows."""

    first: int
    last: int
    length: int


class _SwigluPadded(torch.autograd.Function):
    """Bucket by bucket, so that what one matmul writes is still in the cache when the next step reads it.

    Keeps the pre-activations and repeats the elementwise part in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, buckets: list[Bucket]
    ) -> Tensor:
        gate_up, down = gate_up.index_select(0, order), down.index_select(0, order)
        pre = tokens.new_empty(tokens.shape[0], gate_up.shape[2])  # (rows, 2F)
        out = torch.empty_like(tokens)
        for experts, rows, group in _slices(buckets):
            torch.bmm(tokens[rows].view(group), gate_up[experts], out=pre[rows].view(group))
            hidden = swiglu_hidden(pre[rows], weights[rows])  # (rows, F)
            torch.bmm(hidden.view(group), down[experts], out=out[rows].view(group))
        ctx.save_for_backward(tokens, weights, gate_up, down, pre, order)
        ctx.buckets = buckets
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, gate_up, down, pre, order = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_tokens, grad_weights = torch.empty_like(tokens), torch.empty_like(weights)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        last = 0
        for experts, rows, group in _slices(ctx.buckets):
            grad_rows = grad[rows].view(group)
            grad_hidden = torch.bmm(grad_rows, down[experts].transpose(1, 2)).flatten(0, 1)  # before the gate value
            hidden, grad_pre, weight_part = swiglu_hidden_backward(pre[rows], weights[rows], grad_hidden)
            assert weight_part is not None  # there are weights
            grad_weights[rows] = weight_part
            torch.bmm(hidden.view(group).transpose(1, 2), grad_rows, out=grad_down[experts])
            torch.bmm(tokens[rows].view(group).transpose(1, 2), grad_pre.view(group), out=grad_gate_up[experts])
            torch.bmm(grad_pre.view(group), gate_up[experts].transpose(1, 2), out=grad_tokens[rows].view(group))
            last = experts.stop
        grad_gate_up[last:], grad_down[last:] = 0, 0  # experts without rows
        place = order.argsort()  # of each expert in the order of the buckets
        grad_gate_up, grad_down = grad_gate_up.index_select(0, place), grad_down.index_select(0, place)
        return grad_tokens, grad_weights, grad_gate_up, grad_down, None, None


def _slices(buckets: list[Bucket]) -> Iterator[tuple[slice, slice, tuple[int, int, int]]]:
    """Of each bucket: its experts, its rows, and the shape that makes its rows one batch with a group per expert."""
    start = 0
    for first, last, length in buckets:
        end = start + (last - first) * length
        yield slice(first, last), slice(start, end), (last - first, length, -1)
        start = end


def swiglu_padded(
    tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, buckets: list[Bucket]
) -> Tensor:
    """The same as a few batched matmuls, over groups padded to the fullest of their bucket.

    Args:
        tokens: (rows, D), in the order of the buckets.
        weights: (rows, 1) gate values; 0 in the padding, which makes it inert in both directions.
        gate_up: (E, D, 2F).
        down: (E, F, D).
        order: (E,) int64, a permutation of the experts; those beyond the last bucket have no rows.
        buckets: runs of `order`.

    Returns:
        (rows, D).
    """
    return _SwigluPadded.apply(tokens, weights, gate_up, down, order, buckets)


class _SwigluNative(torch.autograd.Function):
    """Keeps its inputs, and gate and up of every (token, expert) in bf16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, *shared: Tensor
    ) -> Tensor:
        inputs = (x.contiguous(), expert_ids.contiguous(), weights.contiguous(), gate_up, down)
        ctx.sizes = (*weights.shape, *down.shape[:1], *x.shape[1:], *down.shape[1:2])  # T, K, E, D, F
        of_shared = NativeSwiGLU.of(x.shape[0], *shared) if shared else None
        out = torch.zeros(x.shape, dtype=torch.float32) if of_shared is None else of_shared.forward(inputs[0])
        pre = x.new_empty(weights.numel(), gate_up.shape[2], dtype=torch.bfloat16)  # (T K, 2F), in order of the experts
        native.call("experts_forward", *ctx.sizes, *inputs, 1, out, pre)
        ctx.save_for_backward(*inputs, pre, *(of_shared or ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, expert_ids, weights, gate_up, down, pre, *shared = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous()
        of_shared: list[Tensor] = []
        if shared:
            grad_x, *of_shared = NativeSwiGLU(*shared).backward(x, grad)
        else:
            grad_x = torch.zeros(x.shape, dtype=torch.float32)
        results = [torch.empty_like(tensor) for tensor in (weights, gate_up, down)]
        native.call(
            "experts_backward", *ctx.sizes, x, expert_ids, weights, gate_up, down, pre, grad, 1, grad_x, *results
        )  # fmt: skip
        return grad_x.to(x.dtype), None, *results, *of_shared


def swiglu_native(
    x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, shared: SwiGLU | None = None
) -> Tensor:
    """Dispatch, experts and combine in one C kernel (models/native/experts.c), and the shared expert added to it.

    Args:
        x: (T, D) bf16.
        expert_ids: (T, K) int64.
        weights: (T, K) fp32 gate values.
        gate_up: (E, D, 2F) fp32; rounded to bf16 inside the kernel, its gradient is fp32.
        down: (E, F, D) fp32, likewise.
        shared: the shared expert, with fp32 weights.

    Returns:
        (T, D) fp32, the sum over k of weights[t, k] * expert expert_ids[t, k] of x_t, plus the shared expert of x_t.
    """
    of_shared = () if shared is None else (shared.gate_up.weight, shared.down.weight)
    return _SwigluNative.apply(x, expert_ids, weights, gate_up, down, *of_shared)
