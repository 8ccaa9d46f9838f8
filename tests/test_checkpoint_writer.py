"""Writing beside the training, several ranks at once, and what happens where one of them, or the disk, fails."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.bench_checkpoint import anonymous_bytes, peak_of
from tests.faults import KILL_MOMENTS, full_disk, in_child, kill_at
from tests.writing_ranks import STATE, deal, same, tensors, write
from train import rank_files
from train.checkpoint import Checkpoint
from train.checkpoint_commit import give_up
from train.checkpoint_folder import checkpoints, load_latest, newest_good, remove_leftovers
from train.checkpoint_writer import CheckpointWriter, Place, WriterOptions
from train.host_buffer import HostBuffer
from train.pieces import Piece, whole


def pieces_of(named: dict[str, torch.Tensor]) -> list[Piece]:
    return [whole(name, tensor) for name, tensor in named.items()]


def held_back(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing of files waits for the event that this returns."""
    go = threading.Event()
    original = rank_files.write_safetensors

    def waits(*args: Any) -> Any:
        assert go.wait(20)
        return original(*args)

    monkeypatch.setattr(rank_files, "write_safetensors", waits)
    return go


def test_what_is_written_is_the_state_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on and changes every tensor before the first byte is written."""
    go = held_back(monkeypatch)
    live = tensors()
    with CheckpointWriter(tmp_path, WriterOptions(keep=2)) as writer:
        report = writer.save(1, pieces_of(live), STATE)
        assert (report.in_place_bytes, report.waited_seconds) == (0, 0.0) and report.num_bytes > 3000
        for tensor in live.values():
            tensor.fill_(3)
        assert checkpoints(tmp_path) == []
        threading.Timer(0.2, go.set).start()
        report = writer.save(2, pieces_of(live), STATE)
        assert 0.05 < report.waited_seconds <= report.pause_seconds
    first, second = checkpoints(tmp_path)
    assert same(Checkpoint(first), tensors()) and same(Checkpoint(second), live)


def test_buffers_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = HostBuffer()
    buffer.reserve(1 << 16)  # in a thread; it waits for it
    first = buffer.copy(pieces_of(tensors(0)))
    second = buffer.copy(pieces_of(tensors(1)))
    assert [piece.data.data_ptr() for piece in first] == [piece.data.data_ptr() for piece in second]
    for piece, (name, tensor) in zip(second, tensors(1).items(), strict=True):
        assert piece.name == name and torch.equal(piece.data, tensor)


@pytest.mark.parametrize("budget", [0, 700, 1 << 20])
def test_what_exceeds_the_buffers_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    named = tensors()
    mapped = named["table_1.weight"]
    own = [Piece(p.name, p.shape, p.start, p.data, in_place=p.name == "table_1.weight") for p in pieces_of(named)]
    buffered: list[int] = []
    copy = HostBuffer.copy

    def noted(self: HostBuffer, pieces: Any) -> Any:
        buffered.append(sum(piece.num_bytes for piece in pieces))
        assert all(piece.data.data_ptr() != mapped.data_ptr() for piece in pieces)
        return copy(self, pieces)

    monkeypatch.setattr(HostBuffer, "copy", noted)
    with CheckpointWriter(tmp_path, WriterOptions(buffer_bytes=budget)) as writer:
        report = writer.save(1, own, STATE)
        for tensor in named.values():
            tensor.fill_(3)
    assert sum(buffered) <= budget and report.in_place_bytes == report.num_bytes - sum(buffered)
    assert report.in_place_bytes >= mapped.nbytes
    assert same(Checkpoint(checkpoints(tmp_path)[0]), tensors())


def test_synchronous_and_asynchronous_write_the_same_files(tmp_path: Path) -> None:
    for name, asynchronous in (("a", True), ("b", False)):
        with CheckpointWriter(tmp_path / name, WriterOptions(asynchronous=asynchronous)) as writer:
            writer.save(1, pieces_of(tensors()), STATE)
            assert asynchronous or checkpoints(tmp_path / name)
    a, b = (
        {file.name: file.read_bytes() for file in (tmp_path / name / "step_00000001").iterdir()} for name in ("a", "b")
    )
    assert a == b


def left_in(folder: Path) -> list[str]:
    """What lies there, but for the empty folders by which ranks know what rank 0 gave up, until its next save."""
    return [p.name for p in folder.iterdir() if any(p.iterdir()) or not p.name.endswith(".given-up.tmp")]


def ranks(folder: Path, world_size: int, **options: Any) -> list[CheckpointWriter]:
    return [
        CheckpointWriter(folder, WriterOptions(**{"timeout_seconds": 5.0} | options), Place(rank, world_size, "a"))
        for rank in range(world_size)
    ]


def test_ranks_that_write_beside_their_training(tmp_path: Path) -> None:
    """Three rounds; ranks come to each at other moments, and the second step is asked for twice."""
    writers = ranks(tmp_path, 3)

    def train(rank: int) -> None:
        for step, final in ((1, False), (2, False), (2, True), (3, True)):
            time.sleep(0.03 * ((rank + step) % 3))
            writers[rank].save(step, deal(tensors(step), 3)[rank], STATE, final)
            if final:  # every rank knows now that the checkpoint is there
                assert (tmp_path / f"step_{step:08d}").exists()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, range(3)))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    assert same(Checkpoint(tmp_path / "step_00000003"), tensors(3))


def test_a_rank_that_never_comes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 1, deal(tensors(), 3))
    writers = ranks(tmp_path, 3, timeout_seconds=0.2)
    for rank in (0, 2):
        writers[rank].save(2, deal(tensors(), 3)[rank], STATE)
    for rank in (0, 2):
        writers[rank].drain()
    err = capsys.readouterr().err
    assert "warning: checkpoint" in err and "no record of rank 1 (of 3) came within 0.2 s" in err
    assert "step_00000001 is the newest; training goes on" in err
    with pytest.raises(OSError, match=r"no record of rank 1, 2 \(of 3\)"):
        writers[0].save(3, deal(tensors(), 3)[0], STATE, final=True)
    assert left_in(tmp_path) == ["step_00000001"]


def test_a_rank_that_fails_says_so_and_all_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = rank_files.write_safetensors

    def fails(path: Path, *args: Any) -> Any:
        if "rank00001" in path.name:
            raise OSError(5, "Input/output error")
        return original(path, *args)

    monkeypatch.setattr(rank_files, "write_safetensors", fails)
    writers = ranks(tmp_path, 3)
    with ThreadPoolExecutor(3) as pool:
        started = time.monotonic()
        done = [pool.submit(w.save, 1, deal(tensors(), 3)[w.place.rank], STATE, True) for w in writers]
        messages = [str(future.exception(20)) for future in done]
    assert time.monotonic() - started < 3  # nobody waited for the time-out
    assert "rank 1: [Errno 5]" in messages[0] and "Input/output error" in messages[1]
    assert "rank 0 gave it up" in messages[2] or "No such file" in messages[2]
    assert not checkpoints(tmp_path)


def test_a_rank_that_comes_after_rank_0_gave_up_does_not_wait(tmp_path: Path) -> None:
    first, late = ranks(tmp_path, 2)
    temporary = tmp_path / f".step_00000001.{late.place.attempt}-1.tmp"
    temporary.mkdir()
    give_up(temporary, 2)
    started = time.monotonic()
    with pytest.raises(OSError, match="rank 0 gave it up"):
        late.save(1, deal(tensors(), 2)[1], STATE, True)
    assert time.monotonic() - started < 3  # the time-out is 5 s
    first.save(2, deal(tensors(), 2)[0], STATE)  # its thread waits for the other rank's part, not it
    assert not list(tmp_path.glob(".step_00000001.*")), "the next save tidies up"
    give_up(tmp_path / ".step_00000002.a-1.tmp", 2)
    first.drain()
    assert not checkpoints(tmp_path)


def test_a_mistake_in_the_thread_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a mistake")

    monkeypatch.setattr(rank_files, "write_safetensors", broken)
    writer = CheckpointWriter(tmp_path)
    writer.save(1, pieces_of(tensors()), STATE)
    with pytest.raises(ZeroDivisionError):
        writer.save(2, pieces_of(tensors()), STATE)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_is_a_warning_until_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    large = {**tensors(), "model.large": torch.zeros(300_000)}  # 1.2 MB
    with full_disk(tmp_path / "disk", 900_000) as folder:
        writer = CheckpointWriter(folder, WriterOptions(asynchronous=asynchronous))
        writer.save(1, pieces_of(tensors()), STATE)
        writer.save(2, pieces_of(large), STATE)
        writer.drain()
        err = capsys.readouterr().err
        assert err.startswith("warning: checkpoint") and "training goes on" in err and len(err.splitlines()) == 1
        assert "bytes free, the checkpoint needs 1,20" in err and "step_00000001 is the newest" in err
        assert [path.name for path in folder.iterdir()] == ["step_00000001"]
        writer.save(3, pieces_of(tensors(3)), STATE)  # there is room again
        writer.drain()
        found = load_latest(folder)
        assert found is not None and found.step == 3 and same(found, tensors(3))
        with pytest.raises(OSError, match=r"step_00000004 could not be written .*bytes free.*earlier checkpoints are"):
            writer.save(4, pieces_of(large), STATE, final=True)
        found = load_latest(folder)
        assert found is not None and same(found, tensors(3))


def killed(folder: Path, moment: str, rank: int = 0, world_size: int = 1) -> int:
    """A process that begins the checkpoint of step 2 and ends itself at a moment of it; its exit code."""

    def work() -> None:
        kill_at(moment)
        with CheckpointWriter(folder, WriterOptions(timeout_seconds=20), Place(rank, world_size, "killed")) as writer:
            writer.save(2, deal(tensors(2), world_size)[rank], STATE)

    return in_child(work)


@pytest.mark.parametrize("moment", KILL_MOMENTS)
def test_killed_while_writing(tmp_path: Path, moment: str) -> None:
    """After the rename it is the new checkpoint, before it the one before; nothing else is ever seen."""
    write(tmp_path, 1, deal(tensors(1), 2), WriterOptions(keep=1))
    assert killed(tmp_path, moment) == -9
    step = 2 if moment == "before_removal" else 1
    found = load_latest(tmp_path, set_aside=True)
    assert found is not None and found.step == step and same(found, tensors(step))
    # The next start removes what was left, and goes on.
    write(tmp_path, 3, deal(tensors(3), 2), WriterOptions(keep=1), attempt="b")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
    found = load_latest(tmp_path)
    assert found is not None and same(found, tensors(3))


def test_one_of_two_processes_is_killed(tmp_path: Path) -> None:
    write(tmp_path, 1, deal(tensors(1), 2))
    writer = CheckpointWriter(tmp_path, WriterOptions(timeout_seconds=1), Place(0, 2, "killed"))
    assert killed(tmp_path, "before_record", rank=1, world_size=2) == -9
    leftovers = list(tmp_path.glob(".step_*.tmp"))
    assert len(leftovers) == 1  # its files without a record
    with pytest.raises(OSError, match="no record of rank 1"):
        writer.save(2, deal(tensors(2), 2)[0], STATE, final=True)
    assert newest_good(tmp_path, set_aside=False) == tmp_path / "step_00000001"
    assert left_in(tmp_path) == ["step_00000001"]


def test_two_processes_write_one_checkpoint(tmp_path: Path) -> None:
    assert killed(tmp_path, "before_manifest", rank=1, world_size=2) == 0  # rank 0 writes that
    place = Place(0, 2, "killed")
    CheckpointWriter(tmp_path, WriterOptions(timeout_seconds=20), place).save(
        2, deal(tensors(2), 2)[0], STATE, final=True
    )
    assert same(Checkpoint(tmp_path / "step_00000002"), tensors(2))


def test_leftovers_are_removed_but_the_present_attempt_stays(tmp_path: Path) -> None:
    for name in (".step_00000001.1.tmp", ".step_00000002.old.tmp", ".step_00000003.a-1.tmp"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path, keep=".step_00000003.a-1.tmp")
    assert [path.name for path in tmp_path.iterdir()] == [".step_00000003.a-1.tmp"]


@pytest.mark.parametrize("mapped", [False, True])
def test_a_large_table_is_never_held_twice(tmp_path: Path, mapped: bool) -> None:
    """48 MiB of rows and moments, saved with 1 MiB of buffers and loaded: 12 MiB beside them are enough."""
    rows, width, allowed = 2**16, 64, 12 << 20

    def work() -> None:
        table = {}
        for name in ("weight", "exp_avg", "exp_avg_sq"):
            file = str(tmp_path / f"{name}.bin")
            table[name] = torch.from_file(file, shared=True, size=rows * width) if mapped else torch.empty(rows * width)
            table[name] = table[name].view(rows, width).fill_(1.5)
        before = anonymous_bytes()

        def save() -> None:
            with CheckpointWriter(tmp_path / "c", WriterOptions(buffer_bytes=0 if mapped else 1 << 20)) as writer:
                own = [whole(f"table_1.{name}", tensor, in_place=mapped) for name, tensor in table.items()]
                writer.save(1, own, {})

        def read() -> None:
            found = load_latest(tmp_path / "c")
            assert found is not None
            for name, tensor in table.items():
                found.read(f"table_1.{name}", out=tensor.zero_())

        for task in (save, read):
            assert peak_of(task) < before + allowed
        assert all(bool((tensor == 1.5).all()) for tensor in table.values())

    assert in_child(work) == 0


def test_the_memory_is_really_looked_at() -> None:
    def work() -> None:
        held = torch.ones(32 << 20, dtype=torch.uint8)
        time.sleep(0.1)
        del held

    assert peak_of(work) > anonymous_bytes() + (16 << 20)
