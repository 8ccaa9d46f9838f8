"""softmax(q k^T * scale + bias) v, masked at document boundaries, and its fast paths on CPU."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models import native
from models.precision import compute_dtype


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


class CausalMask(NamedTuple):
    """Which positions see which, in the form that the path of `masked_attention` reads. From `causal_mask`."""

    document_ids: Tensor  # (B, S) int64, equal within a document
    bias: Tensor | None  # (B, 1, S, S), see `attention_bias`; None where the C kernel reads the ids instead


def causal_mask(document_ids: Tensor, x: Tensor) -> CausalMask:
    """The mask of all layers, made once: every position sees the earlier ones of its document, and itself.

    Args:
        document_ids: (B, S) int64, equal within a document.
        x: what the layers work on; its device and type decide the form.
    """
    dtype = compute_dtype(x)
    if native.matrices_available(x):
        return CausalMask(document_ids, None)
    return CausalMask(document_ids, attention_bias(attention_mask(document_ids), dtype))


# Longest sequence for which the CPU path below keeps all probabilities: (B, H, S, S) in the type of the matmuls.
MATERIALIZE_UP_TO = 512
# Its queries are handled in blocks of this many positions; keys after the end of the block are masked and left out.
QUERY_BLOCK = 128


class _MaterializedAttention(torch.autograd.Function):
    """softmax(q k^T / divisor + bias) v by plain batched matmuls, keeping the probabilities.

    On CPU torch's fused kernel is slow backwards: forward and backward of 16 x 4 heads x 256 positions x 32 take
    31 ms in bf16, these matmuls 13 ms (one thread). Query heads of one key head are stacked as rows of one matmul.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, divisor: float) -> Tensor:
        batch, num_heads, seq_len, width = query.shape
        num_kv_heads = key.shape[1]
        query = (query / divisor).reshape(batch * num_kv_heads, -1, seq_len, width)  # (B * H_kv, G, S, C)
        key, value = key.flatten(0, 1), value.flatten(0, 1)  # (B * H_kv, S, C) and (B * H_kv, S, W)
        out = query.new_empty(*query.shape[:3], value.shape[-1])  # (B * H_kv, G, S, W)
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
        ctx.divisor = divisor
        return out.view(batch, num_heads, seq_len, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, *saved = ctx.saved_tensors
        batch, num_heads, num_kv_heads = ctx.shapes
        seq_len, width = key.shape[1:]
        grad = grads[0].reshape(batch * num_kv_heads, -1, seq_len, value.shape[-1])
        grad_query = grad.new_empty(*grad.shape[:3], width)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        for index, start in enumerate(range(0, seq_len, QUERY_BLOCK)):
            end = min(start + QUERY_BLOCK, seq_len)
            block, probabilities = saved[2 * index : 2 * index + 2]
            grad_block = grad[:, :, start:end].flatten(1, 2)  # (B * H_kv, G * block, W)
            grad_value[:, :end] += torch.bmm(probabilities.transpose(1, 2), grad_block)
            grad_probabilities = torch.bmm(grad_block, value[:, :end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_key[:, :end] += torch.bmm(grad_scores.transpose(1, 2), block)
            grad_query[:, :, start:end] = torch.bmm(grad_scores, key[:, :end]).view(grad_query[:, :, start:end].shape)
        grad_query = grad_query.div_(ctx.divisor).view(batch, num_heads, seq_len, width)
        kv_shape = (batch, num_kv_heads, seq_len, -1)
        return grad_query, grad_key.view(kv_shape), grad_value.view(kv_shape), None, None


class _NativeAttention(torch.autograd.Function):
    """The same in one C kernel (models/native/attention.c), which keeps one number per query instead."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, document_ids: Tensor, divisor: float) -> Tensor:
        batch, num_heads, seq_len, width = query.shape
        document_ids = document_ids.to(torch.int64).expand(batch, seq_len)
        inputs = tuple(tensor.contiguous() for tensor in (query, key, value, document_ids))
        ctx.sizes = (batch, num_heads, key.shape[1], seq_len, width, value.shape[-1], divisor)
        out = query.new_empty(batch, seq_len, num_heads, value.shape[-1])
        log_sums = torch.empty(batch, num_heads, seq_len, dtype=torch.float32)
        native.call("attention_forward", *ctx.sizes, *inputs, out, log_sums)
        ctx.save_for_backward(*inputs, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
        results = [torch.empty_like(tensor) for tensor in saved[:3]]
        native.call("attention_backward", *ctx.sizes, *saved, grads[0].contiguous(), *results)
        return *results, None, None


def serves_grouped_heads(query: Tensor) -> bool:
    """Whether torch's fused attention takes a mask and fewer key heads than query heads at once.

    On a GPU the flash kernel takes no mask and the memory-efficient one no groups, so that the plain kernel may be
    left, which holds all S^2 probabilities (pytorch/pytorch #139586, huggingface/transformers #45776).
    """
    return query.device.type == "cpu"


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: CausalMask, scale: float) -> Tensor:
    """softmax(q k^T * scale + bias) v, on whichever path is fastest.

    Args:
        query: (B, H, S, C).
        key: (B, H_kv, S, C); each key head serves H / H_kv neighbouring query heads.
        value: (B, H_kv, S, W).
        mask: from `causal_mask`, of B sequences or of one that stands for all.
        scale: positive; usually from `models.rotary.softmax_scale`.

    Returns:
        (B, S, H, W).
    """
    divisor = 1 / scale  # usually sqrt(C), which fp32 holds more exactly than its reciprocal
    if query.dtype == torch.bfloat16 and native.matrices_available(query):
        return _NativeAttention.apply(query, key, value, mask.document_ids, divisor)
    bias = attention_bias(attention_mask(mask.document_ids), query.dtype) if mask.bias is None else mask.bias
    bias = bias.to(query.dtype)
    if query.device.type == "cpu" and query.shape[2] <= MATERIALIZE_UP_TO:
        return _MaterializedAttention.apply(query, key, value, bias, divisor).transpose(1, 2)
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not serves_grouped_heads(query):
        key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))  # (B, H, S, C) and (B, H, S, W)
    enable_gqa = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=enable_gqa)
    return attended.transpose(1, 2)
