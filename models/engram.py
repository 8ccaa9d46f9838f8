"""Engram: n-gram memory rows, gated by the hidden state (arXiv 2601.07372)."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.kernels.gate import engram_gate
from models.ngram_hash import NgramRows

# Epsilon of the two norms in the gate: torch's default in fp32, which the demonstration code leaves in place.
GATE_NORM_EPS = torch.finfo(torch.float32).eps


@dataclass
class EngramConfig(NgramRows):
    """Shape of the Engram modules and their tables (paper 2.2 to 2.4; symbols of the paper in brackets)."""

    layers: list[int] = field(default_factory=lambda: [1])  # 0-based layers that get a module and a table
    max_ngram_size: int = 3  # orders 2..max_ngram_size are looked up [N]; also the dilation of the convolution
    num_hash_heads: int = 4  # hash heads per order [K]
    d_memory: int = 128  # width of all rows of a token together [d_mem]
    table_size: int = 10_000  # rows per head before rounding up to a prime; 1 = one row per head (control)
    kernel_size: int = 4  # taps of the short convolution [w]; 0 = no convolution, as in later production models
    hash_seed: int = 0  # seed of the hash multipliers
    use_bias: bool = False  # biases in the projections, as in the demonstration code; shipped models have none
    norm_eps: float = 1e-5  # epsilon of the norm before the convolution
    compress: bool = True  # n-grams of normalised text; False: of the tokens themselves (ablation, paper 6.2)
    gate: bool = True  # False: the value is added whatever the hidden state is, no keys (ablation, paper 6.2)
    shuffled: bool = False  # each sequence reads its neighbour's rows (control); see `NgramHasher`
    multi_branch: bool = True  # an own gate for every residual stream (eq 6); False: see models/transformer.py, Block

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers) < 0:
            raise ValueError(
                f"model.engram.layers={self.layers} must name at least one layer, each once, counted from 0; "
                "for a model without memory set engram to null"
            )
        self.check_rows("engram")
        if self.kernel_size < 0:
            raise ValueError(f"model.engram.kernel_size={self.kernel_size} must be at least 0; nearest: 0")
        if self.kernel_size == 0 and self.norm_eps != EngramConfig.norm_eps:
            raise ValueError(
                f"model.engram.norm_eps={self.norm_eps} has no effect with model.engram.kernel_size=0: it belongs "
                "to the norm "
                f"before the convolution; nearest: {EngramConfig.norm_eps}"
            )


class EngramOutput(NamedTuple):
    """What one module adds to the residual branches, and how far its gates were open."""

    update: Tensor  # (B, S, J, D)
    gate: Tensor | None  # (B, S, J), in (0, 1); None without a gate


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
    branch has its own key projection and norms. The paper's ablations (6.2): without gate, gate_j = 1 and there are
    neither keys nor their norms; without convolution (kernel_size = 0), update_j = gate_j v.

    Args:
        cfg: shape of rows and convolution.
        d_model: D.
        layer: 0-based layer of this module.
        num_branches: J, residual branches (1 for the plain residual).
    """

    def __init__(self, cfg: EngramConfig, d_model: int, layer: int, num_branches: int = 1):
        super().__init__()
        self.layer, self.d_model, self.num_branches = layer, d_model, num_branches
        # Rows: the value first, then the keys of the branches, where there is a gate; one matmul for all.
        num_keys = num_branches if cfg.gate else 0
        self.value_key = nn.Linear(cfg.d_memory, (1 + num_keys) * d_model, bias=cfg.use_bias)
        self.hidden_norm = nn.Parameter(torch.empty(num_branches, d_model)) if cfg.gate else None
        self.key_norm = nn.Parameter(torch.empty(num_branches, d_model)) if cfg.gate else None
        self.short_conv = ShortConv(cfg, d_model, num_branches) if cfg.kernel_size else None

    def forward(self, hidden: Tensor, rows: Tensor, document_ids: Tensor | None = None) -> EngramOutput:
        """What the memory rows of each position add to its residual branches.

        Args:
            hidden: (B, S, J, D).
            rows: (B, S, R, M), the retrieved rows.
            document_ids: (B, S) int64, or None for one document per row.
        """
        value_keys = self.value_key(rows.flatten(2)).unflatten(-1, (-1, self.d_model))  # (B, S, 1 + J, D), or 1
        gate = None
        if self.hidden_norm is None or self.key_norm is None:
            update = value_keys.expand(-1, -1, self.num_branches, -1)
        else:
            update, gate = engram_gate(hidden, value_keys, self.hidden_norm, self.key_norm, GATE_NORM_EPS)
        if self.short_conv is not None:
            update = self.short_conv(update, document_ids)
        return EngramOutput(update, gate)
