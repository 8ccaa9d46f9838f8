"""Tables in RAM and in a file against the table on the device, to the bit."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from models.lazy_adam import MemoryOptimConfig, SecondMoment, StepCount
from models.memory_table import LocalTable
from tests.memory.tables import CPU, LR, ROWS, WIDTH, copied, draw, gradient, host, local, same_state
from train.memory.host import HostTable
from train.memory.place import Place, RowType, TableConfig, host_table

RULES: list[dict[str, Any]] = [
    {},
    {"step_count": StepCount.global_step},
    {"second_moment": SecondMoment.row},
    {"second_moment": SecondMoment.row, "beta1": 0.0},
]
PLACES = [(Place.host, 0), (Place.file, 0), (Place.file, 1), (Place.file, 7), (Place.file, 20)]


def steps(table: LocalTable | HostTable, first: int, last: int, rows: int = ROWS) -> list[torch.Tensor]:
    """Two micro-batches a step; step 3 has no gradient and step 4 is discarded. What was read."""
    read = []
    for step in range(first, last):
        for part in range(2):
            row_ids = draw(step, part, rows)
            leaf = table.lookup(row_ids)
            read.append(leaf.detach().clone())
            if step != 3:
                table.accumulate(row_ids, gradient(leaf, step))
        norm = table.grad_sq_norm()
        assert (norm == 0) == (step == 3)
        if step == 4:
            table.discard()
        table.apply(0.7, LR)
    return read


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("place", "places"), PLACES)
@pytest.mark.parametrize(("rows", "width"), [(ROWS, WIDTH), (1, 1), (1000, 8)])
def test_equals_the_table_on_the_device(
    tmp_path: Path, place: Place, places: int, rows: int, width: int, rule: dict[str, Any]
) -> None:
    theirs, ours = local(rows, width, **rule), host(tmp_path, rows, width, place, places, **rule)
    for a, b in zip(steps(theirs, 0, 8, rows), steps(ours, 0, 8, rows), strict=True):
        assert torch.equal(a, b)
    same_state(theirs.state_shards(), ours.state_shards())
    for name in ("rows_touched", "rows_ever_touched", "update_ratio", "hot_share", "global_step", "num_rows"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.step, theirs.step)
    assert torch.equal(ours.lookup(draw(0, 0, rows)), theirs.lookup(draw(0, 0, rows)))  # after `weight` was handed out


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("place", "places"), [(Place.host, 0), (Place.file, 7)])
@pytest.mark.parametrize("dtype", list(RowType))
def test_resume_is_exact(tmp_path: Path, place: Place, places: int, dtype: RowType, rule: dict[str, Any]) -> None:
    whole, first, second = (host(tmp_path, place=place, places=places, dtype=dtype, **rule) for _ in range(3))
    read = steps(whole, 0, 8)
    steps(first, 0, 3)
    second.lookup(draw(0, 0))  # its cache is not empty when the state comes
    second.load_state_shards(copied(first.state_shards()))
    again = steps(second, 3, 8)
    assert all(torch.equal(a, b) for a, b in zip(read[6:], again, strict=True))
    same_state(whole.state_shards(), second.state_shards())
    assert second.rows_ever_touched == whole.rows_ever_touched


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("place", "places"), [(Place.host, 0), (Place.file, 7)])
def test_a_frozen_table_takes_no_gradient_and_never_changes(
    tmp_path: Path, place: Place, places: int, asynchronous: bool
) -> None:
    table = host(tmp_path, place=place, places=places, asynchronous=asynchronous, frozen=True)
    before = copied(table.state_shards())
    row_ids = draw(0, 0)
    table.prefetch(row_ids)
    rows = table.lookup(row_ids)
    assert not rows.requires_grad and torch.equal(rows, local().weight[row_ids])
    with pytest.raises(RuntimeError, match=r"memory.frozen=true"):
        table.accumulate(row_ids, rows)
    for _ in range(3):
        table.apply(1.0, LR)
    same_state(before, table.state_shards())
    assert (table.grad_sq_norm(), table.rows_touched, table.rows_ever_touched, table.global_step) == (0.0, 0, 0, 0)
    other = host(tmp_path, place=place, places=places, asynchronous=asynchronous, frozen=True)
    other.load_state_shards(before)
    same_state(before, other.state_shards())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_lookup_returns_a_leaf_that_later_updates_leave_alone(tmp_path: Path, asynchronous: bool) -> None:
    table = host(tmp_path, asynchronous=asynchronous)
    row_ids = draw(0, 0)
    table.prefetch(row_ids)
    rows = table.lookup(row_ids)
    assert rows.is_leaf and rows.requires_grad and rows.shape == (2, 4, 3, WIDTH) and rows.dtype == torch.float32
    kept = rows.detach().clone()
    table.accumulate(row_ids, torch.ones_like(kept))
    assert table.pending_rows().tolist() == sorted(set(row_ids.flatten().tolist()))
    table.apply(1.0, LR)
    table.drain()
    assert torch.equal(rows, kept) and not torch.equal(table.lookup(row_ids), kept)


def test_a_part_of_a_table_holds_that_slice_of_it(tmp_path: Path) -> None:
    """Two halves with ids of their own do what the whole does, rounding included."""
    cfg = TableConfig(Place.host, RowType.bf16)
    whole = host(tmp_path, dtype=RowType.bf16)
    cut = 20
    parts = [
        host_table(cfg, n, WIDTH, 0.5, 4, MemoryOptimConfig(), CPU, tmp_path, 2, first_row=first, total_rows=ROWS)
        for first, n in ((0, cut), (cut, ROWS - cut))
    ]
    for step in range(4):
        row_ids = draw(step, 0).flatten()
        grad = gradient(whole.lookup(row_ids), step)
        for table, mine, first in (
            (whole, row_ids >= 0, 0),
            (parts[0], row_ids < cut, 0),
            (parts[1], row_ids >= cut, cut),
        ):
            table.accumulate(row_ids[mine] - first, grad[mine])
            table.apply(1.0, LR)
    for name, array in whole.state_shards().items():
        if name != "global_step":
            assert torch.equal(array, torch.cat([part.state_shards()[name] for part in parts])), name


def test_state_is_refused_while_a_gradient_waits_or_where_it_does_not_fit(tmp_path: Path) -> None:
    table = host(tmp_path)
    table.accumulate(draw(0, 0), torch.ones(2, 4, 3, WIDTH))
    with pytest.raises(RuntimeError, match="apply or discard"):
        table.state_shards()
    table.discard()
    shards = copied(table.state_shards())
    with pytest.raises(ValueError, match=rf"'weight' has shape \({ROWS}, 3\), this table needs \(13, 3\)"):
        host(tmp_path, rows=13).load_state_shards(shards)
    with pytest.raises(ValueError, match="must hold"):
        host(tmp_path, asynchronous=True).load_state_shards(shards)
    with pytest.raises(ValueError, match=r"rows in torch.float32, this table's are torch.bfloat16; set table.dtype"):
        host(tmp_path, dtype=RowType.bf16).load_state_shards(shards)
    with pytest.raises(ValueError, match="does not belong"):
        table.accumulate(torch.zeros(1, 2, 1, dtype=torch.int64), torch.ones(1, 1, 1, WIDTH))


def test_a_dropped_table_leaves_no_thread(tmp_path: Path) -> None:
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("memory table")]

    table = host(tmp_path, asynchronous=True)
    table.lookup(draw(0, 0))
    assert len(threads()) == 1
    thread = next(t for t in threading.enumerate() if t.name.startswith("memory table"))
    del table
    gc.collect()
    thread.join(timeout=10)
    assert threads() == []
