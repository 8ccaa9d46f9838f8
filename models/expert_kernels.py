"""The routed experts' SwiGLU over grouped tokens, three ways. `swiglu_loop` is the definition of the others.

All three compute, for every row r of expert e with gate value w_r,

    y_r = w_r * down_e( silu(gate_e(x_r)) * up_e(x_r) ).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.feed_forward import silu_mul


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
    for expert, group in enumerate(tokens.split(counts.tolist())):
        gate, up = (group @ gate_up[expert]).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ down[expert])
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
    for name, width in (("model.d_model", d_model), ("moe.d_expert", d_expert)):
        if width % 8:
            raise ValueError(
                f"{name}={width} must be a multiple of 8 with moe.expert_kernel=grouped_mm (rows of 16 bytes in "
                f"bf16); nearest: {max(8, round(width / 8) * 8)}, or use moe.expert_kernel=padded"
            )


class Bucket(NamedTuple):
    """Experts of similar load that are multiplied as one batch: order[first:last], each padded to `length` rows."""

    first: int
    last: int
    length: int


class _SwigluPadded(torch.autograd.Function):
    """One batched matmul per bucket and projection; keeps the pre-activations and repeats the elementwise part."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Tensor, buckets: list[Bucket]
    ) -> Tensor:
        gate_up, down = gate_up.index_select(0, order), down.index_select(0, order)
        pre = _bucketed_matmul(tokens, gate_up, buckets)  # (rows, 2F)
        ctx.save_for_backward(tokens, weights, gate_up, down, pre, order)
        ctx.buckets = buckets
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(weights)  # (rows, F)
        return _bucketed_matmul(hidden, down, buckets)  # (rows, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, gate_up, down, pre, order = ctx.saved_tensors
        buckets: list[Bucket] = ctx.buckets
        grad = grads[0].contiguous()
        gate, up = pre.chunk(2, dim=-1)
        silu = F.silu(gate)
        hidden = silu * up
        grad_hidden = _bucketed_matmul(grad, down.transpose(1, 2), buckets)  # (rows, F), before the gate value
        grad_weights = (grad_hidden * hidden).sum(-1, keepdim=True)
        place = order.argsort()  # of each expert in the order of the buckets
        grad_down = _bucketed_outer(hidden.mul_(weights), grad, down, buckets).index_select(0, place)
        grad_hidden.mul_(weights)
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        torch.mul(silu, grad_hidden, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        grad_gate_up = _bucketed_outer(tokens, grad_pre, gate_up, buckets).index_select(0, place)
        grad_tokens = _bucketed_matmul(grad_pre, gate_up.transpose(1, 2), buckets)
        return grad_tokens, grad_weights, grad_gate_up, grad_down, None, None


def _bucketed_matmul(rows: Tensor, matrices: Tensor, buckets: list[Bucket]) -> Tensor:
    """Product of rows (rows, I) and matrices (E, I, O), bucket by bucket -> (rows, O)."""
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    start = 0
    for first, last, length in buckets:
        shape = (last - first, length, -1)
        part = slice(start, start + (last - first) * length)
        torch.bmm(rows[part].view(shape), matrices[first:last], out=out[part].view(shape))
        start = part.stop
    return out


def _bucketed_outer(left: Tensor, right: Tensor, like: Tensor, buckets: list[Bucket]) -> Tensor:
    """Per expert left^T (I, rows) @ right (rows, O) -> (E, I, O); zero for experts without rows."""
    out = torch.empty_like(like)
    start = end = 0
    for first, last, length in buckets:
        shape = (last - first, length, -1)
        part = slice(start, start + (last - first) * length)
        torch.bmm(left[part].view(shape).transpose(1, 2), right[part].view(shape), out=out[first:last])
        start, end = part.stop, last
    out[end:] = 0
    return out


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
