"""The passes of `gate_triton.py` in plain torch: few over memory, and over parts that stay in the cache.

Autograd over the definition makes and keeps about ten tensors of the size of the residual branches; here the inputs
and three numbers per row are kept, as by the kernels.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Values of hidden handled at a time on a CPU: 1 MiB in fp32, of the size of a second-level cache. Measured at J = 4,
# D = 512: a quarter, once and four times this take 1.08, 1 and 1.15 of the time, all at once 1.4.
CHUNK_ELEMENTS = 1 << 18
# Below this similarity the square root of the gate is held fixed; see `gate.signed_sqrt_gate`.
LEAST_SIMILARITY = 1e-6


def _parts(hidden: Tensor) -> Iterator[slice]:
    """Runs of tokens, all at once off the CPU."""
    num_tokens = hidden.shape[0]
    rows = max(CHUNK_ELEMENTS // hidden[0].numel(), 1) if hidden.device.type == "cpu" else num_tokens
    return (slice(start, start + rows) for start in range(0, num_tokens, rows))


def _inverse_norm(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis."""
    return torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def forward(
    hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor, eps: float, residual: bool, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill `out`; returns the gates (T, J) and, per row, inverse norms and similarity (T, J, 3), both fp32.

    Args:
        hidden: (T, J, D).
        value_keys: (T, 1 + J, D).
        hidden_norm: (J, D).
        key_norm: (J, D).
        eps: added to the mean squares.
        residual: add the hidden state.
        out: (T, J, D).
    """
    weight = hidden_norm.float() * key_norm.float()
    statistics = torch.empty(*hidden.shape[:2], 3, dtype=torch.float32, device=hidden.device)
    gates = torch.empty_like(statistics[..., 0])
    for part in _parts(hidden):
        x, value, keys = hidden[part].float(), value_keys[part, :1].float(), value_keys[part, 1:].float()
        of_hidden, of_keys = _inverse_norm(x, eps), _inverse_norm(keys, eps)
        similarity = (x * weight).mul_(keys).sum(-1).mul_(of_hidden).mul_(of_keys).div_(math.sqrt(x.shape[-1]))
        torch.stack((of_hidden, of_keys, similarity), -1, out=statistics[part])
        root = similarity.abs().clamp_min_(LEAST_SIMILARITY).sqrt_()
        torch.sigmoid(root.mul_(similarity.sign()), out=gates[part])
        update = gates[part][..., None] * value
        out[part] = update.add_(x) if residual else update
    return gates, statistics


def backward(
    grad_out: Tensor, grad_gates: Tensor, hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor,
    statistics: Tensor, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden and value_keys, and that of the product of the two norm weights (J, D) in fp32.

    With s = inverse norms * <h w, k> / sqrt(D): ds/dh = c w k - s r_h^2 h / D, where c is s over the dot product and
    r_h the inverse norm of h; ds/dk likewise, ds/dw = c h k.
    """
    weight, width = hidden_norm.float() * key_norm.float(), hidden.shape[-1]
    grad_hidden, grad_value_keys = torch.empty_like(hidden), torch.empty_like(value_keys)
    grad_weight = torch.zeros_like(weight)
    for part in _parts(hidden):
        x, value, keys = hidden[part].float(), value_keys[part, :1].float(), value_keys[part, 1:].float()
        grad, (of_hidden, of_keys, similarity) = grad_out[part].float(), statistics[part].unbind(-1)
        magnitude = similarity.abs()
        root = magnitude.clamp_min(LEAST_SIMILARITY).sqrt_()
        signed = root * similarity.sign()
        gate, shut = torch.sigmoid(signed), torch.sigmoid(-signed)  # 1 - gate would lose digits of an open gate
        slope = (gate * shut * 0.5 / root).where(~(magnitude < LEAST_SIMILARITY), 0.0)
        grad_similarity = (grad * value).sum(-1).add_(grad_gates[part]).mul_(slope)  # (t, J)
        grad_value_keys[part, :1] = (grad * gate[..., None]).sum(1, keepdim=True)
        scale = (grad_similarity * of_hidden * of_keys / math.sqrt(width))[..., None]
        along = grad_similarity * similarity / -width
        product = x * keys
        grad_weight += product.mul_(scale).sum(0)
        scaled = scale * weight
        grad_keys = (scaled * x).addcmul_(keys, (along * of_keys.square())[..., None])
        grad_x = scaled.mul_(keys).addcmul_(x, (along * of_hidden.square())[..., None])
        grad_value_keys[part, 1:] = grad_keys
        grad_hidden[part] = grad_x.add_(grad) if residual else grad_x
    return grad_hidden, grad_value_keys, grad_weight
