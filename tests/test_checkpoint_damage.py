"""Damage of every kind of file: the loader gives the last good state or a clear error, never other numbers."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from tests.faults import flip_bit, remove, truncate
from tests.test_checkpoint import first_schema
from tests.writing_ranks import deal, same, tensors, write
from train.checkpoint import MANIFEST, CheckpointVersionError, DamagedCheckpointError, read_manifest
from train.checkpoint_folder import checkpoints, load_latest, newest_good, verify


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two checkpoints of three ranks; the newer one will be damaged."""
    write(tmp_path, 1, deal(tensors(1), 3))
    write(tmp_path, 2, deal(tensors(2), 3))
    return tmp_path


def files(folder: Path) -> list[Path]:
    """One of each kind."""
    newest = folder / "step_00000002"
    names = ("model.rank00001.safetensors", "table_1.rank00002.safetensors", "state.json", MANIFEST)
    return [newest / name for name in names]


def falls_back(folder: Path, victim: Path, capsys: pytest.CaptureFixture[str], keeps: bool = True) -> None:
    """The older checkpoint is taken, the newer one named and, with `keeps`, put back for the next fault."""
    capsys.readouterr()
    found = load_latest(folder, set_aside=True)
    assert found is not None and found.step == 1 and same(found, tensors(1))
    err = capsys.readouterr().err
    assert err.startswith("warning: ") and victim.name in err and "kept as step_00000002.damaged" in err, err
    assert [path.name for path in checkpoints(folder)] == ["step_00000001"]
    aside = folder / "step_00000002.damaged"
    assert aside.is_dir()
    if keeps:
        aside.rename(folder / "step_00000002")


def test_truncation_at_several_offsets(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for victim in files(two):
        whole = victim.read_bytes()
        for size in (0, 1, 8, len(whole) // 2, len(whole) - 1):
            truncate(victim, size)
            falls_back(two, victim, capsys)
        victim.write_bytes(whole)
    assert load_latest(two).step == 2  # type: ignore[union-attr]


def test_single_bit_flips(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for victim in files(two):
        size = victim.stat().st_size
        for offset in {0, 7, 8, 9, size // 3, size // 2, size - 2, size - 1}:
            for bit in (0, 5):
                flip_bit(victim, offset, bit)
                falls_back(two, victim, capsys)
                flip_bit(victim, offset, bit)
    found = load_latest(two)
    assert found is not None and found.step == 2 and same(found, tensors(2))


def test_bits_all_over_a_manifest(two: Path) -> None:
    """A flipped digit is still JSON: the manifest's own sum knows it."""
    victim = two / "step_00000002" / MANIFEST
    whole = victim.read_bytes()
    for offset in range(0, len(whole), 13):
        for bit in (0, 1, 5):
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << bit
            victim.write_bytes(flipped)
            if json_of(bytes(flipped)) == json_of(whole):
                continue  # one white space for another
            with pytest.raises(DamagedCheckpointError):
                read_manifest(two / "step_00000002", "")


def test_bits_all_over_a_manifest_of_the_first_schema(tmp_path: Path) -> None:
    """It has no sum of its own: what it says of the files is compared with them."""
    path = first_schema(tmp_path, 5, tensors(), {})
    victim = path / MANIFEST
    whole = victim.read_bytes()
    for offset in range(0, len(whole), 3):
        for bit in (0, 2, 5):
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << bit
            victim.write_bytes(flipped)
            if json_of(bytes(flipped)) != json_of(whole):
                with pytest.raises((DamagedCheckpointError, CheckpointVersionError)):
                    load_latest(tmp_path)


def json_of(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_missing_files(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for victim in files(two):
        whole = victim.read_bytes()
        remove(victim)
        falls_back(two, victim, capsys)
        victim.write_bytes(whole)
    (two / "step_00000002" / MANIFEST).unlink()
    falls_back(two, two / "step_00000002" / MANIFEST, capsys, keeps=False)


def test_a_checkpoint_under_another_step_is_not_taken(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (two / "step_00000002").rename(two / "step_00000009")
    found = load_latest(two, set_aside=True)
    assert found is not None and found.step == 1
    assert "manifest.json is of step 2" in capsys.readouterr().err


def test_files_of_another_checkpoint_are_noticed(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for victim in files(two)[:3]:
        whole = victim.read_bytes()
        shutil.copy(two / "step_00000001" / victim.name, victim)
        falls_back(two, victim, capsys)
        victim.write_bytes(whole)


def test_a_reader_leaves_the_folder_as_it_is(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(files(two)[0], -1)
    before = sorted(path.name for path in two.iterdir())
    found = load_latest(two)
    assert found is not None and found.step == 1
    assert "going on from" in capsys.readouterr().err
    assert sorted(path.name for path in two.iterdir()) == before


def test_no_good_one_left_is_an_error_each_time(two: Path) -> None:
    """Nothing is put aside then: the next start would find nothing and begin anew."""
    truncate(files(two)[0], -1)
    (two / "step_00000001" / MANIFEST).unlink()
    for _ in range(2):
        with pytest.raises(DamagedCheckpointError, match=r"no checkpoint that is whole: .*model.rank00001.*manifest"):
            load_latest(two, set_aside=True)
    assert len(checkpoints(two)) == 2


def test_damaged_ones_do_not_take_each_others_place(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        (two / "step_00000002" / "state.json").unlink()
        assert newest_good(two, set_aside=True) == two / "step_00000001"
        write(two, 2, deal(tensors(2), 1), attempt="b")
    assert {path.name for path in two.glob("*.damaged*")} == {"step_00000002.damaged", "step_00000002.damaged-2"}


@pytest.mark.parametrize("victim", range(4))
def test_several_ranks_verify_together(two: Path, capsys: pytest.CaptureFixture[str], victim: int) -> None:
    """Each rank reads its share of the files; all come to the same checkpoint, and one of them renames."""
    flip_bit(files(two)[victim], -3)
    readers = 3
    boards: list[list[str]] = [[] for _ in range(readers)]
    barrier = Barrier(readers, timeout=20)

    def take(rank: int) -> Path | None:
        def join(lines: list[str]) -> list[str]:
            boards[rank] = lines
            barrier.wait()
            joined = [line for board in boards for line in board]
            barrier.wait()
            return joined

        return newest_good(two, True, rank, readers, join)

    with ThreadPoolExecutor(readers) as pool:
        assert set(pool.map(take, range(readers))) == {two / "step_00000001"}
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (two / "step_00000002.damaged").exists()


def test_every_file_is_verified_by_one_rank(two: Path) -> None:
    path = two / "step_00000002"
    for victim in path.iterdir():
        if victim.name == MANIFEST:
            continue
        flip_bit(victim, -1)
        faults = [fault for rank in range(4) for fault in verify(path, rank, 4)]
        assert faults and all(victim.name in fault for fault in faults)
        flip_bit(victim, -1)
    assert [verify(path, rank, 4) for rank in range(4)] == [[]] * 4
