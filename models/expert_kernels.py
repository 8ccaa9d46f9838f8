"""The routed experts' SwiGLU over grouped tokens, three ways. `swiglu_loop` is the definition of the others.

All three compute, for every row r of expert e with gate value w_r,

    y_r = w_r * down_e( silu(gate_e(x_r)) * up_e(x_r) ).
"""

from typing import Any

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


class _SwigluPadded(torch.autograd.Function):
    """Batched matmuls over (E, P, .) groups; keeps the pre-activations and repeats the cheap elementwise part."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        pre = torch.bmm(tokens, gate_up)  # (E, P, 2F)
        ctx.save_for_backward(tokens, weights, gate_up, down, pre)
        gate, up = pre.chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up).mul_(weights)  # (E, P, F)
        return torch.bmm(hidden, down)  # (E, P, D)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        tokens, weights, gate_up, down, pre = ctx.saved_tensors
        (grad,) = grads
        gate, up = pre.chunk(2, dim=-1)
        silu = F.silu(gate)
        hidden = silu * up
        grad_hidden = torch.bmm(grad, down.transpose(1, 2))  # (E, P, F), before the gate value
        grad_weights = (grad_hidden * hidden).sum(-1, keepdim=True)
        grad_down = torch.bmm(hidden.mul_(weights).transpose(1, 2), grad)
        grad_hidden.mul_(weights)
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        torch.mul(silu, grad_hidden, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_hidden.mul_(up), gate, grad_input=grad_gate)
        grad_gate_up = torch.bmm(tokens.transpose(1, 2), grad_pre)
        grad_tokens = torch.bmm(grad_pre, gate_up.transpose(1, 2))
        return grad_tokens, grad_weights, grad_gate_up, grad_down


def swiglu_padded(tokens: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same as one batched matmul per projection, over groups padded to one length P.

    Args:
        tokens: (E, P, D).
        weights: (E, P, 1) gate values; 0 in the padding, which makes it inert in both directions.
        gate_up: (E, D, 2F).
        down: (E, F, D).

    Returns:
        (E, P, D).
    """
    return _SwigluPadded.apply(tokens, weights, gate_up, down)
