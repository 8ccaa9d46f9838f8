"""The lazy average against one that visits every parameter and every row at every step."""

import pytest
import torch
from torch import nn

from models.memory_table import LocalTable
from train.ema import WeightAverage

STEPS, ROWS, WIDTH, DECAY = 25, 40, 3, 0.8


def test_lazy_rows_equal_dense_averaging() -> None:
    model = nn.Linear(4, 4)
    table = LocalTable(ROWS, WIDTH, 0.02, seed=0, layer=1)
    average = WeightAverage(model, {1: table}, DECAY, STEPS)
    dense_rows, dense_weight = table.weight.double(), model.weight.detach().double()
    generator = torch.Generator().manual_seed(1)
    for step in range(1, STEPS + 1):
        row_ids = torch.randint(0, ROWS // 2, (1, 6, 1), generator=generator)  # half of the rows are never touched
        table.accumulate(row_ids, torch.randn(1, 6, 1, WIDTH, generator=generator))
        average.before_step()
        table.apply(1.0, 0.1)
        with torch.no_grad():
            model.weight.add_(torch.randn(4, 4, generator=generator))
        average.after_step()
        decay = min(DECAY, (1 + step) / (10 + step))
        dense_rows = decay * dense_rows + (1 - decay) * table.weight.double()
        dense_weight = decay * dense_weight + (1 - decay) * model.weight.detach().double()
        assert (average.read(1, torch.arange(ROWS)) - dense_rows).norm() / dense_rows.norm() < 1e-6
    assert (average.dense["weight"] - dense_weight).norm() / dense_weight.norm() < 1e-6


def test_averaged_parameters_are_only_borrowed() -> None:
    model = nn.Linear(4, 4)
    average = WeightAverage(model, {}, DECAY, STEPS)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.before_step()
    average.after_step()
    with average.applied():
        assert torch.equal(model.weight, average.dense["weight"])
    assert torch.equal(model.weight, before + 1.0)
    assert not torch.equal(average.dense["weight"], before)


def test_state_is_kept_by_name_and_a_foreign_one_is_refused() -> None:
    table = LocalTable(ROWS, WIDTH, 0.02, seed=0, layer=1)
    state = WeightAverage(nn.Linear(4, 4), {1: table}, DECAY, STEPS).state_tensors()
    assert set(state) == {"dense.weight", "dense.bias", "rows.1", "last.1"}
    other = WeightAverage(nn.Sequential(nn.Linear(4, 4)), {1: table}, DECAY, STEPS)
    with pytest.raises(ValueError, match=r"missing \['dense.0.bias', 'dense.0.weight'\]"):
        other.load_state_tensors(state, 3)


def test_weights_are_replaced_by_their_averages() -> None:
    model, table = nn.Linear(4, 4), LocalTable(ROWS, WIDTH, 0.02, seed=0, layer=1)
    average = WeightAverage(model, {1: table}, DECAY, STEPS)
    for _ in range(3):
        table.accumulate(torch.arange(5).view(1, 5, 1), torch.ones(1, 5, 1, WIDTH))
        average.before_step()
        table.apply(1.0, 0.1)
        with torch.no_grad():
            model.weight.add_(1.0)
        average.after_step()
    rows = average.read(1, torch.arange(ROWS))
    assert not torch.equal(rows, table.weight) and torch.equal(rows[5:], table.weight[5:])
    average.replace_weights()
    assert torch.equal(table.weight, rows) and torch.equal(model.weight, average.dense["weight"])


def test_state_lies_where_the_table_lies() -> None:
    """The meta device stands for any that is not the processor."""
    table = LocalTable(ROWS, WIDTH, 0.02, seed=0, layer=1)
    for name in ("weight", "step"):
        setattr(table, name, getattr(table, name).to("meta"))
    average = WeightAverage(nn.Linear(4, 4), {1: table}, DECAY, STEPS)
    row_ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert average.last[1].device == average.read(1, row_ids).device == torch.device("meta")
