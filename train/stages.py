"""The stages of a preparation, one after another: read, hash, compare, train a tokenizer, tokenise, put together.

All of them work on one folder. What takes time is cut into tasks of a fixed size (`train.tasks`), which any number of
processes share and which are not done again once they are finished; what is left between them is sorting and copying.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train import copies
from train.copies import batches, exact_copies, similar_groups
from train.corpus import python_identity
from train.data_config import DataConfig, DataSource
from train.document_store import DocumentIndex
from train.files import sync, write_array, write_json
from train.progress_lines import Display
from train.shards import (
    COMPRESSION_TABLE,
    SPLITS,
    TOKENIZER,
    DataError,
    ShardWriter,
    save_array,
    shard_records,
    token_dtype,
    write_manifest,
)
from train.tasks import begin, collect_parts, read_units, write_locations
from train.tokenizer import (
    compression_table,
    end_of_document,
    fetch_tokenizer,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
)
from train.workers import record, run_tasks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BPE_SAMPLE_BYTES = 32 * 2**20  # of training text that the BPE is trained on; more changes 4,096 merges hardly at all
PART_BYTES = 16 * 2**20  # of text in one part: seconds of work, and little to do again
IN_PROCESSES = 32 * 2**20  # bytes from which a stage is worth other processes, which take half a second to start
READERS = 3  # processes that read, at most: `datasets` holds 420 MB in each, and is ten times faster than what follows
PIECE_BYTES = 16 * 2**20  # of text that one task tokenises
FORMAT = 1  # raise it when the same settings would give other data
_ADVANCE = 2**12  # documents after which the display moves


@dataclass(frozen=True)
class Copies:
    """Which documents stay."""

    keep: np.ndarray  # (documents,) bool
    num_exact: int
    num_near: int


def build(cfg: DataConfig, work: Path, whole: Path, display: Display) -> str:
    """Prepare into the folder `whole`, going on with what is finished in `work`, and return the fingerprint.

    Raises:
        DataError: bad input.
        OSError: for example a full disk.
    """
    begin(work, cfg, PART_BYTES, [FORMAT, PIECE_BYTES, copies.BATCH_DOCUMENTS])
    index = _read(cfg, work, display)
    found = _copies(cfg, index, display)
    splits = _split(cfg, index, found.keep)
    tokenizer = _tokenizer(cfg, index, splits["train"], display)
    eos_id = end_of_document(tokenizer, cfg.tokenizer, cfg.eos_token)
    vocab_size = _check_vocabulary(cfg, tokenizer)
    write_json(work / "tokens.json", {"vocab_size": vocab_size, "eos_id": eos_id})
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    shutil.copyfile(work / TOKENIZER, whole / TOKENIZER)
    sync(whole / TOKENIZER)
    save_array(whole / COMPRESSION_TABLE, compression_table(tokenizer))
    records: dict[str, Any] = {}
    for split in SPLITS:
        text_bytes, count = _tokenise(cfg, index, split, splits[split], display)
        with ShardWriter(whole, split, token_dtype(vocab_size), eos_id) as writer:
            _join(work, split, count, token_dtype(vocab_size), writer)
        records[split] = {"shards": shard_records(writer.shards), "text_bytes": text_bytes}
    content = record(work, "digest", 0)
    assert content is not None  # _copies made it
    identity = {
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "pad_id": eos_id,
        "dtype": token_dtype(vocab_size).str,
        "splits": records,
        "settings": {"format": FORMAT, "dedup": asdict(cfg.dedup), "vocab_size": cfg.vocab_size},
        "content_sha256": content["content_sha256"],
    }
    return write_manifest(whole, identity, _provenance(cfg, index, found))


def _tasks(most: int, work: Path, what: str, tasks: list[tuple[str, int]], total: int | None, display: Display) -> None:
    """Do the tasks of a stage that are not finished in at most `most` processes.

    Shows how far they are of `total` bytes, if that is known.
    """
    found = [record(work, *task) for task in tasks]
    done = [finished for finished in found if finished is not None]
    note = f" ({len(done)} of {len(tasks)} parts are finished)" if done else ""
    advance = display.stage(what + note, total, sum(int(finished["bytes"]) for finished in done))
    run_tasks(work, tasks, most if total is None or total >= IN_PROCESSES else 1, advance)


def _read(cfg: DataConfig, work: Path, display: Display) -> DocumentIndex:
    units = read_units(cfg)
    # Of parquet, which is compressed, more comes out; then the time left is a guess.
    sizes = [sum(file.stat().st_size for file in unit.files) for unit in units]
    total = sum(sizes) if all(sizes) else None
    tasks = [("read", number) for number in range(len(units))]
    _tasks(min(cfg.processes, READERS), work, "reading documents", tasks, total, display)
    index = DocumentIndex(work, collect_parts(work, len(units)))
    if len(index) == 0:
        raise DataError(f"data.source={cfg.source.value} gave no document with text; check the data settings")
    display.finish(index.num_bytes)
    return index


def _copies(cfg: DataConfig, index: DocumentIndex, display: Display) -> Copies:
    """Which documents are copies of earlier ones: `train.dedup.find_duplicates`, on disk."""
    work = index.folder
    tasks = [("digest", 0), *(("hash", number) for number in range(len(index.parts)))]
    _tasks(cfg.processes, work, "hashing", tasks, 2 * index.num_bytes, display)  # the digest reads all of it once more
    keep = np.ones(len(index), dtype=bool)
    if not cfg.dedup.enabled:
        return Copies(keep, 0, 0)
    exact = exact_copies(index)
    documents, groups = similar_groups(index, cfg.dedup.num_bands, exact)
    order, bounds = batches(groups)
    write_array(work / "near.groups.npy", groups[order])
    write_array(work / "near.bounds.npy", bounds)
    documents = documents[order]
    write_locations(work / "near.locations", lambda a, b: index.locations(documents[a:b]), len(documents))
    compare = [("compare", number) for number in range(len(bounds) - 1)]
    total = int(index.sizes(documents).sum())
    _tasks(cfg.processes, work, "removing duplicates", compare, total, display)
    found = [np.load(work / f"near-{number:05d}.npy", allow_pickle=False) for _, number in compare]
    near = np.concatenate([np.zeros(0, dtype=bool), *found])
    keep[exact] = False
    keep[documents[near]] = False
    return Copies(keep, int(exact.sum()), int(near.sum()))


def _split(cfg: DataConfig, index: DocumentIndex, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Documents of each split: training shuffled once, validation in the order of the source."""
    parts = [np.load(index.folder / f"{part.name}.held_out.npy", allow_pickle=False) for part in index.parts]
    held_out = np.concatenate(parts)
    train, val = np.flatnonzero(keep & ~held_out), np.flatnonzero(keep & held_out)
    for name, documents in (("training", train), ("validation", val)):
        if len(documents) == 0:
            raise DataError(
                f"no documents left for {name}: {len(index)} read, {int(keep.sum())} without duplicates, {len(train)} "
                f"to train, {len(val)} to validate; give more documents (data.max_documents, data.document_separator) "
                "or another split (data.val_packages, data.val_fraction, data.val_files)"
            )
    return {"train": np.random.default_rng(cfg.shuffle_seed).permutation(train), "val": val}


