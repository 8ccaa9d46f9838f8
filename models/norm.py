"""RMSNorm with few passes over memory; used by every part of the model."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight in fp32. Keeps x and one number per vector; the sums of the backward pass are matmuls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if native.available(x, torch.float32) and x.is_contiguous() and dtype in (torch.float32, torch.bfloat16):
            out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(*x.shape[:-1], 1)
            sizes = (inverse.numel(), x.shape[-1])
            native.call("rms_norm_forward", *sizes, float(eps), x, weight, *_fp32_or_bf16(out), inverse)
            ctx.save_for_backward(x, weight, inverse)
            return out
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        if native.available(x, torch.float32) and x.is_contiguous():
            grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
            sizes = (inverse.numel(), x.shape[-1])
            given = _fp32_or_bf16(grad.contiguous())
            native.call("rms_norm_backward", *sizes, x, weight, inverse, *given, grad_x, grad_weight)
            return grad_x, grad_weight, None, None
        grad = grad.to(x.dtype)
        product = (grad * x).flatten(0, -2)  # (T, D)
        grad_weight = inverse.view(1, -1) @ product  # (1, D)
        # d/dx of x * inverse(x): the part of the gradient along x is removed
        along = (product @ weight).view_as(inverse) * inverse.pow(3) / -x.shape[-1]
        grad_x = (grad * weight).mul_(inverse).addcmul_(x, along)
        return grad_x, grad_weight[0], None, None


def _fp32_or_bf16(tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A tensor of either type, as the kernels take it."""
    return (tensor, None) if tensor.dtype == torch.float32 else (None, tensor)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """RMSNorm(x) = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: (..., D); fp32 takes the short path, any other type torch's own.
        weight: (D,).
        eps: added to the mean square.
        dtype: what to round the result to; by default the type of `x`.

    Returns:
        (..., D).
    """
    dtype = dtype or x.dtype
    if x.dtype == weight.dtype == torch.float32 and x.dim() > 1:
        with torch.autocast(x.device.type, enabled=False):
            return _RMSNorm.apply(x, weight, eps, dtype)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)


class _AddRMSNorm(torch.autograd.Function):
    """The native path of `add_rms_norm`: one pass each way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        hidden, update = hidden.contiguous(), update.contiguous()
        total, normed, rounded = torch.empty_like(hidden), torch.empty_like(hidden), torch.empty_like(update)
        inverse = hidden.new_empty(hidden.shape[:-1])
        ctx.sizes = (inverse.numel(), hidden.shape[-1])
        outputs = (total, normed, rounded, inverse)
        native.call("add_rms_norm_forward", *ctx.sizes, float(eps), hidden, update, weight, *outputs)
        ctx.save_for_backward(total, weight, inverse)
        ctx.set_materialize_grads(False)
        return total, normed, rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
        grad_total, grad_normed, grad_rounded = (None if grad is None else grad.contiguous() for grad in grads)
        if grad_total is None:
            grad_total = torch.zeros_like(saved[0])
        grad_hidden = torch.empty_like(saved[0])
        results = (grad_hidden, torch.empty_like(grad_hidden, dtype=torch.bfloat16), torch.empty_like(saved[1]))
        given = (grad_normed, grad_rounded, grad_total)
        native.call("add_rms_norm_backward", *ctx.sizes, *saved, *given, *results)
        return *results, None


class RMSNorm(nn.Module):
    """`rms_norm` with a learnt weight per coordinate."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Args: x (..., D); dtype of the result where only matmuls read it, which would round it anyway."""
        return rms_norm(x, self.weight, self.eps, dtype)


def add_rms_norm(hidden: Tensor, update: Tensor, norm: RMSNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """What stands between two sub-layers: the residual hidden + update, and its norm.

    Args:
        hidden: (..., D).
        update: like `hidden`, of any type.
        norm: of the next sub-layer.
        dtype: of that sub-layer's matmuls.

    Returns:
        (..., D) the sum, (..., D) its norm, and (..., D) the norm rounded to `dtype`.
    """
    if (
        native.available(hidden, torch.float32)
        and update.dtype == dtype == torch.bfloat16
        and norm.weight.dtype == torch.float32
    ):
        return _AddRMSNorm.apply(hidden, update, norm.weight, norm.eps)
    hidden = hidden + update
    normed = norm(hidden)
    return hidden, normed, normed.to(dtype)
