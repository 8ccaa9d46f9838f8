"""The lazy row update against torch's dense Adam and against row-by-row Python."""

import math
import time

import pytest
import torch

from models.lazy_adam import MemoryOptimConfig, StepCount
from models.memory_table import LocalTable, coalesce
from tests.tiny import relative_error

LR = 0.01


def make(rows: int = 12, width: int = 4, **settings) -> LocalTable:
    return LocalTable(rows, width, 0.5, seed=0, optim=MemoryOptimConfig(**settings))


def dense_adam(table: LocalTable) -> tuple[torch.nn.Parameter, torch.optim.Adam]:
    parameter = torch.nn.Parameter(table.weight.clone())
    cfg = table.optim
    return parameter, torch.optim.Adam([parameter], LR * cfg.lr_multiplier, (cfg.beta1, cfg.beta2), cfg.eps)


def test_lookup_returns_a_detached_leaf():
    table = make()
    row_ids = torch.tensor([[[0, 3], [3, 11]]])
    rows = table.lookup(row_ids)
    assert rows.shape == (1, 2, 2, 4) and rows.is_leaf and rows.requires_grad
    assert torch.equal(rows, table.weight[row_ids])
    with torch.no_grad():
        rows.zero_()
    assert table.weight.count_nonzero() == table.weight.numel()


def test_coalesce_sums_equal_rows():
    row_ids = torch.tensor([5, 2, 5, 9, 2, 5])
    grad = torch.randn(6, 3)
    rows, sums = coalesce(row_ids, grad)
    assert rows.tolist() == [2, 5, 9]
    assert torch.allclose(sums, torch.stack([grad[[1, 4]].sum(0), grad[[0, 2, 5]].sum(0), grad[3]]))
    one, same = coalesce(torch.tensor([7]), grad[:1])
    assert one.tolist() == [7] and torch.equal(same, grad[:1])


@pytest.mark.parametrize("step_count", list(StepCount))
def test_equals_dense_adam_where_every_row_is_touched(step_count):
    table = make(step_count=step_count)
    parameter, adam = dense_adam(table)
    for _ in range(20):
        row_ids = torch.cat((torch.randperm(12), torch.randint(0, 12, (8,)))).view(1, 5, 4)
        grad = torch.randn(1, 5, 4, 4)
        table.accumulate(row_ids, grad)
        table.apply(0.7, LR)
        parameter.grad = torch.zeros_like(parameter).index_add_(0, row_ids.flatten(), 0.7 * grad.view(-1, 4))
        adam.step()
    assert relative_error(table.weight, parameter) < 1e-6


def lazy_row_by_row(table: LocalTable, batches: list[dict[int, float]], per_row: bool) -> list[float]:
    """First column of every row after scalar Adam updates, in Python floats."""
    cfg = table.optim
    weight = table.weight[:, 0].double().tolist()
    m, v, count = [0.0] * len(weight), [0.0] * len(weight), [0] * len(weight)
    for step, batch in enumerate(batches, start=1):
        for row, g in batch.items():
            count[row] += 1
            t = count[row] if per_row else step
            m[row] = cfg.beta1 * m[row] + (1 - cfg.beta1) * g
            v[row] = cfg.beta2 * v[row] + (1 - cfg.beta2) * g * g
            corrected = math.sqrt(v[row] / (1 - cfg.beta2**t)) + cfg.eps
            weight[row] -= LR * cfg.lr_multiplier * m[row] / (1 - cfg.beta1**t) / corrected
    return weight


