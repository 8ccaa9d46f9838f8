"""Memory tables: rows outside the model, with a lazy row-wise Adam."""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from models.initialize import seed_from_name


class StepCount(str, Enum):
    """Which step enters the bias correction of a row's moments."""

    per_row = "per_row"  # the number of updates this row has had
    global_step = "global_step"  # the number of updates the table has had


@dataclass
class MemoryOptimConfig:
    """Adam on the touched rows; no weight decay (paper 4.1)."""

    lr_multiplier: float = 5.0  # times the backbone's learning rate (paper 4.1)
    beta1: float = 0.9  # decay of the first moment per update
    beta2: float = 0.95  # decay of the second moment per update
    eps: float = 1e-8  # added to the root of the second moment
    step_count: StepCount = StepCount.per_row
    frozen: bool = False  # rows keep their random start values (control): no gradient, no moments, no step counts

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"memory.{name}={getattr(self, name)} must be in [0, 1); usual: 0.9 and 0.95")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"memory.eps={self.eps} must be positive and finite; usual: 1e-8")
        if not 0 <= self.lr_multiplier < math.inf:
            raise ValueError(f"memory.lr_multiplier={self.lr_multiplier} must not be negative, and finite; usual: 5.0")
        if self.frozen:
            for name in ("lr_multiplier", "beta1", "beta2", "eps", "step_count"):
                default = getattr(MemoryOptimConfig, name)
                if getattr(self, name) != default:
                    raise ValueError(
                        f"memory.{name}={getattr(self, name)} has no effect with memory.frozen=true: frozen rows are "
                        f"never updated; nearest: {default}"
                    )


class MemoryTable(Protocol):
    """What the training loop asks of a table, wherever its rows lie.

    Order within a step: `lookup` before each forward pass, `accumulate` after each backward pass; at the end
    `grad_sq_norm` (for the one global clipping norm), then `apply`, or `discard` where the step is skipped.
    """

    rows_touched: int  # rows changed by the last `apply`
    rows_ever_touched: int  # rows changed since the start

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


class LocalTable:
    """A table on this process, with lazy row-wise Adam: only rows drawn in a step are read or written in it.

    For a drawn row with summed, clipped gradient g, and t its step count (see `StepCount`),

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,
        w <- w - lr * lr_multiplier * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

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
        trained_shape = (0 if self.optim.frozen else num_rows, row_dim)
        self.exp_avg = torch.zeros(trained_shape, device=device)
        self.exp_avg_sq = torch.zeros(trained_shape, device=device)
        self.step = torch.zeros(num_rows, dtype=torch.int32, device=device)  # updates each row has had
        self.global_step = 0  # updates the table has had
        self.rows_touched = 0
        self.rows_ever_touched = 0
        self._pending: list[tuple[Tensor, Tensor]] = []  # coalesced (row ids, gradients), one per accumulation

    @property
    def num_rows(self) -> int:
        """Rows of all heads together."""
        return self.weight.shape[0]

    def lookup(self, row_ids: Tensor) -> Tensor:
        """Copies rows (B, S, R, M), detached from everything and requiring grad unless frozen."""
        rows = self.weight.index_select(0, row_ids.flatten())
        return rows.view(*row_ids.shape, self.weight.shape[1]).requires_grad_(not self.optim.frozen)

    def accumulate(self, row_ids: Tensor, grad: Tensor) -> None:
        """Adds the gradient of one micro-batch.

        Raises:
            RuntimeError: the table is frozen.
            ValueError: the gradient's shape does not fit the row ids.
        """
        if self.optim.frozen:
            raise RuntimeError("the memory table is frozen (memory.frozen=true) and takes no gradient")
        if grad.shape != (*row_ids.shape, self.weight.shape[1]):
            raise ValueError(
                f"gradient of shape {tuple(grad.shape)} does not belong to row ids of shape {tuple(row_ids.shape)} "
                f"and rows of width {self.weight.shape[1]}"
            )
        self._pending.append(coalesce(row_ids.flatten(), grad.detach().reshape(-1, self.weight.shape[1])))

    def _merged(self) -> tuple[Tensor, Tensor] | None:
        """The step's gradient as one coalesced pair, or None where nothing was accumulated."""
        if len(self._pending) > 1:
            row_ids, grads = zip(*self._pending, strict=True)
            self._pending = [coalesce(torch.cat(row_ids), torch.cat(grads))]
        return self._pending[0] if self._pending else None

    def grad_sq_norm(self) -> float:
        """Squared 2-norm of the coalesced gradient, summed in fp64."""
        merged = self._merged()
        return 0.0 if merged is None else float(torch.linalg.vector_norm(merged[1], dtype=torch.float64) ** 2)

    def pending_rows(self) -> Tensor:
        """Distinct ids of the rows that hold a gradient."""
        merged = self._merged()
        return torch.empty(0, dtype=torch.int64, device=self.step.device) if merged is None else merged[0]

    @torch.no_grad()
    def apply(self, clip_factor: float, lr: float) -> None:
        """One lazy Adam update at learning rate lr * lr_multiplier; see the class for the formula."""
        if self.optim.frozen:
            return
        merged = self._merged()
        self.discard()
        self.global_step += 1
        self.rows_touched = 0
        if merged is None:
            return
        rows, grad = merged
        optim = self.optim
        grad = grad * clip_factor  # (u, M)
        step = self.step[rows] + 1  # (u,)
        exp_avg = self.exp_avg.index_select(0, rows).lerp_(grad, 1 - optim.beta1)
        exp_avg_sq = self.exp_avg_sq.index_select(0, rows).mul_(optim.beta2).addcmul_(grad, grad, value=1 - optim.beta2)
        if optim.step_count is StepCount.per_row:
            count = step.double()[:, None]
        else:
            count = torch.full((1, 1), float(self.global_step), dtype=torch.float64, device=rows.device)
        step_size = (lr * optim.lr_multiplier / (1 - optim.beta1**count)).to(grad.dtype)
        correction = (1 - optim.beta2**count).sqrt().to(grad.dtype)
        update = step_size * exp_avg / (exp_avg_sq.sqrt().div_(correction).add_(optim.eps))
        self.weight.index_copy_(0, rows, self.weight.index_select(0, rows) - update)
        self.exp_avg.index_copy_(0, rows, exp_avg)
        self.exp_avg_sq.index_copy_(0, rows, exp_avg_sq)
        self.step[rows] = step
        self.rows_touched = rows.shape[0]
        self.rows_ever_touched += int((step == 1).sum())

    def discard(self) -> None:
        """Forgets the step's gradient."""
        self._pending = []

    def state_shards(self) -> dict[str, Tensor]:
        """weight, exp_avg, exp_avg_sq (rows, M) fp32; step (rows,) int32; global_step (1,) int64. No copies.

        Raises:
            RuntimeError: a gradient is waiting; only the state between steps can be resumed from.
        """
        if self._pending:
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
        if set(shards) != {*own, "global_step"}:
            raise ValueError(f"memory table state must hold {sorted({*own, 'global_step'})}, found {sorted(shards)}")
        for name, tensor in own.items():
            if shards[name].shape != tensor.shape:
                raise ValueError(
                    f"memory table state {name!r} has shape {tuple(shards[name].shape)}, this table needs "
                    f"{tuple(tensor.shape)}; the run's engram settings differ from the checkpoint's"
                )
        for name, tensor in own.items():
            tensor.copy_(shards[name])
        self.global_step = int(shards["global_step"].item())
        self.rows_ever_touched = int((self.step > 0).sum())
        self.discard()
