"""Grouped-query causal attention with rotary positions, masked at document boundaries."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native
from models.norm import RMSNorm


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


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, minus infinity elsewhere: what is added to the scores. Same shape as `mask`."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)


def rotary_tables(seq_len: int, head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Cosines, and sines with the sign that `rotate` needs, of position * theta^(-2i / C) (arXiv 2104.09864, eq 15).

    Returns:
        (2, S, C) fp32: [0] cos of the angles, twice; [1] minus sin of the angles, then sin of the angles.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)  # (S, C/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


class _Rotate(torch.autograd.Function):
    """x * cos + swap(x) * sin; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        return (grad * cos).addcmul_(grad.roll(grad.shape[-1] // 2, -1), sin, value=-1), None, None


def rotate(x: Tensor, tables: Tensor) -> Tensor:
    """Turns the pair (x_i, x_{i + C/2}) of every head by its position's i-th angle.

    The halves are paired as in the released Llama and DeepSeek checkpoints of Hugging Face, not neighbours as in the
    paper; the two differ by a fixed permutation of the head's coordinates.

    Args:
        x: (B, S, H, C).
        tables: (2, S, C) from `rotary_tables`.

    Returns:
        (B, S, H, C) in the type of `x`.
    """
    # Spread over the heads, the tables let each product run over whole rows of memory: on CPU 3 x faster.
    cos, sin = tables[:, :, None].to(x.dtype).expand(-1, -1, x.shape[2], -1).contiguous()  # each (S, H, C)
    return _Rotate.apply(x, cos, sin)


# Longest sequence for which the CPU path below keeps all probabilities: (B, H, S, S) in the type of the matmuls.
MATERIALIZE_UP_TO = 512
# Its queries are handled in blocks of this many positions; keys after the end of the block are masked and left out.
QUERY_BLOCK = 128


class _MaterializedAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(C) + bias) v by plain batched matmuls, keeping the probabilities.

    On CPU torch's fused kernel is slow backwards: forward and backward of 16 x 4 heads x 256 positions x 32 take
    31 ms in bf16, these matmuls 13 ms (one thread). Query heads of one key head are stacked as rows of one matmul.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        batch, num_heads, seq_len, width = query.shape
        num_kv_heads = key.shape[1]
        query = (query / math.sqrt(width)).reshape(batch * num_kv_heads, -1, seq_len, width)  # (B * H_kv, G, S, C)
        key, value = key.reshape(-1, seq_len, width), value.reshape(-1, seq_len, width)  # (B * H_kv, S, C)
        out = torch.empty_like(query)
        saved = []
        for start in range(0, seq_len, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, seq_len)
            block = query[:, :, start:end].reshape(batch * num_kv_heads, -1, width)  # (B * H_kv, G * block, C)
            scores = torch.bmm(block, key[:, :end].transpose(1, 2))  # (B * H_kv, G * block, end)
            by_head = scores.view(batch, num_heads, end - start, end)
            probabilities = by_head.add_(bias[:, :, start:end, :end]).softmax(-1).view_as(scores)
            out[:, :, start:end] = torch.bmm(probabilities, value[:, :end]).view(out[:, :, start:end].shape)
            saved += [block, probabilities]
        ctx.save_for_backward(key, value, *saved)
        ctx.shapes = (batch, num_heads, num_kv_heads)
        return out.view(batch, num_heads, seq_len, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *saved = ctx.saved_tensors
        batch, num_heads, num_kv_heads = ctx.shapes
        seq_len, width = key.shape[1:]
        grad = grads[0].reshape(batch * num_kv_heads, -1, seq_len, width)
        grad_query, grad_key, grad_value = torch.empty_like(grad), torch.zeros_like(key), torch.zeros_like(value)
        for index, start in enumerate(range(0, seq_len, QUERY_BLOCK)):
            end = min(start + QUERY_BLOCK, seq_len)
            block, probabilities = saved[2 * index : 2 * index + 2]
            grad_block = grad[:, :, start:end].reshape(block.shape)
            grad_value[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad_block)
            grad_probabilities = torch.bmm(grad_block, value[:, :end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_key[:, :end] += torch.bmm(grad_scores.transpose(1, 2), block)
            grad_query[:, :, start:end] = torch.bmm(grad_scores, key[:, :end]).view(grad[:, :, start:end].shape)
        kv_shape = (batch, num_kv_heads, seq_len, width)
        grad_query = grad_query.div_(math.sqrt(width)).view(batch, num_heads, seq_len, width)
        return grad_query, grad_key.view(kv_shape), grad_value.view(kv_shape), None


class _NativeAttention(torch.autograd.Function):
    """The same in one C kernel (models/native/attention.c), which keeps one number per query instead."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        batch, num_heads, seq_len, width = query.shape
        bias = bias.expand(batch, 1, seq_len, seq_len)
        inputs = tuple(tensor.contiguous() for tensor in (query, key, value, bias))
        ctx.sizes = (batch, num_heads, key.shape[1], seq_len, width)
        out = query.new_empty(batch, seq_len, num_heads, width)
        log_sum_exp = torch.empty(batch, num_heads, seq_len, dtype=torch.float32)
        native.call("attention_forward", *ctx.sizes, *inputs, out, log_sum_exp)
        ctx.save_for_backward(*inputs, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
        results = [torch.empty_like(tensor) for tensor in saved[:3]]
        native.call("attention_backward", *ctx.sizes, *saved, grads[0].contiguous(), *results)
        return *results, None


def masked_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v, on whichever path is fastest.

    Args:
        query: (B, H, S, C).
        key: (B, H_kv, S, C); each key head serves H / H_kv neighbouring query heads.
        value: like `key`.
        bias: (B, 1, S, S) from `attention_bias`; it must be causal.

    Returns:
        (B, S, H, C).
    """
    bias = bias.to(query.dtype)
    if query.dtype == torch.bfloat16 and native.matrices_available(query):
        return _NativeAttention.apply(query, key, value, bias)
    if query.device.type == "cpu" and query.shape[2] <= MATERIALIZE_UP_TO:
        return _MaterializedAttention.apply(query, key, value, bias).transpose(1, 2)
    enable_gqa = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=enable_gqa)
    return attended.transpose(1, 2)


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
        grad_weights = [None if weight is None else torch.zeros_like(weight) for weight in saved[1:3]]
        grads = tuple(grad.contiguous() for grad in grads)
        native.call("split_heads_backward", *ctx.sizes, *saved, *grads, grad_heads, *grad_weights)
        return grad_heads, *grad_weights, None, None, None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(C) + mask) v over grouped heads, then the output projection; no biases."""

    rotary: Tensor

    def __init__(self, cfg: AttentionConfig, d_model: int, seq_len: int, norm_eps: float):
        super().__init__()
        self.cfg = cfg
        self.norm_eps = norm_eps
        num_heads_in = cfg.num_heads + 2 * cfg.num_kv_heads
        self.qkv = nn.Linear(d_model, num_heads_in * cfg.head_dim, bias=False)  # rows: queries, keys, values
        self.output = nn.Linear(cfg.num_heads * cfg.head_dim, d_model, bias=False)
        self.query_norm = RMSNorm(cfg.head_dim, norm_eps) if cfg.qk_norm else None
        self.key_norm = RMSNorm(cfg.head_dim, norm_eps) if cfg.qk_norm else None
        self.register_buffer("rotary", rotary_tables(seq_len, cfg.head_dim, cfg.rope_theta), persistent=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Attention of every position to the earlier ones of its document.

        Args:
            x: (B, S, D).
            bias: (B, 1, S, S) from `attention_bias`.

        Returns:
            (B, S, D).
        """
        batch, seq_len, _ = x.shape
        heads = self.qkv(x).view(batch, seq_len, -1, self.cfg.head_dim)  # (B, S, H + 2 H_kv, C)
        query, key, value = self._split(heads)
        attended = masked_attention(query, key, value, bias)  # (B, S, H, C)
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
