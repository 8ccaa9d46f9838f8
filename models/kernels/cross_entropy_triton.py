"""Softmax cross-entropy of a chunk of logits in Triton; `models.kernels.cross_entropy` multiplies around it."""

import triton
import triton.language as tl
from torch import Tensor

from models.kernels import launch

# Triton types what it compiles by itself.
# mypy: disable-error-code="no-untyped-def"

# Logits that a program handles at a time, and those of one warp among them: two 16-byte loads per lane in bf16.
BLOCK, WARP_COLUMNS = 8192, 512


@triton.jit
def softmax_cross_entropy_kernel(
    logits, targets, losses, vocab_size, IGNORE_INDEX: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One program per row: loss = log sum exp(x) - x[target], then x <- softmax(x) - onehot(target) in place."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab_size
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)
    if target == IGNORE_INDEX:
        tl.store(losses + row, 0.0)
        if WITH_GRADIENT:
            nothing = tl.full((BLOCK,), 0.0, logits.dtype.element_ty)
            for start in range(0, vocab_size, BLOCK):
                tl.store(logits + start + columns, nothing, mask=columns < vocab_size - start)
    else:
        # A target outside the vocabulary gives NaN, which stops the run.
        inside = (target >= 0) & (target < vocab_size)
        target_logit = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
        highest, total = float("-inf"), 0.0  # of the logits so far, and the sum of exp(x - highest)
        for start in range(0, vocab_size, BLOCK):
            x = tl.load(logits + start + columns, mask=columns < vocab_size - start, other=float("-inf"))
            x = x.to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, 0))
            total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
            highest = higher
        tl.store(losses + row, tl.log(total) + (highest - target_logit))
        if WITH_GRADIENT:
            for start in range(0, vocab_size, BLOCK):
                mask = columns < vocab_size - start
                x = tl.load(logits + start + columns, mask=mask, other=float("-inf")).to(tl.float32)
                softmax = tl.exp(x - highest) / total
                gradient = tl.where(start + columns == target, softmax - 1.0, softmax)
                tl.store(logits + start + columns, gradient.to(logits.dtype.element_ty), mask=mask)


def sizes(vocab_size: int) -> dict[str, int]:
    """How the kernel is compiled for rows of `vocab_size` logits."""
    block = min(triton.next_power_of_2(vocab_size), BLOCK)
    return {"BLOCK": block, "num_warps": max(block // WARP_COLUMNS, 1)}


def softmax_cross_entropy_(
    logits: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, with_gradient: bool
) -> None:
    """Fill `losses` and, if asked for, turn the logits into their gradient.

    Args:
        logits: (T, V), contiguous; read twice and written once with the gradient, else read once.
        targets: (T,) int64.
        losses: (T,) fp32, nats; 0 where nothing is to be predicted.
        ignore_index: target of rows without loss; whatever their logits hold, their gradient is 0.
        with_gradient: overwrite the logits with the gradient of the sum of the losses.
    """
    num_tokens, vocab_size = logits.shape
    with launch.device_of(logits):
        softmax_cross_entropy_kernel[(num_tokens,)](
            logits, targets, losses, vocab_size,
            IGNORE_INDEX=ignore_index, WITH_GRADIENT=with_gradient, **sizes(vocab_size),
        )  # fmt: skip
