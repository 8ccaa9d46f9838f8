"""What one writes first for the Engram gate, the head with its loss, and the experts; see `bench_kernels`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.engram import GATE_NORM_EPS
from models.loss import IGNORE_INDEX


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Computed in fp32, as in the models of Hugging Face."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + GATE_NORM_EPS)
    return weight * wide.to(x.dtype)


def gate(hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor) -> Tensor:
    """The equations of `models.kernels.gate.engram_gate` one after the other; arguments and result as there."""
    value, keys = value_keys[..., :1, :], value_keys[..., 1:, :]
    product = rms_norm(hidden, hidden_norm) * rms_norm(keys, key_norm)  # (B, S, J, D)
    similarity = product.sum(-1) / math.sqrt(hidden.shape[-1])
    signed_sqrt = torch.sign(similarity) * torch.sqrt(similarity.abs().clamp_min(1e-6))
    return torch.sigmoid(signed_sqrt)[..., None] * value


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits, in the type of the matmul and again in fp32; arguments and result as in `models.loss`."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def experts_loop(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor) -> Tensor:
    """A loop over the experts with masks and index_add, as the eager experts of Hugging Face (transformers 5).

    Args:
        x: (T, D).
        weights: (T, K) gate values.
        gate_up: (E, 2F, D), as Hugging Face lays it out.
        down: (E, D, F).
        expert_ids: (T, K) int64.

    Returns:
        (T, D).
    """
    out = torch.zeros_like(x)
    chosen = F.one_hot(expert_ids, len(gate_up)).permute(2, 1, 0)  # (E, K, T)
    for expert in torch.greater(chosen.sum(dim=(-1, -2)), 0).nonzero()[:, 0]:
        choice, token = torch.where(chosen[expert])
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        rows = F.linear(F.silu(gate) * up, down[expert]) * weights[token, choice, None]
        out.index_add_(0, token, rows.to(out.dtype))
    return out


def every_expert(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor) -> Tensor:
    """All experts on all tokens, those not chosen with weight 0.

    Arguments and result as in `experts_loop`, but gate_up (E, D, 2F) and down (E, F, D).
    """
    dense = torch.zeros(x.shape[0], len(gate_up), dtype=weights.dtype).scatter(1, expert_ids, weights)  # (T, E)
    gate, up = (x @ gate_up).chunk(2, dim=-1)  # (E, T, F)
    outputs = (F.silu(gate) * up) @ down  # (E, T, D)
    return (outputs * dense.t()[..., None].to(outputs.dtype)).sum(0)
