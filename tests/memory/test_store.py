"""Arrays of every kind, and what is left of them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.lazy_adam import MemoryOptimConfig
from tests.memory.tables import ROWS, draw, host
from train.memory import store
from train.memory.cache import CachedStore
from train.memory.place import Place, RowType, array_specs
from train.memory.store import SharedArrays, anonymous_arrays, file_arrays, open_shared_arrays, row_bytes

SPECS = array_specs(ROWS, 3, MemoryOptimConfig(), RowType.bf16)


def test_arrays_are_zeros_of_their_shape_and_do_not_overlap(tmp_path: Path) -> None:
    shared = SharedArrays(SPECS)
    for arrays in (anonymous_arrays(SPECS), file_arrays(SPECS, tmp_path), shared.tensors):
        for number, (name, spec) in enumerate(SPECS.items(), start=1):
            assert (arrays[name].shape, arrays[name].dtype) == (spec.shape, spec.dtype)
            assert not arrays[name].any()
            arrays[name].fill_(number)
        assert [float(array.sum() / array.numel()) for array in arrays.values()] == [1, 2, 3, 4]
    assert row_bytes(SPECS) == 3 * 2 + 2 * 3 * 4 + 4
    shared.release()


def test_a_file_has_no_name_and_its_room_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = host(tmp_path / "new", place=Place.file, places=5)
    assert list((tmp_path / "new").iterdir()) == []
    table.lookup(draw(0, 0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"has no room for a memory table of .* GiB \(No space left on device\)"):
        file_arrays(SPECS, tmp_path)


OTHER = """
import sys, torch
from models.lazy_adam import MemoryOptimConfig
from train.memory.place import RowType, array_specs
from train.memory.store import open_shared_arrays
arrays = open_shared_arrays(sys.argv[1], array_specs(53, 3, MemoryOptimConfig(), RowType.bf16))
arrays["step"][7] = 41
print(float(arrays["exp_avg"].sum()), flush=True)
sys.stdin.readline()
print(float(arrays["exp_avg"].sum()), flush=True)
"""


def test_two_processes_share_arrays_until_the_last_of_them_ends() -> None:
    shared = SharedArrays(SPECS)
    shared.tensors["exp_avg"].fill_(1.0)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, shared.handle], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        assert float(other.stdout.readline()) == 3 * ROWS
        assert shared.tensors["step"][7] == 41
        shared.release()
        for _ in range(2):
            with pytest.raises(ValueError, match=r"memory_table_.* is gone: process"):
                open_shared_arrays(shared.handle, SPECS)
            again = SharedArrays(SPECS)  # has the number of the first one's descriptor
        again.release()
        shared.tensors["exp_avg"].fill_(2.0)
        other.stdin.write("\n")
        other.stdin.flush()
        assert float(other.stdout.readline()) == 6 * ROWS  # still one memory


def test_shared_arrays_of_another_size_are_refused() -> None:
    shared = SharedArrays(SPECS)
    other = array_specs(5000, 3, MemoryOptimConfig(), RowType.bf16)
    with pytest.raises(ValueError, match=r"has \d+ bytes, these arrays need \d+"):
        open_shared_arrays(shared.handle, other)


KILLED = """
import sys, torch
from pathlib import Path
from tests.memory.tables import host
from train.memory.place import Place
table = host(Path(sys.argv[1]), rows=20_000, width=8, place=Place.file, places=1000)
print("ready", flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    """The kernel frees a file without a name with its last holder; so it must have none while it is in use."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        mapped = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        assert any(str(tmp_path) in line and line.endswith("(deleted)") for line in mapped)
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_rows_in_use_stay_and_rows_drawn_once_leave() -> None:
    """100 rows drawn at every turn among 900 drawn once each, in 200 places: the clock keeps the 100."""
    specs = array_specs(100_000, 3, MemoryOptimConfig(), RowType.fp32)
    cache = CachedStore(anonymous_arrays(specs), 200)
    cache.arrays["weight"].copy_(torch.arange(300_000).view(100_000, 3))
    often = torch.arange(0, 50_000, 500)
    for turn in range(30):
        once = torch.arange(60_000 + 90 * turn, 60_000 + 90 * (turn + 1))
        for rows in (often, once):
            out = torch.empty(len(rows), 3)
            cache.lookup(rows, out)
            assert torch.equal(out, cache.arrays["weight"][rows])
        if turn == 5:
            lookups, hits = cache.lookups, cache.hits
    assert cache.lookups - lookups == 24 * 190
    assert (cache.hits - hits) / (24 * 100) > 0.95


def test_hit_rate_of_a_table(tmp_path: Path) -> None:
    table = host(tmp_path, place=Place.file, places=ROWS, asynchronous=True)
    assert table.hit_rate == 0.0
    row_ids = torch.tensor([1, 2, 3, 3])
    table.lookup(row_ids)
    assert table.hit_rate == 0.0
    table.lookup(row_ids)
    assert table.hit_rate == 0.5
    assert host(tmp_path).hit_rate is None


def test_unwritten_changes_reach_the_file_when_they_leave_and_at_flush() -> None:
    specs = array_specs(10, 2, MemoryOptimConfig(), RowType.fp32)
    cache = CachedStore(anonymous_arrays(specs), 3)
    rows = torch.tensor([4, 8])
    values = cache.read(rows)
    cache.write(rows, {name: value + 5 for name, value in values.items()})
    assert not cache.arrays["weight"].any()  # still in RAM alone
    cache.read(torch.tensor([0, 1, 2]))
    assert cache.arrays["weight"].sum() == 20 and cache.arrays["step"].tolist() == [0, 0, 0, 0, 5, 0, 0, 0, 5, 0]
    cache.write(torch.tensor([1]), {"step": torch.tensor([7], dtype=torch.int32)})
    cache.flush()
    assert cache.arrays["step"][1] == 7 and cache.read(torch.tensor([1]))["step"] == 7
