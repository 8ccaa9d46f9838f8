"""Engram: n-gram memory rows, gated by the hidden state (arXiv 2601.07372)."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Epsilon of the two norms in the gate: torch's default in fp32, which the demonstration code leaves in place.
GATE_NORM_EPS = torch.finfo(torch.float32).eps


@dataclass
class EngramConfig:
    """Shape of the Engram modules and their tables (paper 2.2 to 2.4; symbols of the paper in brackets)."""

    layers: list[int] = field(default_factory=lambda: [1])  # 0-based layers that get a module and a table
    max_ngram_size: int = 3  # orders 2..max_ngram_size are looked up [N]; also the dilation of the convolution
    num_hash_heads: int = 4  # hash heads per order [K]
    d_memory: int = 128  # width of all rows of a token together [d_mem]
    table_size: int = 10_000  # rows per head before rounding up to a prime; 1 = one row per head (control)
    kernel_size: int = 4  # taps of the short convolution [w]
    hash_seed: int = 0  # seed of the hash multipliers
    use_bias: bool = False  # biases in the projections, as in the demonstration code; shipped models have none
    norm_eps: float = 1e-5  # epsilon of the norm before the convolution

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(
                f"engram.layers={self.layers} must name at least one layer, each once, counted from 0; "
                "for a model without memory set engram to null"
            )
        for name, least in (("max_ngram_size", 2), ("num_hash_heads", 1), ("table_size", 1), ("kernel_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"engram.{name}={getattr(self, name)} must be at least {least}; nearest: {least}")
        if self.d_memory < 1 or self.d_memory % self.num_rows_per_token:
            unit = self.num_rows_per_token
            raise ValueError(
                f"engram.d_memory={self.d_memory} must be a positive multiple of (max_ngram_size - 1) * "
                f"num_hash_heads = {unit}; nearest: {max(unit, round(self.d_memory / unit) * unit)}"
            )

    @property
    def num_orders(self) -> int:
        """N: number of n-gram orders, 2..max_ngram_size."""
        return self.max_ngram_size - 1

    @property
    def num_rows_per_token(self) -> int:
        """R = N * G: table rows read per token and Engram layer."""
        return self.num_orders * self.num_hash_heads

    @property
    def row_dim(self) -> int:
        """M: width of one row, d_memory / R."""
        return self.d_memory // self.num_rows_per_token


class EngramOutput(NamedTuple):
    """What one module adds to the residual branches, and how far its gates were open."""

    update: Tensor  # (B, S, J, D)
    gate: Tensor  # (B, S, J), in (0, 1)


def signed_sqrt_gate(similarity: Tensor) -> Tensor:
    """sigmoid( sign(s) * sqrt(max(|s|, 1e-6)) ).

    The signed square root is not in the paper's eq 4 but in both official codes; the clamp keeps its slope finite.
    """
    return (similarity.sign() * similarity.abs().clamp_min(1e-6).sqrt()).sigmoid()


class ShortConv(nn.Module):
    """silu( depthwise causal convolution of RMSNorm(v) ) + v, eq 5, never reading across a document's start.

    Tap i looks i * dilation positions back. The taps start at zero, which leaves the module the identity.
    """

    def __init__(self, cfg: EngramConfig, d_model: int, num_branches: int):
        super().__init__()
        self.kernel_size, self.dilation, self.eps = cfg.kernel_size, cfg.max_ngram_size, cfg.norm_eps
        self.norm = nn.Parameter(torch.empty(num_branches, d_model))
        # (w, J, D); the last tap is the current position, as in torch's Conv1d
        self.taps = nn.Parameter(torch.empty(cfg.kernel_size, num_branches, d_model))

    def forward(self, values: Tensor, document_ids: Tensor | None) -> Tensor:
        """Args: values (B, S, J, D), document_ids (B, S) or None for one document per row."""
        seq_len, width = values.shape[1], values.shape[-1]
        normed = F.rms_norm(values, (width,), eps=self.eps) * self.norm
        mixed = normed * self.taps[-1]
        for back in range(1, self.kernel_size):
            distance = back * self.dilation
            if distance >= seq_len:
                break
            tap = self.taps[-1 - back] * normed[:, :-distance]  # (B, S - distance, J, D)
            if document_ids is not None:
                same_document = document_ids[:, distance:] == document_ids[:, :-distance]
                tap = tap * same_document[:, :, None, None]
            mixed = mixed + F.pad(tap, (0, 0, 0, 0, distance, 0))
        return F.silu(mixed) + values


class Engram(nn.Module):
    """update_j = ShortConv(gate_j v) with gate_j = signed_sqrt_gate( <norm(h_j), norm(k_j)> / sqrt(D) ), eqs 3 to 6.

    v = W e and k_j = W_j e are projections of the retrieved rows e. One value projection serves all branches, each
    branch has its own key projection and norms.

    Args:
        cfg: shape of rows and convolution.
        d_model: D.
        layer: 0-based layer of this module.
        num_branches: J, residual branches (1 for the plain residual).
    """

    def __init__(self, cfg: EngramConfig, d_model: int, layer: int, num_branches: int = 1):
        super().__init__()
        self.layer, self.d_model, self.num_branches = layer, d_model, num_branches
        # Rows: the value first, then the keys of the branches; one matmul for all.
        self.value_key = nn.Linear(cfg.d_memory, (1 + num_branches) * d_model, bias=cfg.use_bias)
        self.hidden_norm = nn.Parameter(torch.empty(num_branches, d_model))
        self.key_norm = nn.Parameter(torch.empty(num_branches, d_model))
        self.short_conv = ShortConv(cfg, d_model, num_branches)

    def forward(self, hidden: Tensor, rows: Tensor, document_ids: Tensor | None = None) -> EngramOutput:
        """What the memory rows of each position add to its residual branches.

        Args:
            hidden: (B, S, J, D).
            rows: (B, S, R, M), the retrieved rows.
            document_ids: (B, S) int64, or None for one document per row.
        """
        value, keys = self.value_key(rows.flatten(2)).split((self.d_model, self.num_branches * self.d_model), dim=-1)
        keys = keys.unflatten(-1, (self.num_branches, self.d_model))  # (B, S, J, D)
        shape = (self.d_model,)
        query = F.rms_norm(hidden, shape, eps=GATE_NORM_EPS) * (self.hidden_norm * self.key_norm)
        similarity = (query * F.rms_norm(keys, shape, eps=GATE_NORM_EPS)).sum(-1) / math.sqrt(self.d_model)
        gate = signed_sqrt_gate(similarity)  # (B, S, J)
        update = self.short_conv(gate[..., None] * value[:, :, None], document_ids)
        return EngramOutput(update, gate)
