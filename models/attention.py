"""Grouped-query causal attention with rotary positions, masked at document boundaries."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class AttentionConfig:
    """Shape of one attention layer (grouped-query attention, Ainslie et al. 2023, arXiv 2305.13245)."""

    num_heads: int = 4  # query heads
    num_kv_heads: int = 2  # key and value heads; each serves num_heads / num_kv_heads query heads
    head_dim: int = 32  # width of one head; even, because rotary positions turn pairs of coordinates
    qk_norm: bool = False  # RMSNorm on every query and key head before the rotation
    rope_theta: float = 10_000.0  # base of the rotary wavelengths, in positions (Su et al. 2021, arXiv 2104.09864)

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"attention.{name}={getattr(self, name)} must be at least 1; nearest: 1")
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            nearest = min(divisors, key=lambda n: abs(n - self.num_kv_heads))
            raise ValueError(
                f"attention.num_kv_heads={self.num_kv_heads} must divide attention.num_heads={self.num_heads}; "
                f"nearest: {nearest}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"attention.head_dim={self.head_dim} must be even, because rotary positions turn pairs of "
                f"coordinates; nearest: {self.head_dim + 1}"
            )
        if self.rope_theta <= 0:
            raise ValueError(f"attention.rope_theta={self.rope_theta} must be positive; usual: 10000.0")


def attention_mask(document_ids: Tensor) -> Tensor:
    """Which positions see which: mask[b, 0, t, s] is True where s <= t and both are of the same document.

    Args:
        document_ids: (B, S) int64, equal within a document.

    Returns:
        (B, 1, S, S) bool; the second axis broadcasts over heads.
    """
    seq_len = document_ids.shape[1]
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=document_ids.device).tril()
    same_document = document_ids[:, :, None] == document_ids[:, None, :]
    return (same_document & causal)[:, None]  # (B, 1, S, S)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """cos and sin of position * theta^(-2i / C) for i < C / 2 (arXiv 2104.09864, eq 15).

    Returns:
        (2, S, C / 2) fp32: cosines, then sines.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)  # (S, C/2)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair (x_i, x_{i + C/2}) of every head by its position's i-th angle.

    The halves are paired as in the released Llama and DeepSeek checkpoints of Hugging Face, not neighbours as in the
    paper; the two differ by a fixed permutation of the head's coordinates.

    Args:
        x: (B, S, H, C).
        cos: (S, 1, C / 2), in the type of `x` or fp32.
        sin: like `cos`.

    Returns:
        (B, S, H, C) in the type of `x`.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C) + mask) v over grouped heads, then the output projection; no biases."""

    rotary: Tensor

    def __init__(self, cfg: AttentionConfig, d_model: int, seq_len: int, norm_eps: float):
        super().__init__()
        self.cfg = cfg
        num_heads_in = cfg.num_heads + 2 * cfg.num_kv_heads
        self.qkv = nn.Linear(d_model, num_heads_in * cfg.head_dim, bias=False)  # rows: queries, keys, values
        self.output = nn.Linear(cfg.num_heads * cfg.head_dim, d_model, bias=False)
        self.query_norm = nn.RMSNorm(cfg.head_dim, eps=norm_eps) if cfg.qk_norm else None
        self.key_norm = nn.RMSNorm(cfg.head_dim, eps=norm_eps) if cfg.qk_norm else None
        self.register_buffer("rotary", rotary_tables(seq_len, cfg.head_dim, cfg.rope_theta), persistent=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attention of every position to the earlier ones of its document.

        Args:
            x: (B, S, D).
            mask: (B, 1, S, S) bool, True where a position may look.

        Returns:
            (B, S, D).
        """
        cfg = self.cfg
        batch, seq_len, _ = x.shape
        heads = self.qkv(x).view(batch, seq_len, -1, cfg.head_dim)  # (B, S, H + 2 H_kv, C)
        query_key, value = heads.split((cfg.num_heads + cfg.num_kv_heads, cfg.num_kv_heads), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split((cfg.num_heads, cfg.num_kv_heads), dim=2)
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=2).to(value.dtype)
        cos, sin = self.rotary[:, :seq_len, None].to(query_key.dtype)  # each (S, 1, C/2)
        query_key = rotate(query_key, cos, sin)
        query, key = query_key.split((cfg.num_heads, cfg.num_kv_heads), dim=2)
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),  # (B, H, S, C)
            key.transpose(1, 2),  # (B, H_kv, S, C)
            value.transpose(1, 2),
            attn_mask=mask,
            enable_gqa=cfg.num_heads != cfg.num_kv_heads,
        )
        return self.output(attended.transpose(1, 2).flatten(2))  # (B, S, D)
