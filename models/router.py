"""Sigmoid top-k router with loss-free balancing (DeepSeek-V3 2.1.2, arXiv 2412.19437)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import native


@dataclass
class RouterConfig:
    """How tokens choose experts."""

    top_k: int = 4  # routed experts per token
    sequence_balance_coef: float = 1e-4  # alpha of the sequence-wise balance loss (V3 4.2); 0 switches it off
    bias_update_rate: float = 1e-3  # gamma of the loss-free bias update (V3 4.2); 0 freezes the bias
    route_scale: float = 1.0  # factor on the normalised gate values (2.5 in the released V3)

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"router.top_k={self.top_k} must be at least 1; nearest: 1")
        for name in ("sequence_balance_coef", "bias_update_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"router.{name}={getattr(self, name)} must not be negative; nearest: 0.0")
        if self.route_scale <= 0:
            raise ValueError(f"router.route_scale={self.route_scale} must be positive; usual: 1.0")


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    expert_ids: Tensor  # (T, K) int64, the chosen experts of each token
    weights: Tensor  # (T, K) fp32, their gate values; each row sums to route_scale
    counts: Tensor  # (E,) int64, tokens per expert; sums to T * K
    balance_loss: Tensor  # scalar fp32, sequence-wise balance loss already times its coefficient
    entropy: Tensor  # scalar fp32, detached: mean over tokens of the entropy of the normalised scores, in nats


def top_k_ids(scores: Tensor, top_k: int) -> Tensor:
    """Ids of the K highest of scores (T, E) fp32, in any order: (T, K) int64."""
    if native.available(scores, torch.float32) and scores.is_contiguous():
        ids = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
        native.call("top_k", *scores.shape, top_k, scores, ids)
        return ids
    return scores.topk(top_k, dim=-1, sorted=False).indices


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
    sequence = torch.arange(batch, device=scores.device)[:, None, None]
    counts = torch.bincount((chosen + sequence * num_experts).flatten(), minlength=batch * num_experts)
    fraction = counts.view(batch, num_experts) * (num_experts / (top_k * seq_len))  # f, (B, E)
    mean_share = (scores / scores.sum(-1, keepdim=True)).mean(dim=1)  # P, (B, E)
    return (fraction * mean_share).sum(-1).mean()


class Router(nn.Module):
    """s = sigmoid(x W^T) in fp32; the K experts of highest s + bias; gate = route_scale * s / sum of the chosen s.

    The bias balances the load without a loss (V3 eq 16): it only decides which experts are chosen, takes no
    gradient and never enters the gate value. It is moved by `update_expert_bias`, once per applied step.
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
        with torch.autocast(x.device.type, enabled=False):
            scores = (x.float() @ self.weight.float().t()).sigmoid()  # (B, S, E)
        flat = scores.flatten(0, 1)  # (T, E)
        expert_ids = top_k_ids(flat.detach() + self.expert_bias, cfg.top_k)  # (T, K)
        chosen = flat.gather(1, expert_ids)
        weights = cfg.route_scale * chosen / chosen.sum(-1, keepdim=True)
        counts = torch.bincount(expert_ids.flatten(), minlength=self.num_experts)
        if cfg.sequence_balance_coef > 0:
            balance_loss = cfg.sequence_balance_coef * sequence_balance_loss(scores, cfg.top_k)
        else:
            balance_loss = scores.new_zeros(())
        # The floor keeps a score that underflowed to 0 from giving 0 * log 0.
        share = (flat.detach() / flat.detach().sum(-1, keepdim=True)).clamp_min_(torch.finfo(torch.float32).tiny)
        entropy = -(share * share.log()).sum(-1).mean()
        return Routing(expert_ids, weights, counts, balance_loss, entropy)

    @torch.no_grad()
    def update_expert_bias(self, counts: Tensor) -> None:
        """bias_i += gamma * sign(mean load - load_i); nothing to balance where every expert is always chosen.

        Args:
            counts: (E,) tokens per expert over the whole batch of the step.
        """
        if self.num_experts == self.cfg.top_k:
            return
        load = counts.to(device=self.expert_bias.device, dtype=torch.float64)
        self.expert_bias += self.cfg.bias_update_rate * (load.mean() - load).sign().to(self.expert_bias.dtype)
