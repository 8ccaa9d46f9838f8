"""Multi-head latent attention: keys and values from one narrow vector per position, positions on coordinates apart."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.norm import RMSNorm
from models.rotary import RotaryConfig, rotary_tables, rotate, softmax_scale
from models.softmax_attention import CausalMask, masked_attention


@dataclass
class MLAConfig:
    """Shape of one layer of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, 2.1).

    The defaults are the widths of DeepSeek-V2 and -V3, also those of the 27B models of mHC (arXiv 2512.24880, table 5).
    """

    num_heads: int  # n_h; every head has keys and values of its own
    kv_rank: int = 512  # d_c: width of the vector from which all keys and values of a position are made
    query_rank: int | None = None  # d_c': the same for queries (1536 in V3); null makes them from the hidden state
    nope_head_dim: int = 128  # d_h: coordinates of a query or key head without positions
    rope_head_dim: int = 64  # d_h^R: coordinates that positions turn, even; the key's are shared by all heads
    value_head_dim: int = 128  # width of a value head

    def __post_init__(self) -> None:
        for name in ("num_heads", "kv_rank", "query_rank", "nope_head_dim", "rope_head_dim", "value_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.mla.{name}={value} must be at least 1; nearest: 1")
        if self.rope_head_dim % 2:
            raise ValueError(
                f"model.mla.rope_head_dim={self.rope_head_dim} must be even, because rotary positions turn pairs of "
                f"coordinates; nearest: {self.rope_head_dim + 1}"
            )

    @property
    def key_head_dim(self) -> int:
        """C, width of a query or key head: coordinates without positions, then those with."""
        return self.nope_head_dim + self.rope_head_dim


class LatentAttention(nn.Module):
    """Attention over keys and values that are compressed together (DeepSeek-V2, arXiv 2405.04434, eqs 9 to 19).

    c = norm(W_DKV x); per head k = [W_UK c, RoPE(W_KR x)] and v = W_UV c, where the second part of k is the same for
    all heads; per head q = [W_Q x, RoPE(W_QR x)], or the same of c' = norm(W_DQ x) in the place of x; then
    softmax(q k^T * scale + mask) v and the output projection. No biases. The two norms are of the released models and
    of DeepSeek-V3 (arXiv 2412.19437, 4.2).

    Args:
        cfg: the layer's shape.
        rotary: positions of the coordinates that are turned.
        d_model: D.
        seq_len: longest sequence.
        norm_eps: of the norms of c and c'; Hugging Face's DeepSeek-V3 has 1e-6 there whatever it has elsewhere.
    """

    rotary: Tensor

    def __init__(self, cfg: MLAConfig, rotary: RotaryConfig, d_model: int, seq_len: int, norm_eps: float):
        super().__init__()
        self.cfg = cfg
        self.kv_down = nn.Linear(d_model, cfg.kv_rank + cfg.rope_head_dim, bias=False)  # rows: W_DKV, W_KR
        self.kv_norm = RMSNorm(cfg.kv_rank, norm_eps)
        # Rows: per head W_UK, then W_UV.
        self.kv_up = nn.Linear(cfg.kv_rank, cfg.num_heads * (cfg.nope_head_dim + cfg.value_head_dim), bias=False)
        self.query_down: nn.Linear | None = None
        self.query_norm: RMSNorm | None = None
        if cfg.query_rank is not None:
            self.query_down = nn.Linear(d_model, cfg.query_rank, bias=False)
            self.query_norm = RMSNorm(cfg.query_rank, norm_eps)
        # Rows: per head W_Q (or W_UQ), then W_QR.
        self.query = nn.Linear(cfg.query_rank or d_model, cfg.num_heads * cfg.key_head_dim, bias=False)
        self.output = nn.Linear(cfg.num_heads * cfg.value_head_dim, d_model, bias=False)
        self.register_buffer("rotary", rotary_tables(seq_len, cfg.rope_head_dim, rotary), persistent=False)
        self.scale = softmax_scale(cfg.key_head_dim, rotary)

    def forward(self, x: Tensor, mask: CausalMask) -> Tensor:
        """Attention of every position to the earlier ones of its document.

        Args:
            x: (B, S, D).
            mask: from `causal_mask`.

        Returns:
            (B, S, D).
        """
        tables = self.rotary[:, : x.shape[1]]
        query = self._query(x, tables)
        key, value = self._key_and_value(x, tables)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, H, S, C or W)
        attended = masked_attention(query, key, value, mask, self.scale)  # (B, S, H, W)
        return self.output(attended.flatten(2))  # (B, S, D)

    def _query(self, x: Tensor, tables: Tensor) -> Tensor:
        """(B, S, H, C)."""
        cfg = self.cfg
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        heads = self.query(x).unflatten(-1, (cfg.num_heads, cfg.key_head_dim))
        nope, rope = heads.split((cfg.nope_head_dim, cfg.rope_head_dim), dim=-1)
        return torch.cat((nope, rotate(rope, tables)), dim=-1)

    def _key_and_value(self, x: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, H, C) and (B, S, H, W)."""
        cfg = self.cfg
        latent, rope = self.kv_down(x).split((cfg.kv_rank, cfg.rope_head_dim), dim=-1)
        heads = self.kv_up(self.kv_norm(latent)).unflatten(-1, (cfg.num_heads, -1))
        nope, value = heads.split((cfg.nope_head_dim, cfg.value_head_dim), dim=-1)
        shared = rotate(rope[:, :, None], tables).expand(-1, -1, cfg.num_heads, -1)
        return torch.cat((nope, shared), dim=-1), value
