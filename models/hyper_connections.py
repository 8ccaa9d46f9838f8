"""Manifold-constrained hyper-connections (mHC): J residual streams around every sub-layer (arXiv 2512.24880).

x' = H_res x + H_post^T F(H_pre x). The streams enter as J copies of the embedding and leave as their mean: the mean
needs no parameters, and the norm that follows does not tell it from the sum. The official kernels' weighted sum has a
projection of its own, which no paper describes.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.stream_kernels import read_native, streams_available, write_native

# Start values of the biases, which no paper prints; `HyperConnection.initial_bias` says what follows from them.
# Share of a sub-layer's input that comes from its own stream; the other streams divide the rest.
OWN_STREAM_SHARE = 0.5
# Logit by which a stream prefers itself in H_res: with 4 streams its own weight is e^4 / (e^4 + 3) = 0.948.
IDENTITY_LOGIT = 4.0


@dataclass
class HyperConnectionsConfig:
    """Residual streams and the mappings between them: symbols in brackets and defaults of arXiv 2512.24880."""

    num_streams: int = 4  # residual streams [n]; for one stream, the plain residual, there is no such part
    sinkhorn_iterations: int = 20  # column and row normalisations of H_res [t_max]
    gate_init: float = 0.01  # start of the factors of the input-dependent logits [alpha]
    norm_eps: float = 1e-20  # epsilon of the norm over all streams (table 5)

    def __post_init__(self) -> None:
        if self.num_streams < 2:
            raise ValueError(
                f"model.hyper_connections.num_streams={self.num_streams} must be at least 2; nearest: 2; for the plain "
                "residual, one stream, set model.hyper_connections to null"
            )
        if self.sinkhorn_iterations < 1:
            raise ValueError(
                f"model.hyper_connections.sinkhorn_iterations={self.sinkhorn_iterations} must be at least 1; nearest: 1"
            )
        if not (0 < self.gate_init < math.inf and 0 < self.norm_eps < math.inf):
            raise ValueError(
                f"model.hyper_connections.gate_init={self.gate_init} and "
                f"model.hyper_connections.norm_eps={self.norm_eps} must be "
                "positive and finite; usual: 0.01 and 1e-20"
            )

    @property
    def num_mappings(self) -> int:
        """2 J + J^2: entries of H_pre, H_post and H_res of one token."""
        return 2 * self.num_streams + self.num_streams**2


def sinkhorn_knopp_plain(logits: Tensor, iterations: int) -> Tensor:
    """M_t = rows(columns(M_{t-1})) from M_0 = exp(logits), where rows and columns divide by their sums.

    The first column and row normalisation are done on logarithms, so that no logit is too large or too small. From
    then on no sum leaves [1 / J, J]: a matrix whose rows sum to 1 has columns that sum to at most J, hence rows of at
    least 1 / J once the columns are divided, and so on. Entries that vanish do so harmlessly.

    Args:
        logits: (..., J, J), finite, fp32 or fp64.
        iterations: t_max >= 1.

    Returns:
        (..., J, J), not negative; rows sum to 1 up to rounding, columns as nearly as the iterations reach.
    """
    matrix = logits.log_softmax(-2).softmax(-1)
    for _ in range(iterations - 1):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


class _SinkhornKnopp(torch.autograd.Function):
    """The same with tokens on the last axis, where all passes are contiguous, in place.

    Keeps the result and every sum: J numbers per half step and token, a fifth of what autograd would keep. Backwards
    each division is undone by a product with its sums.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        num_streams = logits.shape[-1]
        logits = logits.permute(1, 2, 0).contiguous()  # (T, J, J) -> (J, J, T)
        matrix = logits.log_softmax(0).softmax(1)
        sums = matrix.new_empty(2 * (iterations - 1), num_streams, matrix.shape[-1])
        for half_step, total in enumerate(sums):
            axis = half_step % 2
            torch.sum(matrix, axis, out=total)
            matrix.div_(total.unsqueeze(axis))
        ctx.save_for_backward(logits, matrix, sums)
        return matrix.permute(2, 0, 1).contiguous()  # as batched matmuls want it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, matrix, sums = ctx.saved_tensors
        matrix, grad = matrix.clone(), grads[0].permute(1, 2, 0).contiguous()  # (J, J, T)
        for half_step in reversed(range(len(sums))):
            axis, total = half_step % 2, sums[half_step].unsqueeze(half_step % 2)
            # y = m / sum(m):  dm = (dy - sum(dy y)) / sum(m)
            grad.sub_((grad * matrix).sum(axis, keepdim=True)).div_(total)
            matrix.mul_(total)
        grad = (grad - (grad * matrix).sum(1, keepdim=True)).mul_(matrix)  # through softmax(1)
        grad.addcmul_(logits.softmax(0), grad.sum(0, keepdim=True), value=-1)  # through log_softmax(0)
        return grad.permute(2, 0, 1), None


def sinkhorn_knopp(logits: Tensor, iterations: int) -> Tensor:
    """`sinkhorn_knopp_plain` with fewer passes over memory, forwards and backwards."""
    return _SinkhornKnopp.apply(logits.reshape(-1, *logits.shape[-2:]), iterations).view(logits.shape)


class Mappings(NamedTuple):
    """How one sub-layer writes to the streams at each position; fp32."""

    post: Tensor  # H_post (B, S, J), in (0, 2)
    res: Tensor  # H_res (B, S, J, J), rows to, columns from