@pytest.mark.parametrize("step_count", list(StepCount))
def test_sparse_touches_equal_python_row_by_row(step_count):
    table = make(width=1, step_count=step_count)
    batches = [{int(row): float(torch.randn(())) for row in torch.randperm(12)[:3]} for _ in range(15)]
    expected = lazy_row_by_row(table, batches, step_count is StepCount.per_row)
    for batch in batches:
        table.accumulate(torch.tensor(list(batch)).view(1, 1, -1), torch.tensor(list(batch.values())).view(1, 1, -1, 1))
        table.apply(1.0, LR)
    assert table.weight[:, 0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_lazy_differs_from_dense_where_rows_rest():
    """Dense Adam keeps moving a row on old momentum; the lazy update leaves it, moments included, as it was."""
    table = make()
    parameter, adam = dense_adam(table)
    start = table.weight.clone()
    rested: list[torch.Tensor] = []
    for step in range(6):
        row_ids = torch.tensor([[[0]]]) if step == 0 else torch.tensor([[[1]]])
        grad = torch.ones(1, 1, 1, 4)
        table.accumulate(row_ids, grad)
        table.apply(1.0, LR)
        parameter.grad = torch.zeros_like(parameter).index_add_(0, row_ids.flatten(), grad.view(-1, 4))
        adam.step()
        rested.append(table.weight[0].clone())
        if step == 0:
            assert relative_error(table.weight, parameter) < 1e-6
            after_first = parameter[0].detach().clone()
    assert all(torch.equal(row, rested[0]) for row in rested)
    assert (parameter[0] - after_first).abs().min() > 0.5 * (after_first - start[0]).abs().max()


def test_accumulations_merge_and_clip_before_the_moments():
    one, many = make(), make()
    row_ids, grad = torch.randint(0, 12, (4, 3, 2)), torch.randn(4, 3, 2, 4)
    one.accumulate(row_ids, grad)
    for part in range(4):
        many.accumulate(row_ids[part : part + 1], grad[part : part + 1])
    dense = torch.zeros(12, 4).index_add_(0, row_ids.flatten(), grad.view(-1, 4))
    for table in (one, many):
        assert table.grad_sq_norm() == pytest.approx(float(dense.square().sum()), rel=1e-5)
        assert table.pending_rows().tolist() == sorted(set(row_ids.flatten().tolist()))
        table.apply(0.25, LR)
        assert table.grad_sq_norm() == 0.0
    touched = many.pending_rows()
    assert touched.numel() == 0
    assert torch.allclose(one.weight, many.weight, atol=1e-7)
    assert torch.allclose(one.exp_avg, 0.1 * 0.25 * dense, atol=1e-7)
    assert torch.allclose(one.exp_avg_sq, 0.05 * (0.25 * dense).square(), atol=1e-7)


def test_bf16_gradients_are_summed_in_fp32():
    table = make()
    grad = torch.full((1, 300, 1, 4), 1.0, dtype=torch.bfloat16)
    table.accumulate(torch.zeros(1, 300, 1, dtype=torch.int64), grad)
    assert table.grad_sq_norm() == 4 * 300.0**2  # bf16 sums would stop at 256


def test_only_touched_rows_change_and_are_counted_once():
    table = make()
    before = {name: tensor.clone() for name, tensor in table.state_shards().items()}
    for row_ids, now, ever in (([2, 5, 5], 2, 2), ([5, 7], 2, 3), ([], 0, 3)):
        if row_ids:
            ids = torch.tensor(row_ids).view(1, 1, -1)
            table.accumulate(ids, torch.randn(*ids.shape, 4))
        table.apply(1.0, LR)
        assert (table.rows_touched, table.rows_ever_touched) == (now, ever)
    untouched = [row for row in range(12) if row not in (2, 5, 7)]
    for name in ("weight", "exp_avg", "exp_avg_sq", "step"):
        after = table.state_shards()[name]
        assert torch.equal(after[untouched], before[name][untouched])
    assert table.step[[2, 5, 7]].tolist() == [1, 2, 1]


def test_discard_forgets_the_gradient():
    table = make()
    before = table.weight.clone()
    table.accumulate(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 4))
    table.discard()
    table.apply(1.0, LR)
    assert torch.equal(table.weight, before) and table.rows_ever_touched == 0


