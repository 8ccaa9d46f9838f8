"""Grouped-query causal attention with rotary positions, masked at document boundaries."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import native
from models.norm import RMSNorm
from models.rotary import RotaryConfig, rotary_tables, rotate, softmax_scale
from models.softmax_attention import CausalMask, masked_attention


@dataclass
class AttentionConfig:
    """Shape of one attention layer (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245)."""

    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads; each serves num_heads / num_kv_heads query heads
    head_dim: int = 32  # width of one head; even, because rotary positions turn pairs of coordinates
    qk_norm: bool = False  # RMSNorm on every query and key head before the rotation

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.attention.{name}={getattr(self, name)} must be at least 1; nearest: 1")
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_kv_heads))
            raise ValueError(
                f"model.attention.num_kv_heads={self.num_kv_heads} must divide "
                f"model.attention.num_heads={self.num_heads}; "
                f"nearest: {nearest}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.attention.head_dim={self.head_dim} must be even, because rotary positions turn pairs of "
                f"coordinates; nearest: {self.head_dim + 1}"
            )


class _SplitHeads(torch.autograd.Function):
    """The native path of `Attention._split`: norm, rotation and the change of layout in one pass each way."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        query_weight: Tensor | None,
        key_weight: Tensor | None,
        tables: Tensor,
        num_heads: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, seq_len, all_heads, width = heads.shape
        num_kv_heads = (all_heads - num_heads) // 2
        heads, (cos, sin) = heads.contiguous(), tables
        ctx.sizes = (batch, seq_len, num_heads, num_kv_heads, width)
        query = heads.new_empty(batch, num_heads, seq_len, width)
        key, value = heads.new_empty(2, batch, num_kv_heads, seq_len, width)
        inverse = tables.new_empty(batch, seq_len, num_heads + num_kv_heads)  # 1 / rms of every head
        native.call(
            "split_heads_forward", *ctx.sizes, float(eps), heads, query_weight, key_weight, cos, sin, query, key, value,
            inverse,
        )  # fmt: skip
        ctx.save_for_backward(heads, query_weight, key_weight, cos, sin, inverse)
        return query, key, value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
        grad_heads = torch.empty_like(saved[0])
        grad_weights = [None if weight is None else torch.empty_like(weight) for weight in saved[1:3]]
        grads = tuple(grad.contiguous() for grad in grads)
        native.call("split_heads_backward", *ctx.sizes, *saved, *grads, grad_heads, *grad_weights)
        return grad_heads, *grad_weights, None, None, None


class Attention(nn.Module):
    """softmax(q k^T * scale + mask) v over grouped heads, then the output projection; no biases.

    Args:
        cfg: the layer's shape.
        rotary: positions; all C coordinates of a head are turned.
        d_model: D.
        seq_len: longest sequence.
        norm_eps: of the norms of queries and keys.
    """

    rotary: Tensor

    def __init__(self, cfg: AttentionConfig, rotary: RotaryConfig, d_model: int, seq_len: int, norm_eps: float):
        super().__init__()
        self.cfg = cfg
        self.norm_eps = norm_eps
        num_heads_in = cfg.num_heads + 2 * cfg.num_kv_heads
        self.qkv = nn.Linear(d_model, num_heads_in * cfg.head_dim, bias=False)  # rows: queries, keys, values
        self.output = nn.Linear(cfg.num_heads * cfg.head_dim, d_model, bias=False)
        self.query_norm = RMSNorm(cfg.head_dim, norm_eps) if cfg.qk_norm else None
        self.key_norm = RMSNorm(cfg.head_dim, norm_eps) if cfg.qk_norm else None
        self.register_buffer("rotary", rotary_tables(seq_len, cfg.head_dim, rotary), persistent=False)
        self.scale = softmax_scale(cfg.head_dim, rotary)

    def forward(self, x: Tensor, mask: CausalMask) -> Tensor:
        """Attention of every position to the earlier ones of its document.

        Args:
            x: (B, S, D).
            mask: from `causal_mask`.

        Returns:
            (B, S, D).
        """
        batch, seq_len, _ = x.shape
        heads = self.qkv(x).view(batch, seq_len, -1, self.cfg.head_dim)  # (B, S, H + 2 H_kv, C)
        query, key, value = self._split(heads)
        attended = masked_attention(query, key, value, mask, self.scale)  # (B, S, H, C)
        return self.output(attended.flatten(2))  # (B, S, D)

    def _split(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and turned queries (B, H, S, C) and keys (B, H_kv, S, C), and values like the keys."""
        cfg = self.cfg
        seq_len = heads.shape[1]
        tables = self.rotary[:, :seq_len]
        weights = [None if norm is None else norm.weight for norm in (self.query_norm, self.key_norm)]
        in_fp32 = all(tensor is None or tensor.dtype == torch.float32 for tensor in (*weights, tables))
        if native.available(heads) and in_fp32:
            return _SplitHeads.apply(heads, *weights, tables, cfg.num_heads, self.norm_eps)
        query_key, value = heads.split((cfg.num_heads + cfg.num_kv_heads, cfg.num_kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split((cfg.num_heads, cfg.num_kv_heads), dim=2)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=2).to(value.dtype)
        query_key = rotate(query_key, tables)
        query, key = query_key.split((cfg.num_heads, cfg.num_kv_heads), dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
