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

from models.memory_table import MemoryTable
from train.held import check_names


def decays(decay: float, max_steps: int) -> Tensor:
    """d_t of steps 1 to `max_steps`, (max_steps,) fp64."""
    steps = torch.arange(1, max_steps + 1, dtype=torch.float64)
    return torch.minimum(torch.tensor(decay, dtype=torch.float64), (1 + steps) / (10 + steps))


def log_products(decay: float, max_steps: int) -> Tensor:
    """Logarithm of the product of all decays up to and including step t, for t from 0; (max_steps + 1,) fp64."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), decays(decay, max_steps).log().cumsum(0)])


def up_to_date(weight: Tensor, average: Tensor, last: Tensor, step: int, log_product: Tensor) -> Tensor:
    """Averages (..., M) after `step` steps of rows that had `average` after step `last` (...), and `weight` since."""
    elapsed = log_product[step] - log_product[last.long()]
    return weight + (average - weight) * elapsed.exp().float().unsqueeze(-1)


class WeightAverage:
    """Averages of a model and its tables.

    Args:
        model: dense parameters, averaged every step.
        tables: {layer: table}, averaged lazily by row.
        decay: d in (0, 1), per optimizer step.
        max_steps: steps of the whole run.
    """

    def __init__(self, model: nn.Module, tables: Mapping[int, MemoryTable], decay: float, max_steps: int) -> None:
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.tables = tables
        self.dense = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.rows = {layer: table.weight.clone() for layer, table in tables.items()}
        # (rows,) step at which each row's average was last brought up to date
        self.last = {layer: torch.zeros_like(table.step) for layer, table in tables.items()}
        self._decays = decays(decay, max_steps)
        log_product = log_products(decay, max_steps)
        self._log_product = {layer: log_product.to(table.weight.device) for layer, table in tables.items()}
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
        torch._foreach_lerp_(list(self.dense.values()), [p.detach() for p in self.parameters.values()], 1.0 - decay)
        for layer, row_ids in self._touched.items():
            self.rows[layer][row_ids] = torch.lerp(self.tables[layer].weight[row_ids], self.rows[layer][row_ids], decay)
            self.last[layer][row_ids] = self.step

    def read(self, layer: int, row_ids: Tensor) -> Tensor:
        """Averaged rows as of now: row_ids (...) -> (..., M)."""
        weight = self.tables[layer].weight[row_ids]
        return up_to_date(
            weight, self.rows[layer][row_ids], self.last[layer][row_ids], self.step, self._log_product[layer]
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the averaged dense parameters in the model; memory rows come from `read`."""
        parameters = list(self.parameters.values())
        current = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, list(self.dense.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, current)

    @torch.no_grad()
    def replace_weights(self) -> None:
        """Put the averages in the place of parameters and rows for good, for use after training."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.dense[name])
        for layer, table in self.tables.items():
            table.weight.copy_(self.read(layer, torch.arange(len(table.weight), device=table.weight.device)))

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs."""
        state = {f"dense.{name}": tensor for name, tensor in self.dense.items()}
        for layer in self.rows:
            state[f"rows.{layer}"] = self.rows[layer]
            state[f"last.{layer}"] = self.last[layer]
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor], step: int) -> None:
        """Restore what `state_tensors` gave after `step` steps."""
        own = self.state_tensors()
        check_names(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.step = step
