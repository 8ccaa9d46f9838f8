"""The routers of DeepSeekMoE's Table 1 (arXiv 2401.06066): its own softmax router, GShard, Switch and Hash.

Groups. GShard and Switch give every expert a capacity within a group of tokens. Our group is one sequence of the
batch, for the capacity and for the balance loss, so that what is learnt does not depend on the micro-batch size.

What a capacity reads. Whether a choice is dropped depends on the choices before it in its sequence: of Switch, on
earlier tokens; of GShard's second choices, on the first choices of *all* tokens, later ones included, as published.
Sequences that hold several documents share their places too. So with drops Switch is causal but not separate by
documents, and GShard is neither; while every expert has room, both are both. The capacity grows with the sequence,
in evaluation as in training.
"""

import math

import torch
from torch import Tensor, nn

from models.router import (
    Router,
    RouterConfig,
    RouterKind,
    Routing,
    count_ids,
    counts_by_sequence,
    mean_entropy,
    top_k_ids,
)


def softmax_scores(x: Tensor, weight: Tensor) -> Tensor:
    """softmax(x W^T) over the experts in fp32: x (B, S, D), weight (E, D) -> (B, S, E)."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.float() @ weight.float().t()).softmax(-1)


def expert_balance_loss(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """Mean over groups of sum_i f_i P_i (DeepSeekMoE eqs 12 to 14, Switch eqs 4 to 6, without the factor alpha).

    f_i = E / (K S) * number of the group's choices that are expert i; P_i = mean over the group of s_i. A perfectly
    even router gives 1. Only P carries a gradient. With K = 1 it is also GShard's auxiliary loss, mean over i of
    c_i / S * P_i (Algorithm 1, line 13), times E^2: that paper leaves its factor open, and so even routers give 1 here
    too.

    Args:
        scores: (B, S, E) fp32, of B groups of S tokens; each row sums to 1.
        expert_ids: (B, S, K) int64.

    Returns:
        Scalar fp32.
    """
    _, seq_len, num_experts = scores.shape
    counts = counts_by_sequence(expert_ids, num_experts)
    fraction = counts * (num_experts / (expert_ids.shape[2] * seq_len))  # f, (B, E)
    return (fraction * scores.mean(dim=1)).sum(-1).mean()


def expert_capacity(capacity_factor: float, seq_len: int, top_k: int, num_experts: int) -> int:
    """Places of one expert in a group of S tokens, capacity_factor * K * S / E (Switch eq 3), rounded up."""
    return math.ceil(capacity_factor * top_k * seq_len / num_experts)


def places(expert_ids: Tensor, num_experts: int) -> Tensor:
    """The place, from 0, of every choice in the queue of its expert, within its sequence.

    First choices come before second choices, and within each earlier tokens before later ones (GShard Algorithm 1).

    Args:
        expert_ids: (B, S, K) int64, a token's first choice first.
        num_experts: E.

    Returns:
        (B, S, K) int64.
    """
    batch, seq_len, top_k = expert_ids.shape
    queue = expert_ids.transpose(1, 2).flatten(1)  # (B, K * S), by priority
    by_expert, order = queue.sort(dim=1, stable=True)
    counts = counts_by_sequence(expert_ids, num_experts)
    first = counts.cumsum(1) - counts  # (B, E), where each expert's queue begins in `by_expert`
    rank = torch.arange(queue.shape[1], device=queue.device) - first.gather(1, by_expert)
    return torch.empty_like(queue).scatter_(1, order, rank).view(batch, top_k, seq_len).transpose(1, 2)


class SoftmaxRouter(nn.Module):
    """s = softmax(x W^T) in fp32; the K experts of highest s; gate = s, not divided by the sum of the chosen.

    DeepSeekMoE eqs 9 to 11. Its expert-level balance loss, alpha_1 * sum_i f_i P_i (eqs 12 to 14), takes f and P over
    all tokens of the micro-batch together: one group of B * S tokens, as the paper's T tokens.
    """

    def __init__(self, cfg: RouterConfig, d_model: int, num_experts: int):
        super().__init__()
        self.cfg = cfg
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x: Tensor) -> Routing:
        """Args: x (B, S, D). Returns: Routing over T = B * S tokens."""
        scores = softmax_scores(x, self.weight).flatten(0, 1)  # (T, E)
        expert_ids = top_k_ids(scores.detach(), self.cfg.top_k)  # (T, K)
        counts = count_ids(expert_ids, self.num_experts)
        balance_loss = self.cfg.balance_coef * expert_balance_loss(scores[None], expert_ids[None])
        losses = {"expert_balance": balance_loss}
        return Routing(expert_ids, scores.gather(1, expert_ids), counts, losses, mean_entropy(scores))


class CapacityRouter(nn.Module):
    """GShard (Lepikhin et al. 2020, arXiv 2006.16668, Algorithm 1) and Switch (Fedus et al. 2021, arXiv 2101.03961).

    s = softmax(x W^T) in fp32, then

        gshard: the two experts of highest s; gate = s / sum of the two
        switch: the expert of highest s;      gate = s  (eq 2)

    Each expert takes capacity = capacity_factor * K * S / E choices of a sequence, by the priority of `places`; further
    ones are dropped: their gate value is 0, the other of the two is not raised. The balance loss counts first choices,
    before any drop. GShard sends a token to its second expert at random, with probability 2 * gate; here it always does
    (lines 17 and 19 without the random number), because then a resumed or recomputed step needs no generator's state.
    Neither Switch's noise on the router's input nor its selective dropout is part of this.
    """

    def __init__(self, cfg: RouterConfig, d_model: int, num_experts: int):
        super().__init__()
        self.cfg = cfg
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))

    def forward(self, x: Tensor) -> Routing:
        """Args: x (B, S, D). Returns: Routing over T = B * S tokens."""
        cfg = self.cfg
        scores = softmax_scores(x, self.weight)  # (B, S, E)
        chosen, expert_ids = scores.topk(cfg.top_k, dim=-1)  # (B, S, K), the best first
        weights = chosen / chosen.sum(-1, keepdim=True) if cfg.kind is RouterKind.gshard else chosen
        capacity = expert_capacity(cfg.capacity_factor, x.shape[1], cfg.top_k, self.num_experts)
        is_full = places(expert_ids, self.num_experts) >= capacity
        balance_loss = cfg.balance_coef * expert_balance_loss(scores, expert_ids[..., :1])
        return Routing(
            expert_ids.flatten(0, 1),
            weights.masked_fill(is_full, 0.0).flatten(0, 1),
            count_ids(expert_ids, self.num_experts),
            {"load_balance": balance_loss},
            mean_entropy(scores.flatten(0, 1)),
            is_full.float().mean(),
        )


class HashRouter(nn.Module):
    """A fixed random, balanced hash of the token id chooses the one expert; gate = 1 (Roller et al. 2021, 2106.04426).

    The vocabulary is shuffled and dealt out to the experts in turn, so that their numbers of token ids differ by one at
    most; how often the ids occur in a text is not known here. Every layer shuffles anew, by its position and nothing
    else: all seeds and sizes of a sweep share the order. No parameters, no balance loss.
    """

    expert_of_token: Tensor

    def __init__(self, vocab_size: int, num_experts: int, layer: int):
        super().__init__()
        self.num_experts = num_experts
        generator = torch.Generator().manual_seed(layer)
        order = torch.randperm(vocab_size, generator=generator, device="cpu")  # (V,)
        self.register_buffer("expert_of_token", order % num_experts, persistent=False)

    def forward(self, token_ids: Tensor) -> Routing:
        """Args: token_ids (B, S) int64. Returns: Routing over T = B * S tokens."""
        expert_ids = self.expert_of_token[token_ids.flatten()][:, None]  # (T, 1)
        counts = count_ids(expert_ids, self.num_experts)
        weights = torch.ones(expert_ids.shape, dtype=torch.float32, device=expert_ids.device)
        return Routing(expert_ids, weights, counts, {}, None)


AnyRouter = Router | SoftmaxRouter | CapacityRouter | HashRouter


def make_router(
    cfg: RouterConfig, d_model: int, num_experts: int, vocab_size: int | None = None, layer: int = 0
) -> AnyRouter:
    """The router of `cfg.kind`; the hash alone needs the size of the vocabulary and its layer's position."""
    if cfg.kind is RouterKind.sigmoid:
        return Router(cfg, d_model, num_experts)
    if cfg.kind is RouterKind.softmax:
        return SoftmaxRouter(cfg, d_model, num_experts)
    if cfg.kind is RouterKind.hash:
        assert vocab_size is not None, "the hash router deals out a vocabulary"
        return HashRouter(vocab_size, num_experts, layer)
    return CapacityRouter(cfg, d_model, num_experts)
