"""SwiGLU feed-forward, used by dense layers and by the shared expert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native


def swiglu_hidden(pre: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted hidden layer w * silu(gate) * up, without a graph.

    Args:
        pre: (rows, 2F), gate and up side by side.
        weights: (rows, 1) w; None is 1.

    Returns:
        (rows, F).
    """
    if native.available(pre) and pre.is_contiguous():
        hidden = pre.new_empty(pre.shape[0], pre.shape[1] // 2)
        native.call("swiglu_forward", *hidden.shape, pre, weights, hidden)
        return hidden
    gate, up = pre.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up)
    return hidden if weights is None else hidden.mul_(weights)


def swiglu_hidden_backward(pre: Tensor, weights: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward of `swiglu_hidden`, given the gradient (rows, F) of its result (before w, where there are weights).

    Returns:
        The result again (rows, F), the gradient of `pre` (rows, 2F), and of the weights (rows, 1) or None.
    """
    if native.available(pre) and pre.is_contiguous() and grad.is_contiguous():
        hidden, grad_pre = torch.empty_like(grad), torch.empty_like(pre)
        grad_weights = None if weights is None else torch.empty_like(weights)
        native.call("swiglu_backward", *grad.shape, pre, weights, grad, hidden, grad_pre, grad_weights)
        return hidden, grad_pre, grad_weights
    gate, up = pre.chunk(2, dim=-1)
    silu = F.silu(gate)
    hidden = silu * up
    grad_weights = None
    if weights is not None:
        grad_weights = (grad * hidden).sum(-1, keepdim=True)
        grad, hidden = grad * weights, hidden.mul_(weights)
    grad_pre = torch.empty_like(pre)
    grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
    torch.mul(silu, grad, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
    return hidden, grad_pre, grad_weights


class _SiluMul(torch.autograd.Function):
    """silu(a) * b of the two halves of one tensor, keeping only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return swiglu_hidden(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_hidden_backward(gate_up.flatten(0, -2), None, grads[0].flatten(0, -2))[1].view_as(gate_up)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2F) holds both halves side by side; returns (..., F)."""
    return _SiluMul.apply(gate_up)


class SwiGLU(nn.Module):
    """down( silu(gate(x)) * up(x) ), without biases (Shazeer 2020, arXiv 2002.05202, eq 6).

    `gate_up` holds the gate's rows first, then the up projection's: one matmul instead of two.
    """

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., D). Returns: (..., D)."""
        return self.down(silu_mul(self.gate_up(x)))