class HyperConnection(nn.Module):
    """The mappings of one sub-layer, computed from all streams of the position (arXiv 2512.24880, eqs 7 and 8).

    u = RMSNorm(vec(x)), and with logits a (phi u) + b, one a for each of the three mappings,
    H_pre = sigmoid(.),  H_post = 2 sigmoid(.),  H_res = Sinkhorn-Knopp(.).
    Always in fp32, also under autocast. The norm has no weight of its own, because one would enter only as a product
    with phi. The rows of `projection` (phi) and `bias` are those of H_pre, of H_post, and of H_res row by row.

    Args:
        cfg: number of streams and iterations.
        d_model: D.
        index: 0-based number of the sub-layer in the model (attention and feed-forward each count); it chooses the
            stream that `initial_bias` prefers.
    """

    def __init__(self, cfg: HyperConnectionsConfig, d_model: int, index: int):
        super().__init__()
        self.cfg, self.index = cfg, index
        self.projection = nn.Parameter(torch.empty(cfg.num_mappings, cfg.num_streams * d_model))  # (2J + J^2, J * D)
        self.bias = nn.Parameter(torch.empty(cfg.num_mappings))
        self.gates = nn.Parameter(torch.empty(3))  # of H_pre, H_post, H_res

    def initial_bias(self) -> Tensor:
        """Biases with which, while phi = 0, a model without Engram is the plain residual model, up to rounding.

        H_pre sums to 1 and H_post is 1. Rows of H_res sum to 1. So equal streams stay equal and each is the plain
        residual, and the gradient, summed over the streams, is the plain one too, for every other parameter. The
        sub-layer's own stream, `index` mod J, has the largest entry of H_pre (as the one-hot start of hyper-
        connections, arXiv 2409.19606): if all streams were read alike they would get equal gradients and never
        part. H_res is near the identity: a uniform one would make the streams equal again and get no gradient, and one
        much nearer to the identity has no slope.
        """
        streams = self.cfg.num_streams
        shares = torch.full((streams,), (1 - OWN_STREAM_SHARE) / (streams - 1))
        shares[self.index % streams] = OWN_STREAM_SHARE
        res = IDENTITY_LOGIT * torch.eye(streams)
        return torch.cat((shares.logit(), torch.zeros(streams), res.flatten()))

    def mappings(self, streams: Tensor) -> tuple[Tensor, Mappings]:
        """H_pre (B, S, J), in (0, 1), and the others; fp32, or fp64 for fp64 streams, which are (B, S, J, D)."""
        dtype = torch.promote_types(streams.dtype, torch.float32)
        sizes = (self.cfg.num_streams, self.cfg.num_streams, self.cfg.num_streams**2)
        with torch.autocast(streams.device.type, enabled=False):
            flat = streams.flatten(2).to(dtype)  # (B, S, J * D)
            inverse = (flat.square().mean(-1, keepdim=True) + self.cfg.norm_eps).rsqrt()
            gates = torch.cat([gate.expand(size) for gate, size in zip(self.gates.to(dtype), sizes, strict=True)])
            # The norm is a factor per position, so it may follow the projection.
            logits = F.linear(flat, self.projection.to(dtype)) * inverse * gates + self.bias.to(dtype)
            pre, post, res = logits.split(sizes, -1)
            res = sinkhorn_knopp(res.unflatten(-1, sizes[:2]), self.cfg.sinkhorn_iterations)
            return pre.sigmoid(), Mappings(2 * post.sigmoid(), res)

    def forward(self, streams: Tensor) -> tuple[Tensor, Mappings]:
        """Input of the sub-layer, H_pre x (B, S, D), and the mappings for `write`; streams are (B, S, J, D)."""
        with torch.autocast(streams.device.type, enabled=False):
            if streams_available(streams) and self.projection.dtype == torch.float32:
                sizes = (self.cfg.sinkhorn_iterations, self.cfg.norm_eps)
                x, post, res = read_native(streams, self.projection, self.gates, self.bias, *sizes)
                return x, Mappings(post, res)
            pre, mappings = self.mappings(streams)
            return (pre[..., None, :].to(streams.dtype) @ streams)[..., 0, :], mappings


def read(connection: HyperConnection | None, hidden: Tensor) -> tuple[Tensor, Mappings | None]:
    """Input of a sub-layer: H_pre x with a connection, the hidden state itself with the plain residual."""
    return (hidden, None) if connection is None else connection(hidden)


def write(hidden: Tensor, update: Tensor, mappings: Mappings | None) -> Tensor:
    """The residual after a sub-layer: H_res x + H_post^T update, or x + update with the plain residual.

    Args:
        hidden: (B, S, J, D), or (B, S, D) with the plain residual.
        update: (B, S, D), the sub-layer's output.
        mappings: from `read`.
    """
    if mappings is None:
        return hidden + update
    with torch.autocast(hidden.device.type, enabled=False):
        if streams_available(hidden):
            return write_native(hidden, update, *mappings)
        post, res, update = (tensor.to(hidden.dtype) for tensor in (*mappings, update))
        written = post[..., None] * update[..., None, :]  # (B, S, J, D)
        return torch.baddbmm(written.flatten(0, 1), res.flatten(0, 1), hidden.flatten(0, 1)).view_as(hidden)


def enter(cfg: HyperConnectionsConfig | None, embedded: Tensor) -> Tensor:
    """J copies of the embedding (B, S, D) -> (B, S, J, D); without `cfg` the embedding itself."""
    return embedded if cfg is None else embedded[:, :, None].expand(-1, -1, cfg.num_streams, -1)


def leave(cfg: HyperConnectionsConfig | None, hidden: Tensor) -> Tensor:
    """Mean of the streams (B, S, J, D) -> (B, S, D); without `cfg` the hidden state itself."""
    return hidden if cfg is None else hidden.mean(2)
