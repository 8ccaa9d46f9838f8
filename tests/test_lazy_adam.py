"""The row-wise second moment against scalar Python, and the statistics of a table."""

import math

import pytest
import torch

from models.lazy_adam import MemoryOptimConfig, SecondMoment, StepCount
from models.memory_table import LocalTable, hot_share

LR, ROWS, WIDTH = 0.01, 9, 5


def transcription(
    table: LocalTable, batches: list[dict[int, list[float]]], beta1: float, per_row: bool
) -> list[list[float]]:
    """FBGEMM's partial row-wise Adam, number by number in Python floats: a scalar v per row, of the mean square."""
    cfg = table.optim
    weight = table.weight.double().tolist()
    m = [[0.0] * WIDTH for _ in range(ROWS)]
    v, count = [0.0] * ROWS, [0] * ROWS
    for number, batch in enumerate(batches, start=1):
        for row, grad in batch.items():
            count[row] += 1
            t = count[row] if per_row else number
            v[row] = cfg.beta2 * v[row] + (1 - cfg.beta2) * sum(g * g for g in grad) / WIDTH
            denominator = math.sqrt(v[row] / (1 - cfg.beta2**t)) + cfg.eps
            for j, g in enumerate(grad):
                m[row][j] = beta1 * m[row][j] + (1 - beta1) * g
                weight[row][j] -= LR * cfg.lr_multiplier * m[row][j] / (1 - beta1**t) / denominator
    return weight


@pytest.mark.parametrize("step_count", list(StepCount))
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_row_wise_second_moment_equals_scalar_python(beta1: float, step_count: StepCount) -> None:
    optim = MemoryOptimConfig(beta1=beta1, second_moment=SecondMoment.row, step_count=step_count)
    table = LocalTable(ROWS, WIDTH, 0.5, seed=0, optim=optim)
    batches = [{int(row): torch.randn(WIDTH).tolist() for row in torch.randperm(ROWS)[:4]} for _ in range(12)]
    expected = transcription(table, batches, beta1, step_count is StepCount.per_row)
    for batch in batches:
        table.accumulate(torch.tensor(list(batch)), torch.tensor(list(batch.values())))
        table.apply(1.0, LR)
    assert torch.allclose(table.weight.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_what_is_kept_per_row() -> None:
    shapes = {}
    for beta1 in (0.0, 0.9):
        for kind in SecondMoment:
            table = LocalTable(ROWS, WIDTH, 0.5, 0, MemoryOptimConfig(beta1=beta1, second_moment=kind))
            shapes[beta1, kind.value] = tuple(table.exp_avg.shape), tuple(table.exp_avg_sq.shape)
    assert shapes == {
        (0.0, "element"): ((ROWS, WIDTH), (ROWS, WIDTH)),
        (0.0, "row"): ((ROWS, 0), (ROWS, 1)),
        (0.9, "element"): ((ROWS, WIDTH), (ROWS, WIDTH)),
        (0.9, "row"): ((ROWS, WIDTH), (ROWS, 1)),
    }


def test_a_row_wise_second_moment_of_a_frozen_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memory.second_moment=.*has no effect with memory.frozen=true"):
        MemoryOptimConfig(frozen=True, second_moment=SecondMoment.row)


def test_update_ratio_is_of_the_rows_just_changed() -> None:
    table = LocalTable(ROWS, WIDTH, 0.5, seed=0)
    assert table.update_ratio == 0.0
    before = table.weight.clone()
    table.accumulate(torch.tensor([2, 7, 2]), torch.randn(3, WIDTH))
    table.apply(1.0, LR)
    change = (table.weight - before)[[2, 7]].norm() / before[[2, 7]].norm()
    assert table.update_ratio == pytest.approx(float(change), rel=1e-4)
    table.apply(1.0, LR)  # nothing was accumulated
    assert table.update_ratio == 0.0


def test_hot_share_counts_updates_of_the_upper_hundredth() -> None:
    step = torch.ones(1000, dtype=torch.int32)
    assert hot_share(step) == pytest.approx(10 / 1000)
    step[torch.randperm(1000)[:10]] = 100
    assert hot_share(step) == pytest.approx(1000 / 1990)
    assert hot_share(torch.zeros(50, dtype=torch.int32)) == 0.0
    many = torch.ones(100_000, dtype=torch.int32)
    many[::100] = 11  # one in a hundred; the grid of every 3rd row meets a third of them
    assert hot_share(many, sample=30_000) == pytest.approx(11 * 1000 / 110_000, rel=0.01)