@pytest.mark.parametrize("step_count", list(StepCount))
def test_resume_is_exact(step_count):
    def steps(table: LocalTable, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            row_ids = torch.randint(0, 12, (1, 3, 2), generator=generator)
            table.accumulate(row_ids, torch.randn(1, 3, 2, 4, generator=generator))
            table.apply(1.0, LR)

    whole, first, second = (make(step_count=step_count) for _ in range(3))
    steps(whole, 0, 8)
    steps(first, 0, 3)
    second.load_state_shards({name: tensor.clone() for name, tensor in first.state_shards().items()})
    steps(second, 3, 8)
    for name, tensor in whole.state_shards().items():
        assert torch.equal(tensor, second.state_shards()[name]), name
    assert second.rows_ever_touched == whole.rows_ever_touched


def test_state_is_refused_while_a_gradient_waits_or_where_it_does_not_fit():
    table = make()
    table.accumulate(torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 4))
    with pytest.raises(RuntimeError, match="apply or discard"):
        table.state_shards()
    table.discard()
    shards = table.state_shards()
    with pytest.raises(ValueError, match=r"'weight' has shape \(12, 4\), this table needs \(13, 4\)"):
        make(rows=13).load_state_shards(shards)
    with pytest.raises(ValueError, match="must hold"):
        table.load_state_shards({"weight": shards["weight"]})


def test_a_frozen_table_takes_no_gradient_and_never_changes():
    table = make(frozen=True)
    before = {name: tensor.clone() for name, tensor in table.state_shards().items()}
    assert torch.equal(table.weight, make().weight)  # the start values of a trained one
    rows = table.lookup(torch.tensor([[[0, 3]]]))
    assert rows.is_leaf and not rows.requires_grad
    with pytest.raises(RuntimeError, match=r"memory.frozen=true"):
        table.accumulate(torch.tensor([[[0, 3]]]), torch.ones(1, 1, 2, 4))
    for _ in range(3):
        table.apply(1.0, LR)
    assert all(torch.equal(tensor, before[name]) for name, tensor in table.state_shards().items())
    assert (table.grad_sq_norm(), table.rows_touched, table.rows_ever_touched, table.global_step) == (0.0, 0, 0, 0)
    assert table.exp_avg.numel() == table.exp_avg_sq.numel() == 0
    other = LocalTable(12, 4, 0.5, seed=1, optim=MemoryOptimConfig(frozen=True))
    other.load_state_shards(before)
    assert torch.equal(other.weight, table.weight)


def test_gradient_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="does not belong"):
        make().accumulate(torch.zeros(1, 2, 1, dtype=torch.int64), torch.ones(1, 1, 1, 4))


def test_start_values_follow_seed_and_layer_only():
    first, again = LocalTable(50, 4, 0.02, seed=3, layer=1), LocalTable(50, 4, 0.02, seed=3, layer=1)
    assert torch.equal(first.weight, again.weight)
    for seed, layer in ((3, 2), (4, 1)):
        assert not torch.equal(first.weight, LocalTable(50, 4, 0.02, seed=seed, layer=layer).weight)
    big = LocalTable(20_000, 8, 0.02, seed=0)
    assert float(big.weight.std()) == pytest.approx(0.02, rel=0.02)
    assert abs(float(big.weight.mean())) < 1e-3


def test_cost_of_a_step_does_not_grow_with_the_rows():
    """A hundred times the rows, equal draws: an operation over the whole table would cost a hundred times more."""
    seconds = []
    for rows in (20_000, 2_000_000):
        table = LocalTable(rows, 8, 0.02, seed=0)
        row_ids, grad = torch.randint(0, rows, (4, 64, 8)), torch.randn(4, 64, 8, 8)
        best = math.inf
        for _ in range(10):
            start = time.perf_counter()
            table.lookup(row_ids)
            table.accumulate(row_ids, grad)
            table.grad_sq_norm()
            table.apply(1.0, LR)
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
    assert seconds[1] < 4 * seconds[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta2": 1.0}, r"memory.beta2=1.0 must be in \[0, 1\)"),
        ({"eps": 0.0}, "memory.eps=0.0 must be positive"),
        ({"eps": float("nan")}, "memory.eps=nan must be positive and finite"),
        ({"lr_multiplier": float("nan")}, "memory.lr_multiplier=nan must not be negative, and finite"),
        ({"lr_multiplier": -1.0}, "memory.lr_multiplier=-1.0 must not be negative"),
        ({"frozen": True, "lr_multiplier": 1.0}, r"memory.lr_multiplier=1.0 has no effect.*nearest: 5.0"),
        ({"frozen": True, "step_count": StepCount.global_step}, r"memory.step_count=.*has no effect"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MemoryOptimConfig(**settings)
