"""Token cross-entropy in nats, computed in fp32 from logits of any type, and the output head with it in one pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native
from models.kernels import launch
from models.kernels.cross_entropy import chunked_cross_entropy
from models.precision import compute_dtype

# Targets with this value are not predicted: padding, and the first token of the next document.
IGNORE_INDEX = -100

# Rows of logits handled at a time: at vocabulary 4096 a chunk is 1 MiB in fp32 and stays in the second-level cache.
CHUNK_ELEMENTS = 1 << 18


class _CrossEntropySum(torch.autograd.Function):
    """Sum of log-sum-exp minus target logit. Keeps the logits and one number per row; softmax is recomputed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_sum_exp = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        buffer = log_sum_exp.new_empty(chunk, logits.shape[1])
        for start in range(0, len(logits), chunk):
            part = logits[start : start + chunk]
            torch.logsumexp(buffer[: len(part)].copy_(part), -1, out=log_sum_exp[start : start + chunk])
        valid = targets != IGNORE_INDEX
        safe_targets = targets.where(valid, 0)
        target_logits = logits.gather(1, safe_targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, log_sum_exp, safe_targets, valid)
        return (log_sum_exp - target_logits).where(valid, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sum_exp, targets, valid = ctx.saved_tensors
        scale = grads[0].float() * valid  # (T,)
        grad_logits = torch.empty_like(logits)
        chunk = max(1, CHUNK_ELEMENTS // logits.shape[1])
        buffer = log_sum_exp.new_empty(chunk, logits.shape[1])
        for start in range(0, len(logits), chunk):
            part = slice(start, min(start + chunk, len(logits)))
            softmax = buffer[: part.stop - start].copy_(logits[part]).sub_(log_sum_exp[part, None]).exp_()
            softmax.scatter_add_(1, targets[part, None], softmax.new_full((softmax.shape[0], 1), -1.0))
            grad_logits[part] = softmax.mul_(scale[part, None])
        return grad_logits, None


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over predicted targets of logsumexp(logits) - logits[target], and their number.

    The exponentials are in fp32 whatever the type of the logits, without an fp32 copy of all of them.

    Args:
        logits: (..., V).
        targets: (...) int64, IGNORE_INDEX where nothing is to be predicted.

    Returns:
        Scalar fp32 sum in nats, scalar int64 number of targets that are not IGNORE_INDEX.
    """
    nats = _CrossEntropySum.apply(logits.flatten(0, -2), targets.flatten())
    return nats, (targets != IGNORE_INDEX).sum()


class _NativeLinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients for a loss of 1 where the logits are made, in the forward pass, and keeps these alone."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        x, weight, targets = hidden.to(torch.bfloat16).contiguous(), weight.contiguous(), targets.contiguous()
        nats = torch.empty(x.shape[0], dtype=torch.float32)
        grad_x = torch.empty(x.shape, dtype=torch.float32) if with_gradients else None
        grad_weight = torch.empty_like(weight) if with_gradients else None
        inputs = (*x.shape, weight.shape[0], x, weight, targets, IGNORE_INDEX)  # T, D, V, ...
        native.call("head", *inputs, nats, grad_x, grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.hidden_dtype = hidden.dtype
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        # In place: nobody else has them, and torch refuses a second backward pass over a tensor that has changed.
        return grad_x.mul_(grads[0]).to(ctx.hidden_dtype), grad_weight.mul_(grads[0]), None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of `cross_entropy` over the logits hidden weight^T, which are never there at once.

    Args:
        hidden: (..., D).
        weight: (V, D).
        targets: (...) int64, IGNORE_INDEX where nothing is to be predicted.

    Returns:
        Scalar fp32 sum in nats.
    """
    if weight.dtype == torch.float32 and native.matrices_available(hidden):
        with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _NativeLinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), with_gradients)
    if compute_dtype(hidden) not in launch.DTYPES:
        return cross_entropy(F.linear(hidden, weight), targets)[0]
    return chunked_cross_entropy(hidden.flatten(0, -2), weight, targets.flatten(), IGNORE_INDEX)
