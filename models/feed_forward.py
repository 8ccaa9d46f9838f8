"""SwiGLU feed-forward, used by dense layers and by the shared expert."""

from typing import Any, NamedTuple

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
        return swiglu_hidden(gate_up.flatten(0, -2)).view(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_hidden_backward(gate_up.flatten(0, -2), None, grads[0].flatten(0, -2))[1].view_as(gate_up)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2F) holds both halves side by side; returns (..., F)."""
    if torch.compiler.is_compiling():  # which fuses the passes itself, and cannot look into writes to halves
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SiluMul.apply(gate_up)


class NativeSwiGLU(NamedTuple):
    """A `SwiGLU` as one expert that every token goes to with weight 1 (models/native/experts.c), without a graph."""

    ids: Tensor  # (T, 1) int64, 0
    weights: Tensor  # (T, 1) fp32, 1
    gate_up: Tensor  # (D, 2F) fp32: the kernel takes (inputs, outputs), torch's linear layers hold (outputs, inputs)
    down: Tensor  # (F, D) fp32
    pre: Tensor  # (T, 2F) bf16: gate and up of every token, once `forward` has run

    @classmethod
    def of(cls, num_tokens: int, gate_up: Tensor, down: Tensor) -> "NativeSwiGLU":
        """Args: gate_up (2F, D), down (D, F) as `SwiGLU` holds them."""
        ids, ones = torch.zeros(num_tokens, 1, dtype=torch.int64), torch.ones(num_tokens, 1)
        pre = gate_up.new_empty(num_tokens, len(gate_up), dtype=torch.bfloat16)
        return cls(ids, ones, gate_up.t().contiguous(), down.t().contiguous(), pre)

    def forward(self, x: Tensor) -> Tensor:
        """swiglu(x): (T, D) fp32, of x (T, D) bf16."""
        out = torch.empty(x.shape, dtype=torch.float32)
        native.call("experts_forward", *self._sizes(x), x, *self[:4], 0, out, self.pre)
        return out

    def backward(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x (T, D), gate_up and down in fp32, given the output's in bf16."""
        grad_x = torch.empty(x.shape, dtype=torch.float32)
        results = [torch.empty_like(tensor) for tensor in (self.weights, self.gate_up, self.down)]
        native.call("experts_backward", *self._sizes(x), x, *self, grad, 0, grad_x, *results)
        return grad_x, results[1].t(), results[2].t()

    def _sizes(self, x: Tensor) -> tuple[int, ...]:
        return x.shape[0], 1, 1, x.shape[1], self.down.shape[0]  # T, K, E, D, F


class _SwiGLUFunction(torch.autograd.Function):
    """The native path of `SwiGLU`; keeps gate and up, in bf16, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        x = x.contiguous()
        swiglu = NativeSwiGLU.of(x.shape[0], gate_up, down)
        out = swiglu.forward(x)
        ctx.save_for_backward(x, *swiglu)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *saved = ctx.saved_tensors
        grad_x, *gradients = NativeSwiGLU(*saved).backward(x, grads[0].to(x.dtype).contiguous())
        return grad_x.to(x.dtype), *gradients


class SwiGLU(nn.Module):
    """down( silu(gate(x)) * up(x) ), without biases (Shazeer 2020, arXiv 2002.05202, eq 6).

    `gate_up` holds the gate's rows first, then the up projection's: one matmul instead of two.
    """

    def __init__(self, d_model: int, width: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * width, bias=False)
        self.down = nn.Linear(width, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., D). Returns: (..., D), in fp32 where the native kernel sums it up."""
        if self.down.weight.dtype == torch.float32 and native.matrices_available(x):
            tokens = x.to(torch.bfloat16).flatten(0, -2)
            return _SwiGLUFunction.apply(tokens, self.gate_up.weight, self.down.weight).view_as(x)
        return self.down(silu_mul(self.gate_up(x)))
