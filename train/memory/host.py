"""A memory table whose rows lie in this machine's RAM or in a file."""

from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

from models.lazy_adam import MemoryOptimConfig, bias_count, lazy_adam
from models.memory_table import StepGradient, check_shards, hot_share, ratio_of_norms
from train.memory.cache import CachedStore
from train.memory.copies import ToDevice, ToHost
from train.memory.in_order import InOrder
from train.memory.rounding import stochastic_round
from train.memory.store import Store


class HostTable:
    """Rows in a store, with the lazy Adam of `LocalTable`: same calls, same numbers, on another place.

    Which version of the rows a look-up sees, where version s is that after update s:

    * synchronous: the newest, always.
    * asynchronous: reads and updates are done by one thread in the order in which `prefetch`, `lookup` and `apply`
      were called, so this order alone decides, never the clock. A look-up that was announced by `prefetch` sees what
      there was at its `prefetch`; any other sees the newest. The training loop announces the first micro-batch of
      step s + 1 while the last one of step s is computed, before update s is given: it sees version s - 1. The other
      micro-batches are announced after update s - 1, and see the newest. So training is at most one update behind,
      and evaluation and checkpoints not at all.

    A resumed run must read what the uninterrupted one had read ahead. So the state of an asynchronous table has the
    rows that the last update changed as they were before it (`previous_rows`, `previous_weight`), and the first
    `prefetch` after loading reads those.

    bf16 rows are rounded stochastically, with bits that are a function of seed, layer, row and the row's step.

    Args:
        store: arrays of `train.memory.place.array_specs`, with start values.
        optim: hyper-parameters of the update.
        device: where rows are used; gradients are summed there, and the update is computed on the CPU.
        seed: of the run, for rounding.
        layer: the table's, for rounding.
        first_row: id of row 0 in the whole table, for rounding.
        asynchronous: see above.
    """

    def __init__(
        self,
        store: Store,
        optim: MemoryOptimConfig,
        device: torch.device,
        seed: int = 0,
        layer: int = 0,
        first_row: int = 0,
        asynchronous: bool = False,
    ) -> None:
        self.store = store
        self.optim = optim
        self.device = device
        self.asynchronous = asynchronous
        self.global_step = 0  # updates the table has had
        self.rows_touched = 0
        self._seed, self._layer, self._first_row = seed, layer, first_row
        self._rows_ever_touched = 0
        self._norms: tuple[Tensor, Tensor] | None = None  # of the last update and of the rows before it
        self._gradient = StepGradient(self._rows.shape[1], self.optim.frozen)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._tasks = InOrder(asynchronous, f"memory table {layer}")
        self._update: Future[None] | None = None
        self._ahead: tuple[Tensor, Future[ToDevice]] | None = None  # announced row ids and their rows
        self._previous = self._no_rows()  # ids and rows that the last update changed, before it
        self._resumed: tuple[Tensor, Tensor] | None = None  # the same, to be read once after loading

    @property
    def _rows(self) -> Tensor:
        """(rows, M), in a file perhaps older than the cache."""
        return self.store.arrays["weight"]

    def _no_rows(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, dtype=torch.int64), self._rows[:0]

    @property
    def num_rows(self) -> int:
        """Rows of this table."""
        return len(self._rows)

    @property
    def weight(self) -> Tensor:
        """(rows, M) all rows as of now, in their type; to be read or written before the next call."""
        self.drain()
        self.store.flush()
        self.store.forget()
        return self._rows

    @property
    def step(self) -> Tensor:
        """(rows,) int32, updates each row has had."""
        self.drain()
        self.store.flush()
        return self.store.arrays["step"]

    @property
    def rows_ever_touched(self) -> int:
        """Rows changed since the start."""
        self.drain()
        return self._rows_ever_touched

    @property
    def update_ratio(self) -> float:
        """|update| / |rows before it| of the rows changed by the last `apply`, 2-norms; before rounding."""
        self.drain()
        return ratio_of_norms(self._norms)

    @property
    def hot_share(self) -> float:
        """Share of the updates that went to the 1 % of the rows with the most; see `hot_share`."""
        return hot_share(self.step)

    @property
    def hit_rate(self) -> float | None:
        """Share of the rows looked up so far that were in RAM; None without a cache."""
        self.drain()
        store = self.store
        return store.hits / max(store.lookups, 1) if isinstance(store, CachedStore) else None

    def prefetch(self, row_ids: Tensor) -> None:
        """Begins to read the rows of the next `lookup`, which must give the same tensor; synchronous: nothing."""
        if self.asynchronous:
            resumed, self._resumed = self._resumed, None
            self._ahead = row_ids, self._read(row_ids, resumed)

    def lookup(self, row_ids: Tensor) -> Tensor:
        """row_ids (...) -> rows (..., M) fp32 on `device`, a leaf that requires grad unless frozen."""
        if self._ahead is not None and self._ahead[0] is row_ids:
            future, self._ahead = self._ahead[1], None
        else:
            future = self._read(row_ids, None)
        rows = self._tasks.result(future).take()
        return rows.view(*row_ids.shape, self._rows.shape[1]).requires_grad_(not self.optim.frozen)

    def _read(self, row_ids: Tensor, previous: tuple[Tensor, Tensor] | None) -> "Future[ToDevice]":
        on_host = ToHost(row_ids.flatten())

        @torch.no_grad()
        def task() -> ToDevice:
            rows = on_host.wait()
            out = torch.empty(
                (len(rows), self._rows.shape[1]), dtype=self._rows.dtype, pin_memory=self._stream is not None
            )
            self.store.lookup(rows, out)
            if previous is not None and len(previous[0]):
                changed, before = previous
                position = torch.searchsorted(changed, rows).clamp_(max=len(changed) - 1)
                found = changed[position] == rows
                out[found] = before[position[found]]
            return ToDevice(out, self.device, self._stream)

        return self._tasks.submit(task)

    def accumulate(self, row_ids: Tensor, grad: Tensor) -> None:
        """Adds the gradient of one micro-batch; errors as in `StepGradient.add`."""
        self._gradient.add(row_ids, grad)

    def grad_sq_norm(self) -> float:
        """Squared 2-norm of the coalesced gradient, summed in fp64."""
        return self._gradient.sq_norm()

    def pending_rows(self) -> Tensor:
        """Distinct ids of the rows that hold a gradient, on the device."""
        merged = self._gradient.merged()
        return torch.empty(0, dtype=torch.int64, device=self.device) if merged is None else merged[0]

    def apply(self, clip_factor: float, lr: float) -> None:
        """One update by `lazy_adam`; asynchronous: given to the thread, after the one before is done."""
        if self.optim.frozen:
            return
        merged = self._gradient.take()
        self.global_step += 1
        self.rows_touched = 0 if merged is None else len(merged[0])
        if self._update is not None:
            self._tasks.result(self._update)  # never more than one gradient waits
        self._resumed = None
        self._update = self._tasks.submit(self._updating(merged, clip_factor, lr, self.global_step))

    def _updating(
        self, merged: tuple[Tensor, Tensor] | None, clip_factor: float, lr: float, global_step: int
    ) -> Callable[[], None]:
        copies = None if merged is None else (ToHost(merged[0]), ToHost(merged[1]))

        @torch.no_grad()
        def task() -> None:
            self._norms, self._previous = None, self._no_rows()
            if copies is None:
                return
            rows, grad = copies[0].wait(), copies[1].wait()  # (u,), (u, M)
            old = self.store.read(rows)
            step = old["step"] + 1
            count = bias_count(self.optim, step, global_step)
            update, exp_avg, exp_avg_sq = lazy_adam(
                self.optim, lr, grad * clip_factor, count, old["exp_avg"], old["exp_avg_sq"]
            )
            before = old["weight"].float()
            self._norms = update.norm(), before.norm()
            after = before - update
            if self._rows.dtype == torch.bfloat16:
                after = stochastic_round(after, self._seed, self._layer, rows + self._first_row, step)
            self.store.write(rows, {"weight": after, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step})
            self._rows_ever_touched += int((step == 1).sum())
            self._previous = rows, old["weight"]

        return task

    def discard(self) -> None:
        """Forgets the step's gradient."""
        self._gradient.clear()

    def drain(self) -> None:
        """Waits until every update is done.

        Raises:
            RuntimeError: the thread failed.
        """
        self._tasks.drain()

    def close(self) -> None:
        """Finishes what was given and ends the thread; a table that is dropped, or a process that ends, does it too."""
        self._tasks.close()

    def state_shards(self) -> dict[str, Tensor]:
        """What `LocalTable.state_shards` gives, and of an asynchronous table previous_rows and previous_weight.

        Raises:
            RuntimeError: a gradient is waiting, or the thread failed.
        """
        if self._gradient:
            raise RuntimeError("the memory table holds a gradient; call apply or discard before saving its state")
        self.drain()
        self.store.flush()
        shards = {**self.store.arrays, "global_step": torch.tensor([self.global_step])}
        if self.asynchronous:
            shards |= {"previous_rows": self._previous[0], "previous_weight": self._previous[1]}
        return shards

    def load_state_shards(self, shards: dict[str, Tensor]) -> None:
        """Copies what `state_shards` gave into this table.

        Raises:
            ValueError: a name is missing or unknown, a shape differs, or the type of the rows.
        """
        self.drain()
        others = {"previous_rows", "previous_weight"} if self.asynchronous else set()
        check_shards(self.store.arrays, shards, {"global_step", *others})
        if shards["weight"].dtype != self._rows.dtype:
            raise ValueError(
                f"memory table state holds rows in {shards['weight'].dtype}, this table's are {self._rows.dtype}; "
                "set table.dtype as the run that wrote it"
            )
        self.store.forget()
        for name, tensor in self.store.arrays.items():
            tensor.copy_(shards[name])
        self.global_step = int(shards["global_step"].item())
        self._rows_ever_touched = int((self.store.arrays["step"] > 0).sum())
        self._ahead = None
        if self.asynchronous:
            self._previous = self._resumed = shards["previous_rows"].clone(), shards["previous_weight"].clone()
        self.discard()
