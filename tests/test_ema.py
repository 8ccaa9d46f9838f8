"""The lazy average against one that visits every parameter and every row at every step."""

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
    assert (average.dense[0] - dense_weight).norm() / dense_weight.norm() < 1e-6


def test_averaged_parameters_are_only_borrowed() -> None:
    model = nn.Linear(4, 4)
    average = WeightAverage(model, {}, DECAY, STEPS)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    average.before_step()
    average.after_step()
    with average.applied():
        assert torch.equal(model.weight, average.dense[0])
    assert torch.equal(model.weight, before + 1.0)
    assert not torch.equal(average.dense[0], before)
