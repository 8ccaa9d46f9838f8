"""The Engram gate: both norms, their dot product, signed square root, sigmoid, and the value scaled by it, in one pass.

The definition needs about ten passes over tensors of the size of the residual branches, the kernels
(`gate_triton.py`) one forward and one backward, so their speed is that of the memory; see `bytes_moved`. Where they
cannot run, `gate_torch.py` does the same in plain torch, part by part.
"""

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.kernels import gate_torch, launch

# Widest row that the kernels keep in registers.
MAX_WIDTH = 4096


def signed_sqrt_gate(similarity: Tensor) -> Tensor:
    """sigmoid( sign(s) * sqrt(max(|s|, 1e-6)) ).

    The signed square root is not in the paper's eq 4 but in both official codes; the clamp keeps its slope finite.
    """
    return (similarity.sign() * similarity.abs().clamp_min(1e-6).sqrt()).sigmoid()


def engram_gate_definition(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool = False
) -> tuple[Tensor, Tensor]:
    """What `engram_gate` computes, as its equations say it."""
    width, branches = hidden.shape[-1], hidden.shape[-2]
    value, keys = value_keys.split((1, branches), dim=-2)  # (B, S, 1, D), (B, S, J, D)
    query = F.rms_norm(hidden, (width,), eps=eps) * (hidden_norm * key_norm)
    similarity = (query * F.rms_norm(keys, (width,), eps=eps)).sum(-1) / math.sqrt(width)
    gate = signed_sqrt_gate(similarity)  # (B, S, J)
    update = gate[..., None] * value  # (B, S, J, D)
    return (hidden + update if residual else update), gate


def _kernel_runs(hidden: Tensor) -> bool:
    return launch.can_run(hidden) and hidden.shape[-1] <= MAX_WIDTH


def _passes(hidden: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run where `hidden` is."""
    if _kernel_runs(hidden):
        from models.kernels import gate_triton

        return gate_triton
    return gate_torch


@torch.library.custom_op("engram_lab::gate_forward", mutates_args=())
def _gate_forward(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gates and statistics; an operator of its own, so that torch.compile need not look inside."""
    out = torch.empty_like(hidden, dtype=_out_dtype(hidden, value_keys, hidden_norm, key_norm))
    return out, *_passes(hidden).forward(hidden, value_keys, hidden_norm, key_norm, eps, residual, out)


@_gate_forward.register_fake
def _(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gates = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    out = torch.empty_like(hidden, dtype=_out_dtype(hidden, value_keys, hidden_norm, key_norm))
    return out, gates, gates.new_empty(*hidden.shape[:2], 3)


@torch.library.custom_op("engram_lab::gate_backward", mutates_args=())
def _gate_backward(
    grad_out: Tensor, grad_gates: Tensor, hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor,
    statistics: Tensor, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = (hidden, value_keys, hidden_norm, key_norm)
    grads: tuple[Tensor, Tensor, Tensor] = _passes(hidden).backward(grad_out, grad_gates, *inputs, statistics, residual)
    return grads


@_gate_backward.register_fake
def _(
    grad_out: Tensor, grad_gates: Tensor, hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor,
    statistics: Tensor, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = torch.empty_like(hidden_norm, dtype=torch.float32)
    return torch.empty_like(hidden), torch.empty_like(value_keys), weights


def _out_dtype(*inputs: Tensor) -> torch.dtype:
    """What torch's promotion gives in the definition."""
    dtype = inputs[0].dtype
    for tensor in inputs[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class _EngramGate(torch.autograd.Function):
    """Keeps its inputs and three numbers per row: the two inverse norms and the similarity."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, value_keys, hidden_norm, key_norm)
        out, gates, statistics = _gate_forward(*inputs, eps, residual)
        ctx.save_for_backward(*inputs, statistics)
        ctx.residual = residual
        return out, gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        grad_out, grad_gates = (grad.contiguous() for grad in grads)
        grad_hidden, grad_value_keys, grad_weights = _gate_backward(
            grad_out, grad_gates, *inputs, statistics, ctx.residual
        )
        _, _, hidden_norm, key_norm = inputs
        norms = ((grad_weights * key_norm).to(hidden_norm.dtype), (grad_weights * hidden_norm).to(key_norm.dtype))
        return grad_hidden, grad_value_keys, *norms, None, None


def engram_gate(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool = False
) -> tuple[Tensor, Tensor]:
    """out_j = [h_j +] gate_j v with gate_j = signed_sqrt_gate( <norm(h_j), norm(k_j)> / sqrt(D) ).

    Engram, arXiv 2601.07372, eqs 4 and 6, with the signed square root of the official codes. `norm` is RMSNorm with
    the branch's weights. On a GPU with Triton one kernel per direction, in fp32 inside, whose result is the same to the
    bit from call to call on one kind of device; elsewhere, and for D above MAX_WIDTH, the same passes in plain torch.
    The definition runs for types other than fp32 and bf16, and where torch.compile fuses it without Triton kernels.

    Args:
        hidden: (B, S, J, D).
        value_keys: (B, S, 1 + J, D), the value of all branches and then a key per branch, as one projection gives
            them: its gradient needs no concatenation.
        hidden_norm: (J, D), weights of the norm of the hidden state.
        key_norm: (J, D), weights of the norm of the keys.
        eps: added to the mean squares.
        residual: add the hidden state, for a module without convolution.

    Returns:
        (B, S, J, D) in the type that torch's promotion of all inputs gives, and the gates (B, S, J) in (0, 1), fp32
        unless the definition ran.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    branches, width = hidden.shape[-2:]
    shapes = (tuple(value_keys.shape), tuple(hidden_norm.shape), tuple(key_norm.shape))
    expected = ((*hidden.shape[:-2], 1 + branches, width), (branches, width), (branches, width))
    if shapes != expected:
        raise ValueError(f"value_keys, hidden_norm and key_norm have shapes {shapes}, must have {expected}")
    tensors = (hidden, value_keys, hidden_norm, key_norm)
    other_type = any(tensor.dtype not in launch.DTYPES for tensor in tensors)
    if other_type or hidden.numel() == 0 or (torch.compiler.is_compiling() and not _kernel_runs(hidden)):
        return engram_gate_definition(hidden, value_keys, hidden_norm, key_norm, eps, residual)
    flat = (hidden.flatten(0, -3).contiguous(), value_keys.flatten(0, -3).contiguous())  # (T, J, D), (T, 1 + J, D)
    out, gates = _EngramGate.apply(*flat, hidden_norm.contiguous(), key_norm.contiguous(), eps, residual)
    return out.view(hidden.shape), gates.view(hidden.shape[:-1])


def bytes_moved(hidden: Tensor, value_keys: Tensor, out: Tensor) -> tuple[int, int]:
    """Bytes that one forward and one backward pass of the kernels must at least read and write.

    Forward: hidden, value_keys and the output once each. Backward: these three (the last one's gradient) are read, and
    the gradients of the first two are written. Weights and the numbers per row are below 1 % and not counted.
    """
    inputs = hidden.nbytes + value_keys.nbytes
    return inputs + out.nbytes, 2 * inputs + out.nbytes
