"""Shards: what is written is what is read; damage of any kind is named, never read."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from train.shards import (
    COMPRESSION_TABLE,
    MANIFEST,
    TOKENIZER,
    DataError,
    PreparedData,
    ShardWriter,
    open_folder,
    save_array,
    shard_records,
    token_dtype,
    write_manifest,
)

EOS = 0


def write_folder(
    folder: Path, documents: dict[str, list[list[int]]], vocab_size: int = 50, shard_tokens: int = 20
) -> str:
    folder.mkdir()
    (folder / TOKENIZER).write_text("{}")
    save_array(folder / COMPRESSION_TABLE, np.arange(vocab_size))
    splits = {}
    for split, texts in documents.items():
        with ShardWriter(folder, split, token_dtype(vocab_size), EOS, shard_tokens) as writer:
            for ids in texts:
                writer.add(ids)
        splits[split] = {"shards": shard_records(writer.shards), "text_bytes": 3 * sum(map(len, texts))}
    content = {"vocab_size": vocab_size, "eos_id": EOS, "pad_id": EOS, "splits": splits, "settings": {}}
    return write_manifest(folder, content, {"from": "a test"})


def random_documents(seed: int, count: int, high: int = 50) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, high, rng.integers(1, 12)).tolist() for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "p", {"train": random_documents(0, 30), "val": random_documents(1, 5)})
    return tmp_path / "p"


@pytest.mark.parametrize(("vocab_size", "itemsize"), [(2**16, 2), (2**16 + 1, 4)])
def test_reads_what_was_written_across_shards(tmp_path: Path, vocab_size: int, itemsize: int) -> None:
    documents = {"train": random_documents(0, 30, vocab_size), "val": [[vocab_size - 1], [1, 2, 3]]}
    fingerprint = write_folder(tmp_path / "p", documents, vocab_size)
    prepared = open_folder(tmp_path / "p")
    flat = {split: [token for ids in texts for token in [*ids, EOS]] for split, texts in documents.items()}
    assert len(prepared.shards["train"]) > 3
    assert prepared.fingerprint == fingerprint
    assert (prepared.num_train_tokens, prepared.num_val_tokens) == (len(flat["train"]), len(flat["val"]))
    assert prepared.train.read(0, len(prepared.train)).tolist() == flat["train"]
    assert prepared.val.read(0, len(prepared.val)).tolist() == flat["val"]
    for start, length in ((3, 40), (19, 2), (len(flat["train"]) - 1, 1), (5, 0)):
        assert prepared.train.read(start, length).tolist() == flat["train"][start : start + length]
    assert prepared.train.read(0, 1).dtype == np.int64
    assert (tmp_path / "p" / "train-00000.bin").stat().st_size == itemsize * prepared.shards["train"][0].num_tokens
    with pytest.raises(IndexError):
        prepared.train.read(len(flat["train"]), 1)


def test_offsets_bound_documents_and_shards_never_cut_one(folder: Path) -> None:
    prepared = open_folder(folder)
    documents = []
    for shard in prepared.shards["train"]:
        offsets = np.load(folder / shard.offsets, allow_pickle=False)
        ids = np.fromfile(folder / shard.tokens, dtype="<u2")
        assert offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(ids) == shard.num_tokens
        assert len(offsets) == shard.num_documents + 1
        documents += [ids[a : b - 1].tolist() for a, b in itertools.pairwise(offsets)]
        assert (ids[offsets[1:] - 1] == EOS).all()
    assert documents == random_documents(0, 30)


def test_bytes_per_token_counts_predicted_tokens(folder: Path) -> None:
    assert open_folder(folder).bytes_per_token_val == 3.0  # 3 bytes a token of text, as write_folder says


def test_same_content_same_bytes_and_fingerprint_different_content_another(tmp_path: Path) -> None:
    documents = {"train": random_documents(0, 9), "val": random_documents(1, 3)}
    first = write_folder(tmp_path / "a", documents)
    assert write_folder(tmp_path / "b", documents) == first
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    documents["train"][4][0] += 1
    assert write_folder(tmp_path / "c", documents) != first


def test_end_of_document_inside_a_document_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"end-of-document id 0 inside a document.*data\.eos_token"),
        ShardWriter(tmp_path, "train", np.dtype("<u2"), EOS) as writer,
    ):
        writer.add([4, 0, 5])


def alter_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("name", ["train-00001.bin", "val-00000.bin", "val-00000.offsets.npy", COMPRESSION_TABLE])
def test_truncated_altered_or_missing_file_is_named_with_remedy(folder: Path, name: str, opened_before: bool) -> None:
    if opened_before:
        open_folder(folder)
    path = folder / name
    original = path.read_bytes()
    alter_byte(path)
    with pytest.raises(DataError, match=rf"{name} was altered: its SHA-256 .*; delete the folder .* prepare again"):
        open_folder(folder)
    path.write_bytes(original[:-2])
    with pytest.raises(DataError, match=rf"{name} has {len(original) - 2} bytes, manifest\.json says {len(original)}"):
        open_folder(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing, and manifest\.json lists it; delete"):
        open_folder(folder)
    path.write_bytes(original)
    assert isinstance(open_folder(folder), PreparedData)


def test_alteration_that_keeps_size_and_modification_time_is_found(folder: Path) -> None:
    open_folder(folder)
    path = folder / "train-00000.bin"
    status = path.stat()
    alter_byte(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="was altered"):
        open_folder(folder)


def test_checksums_are_compared_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_folder(folder)
    monkeypatch.setattr("train.shards.sha256", lambda path: pytest.fail(f"{path} was read again"))
    open_folder(folder)


def test_manifest_is_checked(folder: Path) -> None:
    path = folder / MANIFEST
    original = path.read_text()
    manifest = json.loads(original)
    for changes, message in (
        ({"vocab_size": 51}, "was altered"),
        ({"schema_version": 99}, "schema_version 99"),
    ):
        path.write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(DataError, match=message):
            open_folder(folder)
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"is not a manifest of prepared data.*delete the folder"):
            open_folder(folder)
    path.unlink()
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        open_folder(folder)
