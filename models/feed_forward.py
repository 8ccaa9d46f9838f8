"""SwiGLU feed-forward, used by dense layers and by the shared expert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _SiluMul(torch.autograd.Function):
    """silu(a) * b of the two halves of one tensor, keeping only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grads
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up


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
