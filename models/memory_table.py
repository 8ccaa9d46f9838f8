"""Memory tables: rows outside the model, with a lazy Adam (models/lazy_adam.py)."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.initialize import seed_from_name
from models.lazy_adam import MemoryOptimConfig, bias_count, lazy_adam


class MemoryTable(Protocol):
    """What the training loop asks of a table, wherever its rows lie.

    Order within a step: `lookup` before each forward pass, `accumulate` after each backward pass; at the end
    `grad_sq_norm` (for the one global clipping norm), then `apply`, or `discard` where the step is skipped.
    """

    @property
    def rows_touched(self) -> int:
        """Rows changed by the last `apply`."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of all heads together."""
        ...

    @property
    def weight(self) -> Tensor:
        """(rows, M) all rows as of now, where they lie; to be read or written between steps."""
        ...

    @property
    def step(self) -> Tensor:
        """(rows,) int32, updates each row has had."""
        ...

    @property
    def rows_ever_touched(self) -> int:
        """Rows changed since the start."""
        ...

    @property
    def update_ratio(self) -> float:
        """|update| / |rows before it| of the rows changed by the last `apply`, 2-norms; 0 where none was."""
        ...

    def prefetch(self, row_ids: Tensor) -> None:
        """Announces that the next `lookup` of training is that of `row_ids`, the same tensor; may do nothing."""
        ...

    def lookup(self, row_ids: Tensor) -> Tensor:
        """row_ids (B, S, R) int64 -> rows (B, S, R, M) fp32, a detached leaf that requires grad unless frozen."""
        ...

    def accumulate(self, row_ids: Tensor, grad: Tensor) -> None:
        """Adds the gradient (B, S, R, M) of rows looked up with `row_ids` to the step's gradient."""
        ...

    def grad_sq_norm(self) -> float:
        """Squared 2-norm of the step's gradient, after rows drawn more than once were summed."""
        ...

    def pending_rows(self) -> Tensor:
        """(u,) int64 distinct ids, ascending, of the rows that the coming `apply` will change."""
        ...

    def apply(self, clip_factor: float, lr: float) -> None:
        """Updates the touched rows with clip_factor * gradient and forgets the gradient."""
        ...

    def discard(self) -> None:
        """Forgets the gradient without an update."""
        ...

    def state_shards(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name; no copies."""
        ...

    def load_state_shards(self, shards: dict[str, Tensor]) -> None:
        """Takes back what `state_shards` gave."""
        ...


def coalesce(row_ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums the gradients of equal rows.

    Sorting and then summing neighbouring segments is made of gathers, so the result does not depend on the order of
    threads.

    Args:
        row_ids: (n,) int64.
        grad: (n, M).

    Returns:
        (u,) int64 distinct ids in ascending order, (u, M) fp32 sums.
    """
    sorted_ids, order = row_ids.sort(stable=True)
    rows, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    starts = counts.cumsum(0) - counts
    return rows, F.embedding_bag(order, grad.float(), starts, mode="sum")


class StepGradient:
    """The gradient of one step's rows, summed over its micro-batches.

    Args:
        row_dim: M.
        frozen: whether the rows take none.
    """

    def __init__(self, row_dim: int, frozen: bool) -> None:
        self.row_dim = row_dim
        self.frozen = frozen
        self._parts: list[tuple[Tensor, Tensor]] = []  # coalesced (row ids, gradients), one per accumulation

    def __bool__(self) -> bool:
        return bool(self._parts)

    def add(self, row_ids: Tensor, grad: Tensor) -> None:
        """Adds the gradient (..., M) of rows (...).

        Raises:
            RuntimeError: the table is frozen.
            ValueError: the gradient's shape does not fit the row ids.
        """
        if self.frozen:
            raise RuntimeError("the memory table is frozen (memory.frozen=true) and takes no gradient")
        if grad.shape != (*row_ids.shape, self.row_dim):
            raise ValueError(
                f"gradient of shape {tuple(grad.shape)} does not belong to row ids of shape {tuple(row_ids.shape)} "
                f"and rows of width {self.row_dim}"
            )
        self._parts.append(coalesce(row_ids.flatten(), grad.detach().reshape(-1, self.row_dim)))

    def merged(self) -> tuple[Tensor, Tensor] | None:
        """One coalesced pair, or None where nothing was added."""
        if len(self._parts) > 1:
            row_ids, grads = zip(*self._parts, strict=True)
            self._parts = [coalesce(torch.cat(row_ids), torch.cat(grads))]
        return self._parts[0] if self._parts else None

    def take(self) -> tuple[Tensor, Tensor] | None:
        """What `merged` gives, forgotten here."""
        merged = self.merged()
        self.clear()
        return merged

    def sq_norm(self) -> float:
        """Squared 2-norm of the coalesced gradient, summed in fp64."""
        merged = self.merged()
        return 0.0 if merged is None else float(torch.linalg.vector_norm(merged[1], dtype=torch.float64) ** 2)

    def clear(self) -> None:
        """Forgets it."""
        self._parts = []


def check_shards(own: Mapping[str, Tensor], shards: Mapping[str, Tensor], others: set[str]) -> None:
    """Compares a saved state with a table's arrays `own`; `others` may have any shape.

    Raises:
        ValueError: a name is missing or unknown, or a shape differs.
    """
    if set(shards) != {*own, *others}:
        raise ValueError(f"memory table state must hold {sorted({*own, *others})}, found {sorted(shards)}")
    for name, tensor in own.items():
        if shards[name].shape != tensor.shape:
            raise ValueError(
                f"memory table state {name!r} has shape {tuple(shards[name].shape)}, this table needs "
                f"{tuple(tensor.shape)}; the run's engram settings differ from the checkpoint's"
            )


def ratio_of_norms(norms: tuple[Tensor, Tensor] | None) -> float:
    """The quotient of two norms; 0 where there are none, or the second is 0."""
    return float(norms[0] / norms[1]) if norms is not None and float(norms[1]) > 0 else 0.0


def hot_share(step: Tensor, sample: int = 2**20) -> float:
    """Share of all row updates that went to the 1 % of the rows with the most; 0 where nothing was updated.

    From the rows' step counts (rows,), so a row counts once per step, however often the step drew it. Of more than
    `sample` rows a regular grid of about that many stands for all.
    """
    counts = step[:: max(1, len(step) // sample)].double().sort(descending=True).values
    total = float(counts.sum())
    return float(counts[: max(1, len(counts) // 100)].sum()) / total if total else 0.0


class LocalTable:
    """A table on this process, with lazy row-wise Adam (`lazy_adam`): a step reads and writes only rows it drew.

    Lazy is not dense: dense Adam also decays the moments of the rows that were not drawn, and moves those rows by what
    is left of their momentum. Here they rest, moments included. The two agree where every row is drawn at every step.

    A frozen table (`optim.frozen`) is the start values and nothing else: its rows ask for no gradient, so none is
    computed, it adds nothing to the clipping norm, and its moments have no rows.

    Args:
        num_rows: rows of all heads together.
        row_dim: M.
        init_std: standard deviation of the normal start values.
        seed: of the run.
        optim: hyper-parameters of the update.
        device: where the table lies, and where its start values are drawn: a GPU draws others than a CPU, unlike in
            `models.initialize`. One core draws 7e7 numbers a second, which is 15 minutes for 1e9 rows of 64.
        layer: layer the table belongs to; with `seed` and the kind of device it fixes the start values.
        rows: the rows of the whole table that lie here, with the values they have there; by default all. Row ids then
            count from the first of them.
    """

    def __init__(
        self,
        num_rows: int,
        row_dim: int,
        init_std: float,
        seed: int,
        optim: MemoryOptimConfig | None = None,
        device: torch.device | str | None = None,
        layer: int = 0,
        rows: range | None = None,
    ):
        self.optim = optim if optim is not None else MemoryOptimConfig()
        shape = (num_rows, row_dim)
        generator = torch.Generator(device=device or "cpu").manual_seed(seed_from_name(seed, f"memory.{layer}"))
        self.weight = torch.empty(shape, device=device).normal_(0, init_std, generator=generator)
        if rows is not None:
            num_rows = len(rows)
            self.weight = self.weight[rows.start : rows.stop].clone()
        trained, widths = 0 if self.optim.frozen else num_rows, self.optim.state_widths(row_dim)
        self.exp_avg = torch.zeros((trained, widths["exp_avg"]), device=device)
        self.exp_avg_sq = torch.zeros((trained, widths["exp_avg_sq"]), device=device)
        self.step = torch.zeros(num_rows, dtype=torch.int32, device=device)  # updates each row has had
        self.global_step = 0  # updates the table has had
        self.rows_touched = 0
        self.rows_ever_touched = 0
        self._norms: tuple[Tensor, Tensor] | None = None  # of the last update and of the rows before it
        self._gradient = StepGradient(row_dim, self.optim.frozen)

    @property
    def num_rows(self) -> int:
        """Rows of all heads together."""
        return self.weight.shape[0]

    @property
    def update_ratio(self) -> float:
        """|update| / |rows before it| of the rows changed by the last `apply`, 2-norms; 0 where none was."""
        return ratio_of_norms(self._norms)

    @property
    def hot_share(self) -> float:
        """Share of the updates that went to the 1 % of the rows with the most; see `hot_share`."""
        return hot_share(self.step)

    def prefetch(self, row_ids: Tensor) -> None:
        """Nothing: the rows lie where they are used."""

    def lookup(self, row_ids: Tensor) -> Tensor:
        """Copies rows (B, S, R, M), detached from everything and requiring grad unless frozen."""
        rows = self.weight.index_select(0, row_ids.flatten())
        return rows.view(*row_ids.shape, self.weight.shape[1]).requires_grad_(not self.optim.frozen)

    def accumulate(self, row_ids: Tensor, grad: Tensor) -> None:
        """Adds the gradient of one micro-batch; errors as in `StepGradient.add`."""
        self._gradient.add(row_ids, grad)

    def grad_sq_norm(self) -> float:
        """Squared 2-norm of the coalesced gradient, summed in fp64."""
        return self._gradient.sq_norm()

    def pending_rows(self) -> Tensor:
        """Distinct ids of the rows that hold a gradient."""
        merged = self._gradient.merged()
        return torch.empty(0, dtype=torch.int64, device=self.step.device) if merged is None else merged[0]

    @torch.no_grad()
    def apply(self, clip_factor: float, lr: float) -> None:
        """One lazy Adam update at learning rate lr * lr_multiplier; see the class for the formula."""
        if self.optim.frozen:
            return
        merged = self._gradient.take()
        self.global_step += 1
        self.rows_touched, self._norms = 0, None
        if merged is None:
            return
        rows, grad = merged
        step = self.step[rows] + 1  # (u,)
        update, exp_avg, exp_avg_sq = lazy_adam(
            self.optim, lr, grad * clip_factor, bias_count(self.optim, step, self.global_step),
            self.exp_avg.index_select(0, rows), self.exp_avg_sq.index_select(0, rows),
        )  # fmt: skip
        before = self.weight.index_select(0, rows)  # (u, M)
        self._norms = update.norm(), before.norm()
        self.weight.index_copy_(0, rows, before - update)
        self.exp_avg.index_copy_(0, rows, exp_avg)
        self.exp_avg_sq.index_copy_(0, rows, exp_avg_sq)
        self.step[rows] = step
        self.rows_touched = rows.shape[0]
        self.rows_ever_touched += int((step == 1).sum())

    def discard(self) -> None:
        """Forgets the step's gradient."""
        self._gradient.clear()

    def state_shards(self) -> dict[str, Tensor]:
        """weight, exp_avg, exp_avg_sq (rows, M) fp32; step (rows,) int32; global_step (1,) int64. No copies.

        Widths of the moments: `MemoryOptimConfig.state_widths`.

        Raises:
            RuntimeError: a gradient is waiting; only the state between steps can be resumed from.
        """
        if self._gradient:
            raise RuntimeError("the memory table holds a gradient; call apply or discard before saving its state")
        return {
            "weight": self.weight,
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "step": self.step,
            "global_step": torch.tensor([self.global_step]),
        }

    def load_state_shards(self, shards: dict[str, Tensor]) -> None:
        """Copies what `state_shards` gave into this table.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        own = {"weight": self.weight, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "step": self.step}
        check_shards(own, shards, {"global_step"})
        for name, tensor in own.items():
            tensor.copy_(shards[name])
        self.global_step = int(shards["global_step"].item())
        self.rows_ever_touched = int((self.step > 0).sum())
        self.discard()
