"""Token cross-entropy in nats, computed in fp32 from logits of any type."""

from typing import Any

import torch
from torch import Tensor

from models import native

# Targets with this value are not predicted: padding, and the first token of the next document.
IGNORE_INDEX = -100

# Rows of logits handled at a time: at vocabulary 4096 a chunk is 1 MiB in fp32 and stays in the second-level cache.
CHUNK_ELEMENTS = 1 << 18


def _log_sum_exp(logits: Tensor) -> Tensor:
    """(T,) fp32 logsumexp over the last axis of logits (T, V)."""
    rows, vocab_size = logits.shape
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if native.available(logits):
        native.call("log_sum_exp", rows, vocab_size, logits, log_sum_exp, log_sum_exp.new_empty(vocab_size))
        return log_sum_exp
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    buffer = log_sum_exp.new_empty(chunk, vocab_size)
    for start in range(0, rows, chunk):
        part = logits[start : start + chunk]
        torch.logsumexp(buffer[: part.shape[0]].copy_(part), -1, out=log_sum_exp[start : start + chunk])
    return log_sum_exp


def _grad_logits(logits: Tensor, log_sum_exp: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """(T, V) scale * (exp(logits - log_sum_exp) - one-hot(targets)), in the type of `logits`; scale is (T,) fp32."""
    rows, vocab_size = logits.shape
    grad_logits = torch.empty_like(logits)
    if native.available(logits):
        native.call("cross_entropy_backward", rows, vocab_size, logits, targets, log_sum_exp, scale, grad_logits)
        return grad_logits
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    buffer = log_sum_exp.new_empty(chunk, vocab_size)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        softmax = buffer[: part.stop - start].copy_(logits[part]).sub_(log_sum_exp[part, None]).exp_()
        softmax.scatter_add_(1, targets[part, None], softmax.new_full((softmax.shape[0], 1), -1.0))
        grad_logits[part] = softmax.mul_(scale[part, None])
    return grad_logits


class _CrossEntropySum(torch.autograd.Function):
    """Sum of log-sum-exp minus target logit. Keeps the logits and one number per row; softmax is recomputed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.contiguous()
        log_sum_exp = _log_sum_exp(logits)
        valid = targets != IGNORE_INDEX
        safe_targets = targets.where(valid, 0)
        target_logits = logits.gather(1, safe_targets[:, None])[:, 0].float()
        ctx.save_for_backward(logits, log_sum_exp, safe_targets, valid)
        return (log_sum_exp - target_logits).where(valid, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, log_sum_exp, targets, valid = ctx.saved_tensors
        return _grad_logits(logits, log_sum_exp, targets, grads[0].float() * valid), None


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
