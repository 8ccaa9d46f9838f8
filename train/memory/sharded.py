"""A memory table whose rows are dealt out over all ranks.

Every rank owns a run of neighbouring rows, alone holds their moments, and alone updates them. In a step

    lookup       each rank asks the owners for the distinct rows of its micro-batch: ids out by all-to-all, rows back
    accumulate   gradients, summed by row, go to the owners, who add up what all ranks send
    apply        every owner updates its rows; nothing has to be sent

Bytes per distinct row of a micro-batch and rank: 8 for its id, 4 M for the row, 4 M for its gradient; one part in W of
them stays where it is. Rows drawn more than once by a rank travel once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from models.memory_table import MemoryTable, coalesce
from train.expert_parallel import exchange
from train.ranks import Ranks, part


class _Route(NamedTuple):
    """Where the rows of one micro-batch lie."""

    row_ids: Tensor  # as looked up; one micro-batch is recognised by it
    inverse: Tensor  # (n,) int64, each drawn row among the distinct ones
    asked: list[int]  # distinct rows of this rank at each owner
    wanted: list[int]  # rows that each rank asks of this one
    wanted_rows: Tensor  # (sum of wanted,) int64, counted from this rank's first row


class ShardedTable:
    """Rows `part(num_rows, rank, world_size)` of a table, and the way to those of the other ranks.

    All ranks must call `lookup` and `accumulate` equally often and in the same order.

    Args:
        local: holds this rank's rows.
        num_rows: of the whole table.
        ranks: the processes that share it.
        frozen: whether rows ask for no gradient.
    """

    def __init__(self, local: MemoryTable, num_rows: int, ranks: Ranks, frozen: bool = False):
        self.local = local
        self._num_rows = num_rows
        self.ranks = ranks
        self.frozen = frozen
        self.rows = part(num_rows, ranks.rank, ranks.world_size)
        self._ends = torch.tensor([part(num_rows, rank, ranks.world_size).stop for rank in range(ranks.world_size)])
        self._ends = self._ends.to(local.weight.device)
        self._routes: list[_Route] = []  # of lookups whose gradient has not come yet

    @property
    def num_rows(self) -> int:
        """Rows of all ranks together."""
        return self._num_rows

    @property
    def weight(self) -> Tensor:
        """This rank's rows."""
        return self.local.weight

    @property
    def step(self) -> Tensor:
        """Updates that each of this rank's rows has had."""
        return self.local.step

    @property
    def rows_touched(self) -> int:
        """Rows of this rank that the last `apply` changed."""
        return self.local.rows_touched

    @property
    def rows_ever_touched(self) -> int:
        """Rows of this rank changed since the start."""
        return self.local.rows_ever_touched

    @property
    def update_ratio(self) -> float:
        """Of this rank's rows; see `MemoryTable`."""
        return self.local.update_ratio

    def prefetch(self, row_ids: Tensor) -> None:
        """Nothing: rows are fetched when they are looked up."""

    def lookup(self, row_ids: Tensor) -> Tensor:
        """row_ids (B, S, R) -> rows (B, S, R, M), a detached leaf that requires grad unless frozen."""
        route = self._route(row_ids)
        if torch.is_grad_enabled() and not self.frozen:
            self._routes.append(route)
        rows = self._fetch(route, lambda ids: self.local.weight.index_select(0, ids))
        return rows.requires_grad_(not self.frozen)

    def read(self, row_ids: Tensor, read_local: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows of another array that is dealt out like this table: `read_local` maps (n,) local ids to (n, M)."""
        return self._fetch(self._route(row_ids), read_local)

    def accumulate(self, row_ids: Tensor, grad: Tensor) -> None:
        """Sends the gradient (B, S, R, M) of one micro-batch to the owners; see `LocalTable.accumulate` for errors."""
        index = next((i for i, route in enumerate(self._routes) if route.row_ids is row_ids), None)
        if index is None:
            raise ValueError("accumulate got row ids that were not looked up before, or whose gradient came already")
        route = self._routes.pop(index)
        _, summed = coalesce(route.inverse, grad.detach().reshape(len(route.inverse), -1))  # (u, M) in ascending rows
        arrived = exchange(summed, route.asked, route.wanted)  # (sum of wanted, M), rank 0's first
        self.local.accumulate(route.wanted_rows, arrived)

    def grad_sq_norm(self) -> float:
        """Squared 2-norm of the step's gradient over this rank's rows; the caller adds up the ranks'."""
        return self.local.grad_sq_norm()

    def pending_rows(self) -> Tensor:
        """Distinct rows of this rank that hold a gradient, counted from its first row."""
        return self.local.pending_rows()

    def apply(self, clip_factor: float, lr: float) -> None:
        """Updates this rank's rows."""
        self.local.apply(clip_factor, lr)

    def discard(self) -> None:
        """Forgets the step's gradient."""
        self._routes = []
        self.local.discard()

    def state_shards(self) -> dict[str, Tensor]:
        """Of this rank's rows."""
        return self.local.state_shards()

    def load_state_shards(self, shards: dict[str, Tensor]) -> None:
        """Takes back what `state_shards` gave on a rank with the same rows."""
        self.local.load_state_shards(shards)

    def _route(self, row_ids: Tensor) -> _Route:
        distinct, inverse = row_ids.flatten().unique(return_inverse=True)  # ascending, and so sorted by owner
        bounds = torch.searchsorted(distinct, self._ends)  # (W,), end of each owner's part
        asked = bounds.diff(prepend=bounds.new_zeros(1))
        wanted = torch.empty_like(asked)
        dist.all_to_all_single(wanted, asked)
        asked_list, wanted_list = asked.tolist(), wanted.tolist()
        wanted_rows = exchange(distinct, asked_list, wanted_list) - self.rows.start
        return _Route(row_ids, inverse, asked_list, wanted_list, wanted_rows)

    @torch.no_grad()
    def _fetch(self, route: _Route, read_local: Callable[[Tensor], Tensor]) -> Tensor:
        distinct = exchange(read_local(route.wanted_rows), route.wanted, route.asked)  # (u, M)
        return distinct.index_select(0, route.inverse).view(*route.row_ids.shape, -1)
