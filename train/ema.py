"""Exponential moving average of parameters and memory rows, used for validation.

After step t: average_t = d_t average_{t-1} + (1 - d_t) weight_t, with d_t = min(decay, (1 + t) / (10 + t)) so that the
first steps do not weigh the random initialisation (the warm-up of TensorFlow's ExponentialMovingAverage).

A memory row that was not touched since step l has a constant weight w, so its average has the closed form
average_t = w + (average_l - w) prod_{l < s <= t} d_s. Rows are therefore brought up to date only when they are touched
or read, and the cost of a step does not grow with the number of rows.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.memory_table import LocalTable


class WeightAverage:
    """Averages of a model and its tables.

    Args:
        model: dense parameters, averaged every step.
        tables: {layer: table}, averaged lazily by row.
        decay: d in (0, 1), per optimizer step.
        max_steps: steps of the whole run.
    """

    def __init__(self, model: nn.Module, tables: Mapping[int, LocalTable], decay: float, max_steps: int) -> None:
        self.parameters: list[Tensor] = list(model.parameters())
        self.tables = tables
        self.dense = [parameter.detach().clone() for parameter in self.parameters]
        self.rows = {layer: table.weight.clone() for layer, table in tables.items()}
        self.last = {layer: torch.zeros(len(table.weight), dtype=torch.int32) for layer, table in tables.items()}
        steps = torch.arange(1, max_steps + 1, dtype=torch.float64)
        self._decays = torch.minimum(torch.tensor(decay, dtype=torch.float64), (1 + steps) / (10 + steps))
        # (max_steps + 1,) logarithm of the product of all decays up to and including step t
        self._log_product = torch.cat([torch.zeros(1, dtype=torch.float64), self._decays.log().cumsum(0)])
        self.step = 0
        self._touched: dict[int, Tensor] = {}

    def before_step(self) -> None:
        """Bring the rows that the coming step will change up to date, while they still have their old weight."""
        self._touched = {layer: table.pending_rows() for layer, table in self.tables.items()}
        for layer, row_ids in self._touched.items():
            self.rows[layer][row_ids] = self.read(layer, row_ids)

    @torch.no_grad()
    def after_step(self) -> None:
        """Fold the new weights in."""
        decay = float(self._decays[self.step])
        self.step += 1
        torch._foreach_lerp_(self.dense, [p.detach() for p in self.parameters], 1.0 - decay)
        for layer, row_ids in self._touched.items():
            self.rows[layer][row_ids] = torch.lerp(self.tables[layer].weight[row_ids], self.rows[layer][row_ids], decay)
            self.last[layer][row_ids] = self.step

    def read(self, layer: int, row_ids: Tensor) -> Tensor:
        """Averaged rows as of now: row_ids (...) -> (..., M)."""
        weight = self.tables[layer].weight[row_ids]
        elapsed = self._log_product[self.step] - self._log_product[self.last[layer][row_ids].long()]
        return weight + (self.rows[layer][row_ids] - weight) * elapsed.exp().float().unsqueeze(-1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the averaged dense parameters in the model; memory rows come from `read`."""
        current = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.dense)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, current)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs."""
        state = {f"dense.{index}": tensor for index, tensor in enumerate(self.dense)}
        for layer in self.rows:
            state[f"rows.{layer}"] = self.rows[layer]
            state[f"last.{layer}"] = self.last[layer]
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore what `state_tensors` gave after `step` steps."""
        for name, tensor in self.state_tensors().items():
            tensor.copy_(state[name])
        self.step = step