def _tokenizer(cfg: DataConfig, index: DocumentIndex, train: np.ndarray, display: Display) -> Tokenizer:
    path = index.folder / TOKENIZER
    if not path.is_file():
        tokenizer = (
            fetch_tokenizer(cfg.tokenizer)
            if cfg.tokenizer is not None
            else _train_tokenizer(cfg, index, train, display)
        )
        temporary = path.with_suffix(".tmp")
        tokenizer.save(str(temporary), pretty=False)
        sync(temporary)
        os.replace(temporary, path)
    return load_tokenizer(path)


def _train_tokenizer(cfg: DataConfig, index: DocumentIndex, train: np.ndarray, display: Display) -> Tokenizer:
    sizes = np.cumsum(index.sizes(train[: BPE_SAMPLE_BYTES + 1]))  # no document is empty
    sample = train[: int(np.searchsorted(sizes, BPE_SAMPLE_BYTES)) + 1]
    advance = display.stage("training the tokenizer", int(sizes[len(sample) - 1]))

    def texts() -> Iterator[str]:
        with index.reader() as reader:
            for part, _, offset, size in index.locations(sample).tolist():
                yield reader.read(part, offset, size).decode()
                advance(size)

    return train_bpe(texts(), cfg.vocab_size)


def _check_vocabulary(cfg: DataConfig, tokenizer: Tokenizer) -> int:
    vocab_size = vocabulary_size(tokenizer)
    if vocab_size > cfg.vocab_size:
        raise DataError(f"data.vocab_size={cfg.vocab_size} must be at least the {vocab_size} ids of the tokenizer")
    if vocab_size < cfg.vocab_size:
        print(
            f"note: the tokenizer has {vocab_size:,} ids, data.vocab_size={cfg.vocab_size} leaves "
            f"{cfg.vocab_size - vocab_size:,} rows of the embedding unused; data.vocab_size={vocab_size} would fit",
            file=sys.stderr,
        )
    return vocab_size


def _tokenise(
    cfg: DataConfig, index: DocumentIndex, split: str, order: np.ndarray, display: Display
) -> tuple[int, int]:
    """Tokenise a split in pieces; its bytes of UTF-8 and the number of pieces."""
    work = index.folder
    ends = np.cumsum(index.sizes(order))
    total = int(ends[-1])
    # A piece ends with the document that fills it.
    full = np.flatnonzero(np.diff((ends - 1) // PIECE_BYTES, append=-1) != 0) + 1
    del ends
    write_array(work / f"{split}.bounds.npy", np.concatenate([[0], full]))
    write_locations(work / f"{split}.locations", lambda a, b: index.locations(order[a:b]), len(order))
    tasks = [(f"encode_{split}", number) for number in range(len(full))]
    _tasks(cfg.processes, work, f"tokenising {split}", tasks, total, display)
    return total, len(full)


def _join(work: Path, split: str, count: int, dtype: np.dtype, writer: ShardWriter) -> None:
    """Write the pieces of a split into its shards, one after another."""
    for number in range(count):
        lengths = np.load(work / f"{split}-{number:05d}.lengths.npy", allow_pickle=False)
        writer.add_documents(np.fromfile(work / f"{split}-{number:05d}.ids", dtype=dtype), lengths)


def _provenance(cfg: DataConfig, index: DocumentIndex, found: Copies) -> dict[str, Any]:
    versions = {"python": sys.version.split()[0], "tokenizers": version("tokenizers")}
    if cfg.source == DataSource.python:
        versions |= python_identity()
    return {
        "settings": cfg.content_settings(),
        "versions": versions,
        "documents_read": len(index),
        "bytes_read": index.num_bytes,
        "exact_duplicates": found.num_exact,
        "near_duplicates": found.num_near,
    }
