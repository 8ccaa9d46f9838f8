"""The output head and its cross-entropy in chunks of tokens, so that the logits of a batch are never there at once.

The definition is `models.loss.cross_entropy` of the product. The matmuls are torch's everywhere; where Triton can run,
one kernel (`cross_entropy_triton.py`) replaces all passes over a chunk of logits by two reads and a write, elsewhere
`softmax_cross_entropy` makes them in plain torch.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.kernels import launch
from models.precision import compute_dtype

# Bytes of one chunk of logits. Each chunk adds to the fp32 gradient of the weight, 8 V D bytes of traffic against
# 6 T V D FLOPs: with 4096 tokens (V = 129280 in bf16) by calculation 6 % of their time on an H200 at 790 TFLOP/s and
# 4.2 TB/s. Smaller chunks cost more.
CHUNK_BYTES = 1 << 30
# Rows of a chunk are a multiple of this, where they are more: whole tiles of a matmul.
ROW_TILE = 128
# Tokens of a chunk on a CPU. Measured on one thread of an EPYC (V = 4096 and 32768, both types): 512 are as fast as or
# faster than 256, which are up to a third faster than 64.
CPU_ROWS = 512


def chunk_rows(vocab_size: int, element_size: int) -> int:
    """Tokens per chunk on a GPU."""
    rows = max(CHUNK_BYTES // (vocab_size * element_size), 1)
    return rows if rows < ROW_TILE else rows // ROW_TILE * ROW_TILE


def _chunk_rows(x: Tensor, vocab_size: int) -> int:
    """Tokens per chunk where `x` is; without the kernel, logits and softmax are there in fp32 as well."""
    if launch.can_run(x):
        rows = chunk_rows(vocab_size, x.element_size())
    else:
        rows = chunk_rows(vocab_size, x.element_size() + 2 * torch.float32.itemsize) if x.is_cuda else CPU_ROWS
    return max(min(rows, x.shape[0]), 1)


def softmax_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """What `cross_entropy_triton.softmax_cross_entropy_` computes, in plain torch.

    Args:
        logits: (T, V).
        targets: (T,) int64; outside the vocabulary the loss is NaN.
        ignore_index: target of rows without loss; whatever their logits hold, their gradient is 0.
        with_gradient: compute the gradient as well.

    Returns:
        (T,) fp32, log sum_v exp(z_tv) - z_t,target in nats; (T, V) softmax(z) - onehot(target) in the type of `logits`,
        or `logits` unchanged if no gradient is asked for.
    """
    predicted, inside = targets != ignore_index, (targets >= 0) & (targets < logits.shape[1])
    column = targets.where(inside, 0)[:, None]
    target_logit, highest = logits.gather(1, column)[:, 0].float(), logits.amax(1).float()
    softmax = torch.softmax(logits, 1, dtype=torch.float32)
    # The highest logit's softmax is at least 1 / V, so that its logarithm loses nothing; the target's may underflow.
    losses = highest - softmax.amax(1).log() - target_logit
    losses = losses.where(inside, math.nan).where(predicted, 0.0)
    if not with_gradient:
        return losses, logits
    softmax.scatter_(1, column, softmax.gather(1, column) - 1.0)
    softmax.index_fill_(0, (~predicted).nonzero()[:, 0], 0.0)  # a product with 0 would keep what is not finite
    return losses, softmax.to(logits.dtype)


@torch.library.custom_op("engram_lab::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad_x: bool, with_grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats and their gradients; empty ones where none is asked for. An operator, opaque to torch.compile."""
    kernel_runs = launch.can_run(x)
    if kernel_runs:
        from models.kernels.cross_entropy_triton import softmax_cross_entropy_

    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if with_grad_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if with_grad_weight else 0, dtype=torch.float32, device=x.device)
    rows = _chunk_rows(x, weight.shape[0])
    with_gradient = with_grad_x or with_grad_weight
    buffer = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        logits = torch.mm(x[part], weight.t(), out=buffer[: x.shape[0] - start])  # (rows, V), from here their gradient
        if kernel_runs:
            softmax_cross_entropy_(logits, targets[part], losses[part], ignore_index, with_gradient)
        else:
            losses[part], logits = softmax_cross_entropy(logits, targets[part], ignore_index, with_gradient)
        if with_grad_x:
            torch.mm(logits, weight, out=grad_x[part])
        if with_grad_weight:
            _add_product(grad_weight, logits, x[part])
    return losses.sum(), grad_x, grad_weight


@_chunked_cross_entropy.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad_x: bool, with_grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x) if with_grad_x else x.new_empty(0)
    grad_weight = x.new_empty(weight.shape if with_grad_weight else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), grad_x, grad_weight


def _add_product(total: Tensor, grad_logits: Tensor, x: Tensor) -> None:
    """Add grad_logits^T x to `total` (V, D): factors in their own type, every sum in fp32.

    On a CPU, whose bf16 matmuls have no fp32 result, the product of a chunk is rounded once on its way.
    """
    if x.dtype == torch.float32:
        total.addmm_(grad_logits.t(), x)
    elif x.is_cuda:
        torch.addmm(total, grad_logits.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.add_(grad_logits.t() @ x)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass and scales them in the backward pass.

    Keeps the gradient of hidden (T, D) in the type of the matmuls, and that of the weight (V, D) in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype, grad: bool
    ) -> Tensor:
        x, matrix = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
        wanted = (grad and ctx.needs_input_grad[0], grad and ctx.needs_input_grad[1])
        nats, *grads = _chunked_cross_entropy(x, matrix, targets.contiguous(), ignore_index, *wanted)
        ctx.save_for_backward(*grads)
        ctx.wanted, ctx.dtypes = wanted, (hidden.dtype, weight.dtype)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Of one dimension: a scalar would be rounded to the type of `kept`, and all gradients be off by one factor.
        scale = grads[0].view(1)
        scaled = (
            torch.mul(kept, scale, out=torch.empty_like(kept, dtype=dtype)) if wanted else None
            for kept, wanted, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum over t of log sum_v exp(z_tv) - z_t,target with z = hidden weight^T, in nats.

    Logits and their gradient are rounded to the type of the matmuls (autocast's where it is on), exponentials and the
    gradient of the weight are summed in fp32, in a fixed order: the result is the same to the bit from call to call.
    With gradients, 6 T V D FLOPs in the forward pass and none in the backward pass; see `_ChunkedCrossEntropy` for
    what is kept. Beside that a chunk of logits, at most CHUNK_BYTES on a GPU and CPU_ROWS tokens on a CPU.

    Args:
        hidden: (T, D).
        weight: (V, D).
        targets: (T,) int64; outside the vocabulary the sum is NaN.
        ignore_index: target of the rows where nothing is to be predicted.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if hidden.dim() != 2 or weight.shape[1:] != hidden.shape[1:] or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} must have "
            "shapes (T, D), (V, D) and (T,)"
        )
    return _ChunkedCrossEntropy.apply(
        hidden, weight, targets, ignore_index, compute_dtype(hidden), torch.is_grad_enabled()
    )


def bytes_moved(num_tokens: int, vocab_size: int, element_size: int, with_gradient: bool) -> int:
    """Bytes that the softmax kernel reads and writes for all chunks: three times the logits with the gradient, or one.

    The second read may come from the second-level cache.
    """
    return num_tokens * vocab_size * element_size * (3 if with_gradient else 1)
