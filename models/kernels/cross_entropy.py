"""The output head and its cross-entropy in chunks of tokens, so that the logits of a batch are never there at once.

The definition is `models.loss.cross_entropy` of the product. Here the matmuls stay torch's; one Triton kernel
(`cross_entropy_triton.py`) replaces all passes over a chunk of logits by two reads and a write.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.precision import compute_dtype

# Bytes of one chunk of logits. Each chunk adds to the fp32 gradient of the weight, 8 V D bytes of traffic against
# 6 T V D FLOPs: with 4096 tokens (V = 129280 in bf16) by calculation 6 % of their time on an H200 at 790 TFLOP/s and
# 4.2 TB/s. Smaller chunks cost more.
CHUNK_BYTES = 1 << 30
# Rows of a chunk are a multiple of this, where they are more: whole tiles of a matmul.
ROW_TILE = 128


def chunk_rows(vocab_size: int, element_size: int) -> int:
    """Tokens per chunk."""
    rows = max(CHUNK_BYTES // (vocab_size * element_size), 1)
    return rows if rows < ROW_TILE else rows // ROW_TILE * ROW_TILE


@torch.library.custom_op("engram_lab::chunked_cross_entropy", mutates_args=())
def _chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_grad_x: bool, with_grad_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats and their gradients; empty ones where none is asked for. An operator, opaque to torch.compile."""
    from models.kernels.cross_entropy_triton import softmax_cross_entropy_

    losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    grad_x = torch.empty_like(x) if with_grad_x else x.new_empty(0)
    grad_weight = torch.zeros(weight.shape if with_grad_weight else 0, dtype=torch.float32, device=x.device)
    rows = min(chunk_rows(weight.shape[0], x.element_size()), x.shape[0])
    buffer = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        logits = torch.mm(x[part], weight.t(), out=buffer[: x.shape[0] - start])  # (rows, V)
        softmax_cross_entropy_(logits, targets[part], losses[part], ignore_index, with_grad_x or with_grad_weight)
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
    """Add grad_logits^T x to `total` (V, D): factors in their own type, every sum in fp32."""
    if x.dtype == torch.float32:
        total.addmm_(grad_logits.t(), x)
    elif x.is_cuda:
        torch.addmm(total, grad_logits.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad_logits.t().float(), x.float())


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
    """Sum over t of log sum_v exp(z_tv) - z_t,target with z = hidden weight^T, in nats, where Triton can run.

    Logits and their gradient are rounded to the type of the matmuls (autocast's where it is on), exponentials and the
    gradient of the weight are summed in fp32, in a fixed order: the result is the same to the bit from call to call.
    With gradients, 6 T V D FLOPs in the forward pass and none in the backward pass; see `_ChunkedCrossEntropy` for
    what is kept. Beside that a chunk of logits, at most CHUNK_BYTES.

    Args:
        hidden: (T, D), T > 0.
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
