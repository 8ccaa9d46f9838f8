"""The asynchronous table against a simulation of what it promises, in one thread."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.memory.tables import LR, ROWS, copied, draw, gradient, host, same_state
from train.memory.host import HostTable
from train.memory.place import Place, RowType

PARTS, STEPS = 3, 9


def loop(table: HostTable, first: int, last: int, parts: int) -> list[torch.Tensor]:
    """The order of calls of train/loop.py, an evaluation after step 2 included. What was read in training."""
    read = []
    row_ids = draw(first, 0)
    table.prefetch(row_ids)
    for step in range(first, last):
        for part in range(parts):
            rows = table.lookup(row_ids)
            read.append(rows.detach().clone())
            following = draw(step, part + 1) if part + 1 < parts else draw(step + 1, 0)
            if step + 1 < last or part + 1 < parts:
                table.prefetch(following)
            table.accumulate(row_ids, gradient(rows, step))
            row_ids = following
        table.apply(0.5, LR)
        if step == 2:
            table.lookup(draw(77, 0))
    return read


def simulated(table: HostTable, last: int, parts: int) -> list[torch.Tensor]:
    """A synchronous table: the first micro-batch of a step reads a copy made before the last update."""
    read, before = [], table.weight.clone()
    for step in range(last):
        for part in range(parts):
            row_ids = draw(step, part)
            rows = (before if part == 0 else table.weight)[row_ids].float()
            read.append(rows)
            table.accumulate(row_ids, gradient(rows, step))
        before = table.weight.clone()
        table.apply(0.5, LR)
    return read


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("dtype", list(RowType))
@pytest.mark.parametrize(("place", "places"), [(Place.host, 0), (Place.file, 7)])
def test_equals_its_simulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, places: int, dtype: RowType, parts: int
) -> None:
    """Also where the thread is slow, so that everything waits for it."""
    plain = host(tmp_path, dtype=dtype)
    expected = simulated(plain, STEPS, parts)
    fresh = host(tmp_path, dtype=dtype)
    read = [fresh.lookup(draw(0, 0))]
    for slow in (False, True):
        table = host(tmp_path, place=place, places=places, dtype=dtype, asynchronous=True)
        if slow:
            look_up, put = table.store.lookup, table.store.write
            monkeypatch.setattr(table.store, "lookup", lambda *a: (time.sleep(0.002), look_up(*a)))  # noqa: B023
            monkeypatch.setattr(table.store, "write", lambda *a: (time.sleep(0.004), put(*a)))  # noqa: B023
        read = loop(table, 0, STEPS, parts)
        assert all(torch.equal(a, b) for a, b in zip(read, expected, strict=True))
        state = table.state_shards()
        del state["previous_rows"], state["previous_weight"]
        same_state(state, plain.state_shards())
        assert table.rows_touched == plain.rows_touched and table.rows_ever_touched == plain.rows_ever_touched
    synchronous = host(tmp_path, dtype=dtype)
    assert not torch.equal(torch.stack(loop(synchronous, 0, STEPS, parts)), torch.stack(read))  # it is stale


@pytest.mark.parametrize("parts", [1, PARTS])
@pytest.mark.parametrize("dtype", list(RowType))
@pytest.mark.parametrize(("place", "places"), [(Place.host, 0), (Place.file, 7)])
@pytest.mark.parametrize("at", [1, 4])
def test_resume_is_exact(tmp_path: Path, place: Place, places: int, dtype: RowType, parts: int, at: int) -> None:
    """Also of a state that was saved with the next rows already read, and saved again before anything was read."""
    whole, first, second, third = (
        host(tmp_path, place=place, places=places, dtype=dtype, asynchronous=True) for _ in range(4)
    )
    read = loop(whole, 0, STEPS, parts)
    loop(first, 0, at, parts)
    first.prefetch(draw(at, 0))
    second.load_state_shards(copied(first.state_shards()))
    third.load_state_shards(copied(second.state_shards()))
    third.lookup(draw(5, 5))  # an evaluation before the first step
    again = loop(third, at, STEPS, parts)
    assert all(torch.equal(a, b) for a, b in zip(read[at * parts :], again, strict=True))
    same_state(whole.state_shards(), third.state_shards())


def test_a_step_without_gradient_leaves_nothing_behind(tmp_path: Path) -> None:
    table = host(tmp_path, asynchronous=True)
    loop(table, 0, 2, 1)
    assert len(table.state_shards()["previous_rows"])
    table.apply(1.0, LR)
    assert len(table.state_shards()["previous_rows"]) == 0 and table.rows_touched == 0 and table.global_step == 3


def test_calls_return_before_the_work_is_done_and_what_is_unannounced_waits(tmp_path: Path) -> None:
    table = host(tmp_path, asynchronous=True)
    gate, put = threading.Event(), table.store.write
    table.store.write = lambda *a: (gate.wait(10), put(*a))[1]  # type: ignore[method-assign]
    row_ids, before = torch.arange(ROWS), table.weight.clone()
    table.accumulate(row_ids, torch.ones(ROWS, 3))
    announced = torch.arange(5)
    table.prefetch(announced)
    table.apply(1.0, LR)  # returns, although the update cannot end
    assert torch.equal(table.lookup(announced), before[:5])
    late = torch.arange(5)
    table.prefetch(late)
    threading.Timer(0.05, gate.set).start()
    assert not torch.equal(table.lookup(late), before[:5])  # had to wait for the update


def test_an_error_of_the_thread_is_raised_by_every_later_call(tmp_path: Path) -> None:
    table = host(tmp_path, asynchronous=True)

    def fails(*_: object) -> None:
        raise OSError("no such device")

    table.store.write = fails  # type: ignore[method-assign]
    row_ids = draw(0, 0)
    table.accumulate(row_ids, gradient(table.lookup(row_ids), 0))
    table.apply(1.0, LR)
    message = r"thread of a memory table failed \(OSError: no such device\).*resume from the last checkpoint"
    for call in (
        table.drain,
        table.state_shards,
        lambda: table.lookup(row_ids),
        lambda: table.prefetch(row_ids),
        lambda: table.apply(1.0, LR),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    table.close()


def test_a_process_ends_with_its_updates_and_without_waiting(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; import torch\n"
        "from tests.memory.tables import draw, host\n"
        f"table = host(Path({str(tmp_path)!r}), asynchronous=True)\n"
        "table.accumulate(draw(0, 0), torch.ones(2, 4, 3, 3)); table.apply(1.0, 0.1); table.prefetch(draw(1, 0))\n"
        "raise SystemExit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (7, "")
