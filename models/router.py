"""Settings of all routers, and DeepSeek-V3's: sigmoid, top-k, loss-free balancing (2.1.2, arXiv 2412.19437).

The routers it is compared with are in `baseline_routers`.
"""

import math
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models import native


class RouterKind(str, Enum):
    """Who decides which experts a token goes to: `Router` for sigmoid, else a class of `baseline_routers`."""

    sigmoid = "sigmoid"  # DeepSeek-V3: top-k of sigmoid scores, balanced by a bias
    softmax = "softmax"  # DeepSeekMoE: top-k of softmax scores, balanced by a loss
    gshard = "gshard"  # top-2 with a capacity
    switch = "switch"  # top-1 with a capacity
    hash = "hash"  # a fixed function of the token


# Settings that only some kinds read.
_READ_BY = {
    "sequence_balance_coef": {RouterKind.sigmoid},
    "bias_update_rate": {RouterKind.sigmoid},
    "normalize": {RouterKind.sigmoid},
    "route_scale": {RouterKind.sigmoid},
    "num_groups": {RouterKind.sigmoid},
    "top_groups": {RouterKind.sigmoid},
    "balance_coef": {RouterKind.softmax, RouterKind.gshard, RouterKind.switch},
    "capacity_factor": {RouterKind.gshard, RouterKind.switch},
}
# Places per expert over an even share of the choices: with half of them, half of the choices are dropped at the best.
MIN_CAPACITY_FACTOR = 0.5
# Experts per token of the kinds that are defined for one number of them.
_FIXED_TOP_K = {RouterKind.gshard: 2, RouterKind.switch: 1, RouterKind.hash: 1}


