"""Reading and writing residual streams in one pass each way, by the C kernels of `models/native/streams.c`.

The definitions in plain torch are in `models.hyper_connections`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models import native

MOST_STREAMS = 8  # the kernels keep the mappings of a block of tokens in arrays of fixed size


def streams_available(streams: Tensor) -> bool:
    """Whether the kernels are in use and can work on `streams` (B, S, J, D)."""
    return native.available(streams, torch.float32) and streams.shape[2] <= MOST_STREAMS


class _Read(torch.autograd.Function):
    """Keeps the streams, their projections and one number per position; the mappings are computed again backwards."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, projection: Tensor, gates: Tensor, bias: Tensor, iterations: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        streams, gates, bias = streams.contiguous(), gates.contiguous(), bias.contiguous()
        num_tokens, num_streams, width = streams.shape
        ctx.sizes = (num_streams, num_tokens, width, iterations)
        raw = streams.flatten(1) @ projection.t()  # (T, 2J + J^2)
        x, inverse = streams.new_empty(num_tokens, width), streams.new_empty(num_tokens)
        post, res = streams.new_empty(num_tokens, num_streams), streams.new_empty(num_tokens, num_streams, num_streams)
        outputs = (x, inverse, post, res)
        native.call("streams_read_forward", *ctx.sizes, float(eps), streams, raw, gates, bias, *outputs)
        ctx.save_for_backward(streams, projection, gates, bias, raw, inverse)
        return x, post, res

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        streams, projection, gates, bias, raw, inverse = ctx.saved_tensors
        grad_streams, grad_raw = torch.empty_like(streams), torch.empty_like(raw)
        grad_gates, grad_bias = torch.empty_like(gates), torch.empty_like(bias)
        results = (grad_streams, grad_raw, grad_gates, grad_bias)
        inputs = (streams, raw, gates, bias, inverse, *(grad.contiguous() for grad in grads))
        native.call("streams_read_backward", *ctx.sizes, *inputs, *results)
        grad_streams.flatten(1).addmm_(grad_raw, projection)
        return grad_streams, grad_raw.t() @ streams.flatten(1), grad_gates, grad_bias, None, None


class _Write(torch.autograd.Function):
    """Keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, update: Tensor, post: Tensor, res: Tensor) -> Tensor:
        inputs = tuple(tensor.contiguous() for tensor in (streams, update, post, res))
        num_tokens, num_streams, width = streams.shape
        ctx.sizes = (num_streams, num_tokens, width)
        out = torch.empty_like(inputs[0])
        native.call("streams_write_forward", *ctx.sizes, *inputs, out)
        ctx.save_for_backward(*inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing gives them out once
        results = tuple(torch.empty_like(tensor) for tensor in saved)
        native.call("streams_write_backward", *ctx.sizes, *saved, grads[0].contiguous(), *results)
        return results


def read_native(
    streams: Tensor, projection: Tensor, gates: Tensor, bias: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`HyperConnection.forward`: H_pre x (B, S, D), H_post (B, S, J) and H_res (B, S, J, J); all tensors are fp32."""
    x, post, res = _Read.apply(streams.flatten(0, 1), projection, gates, bias, iterations, eps)
    shape = streams.shape[:2]
    return x.unflatten(0, shape), post.unflatten(0, shape), res.unflatten(0, shape)


def write_native(streams: Tensor, update: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """H_res x + H_post^T update, (B, S, J, D); `update` (B, S, D) may be of any type, the others are fp32."""
    flat = (tensor.flatten(0, 1) for tensor in (streams, update.float(), post, res))
    return _Write.apply(*flat).view_as(streams)
