"""The whole preparation: deterministic, cached, locked, atomic; the shards hold what the text says."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train.prepare
from scripts.prepare_data import main
from train.corpus import python_documents
from train.data import DataConfig, DataSource, TrainBatches, check_fits, validation_batches
from train.prepare import open_prepared, prepare
from train.shards import SPLITS, DataError, PreparedData
from train.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"


def sentence(i: int) -> str:
    return " ".join(f"word{(i * 7919 + j * j) % 997}" for j in range(20 + i % 30))


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    """Documents as rows of a file, two of them copies."""
    rows = [{"text": sentence(i)} for i in range(200)]
    rows += [rows[11], {"text": rows[12]["text"] + " end"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        source=DataSource.datasets,
        root=str(tmp_path / "data"),
        vocab_size=300,
        data_files=[str(tmp_path / "rows.jsonl")],
        val_fraction=0.1,
    )


def documents_of(prepared: PreparedData, split: str) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    stream = {"train": prepared.train, "val": prepared.val}[split]
    ids = stream.read(0, len(stream))
    ends = np.flatnonzero(ids == prepared.eos_id)
    assert ends[-1] == len(ids) - 1
    starts = [0, *(ends[:-1] + 1)]
    return [tokenizer.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]


def test_shards_hold_every_document_once_without_copies(cfg: DataConfig) -> None:
    prepared = prepare(cfg)
    train, val = (documents_of(prepared, split) for split in SPLITS)
    assert sorted(train + val) == sorted(sentence(i) for i in range(200))
    assert train != sorted(train, key=[sentence(i) for i in range(200)].index), "training documents are shuffled"
    assert 5 <= len(val) <= 40
    assert prepared.provenance["exact_duplicates"] == 1
    assert prepared.provenance["near_duplicates"] == 1
    assert prepared.bytes_per_token_val == sum(map(len, val)) / (prepared.num_val_tokens - len(val))
    assert len(prepared.compression_table) == prepared.vocab_size == 300
    check_fits(prepared, 300, 16)


def test_held_out_documents_stay_so_when_others_come(cfg: DataConfig) -> None:
    before = set(documents_of(prepare(cfg), "val"))
    with open(cfg.data_files[0], "a") as file:
        file.writelines(json.dumps({"text": f"more {sentence(i)} more"}) + "\n" for i in range(300, 360))
    after = prepare(cfg)
    assert before <= set(documents_of(after, "val"))
    assert not before & set(documents_of(after, "train"))


def test_validation_given_apart_loses_its_copies_of_training_text(cfg: DataConfig, tmp_path: Path) -> None:
    file = tmp_path / "val.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (sentence(3), "quite another text")))
    prepared = prepare(replace(cfg, val_files=[str(file)]))
    assert documents_of(prepared, "val") == ["quite another text"]
    assert len(documents_of(prepared, "train")) == 200


def test_two_preparations_give_the_same_bytes(tmp_path: Path) -> None:
    """The embedded corpus, a few documents of it; a validation package among them."""
    cfg = DataConfig(root=str(tmp_path / "a"), vocab_size=300, max_documents=150)
    first, second = prepare(cfg), prepare(replace(cfg, root=str(tmp_path / "b")))
    assert first.fingerprint == second.fingerprint
    assert first.path.name == second.path.name == f"python-{first.fingerprint[:12]}"
    names = {path.name for path in first.path.iterdir()} - {"verified.json"}
    assert {"manifest.json", "tokenizer.json", "train-00000.bin", "val-00000.bin"} <= names
    assert all((first.path / name).read_bytes() == (second.path / name).read_bytes() for name in names)
    held_out = {d.text.decode() for d in python_documents(cfg.val_packages, 150) if d.held_out}
    assert set(documents_of(first, "val")) <= held_out
    assert first.provenance["versions"]["numpy"] == np.__version__


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 301}, {"shuffle_seed": 1}, {"val_fraction": 0.2}, {"max_documents": 150}, {"text_field": "other"}],
)
def test_every_setting_that_matters_changes_the_fingerprint(cfg: DataConfig, change: dict) -> None:
    rows = [json.loads(line) for line in Path(cfg.data_files[0]).read_text().splitlines()]
    Path(cfg.data_files[0]).write_text("".join(json.dumps({**r, "other": r["text"] + "!"}) + "\n" for r in rows))
    assert prepare(replace(cfg, **change)).fingerprint != prepare(cfg).fingerprint


def test_second_call_reads_no_text_and_a_touched_file_ends_in_the_same_folder(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(cfg)
    file = Path(cfg.data_files[0])
    file.write_text(file.read_text())
    assert prepare(cfg).path == first.path
    monkeypatch.setattr(train.prepare, "_build", lambda *_: pytest.fail("prepared again"))
    assert prepare(cfg).fingerprint == open_prepared(cfg).fingerprint == first.fingerprint
    folders = [path.name for path in Path(cfg.root).iterdir()]
    assert sorted(folders) == sorted(["index", first.path.name])


def test_cached_path_imports_nothing_heavy(cfg: DataConfig) -> None:
    prepare(cfg)
    code = (
        "import sys, train.prepare, train.data\n"
        f"cfg = train.data.DataConfig(source=train.data.DataSource.datasets, root={cfg.root!r}, vocab_size=300, "
        f"data_files={cfg.data_files!r}, val_fraction=0.1)\n"
        "train.prepare.prepare(cfg)\n"
        "print(sorted({'datasets', 'tokenizers', 'transformers', 'rich', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_two_at_once_prepare_once(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    built = []
    build = train.prepare._build

    def counted(*arguments: object) -> Path:
        built.append(arguments)
        return build(*arguments)

    monkeypatch.setattr(train.prepare, "_build", counted)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(prepare, [cfg] * 3))
    assert len(built) == 1
    assert len({prepared.fingerprint for prepared in results}) == 1
    assert "waiting: another process prepares the same data" in capsys.readouterr().err


def test_processes_at_once_prepare_once(cfg: DataConfig) -> None:
    code = (
        "import train.prepare as p, train.data as d\n"
        "build = p._build\n"
        "p._build = lambda *a: (print('built'), build(*a))[1]\n"
        f"cfg = d.DataConfig(source=d.DataSource.datasets, root={cfg.root!r}, vocab_size=300, "
        f"data_files={cfg.data_files!r}, val_fraction=0.1)\n"
        "print(p.prepare(cfg).fingerprint)"
    )
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [line for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0]
    assert lines.count("built") == 1
    assert len(set(lines) - {"built"}) == 1


@pytest.mark.parametrize("calls_before", [2, 7, 12, 20, 25])
def test_full_disk_leaves_nothing_and_says_where(
    cfg: DataConfig, monkeypatch: pytest.MonkeyPatch, calls_before: int
) -> None:
    """The disk fills while documents are collected, hashed, compared, tokenised, or while shards are written."""
    original, calls = os.fsync, []

    def full_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > calls_before:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    message = (
        rf"no space left in {Path(cfg.root)} .* [1-9][\d,]+ bytes were written .*at least [1-9][\d,]+ bytes must be"
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_later)
        with pytest.raises(DataError, match=message):
            prepare(cfg)
    left = [path.name for path in Path(cfg.root).rglob("*") if path.suffix != ".lock"]
    assert left == ["index"]
    assert prepare(cfg).num_train_tokens > 0


def test_remains_of_a_killed_preparation_are_replaced(cfg: DataConfig) -> None:
    key = train.prepare._request_key(cfg)
    half = Path(cfg.root) / f".preparing-{key}"
    half.mkdir(parents=True)
    (half / "train-00000.bin").write_bytes(b"half")
    prepared = prepare(cfg)
    assert not half.exists()
    assert len(documents_of(prepared, "train")) > 100


def test_planned_fingerprint_is_checked(cfg: DataConfig) -> None:
    with pytest.raises(DataError, match=r"holds no data prepared with these settings; run make prepare"):
        open_prepared(cfg)
    fingerprint = prepare(cfg).fingerprint
    assert prepare(replace(cfg, fingerprint=fingerprint)).fingerprint == fingerprint
    with pytest.raises(DataError, match=r"data\.fingerprint=0123 is not that of .*plan anew"):
        open_prepared(replace(cfg, fingerprint="0123"))


def test_damaged_or_deleted_folder(cfg: DataConfig) -> None:
    prepared = prepare(cfg)
    with open(prepared.path / "train-00000.bin", "ab") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"train-00000\.bin has 100 bytes.*delete the folder"):
        prepare(cfg)
    for path in prepared.path.iterdir():
        path.unlink()
    prepared.path.rmdir()
    assert prepare(cfg).fingerprint == prepared.fingerprint


def test_no_documents_left_is_said(cfg: DataConfig, tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text("all of it in one document")
    with pytest.raises(DataError, match=r"no documents left for validation.*data\.document_separator"):
        prepare(replace(cfg, data_files=[str(one)], val_fraction=1e-9))
    with pytest.raises(DataError, match=r"no documents left for training"):
        prepare(replace(cfg, data_files=[str(one)], val_fraction=1 - 1e-9))
    one.write_text(" \n ")
    with pytest.raises(DataError, match="no document with text"):
        prepare(replace(cfg, data_files=[str(one)]))
    assert not [path for path in Path(cfg.root).iterdir() if path.name != "index"]


def test_any_tokenizer_folder(cfg: DataConfig) -> None:
    with pytest.raises(DataError, match=r"data\.vocab_size=300 must be at least the 3000 ids"):
        prepare(replace(cfg, tokenizer=str(GOLDEN)))
    prepared = prepare(replace(cfg, tokenizer=str(GOLDEN), vocab_size=3000))
    assert prepared.vocab_size == 3000
    assert prepared.eos_id == prepared.pad_id == load_tokenizer(GOLDEN / "tokenizer.json").token_to_id("<eos>")
    assert len(next(validation_batches(prepared, 8, 2, 100)).token_ids) == 2


def test_tiny_config_trains_within_one_epoch(tmp_path: Path) -> None:
    """The command a user types, on the configuration of the smoke run, shrunk."""
    assert main(["data=tiny", f"data.root={tmp_path}", "data.max_documents=150"]) == 0
    prepared = open_prepared(DataConfig(root=str(tmp_path), vocab_size=512, max_documents=150))
    batches = TrainBatches(prepared, 64, 8, seed=0)
    assert batches.epochs_needed(20) < 1
    assert batches.batch(19).token_ids.max() < 512


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.vocab_siz=3"], "data.vocab_siz"),
        (["data.vocab_size=many"], "could not be converted to Integer"),
        (["data=nowhere"], "Could not find 'data/nowhere'"),
        (["data.vocab_size=3"], "data.vocab_size=3 must be at least 257"),
        (["data=datasets", "data.data_files=[none.txt]"], "data.data_files=none.txt is no file"),
    ],
)
def test_command_ends_with_one_message(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*overrides, f"data.root={tmp_path}"]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and message in output.err and "Traceback" not in output.err
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture) -> None:
    assert main(["data.root=/proc/nope"]) == 2
    assert capsys.readouterr().err.startswith("error: data.root=/proc/nope cannot be written (")


def test_a_vocabulary_larger_than_the_text_gives_is_noted(cfg: DataConfig, capsys: pytest.CaptureFixture) -> None:
    prepared = prepare(replace(cfg, vocab_size=60_000))
    assert prepared.vocab_size < 60_000
    assert f"data.vocab_size={prepared.vocab_size} would fit" in capsys.readouterr().err