@dataclass
class RouterConfig:
    """How tokens choose experts. A setting that `kind` does not read must keep its default."""

    kind: RouterKind = RouterKind.sigmoid
    top_k: int = 4  # routed experts per token; 2 for gshard, 1 for switch and hash
    # sigmoid
    sequence_balance_coef: float = 1e-4  # alpha of the sequence-wise balance loss (V3 4.2); 0 switches it off
    bias_update_rate: float = 1e-3  # gamma of the loss-free bias update (V3 4.2); 0 freezes the bias
    normalize: bool = True  # divide the gate values by their sum (`norm_topk_prob` of released models)
    route_scale: float = 1.0  # factor on the normalised gate values (2.5 in the released V3)
    num_groups: int = 1  # consecutive experts form so many groups of equal size (8 in the released V3)
    top_groups: int = 1  # groups a token may choose from (4 in the released V3)
    # softmax, gshard, switch
    balance_coef: float = 1e-2  # alpha of the balance loss (DeepSeekMoE 4.1 at 2B; Switch 2.2); 0 switches it off
    # gshard, switch
    capacity_factor: float = 1.25  # places per expert over an even share (Switch 2.2; GShard's 2 S / E is 1.0)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"model.moe.router.top_k={self.top_k} must be at least 1; nearest: 1")
        for name in ("sequence_balance_coef", "bias_update_rate", "balance_coef"):
            if not 0 <= getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"model.moe.router.{name}={value} must not be negative, and finite; nearest: 0.0")
        if not 0 < self.route_scale < math.inf:
            raise ValueError(f"model.moe.router.route_scale={self.route_scale} must be positive and finite; usual: 1.0")
        if not MIN_CAPACITY_FACTOR <= self.capacity_factor < math.inf:
            raise ValueError(
                f"model.moe.router.capacity_factor={self.capacity_factor} must be at least {MIN_CAPACITY_FACTOR} "
                "and finite: below it even a perfectly balanced router drops most choices; "
                f"nearest: {MIN_CAPACITY_FACTOR}, usual: 1.25"
            )
        self._check_groups()
        mistakes = self._at_odds_with_kind()
        if mistakes:  # all of them: another kind often needs several settings changed
            raise ValueError("; ".join(mistakes))

    def _at_odds_with_kind(self) -> list[str]:
        """What cannot be, or has no effect, with this kind of router."""
        kind, mistakes = f"model.moe.router.kind={self.kind.value}", []
        top_k = _FIXED_TOP_K.get(self.kind, self.top_k)
        if self.top_k != top_k:
            mistakes.append(f"model.moe.router.top_k={self.top_k} must be {top_k} with {kind}; nearest: {top_k}")
        for setting in fields(self):
            readers, value = _READ_BY.get(setting.name), getattr(self, setting.name)
            if readers is not None and self.kind not in readers and value != setting.default:
                mistakes.append(
                    f"model.moe.router.{setting.name}={value} has no effect with {kind}; nearest: its default "
                    f"{setting.default}"
                )
        return mistakes

    def _check_groups(self) -> None:
        if self.num_groups < 1:
            raise ValueError(f"model.moe.router.num_groups={self.num_groups} must be at least 1; nearest: 1")
        most = max(1, self.num_groups - 1)
        if not 1 <= self.top_groups <= most:
            raise ValueError(
                f"model.moe.router.top_groups={self.top_groups} must be between 1 and {most} with "
                "model.moe.router.num_groups="
                f"{self.num_groups}, or it limits nothing; nearest: {min(max(self.top_groups, 1), most)}"
            )

    def check_num_experts(self, num_experts: int) -> None:
        """Raises ValueError where E experts cannot be routed as this configuration says."""
        if num_experts < self.top_k:
            raise ValueError(
                f"model.moe.num_experts={num_experts} must be at least model.moe.router.top_k={self.top_k}; "
                f"nearest: {self.top_k}"
            )
        if self.num_groups == 1:
            return
        # A group's score is the sum of its two best, and the chosen groups must hold top_k experts.
        smallest = self.num_groups * max(2, -(-self.top_k // self.top_groups))
        nearest = max(smallest, round(num_experts / self.num_groups) * self.num_groups)
        if num_experts != nearest:
            raise ValueError(
                f"model.moe.num_experts={num_experts} must be a multiple of "
                f"model.moe.router.num_groups={self.num_groups}, at "
                f"least {smallest}: groups of two or more, of which {self.top_groups} hold "
                f"model.moe.router.top_k={self.top_k}; nearest: {nearest}"
            )

    @property
    def is_learned(self) -> bool:
        """Whether the router has a weight matrix (E, D)."""
        return self.kind is not RouterKind.hash

    @property
    def can_drop(self) -> bool:
        """Whether a token may find its expert full."""
        return self.kind in _READ_BY["capacity_factor"]


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    expert_ids: Tensor  # (T, K) int64, the chosen experts of each token
    weights: Tensor  # (T, K) fp32, their gate values; 0 where the expert was full
    counts: Tensor  # (E,) int64, choices per expert, those of full experts included; sums to T * K
    aux_losses: dict[str, Tensor]  # scalars fp32, already times their coefficients
    entropy: Tensor | None  # scalar fp32, detached: mean over tokens of the entropy of the scores' shares, in nats
    dropped: Tensor | None = None  # scalar fp32, the part of the T * K choices whose expert was full


def top_k_ids(scores: Tensor, top_k: int) -> Tensor:
    """Ids of the K highest of scores (T, E) fp32, in any order: (T, K) int64."""
    if native.available(scores, torch.float32) and scores.is_contiguous():
        ids = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
        native.call("top_k", *scores.shape, top_k, scores, ids)
        return ids
    return scores.topk(top_k, dim=-1, sorted=False).indices


def count_ids(ids: Tensor, num_ids: int) -> Tensor:
    """How often each of 0 .. num_ids - 1 occurs in ids (int64): (num_ids,) int64. The host waits for no GPU."""
    ids = ids.flatten()
    return torch.zeros(num_ids, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))


def counts_by_sequence(expert_ids: Tensor, num_experts: int) -> Tensor:
    """How often each sequence chose each expert: expert_ids (B, S, K) int64 -> (B, E) int64."""
    batch = expert_ids.shape[0]
    sequence = torch.arange(batch, device=expert_ids.device)[:, None, None]
    return count_ids(expert_ids + sequence * num_experts, batch * num_experts).view(batch, num_experts)


def mean_entropy(shares: Tensor) -> Tensor:
    """Mean over tokens of -sum_i p_i ln p_i in nats, detached; shares (T, E) fp32, each row sums to 1."""
    # The floor keeps a share that underflowed to 0 from giving 0 * log 0.
    shares = shares.detach().clamp_min(torch.finfo(torch.float32).tiny)
    return -(shares * shares.log()).sum(-1).mean()


def sequence_balance_loss(scores: Tensor, top_k: int) -> Tensor:
    """Mean over sequences of sum_i f_i P_i (V3 eqs 17 to 20, without the factor alpha).

    f_i = E / (K S) * number of the sequence's tokens that have expert i among their K highest *unbiased* scores;
    P_i = mean over the sequence of s_i / sum_j s_j. A perfectly even router gives 1. Only P carries a gradient.

    Args:
        scores: (B, S, E) fp32 sigmoid scores, without bias.
        top_k: K.

    Returns:
        Scalar fp32.
    """
    batch, seq_len, num_experts = scores.shape
    chosen = top_k_ids(scores.detach().flatten(0, 1), top_k).view(batch, seq_len, top_k)
    fraction = counts_by_sequence(chosen, num_experts) * (num_experts / (top_k * seq_len))  # f, (B, E)
    mean_share = (scores / scores.sum(-1, keepdim=True)).mean(dim=1)  # P, (B, E)
    return (fraction * mean_share).sum(-1).mean()


TOKENS_PER_BLOCK = 32  # TOKENS of models/native/router.c, in whose layout the scores wait for the backward pass


class _NativeRouting(torch.autograd.Function):
    """`Router.forward` without groups, in one C kernel each way (models/native/router.c)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cfg: RouterConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, seq_len, width = x.shape
        num_experts, num_tokens, blocks = weight.shape[0], batch * seq_len, -(-seq_len // TOKENS_PER_BLOCK)
        x, weight = x.contiguous(), weight.contiguous()
        scores = x.new_empty(batch, blocks, num_experts, TOKENS_PER_BLOCK)
        sums = x.new_empty(batch, blocks, TOKENS_PER_BLOCK)
        ids, weights = torch.empty(num_tokens, cfg.top_k, dtype=torch.int64), x.new_empty(num_tokens, cfg.top_k)
        counts = torch.zeros(batch, num_experts, dtype=torch.int64)
        even, share = x.new_zeros(2, batch, num_experts)
        entropy = torch.zeros(batch, dtype=torch.float64)
        sizes = (batch, seq_len, width, num_experts, cfg.top_k, float(cfg.route_scale), int(cfg.normalize))
        native.call("router_forward", *sizes, x, weight, bias, scores, sums, ids, weights, counts, even, share, entropy)
        # f_i P_i / B of the balance loss without P_i's sum over tokens, times its coefficient: (B, E)
        pull = even * (cfg.sequence_balance_coef * num_experts / (cfg.top_k * seq_len * seq_len * batch))
        ctx.sizes = sizes
        ctx.save_for_backward(x, weight, scores, sums, ids, pull)
        counts, entropy = counts.sum(0), (entropy.sum() / num_tokens).float()
        ctx.mark_non_differentiable(ids, counts, entropy)
        ctx.set_materialize_grads(False)
        return weights, (pull * share).sum(), ids, counts, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, scores, sums, ids, pull = ctx.saved_tensors
        grad_weights, grad_loss = grads[:2]  # of what goes unused: None
        grad_weights = x.new_zeros(ids.shape) if grad_weights is None else grad_weights.contiguous()
        grad_pull = torch.zeros_like(pull) if grad_loss is None else pull * grad_loss
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        inputs = (x, weight, scores, sums, ids, grad_weights, grad_pull)
        native.call("router_backward", *ctx.sizes, *inputs, grad_x, grad_weight, x.new_empty(len(x), *weight.shape))
        return grad_x, grad_weight, None, None


class Router(nn.Module):
    """s = sigmoid(x W^T) in fp32; the K experts of highest s + bias; gate = route_scale * s / sum of the chosen s.

    The bias balances the load without a loss (V3 eq 16): it only decides which experts are chosen, takes no
    gradient and never enters the gate value. It is moved by `update_expert_bias`, once per applied step.
    With groups the K experts come from the `top_groups` best groups (V3 2.1.2, node-limited routing); a group is as
    good as the sum of its two highest s + bias (as in the released code).
    """

    expert_bias: Tensor

    def __init__(self, cfg: RouterConfig, d_model: int, num_experts: int):
        super().__init__()
        self.cfg = cfg
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """Chooses the experts of every token.

        Args:
            x: (B, S, D).

        Returns:
            Routing over T = B * S tokens.
        """
        cfg = self.cfg
        x, weight = x.float(), self.weight.float()
        if native.available(x, torch.float32) and cfg.num_groups == 1:
            weights, balance_loss, expert_ids, counts, entropy = _NativeRouting.apply(x, weight, self.expert_bias, cfg)
            return Routing(expert_ids, weights, counts, {"sequence_balance": balance_loss}, entropy)
        with torch.autocast(x.device.type, enabled=False):
            logits = x @ weight.t()  # (B, S, E)
        scores = logits.sigmoid()
        flat = scores.flatten(0, 1)  # (T, E)
        biased = flat.detach() + self.expert_bias
        if cfg.num_groups > 1:
            biased = self._limit_to_groups(biased)
        expert_ids = top_k_ids(biased, cfg.top_k)  # (T, K)
        chosen = flat.gather(1, expert_ids)
        weights = cfg.route_scale * chosen
        if cfg.normalize:
            weights = weights / chosen.sum(-1, keepdim=True)
        counts = count_ids(expert_ids, self.num_experts)
        if cfg.sequence_balance_coef > 0:
            balance_loss = cfg.sequence_balance_coef * sequence_balance_loss(scores, cfg.top_k)
        else:
            balance_loss = scores.new_zeros(())
        entropy = mean_entropy(flat.detach() / flat.detach().sum(-1, keepdim=True))
        return Routing(expert_ids, weights, counts, {"sequence_balance": balance_loss}, entropy)

    def _limit_to_groups(self, biased: Tensor) -> Tensor:
        """Scores (T, E) with -inf outside the best groups of each token."""
        grouped = biased.unflatten(-1, (self.cfg.num_groups, -1))  # (T, groups, E / groups)
        best = top_k_ids(grouped.topk(2, dim=-1).values.sum(-1), self.cfg.top_groups)  # (T, top_groups)
        closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter_(1, best, False)
        return grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)

    @torch.no_grad()
    def update_expert_bias(self, counts: Tensor) -> None:
        """bias_i += gamma * sign(mean load - load_i); nothing to balance where every expert is always chosen.

        Args:
            counts: (E,) tokens per expert over the whole batch of the step.
        """
        if self.num_experts == self.cfg.top_k:
            return
        load = counts.to(device=self.expert_bias.device, dtype=torch.float64)
        direction = (load.mean() - load).sign().to(self.expert_bias.dtype)
        self.expert_bias.add_(direction, alpha=self.cfg.bias_update_rate)
