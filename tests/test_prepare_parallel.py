"""Preparation in several processes: the same bytes with any number, and after a kill at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import train.prepare
from train import stages, workers
from train.data import DataConfig, DataSource
from train.prepare import prepare
from train.shards import DataError

ROOT = Path(__file__).resolve().parents[1]
PART_BYTES, PIECE_BYTES, BATCH_DOCUMENTS = 20_000, 15_000, 8


def write_rows(path: Path, seed: int, count: int) -> str:
    """Rows of text, a third of them near copies of an earlier one and a few exact copies."""
    rng = random.Random(seed)
    texts: list[str] = []
    for i in range(count):
        words = [f"w{rng.randrange(500)}" for _ in range(rng.randint(20, 80))]
        if i % 3 == 2:
            words = [*rng.choice(texts).split(), "end"]
        texts.append(" ".join(words) if i % 17 else rng.choice(["same", *texts]))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    files = [write_rows(tmp_path / f"{name}.jsonl", seed, 300) for seed, name in enumerate("abc")]
    return DataConfig(
        source=DataSource.datasets, root=str(tmp_path / "data"), vocab_size=300, data_files=files, val_fraction=0.1
    )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts of little text, each stage in processes."""
    monkeypatch.setattr(stages, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(stages, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(stages, "IN_PROCESSES", 0)
    monkeypatch.setattr("train.copies.BATCH_DOCUMENTS", BATCH_DOCUMENTS)


def content(cfg: DataConfig) -> dict[str, bytes]:
    folder = prepare(cfg).path
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "verified.json"}


def test_any_number_of_processes_and_size_of_parts_gives_the_same_bytes(
    cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(replace(cfg, root=str(tmp_path / "whole"), num_workers=1))  # one part a file, in this process
    monkeypatch.setattr(stages, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(stages, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(stages, "IN_PROCESSES", 0)
    monkeypatch.setattr("train.copies.BATCH_DOCUMENTS", BATCH_DOCUMENTS)
    started: list[int] = []
    original = workers._run_in_processes
    monkeypatch.setattr(workers, "_run_in_processes", lambda *args: (started.append(args[2]), original(*args)))
    for num_workers in (1, 2, 3):
        started.clear()
        assert content(replace(cfg, root=str(tmp_path / f"w{num_workers}"), num_workers=num_workers)) == whole
        assert started == [] if num_workers == 1 else max(started) == num_workers and len(started) >= 4
    manifest = json.loads(whole["manifest.json"])
    assert manifest["provenance"]["exact_duplicates"] > 10 and manifest["provenance"]["near_duplicates"] > 100


def test_the_number_of_processes_is_no_part_of_the_request(cfg: DataConfig) -> None:
    assert train.prepare._request_key(cfg) == train.prepare._request_key(replace(cfg, num_workers=7))
    with pytest.raises(ValueError, match=r"data\.num_workers=-1 must be at least 1, or 0"):
        DataConfig(num_workers=-1)


@pytest.mark.usefixtures("small_parts")
def test_errors_of_workers_are_those_of_the_data_and_leave_nothing(cfg: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(DataError, match=r"b\.jsonl"):
        prepare(replace(cfg, num_workers=2))
    assert [path.name for path in Path(cfg.root).iterdir()] == ["index"]


PROGRAM = f"""
import os, sys, time
rename = os.rename
def rename_later(*paths):
    time.sleep(1.0)  # long enough to be killed in, between the last file and the name of the folder
    rename(*paths)
os.rename = rename_later
from train import copies, stages, workers
from train.data_config import DataConfig, DataSource
from train.prepare import prepare
stages.PART_BYTES, stages.PIECE_BYTES, stages.IN_PROCESSES = {PART_BYTES}, {PIECE_BYTES}, 0
copies.BATCH_DOCUMENTS = {BATCH_DOCUMENTS}
here, elsewhere = workers.perform, workers._run_in_processes
def perform(folder, kind, number, advance):
    print("task", kind, number, flush=True)
    here(folder, kind, number, advance)
def run_in_processes(folder, pending, *rest):
    for task in pending:
        print("task", *task, flush=True)
    elsewhere(folder, pending, *rest)
workers.perform, workers._run_in_processes = perform, run_in_processes
root, num_workers, *files = sys.argv[1:]
cfg = DataConfig(
    source=DataSource.datasets, root=root, vocab_size=300, data_files=files, val_fraction=0.1,
    num_workers=int(num_workers),
)
print(prepare(cfg).fingerprint)
"""


def start(cfg: DataConfig, num_workers: int) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, cfg.root, str(num_workers), *cfg.data_files]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(cfg: DataConfig) -> set[str]:
    """Names of the finished tasks in the working folder."""
    return {path.stem for path in Path(cfg.root).glob(".preparing-*/*-*.json") if not path.name.startswith(".")}


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "num_workers"),
    [
        ("hash-00002.json", 2),
        pytest.param("read-00001.json", 1, marks=slow),
        pytest.param("read-00000.json", 2, marks=slow),
        pytest.param("compare-00001.json", 2, marks=slow),
        pytest.param("encode_train-00001.json", 2, marks=slow),
        pytest.param("encode_val-00000.json", 1, marks=slow),
        pytest.param("whole", 2, marks=slow),
        pytest.param("whole/manifest.json", 1, marks=slow),
    ],
)
def test_killed_at_any_moment_the_same_command_goes_on(
    cfg: DataConfig, tmp_path: Path, moment: str, num_workers: int
) -> None:
    process = start(cfg, num_workers)
    deadline = time.monotonic() + 120
    while not list(Path(cfg.root).glob(f".preparing-*/{moment}")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    whole = [path.name for path in Path(cfg.root).iterdir() if path.name != "index" and not path.name.startswith(".")]
    assert whole == [], "nothing looks prepared"
    time.sleep(0.5)  # workers see that their input has ended
    before = records(cfg)
    assert before

    second = start(cfg, num_workers)
    output, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    *tasks, fingerprint = output.splitlines()
    done = {f"{kind}-{int(number):05d}" for _, kind, number in map(str.split, tasks)}
    assert not done & before, "a finished task was done again"
    assert "parts are finished" in errors
    assert content(cfg) == content(replace(cfg, root=str(tmp_path / "straight"), num_workers=1))
    assert fingerprint == prepare(cfg).fingerprint
    assert sorted(path.name for path in Path(cfg.root).iterdir()) == sorted(["index", prepare(cfg).path.name])


@pytest.mark.usefixtures("small_parts")
def test_a_killed_worker_is_said_and_what_is_finished_stays(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = workers._Worker.ask

    def kill(self: workers._Worker, kind: str, number: int) -> None:
        if kind == "hash" and number == 3:
            self._process.kill()
        asked(self, kind, number)

    with monkeypatch.context() as patch:
        patch.setattr(workers._Worker, "ask", kill)
        with pytest.raises(workers.WorkerError, match=r"ended with code -9.*the same command goes on"):
            prepare(replace(cfg, num_workers=2))
    assert any(name.startswith("hash-") for name in records(cfg))
    assert content(replace(cfg, num_workers=2)) == content(replace(cfg, root=str(tmp_path / "other"), num_workers=1))


@pytest.mark.usefixtures("small_parts")
def test_ctrl_c_leaves_what_is_finished(cfg: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    perform = workers.perform

    def interrupted(folder: Path, kind: str, number: int, advance: workers.Advance) -> None:
        if kind == "hash" and number == 2:
            raise KeyboardInterrupt
        perform(folder, kind, number, advance)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "perform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(cfg, num_workers=1))
    assert "hash-00001" in records(cfg)
    assert prepare(cfg).num_train_tokens > 0


@pytest.mark.usefixtures("small_parts")
def test_work_cut_in_another_way_is_not_taken_over(
    cfg: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version may have cut its tasks differently: a piece of other documents must not be joined in."""
    perform = workers.perform

    def interrupted(folder: Path, kind: str, number: int, advance: workers.Advance) -> None:
        if kind == "encode_train" and number == 2:
            raise KeyboardInterrupt
        perform(folder, kind, number, advance)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "perform", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(replace(cfg, num_workers=1))
    assert "encode_train-00001" in records(cfg)
    monkeypatch.setattr(stages, "PIECE_BYTES", 2 * PIECE_BYTES)
    expected = content(replace(cfg, root=str(tmp_path / "other"), num_workers=1))
    assert content(replace(cfg, num_workers=1)) == expected


def test_workers_import_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'rich', 'scipy'}"
    code = f"import sys, train.workers, train.tasks; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
