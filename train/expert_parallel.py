"""Experts spread over processes: tokens travel to them by all-to-all and their outputs travel back.

Every rank holds a run of neighbouring experts (55 experts on 4 ranks: 13, 14, 14, 14). Of a micro-batch's T * K choices

    dispatch   rows are sorted by expert, and so by rank; counts per expert are exchanged first, then the rows, each
               with its gate value as one more column
    experts    what arrived is one choice per row, and goes through the dispatcher of a single process
    combine    outputs, already weighted, travel back; a token's K rows are summed

The backward pass is the same with all directions reversed. Bytes sent per token and layer, for rows of b bytes per
value: K * (D + 1) * b out and K * D * b back, the same again in the backward pass; of them 1 / P stay on the rank.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from models.moe import Dispatched, LocalDispatcher, combine_rows, gather_rows
from train.ranks import part


class _Route(NamedTuple):
    """How rows went out, to bring them back."""

    sent: list[int]  # rows to each rank of the group
    received: list[int]  # rows from each rank of the group
    slots: Tensor  # (T, K) int64, the sent row of each token's k-th choice
    token_of_row: Tensor  # (T * K,) int64


class AllToAllDispatcher:
    """Tokens to the experts of all ranks in `group`, and back; see the module.

    Args:
        num_experts: of the layer, on all ranks together.
        padded: how the experts here want their tokens, see `models.moe.LocalDispatcher`.
        group: ranks that together hold every expert once.
    """

    def __init__(self, num_experts: int, padded: bool, group: dist.ProcessGroup):
        self.group = group
        self.num_experts = num_experts
        self.degree = dist.get_world_size(group)
        self.shares = [part(num_experts, rank, self.degree) for rank in range(self.degree)]
        self.local_experts = self.shares[dist.get_rank(group)]
        self.local = LocalDispatcher(len(self.local_experts), padded)

    def dispatch(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Dispatched:
        """Sends x (T, D) to the experts in expert_ids (T, K) with gate values (T, K); the rows that arrived here."""
        num_tokens, top_k = expert_ids.shape
        sorted_ids, pair_of_row = expert_ids.flatten().sort(stable=True)  # (T * K,)
        counts = torch.searchsorted(sorted_ids, torch.arange(self.num_experts + 1, device=x.device)).diff()
        arriving = self._exchange_counts(counts)  # (P, E_local), rows from each rank for each expert here
        token_of_row = pair_of_row // top_k
        slots = torch.empty_like(pair_of_row)
        slots[pair_of_row] = torch.arange(len(pair_of_row), device=x.device)
        slots = slots.view(num_tokens, top_k)
        sent = [int(counts[share.start : share.stop].sum()) for share in self.shares]
        route = _Route(sent, arriving.sum(1).tolist(), slots, token_of_row)
        tokens, row_weights = gather_rows(x, weights, slots, token_of_row)  # (T * K, D), (T * K,)
        rows = torch.cat([tokens, row_weights[:, None]], 1)
        rows = _AllToAll.apply(rows, route.sent, route.received, self.group)  # (n, D + 1)
        experts = torch.arange(len(self.local_experts), device=x.device).repeat(self.degree)
        ids = experts.repeat_interleave(arriving.flatten())[:, None]  # (n, 1)
        return self.local.dispatch(rows[:, :-1], ids, rows[:, -1:])._replace(route=route)

    def combine(self, outputs: Tensor, dispatched: Dispatched) -> Tensor:
        """Brings the weighted outputs of the experts here back to their tokens; the sums of what comes back, (T, D)."""
        route: _Route = dispatched.route
        rows = self.local.combine(outputs, dispatched)  # (n, D), as they arrived
        rows = _AllToAll.apply(rows, route.received, route.sent, self.group)  # (T * K, D)
        return combine_rows(rows, route.slots, route.token_of_row)

    def _exchange_counts(self, counts: Tensor) -> Tensor:
        """(E,) rows of this rank for every expert -> (P, E_local) rows of every rank for the experts here."""
        arriving = counts.new_empty(self.degree * len(self.local_experts))
        sizes = [len(share) for share in self.shares]
        dist.all_to_all_single(arriving, counts, [len(self.local_experts)] * self.degree, sizes, group=self.group)
        return arriving.view(self.degree, -1)


class _AllToAll(torch.autograd.Function):
    """Rows sorted by destination -> rows sorted by origin. The gradient travels the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return exchange(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None = None) -> Tensor:
    """Rows (n, ...) sorted by destination rank -> (m, ...) sorted by origin; sent and received are rows per rank."""
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
