"""The whole preparation, once, under a lock: documents -> duplicates removed -> tokenizer -> token shards.

`<root>/index/<key>.json` says which folder holds the data of a request, that is of the settings and of everything
outside them that decides the result and is cheap to know: package versions, sizes and times of local files. So a
second call reads no text. The folder itself is named by its fingerprint, which covers the content.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from train.corpus import Document, python_documents, python_identity
from train.data_config import DataConfig, DataSource
from train.dedup import DedupResult, find_duplicates
from train.document_store import DocumentStore
from train.external import external_documents, local_files
from train.files import write_json
from train.mixture import MixedData, mix
from train.shards import (
    COMPRESSION_TABLE,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    DataError,
    NotPreparedError,
    PreparedData,
    ShardWriter,
    open_folder,
    save_array,
    shard_records,
    token_dtype,
    write_manifest,
)
from train.tokenizer import (
    compression_table,
    end_of_document,
    fetch_tokenizer,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
)

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from tokenizers import Tokenizer

__all__ = ["PreparedData", "open_prepared", "prepare"]

BPE_SAMPLE_BYTES = 32 * 2**20  # of training text that the BPE is trained on; more changes 4,096 merges hardly at all
_ENCODE_BYTES = 4 * 2**20  # of text encoded at once
_FORMAT = 1  # raise it when the same settings would give other data


def prepare(cfg: DataConfig) -> PreparedData:
    """Prepare the data of `cfg` unless it already lies under `cfg.root`, and open it; of a mixture, every source.

    Processes that ask for the same data at once prepare it once. Nothing half-written remains after an error.

    Raises:
        DataError: Bad input, full disk, altered files, or a fingerprint that is not `cfg.fingerprint`.
    """
    if cfg.mixture:
        return _mixed(cfg, prepare)
    key = _request_key(cfg)
    root = Path(cfg.root)
    folder = _indexed_folder(root, key)
    if folder is None:
        index = root / "index"
        try:
            index.mkdir(parents=True, exist_ok=True)
            (index / f"{key}.lock").touch()
        except OSError as error:
            raise DataError(
                f"data.root={cfg.root} cannot be written ({error.strerror}); set data.root to a folder that you own"
            ) from error
        with _locked(index / f"{key}.lock"):
            folder = _indexed_folder(root, key)
            if folder is None:
                folder = _build(cfg, root, key)
    return _open_checked(folder, cfg)


def open_prepared(cfg: DataConfig) -> PreparedData:
    """Open the prepared data of `cfg` without preparing.

    Raises:
        NotPreparedError: Not prepared yet.
        DataError: Altered, or of another fingerprint than `cfg.fingerprint`.
    """
    if cfg.mixture:
        return _mixed(cfg, open_prepared)
    folder = _indexed_folder(Path(cfg.root), _request_key(cfg))
    if folder is None:
        raise NotPreparedError(
            f"data.root={cfg.root} holds no data prepared with these settings; run make prepare with them"
        )
    return _open_checked(folder, cfg)


def _mixed(cfg: DataConfig, get: Callable[[DataConfig], PreparedData]) -> MixedData:
    """Every source of a mixture, each by `get`, put together."""
    sources: list[PreparedData] = []
    shared = cfg
    for source in cfg.mixture:
        if source.prepared is not None:
            sources.append(_named_folder(Path(cfg.root), source.prepared))
        else:
            sources.append(get(shared.of_source(source)))
        if cfg.tokenizer is None and len(sources) == 1:  # the others are written in the first one's tokens
            first = sources[0]
            eos_token = load_tokenizer(first.tokenizer_path).id_to_token(first.eos_id)
            shared = replace(cfg, tokenizer=str(first.tokenizer_path), eos_token=eos_token)
    mixed = mix(Path(cfg.root), [s.title for s in cfg.mixture], [s.weight for s in cfg.mixture], sources)
    _check_fingerprint(mixed, cfg)
    return mixed


def _named_folder(root: Path, name: str) -> PreparedData:
    """A folder that lies prepared, by its name."""
    if not (root / name).is_dir():
        known = sorted(path.parent.name for path in root.glob(f"*/{MANIFEST}"))
        near = get_close_matches(name, known, n=1)
        raise DataError(
            f"data.mixture: prepared={name} is no prepared folder in data.root={root}"
            f"{f'; did you mean {near[0]}?' if near else ''} (there are: {', '.join(known) or 'none'})"
        )
    return open_folder(root / name)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; say so when another process has it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting: another process prepares the same data ({path})", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _open_checked(folder: Path, cfg: DataConfig) -> PreparedData:
    prepared = open_folder(folder)
    _check_fingerprint(prepared, cfg)
    return prepared


def _check_fingerprint(prepared: PreparedData, cfg: DataConfig) -> None:
    if cfg.fingerprint and cfg.fingerprint != prepared.fingerprint:
        raise DataError(
            f"data.fingerprint={cfg.fingerprint} is not that of {prepared.path} ({prepared.fingerprint}): text, "
            "packages or settings changed since the run was planned; restore them, or plan anew (with "
            "data.fingerprint empty)"
        )


def _request_key(cfg: DataConfig) -> str:
    """Hex key of the settings and of what outside them decides the result, without reading any text."""
    settings: dict[str, Any] = {**cfg.content_settings(), "format": _FORMAT, "tokenizers": version("tokenizers")}
    if cfg.source == DataSource.python:
        settings["versions"] = python_identity()
    else:
        files = [file for name in ("data_files", "val_files") for file in local_files(getattr(cfg, name), name)]
        if cfg.path is not None and Path(cfg.path).is_dir():
            files += sorted(file for file in Path(cfg.path).rglob("*") if file.is_file())
        settings["files"] = [_file_state(file) for file in files]
        settings["datasets"] = version("datasets")
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else None
    if tokenizer is not None and tokenizer.exists():
        files = sorted(tokenizer.glob("*.json")) if tokenizer.is_dir() else [tokenizer]
        settings["tokenizer_files"] = [_file_state(file) for file in files]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _file_state(file: Path) -> list[Any]:
    status = file.stat()
    return [str(file.resolve()), status.st_size, status.st_mtime_ns]


def _indexed_folder(root: Path, key: str) -> Path | None:
    """Folder of a request, or None where it was never prepared or was deleted since."""
    try:
        entry = json.loads((root / "index" / f"{key}.json").read_text(encoding="utf-8"))
        folder = root / str(entry["folder"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # not prepared, or the entry is damaged
        return None
    return folder if folder.is_dir() else None


def _build(cfg: DataConfig, root: Path, key: str) -> Path:
    """Prepare into a temporary folder, rename it to its fingerprint, and enter it in the index."""
    temporary = root / f".preparing-{key}"
    with _removed_on_error(temporary), _progress() as progress:
        fingerprint = _write(cfg, temporary, progress)
        label = cfg.source.value if cfg.path is None else Path(cfg.path).name
        folder = root / f"{label}-{fingerprint[:12]}"
        if folder.is_dir():  # the same content was reached by other settings or touched files
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, folder)
        write_json(root / "index" / f"{key}.json", {"folder": folder.name, "fingerprint": fingerprint})
    return folder


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """A fresh folder that disappears if the block fails; a full disk becomes a message."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed; the lock is ours now
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException as error:
        written = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder.parent).free
            raise DataError(
                f"no space left in {folder.parent.resolve()} while preparing data: {written:,} bytes were written and "
                f"removed again, at least {2 * written:,} bytes must be free, {free:,} are; free some, or set "
                "data.root to a folder on another disk"
            ) from error
        raise


def _write(cfg: DataConfig, folder: Path, progress: Progress) -> str:
    """Write all files of the prepared folder and return the fingerprint."""
    with DocumentStore(folder / "documents.tmp") as store:
        task = _stage(progress, "reading documents", None)
        for document in _documents(cfg):
            store.append(document)
            progress.advance(task, len(document.text))
        if len(store) == 0:
            raise DataError(f"data.source={cfg.source.value} gave no document with text; check the data settings")
        progress.update(task, total=store.num_bytes)
        task = _stage(progress, "removing duplicates", store.num_bytes)
        duplicates = find_duplicates(store, cfg.dedup, lambda n: progress.advance(task, n))
        splits = _split(cfg, store, duplicates.keep)
        tokenizer = _tokenizer(cfg, store, splits["train"], progress)
        eos_id = end_of_document(tokenizer, cfg.tokenizer, cfg.eos_token)
        vocab_size = vocabulary_size(tokenizer)
        if vocab_size > cfg.vocab_size:
            raise DataError(f"data.vocab_size={cfg.vocab_size} must be at least the {vocab_size} ids of the tokenizer")
        if vocab_size < cfg.vocab_size:
            print(
                f"note: the tokenizer has {vocab_size:,} ids, data.vocab_size={cfg.vocab_size} leaves "
                f"{cfg.vocab_size - vocab_size:,} rows of the embedding unused; data.vocab_size={vocab_size} would fit",
                file=sys.stderr,
            )
        tokenizer.save(str(folder / TOKENIZER), pretty=False)
        save_array(folder / COMPRESSION_TABLE, compression_table(tokenizer))
        records: dict[str, Any] = {}
        for split in SPLITS:
            with ShardWriter(folder, split, token_dtype(vocab_size), eos_id) as writer:
                text_bytes = _encode(store, splits[split], tokenizer, writer, progress, split)
            records[split] = {"shards": shard_records(writer.shards), "text_bytes": text_bytes}
    identity = {
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "pad_id": eos_id,
        "dtype": token_dtype(vocab_size).str,
        "splits": records,
        "settings": {"format": _FORMAT, "dedup": asdict(cfg.dedup), "vocab_size": cfg.vocab_size},
        "content_sha256": store.content_sha256,
    }
    return write_manifest(folder, identity, _provenance(cfg, store, duplicates))


def _documents(cfg: DataConfig) -> Iterator[Document]:
    if cfg.source == DataSource.python:
        return python_documents(cfg.val_packages, cfg.max_documents)
    return external_documents(cfg)


def _split(cfg: DataConfig, store: DocumentStore, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Documents of each split: training shuffled once, validation in the order of the source."""
    held_out = np.array([store.held_out(i, cfg.val_fraction) for i in range(len(store))])
    train, val = np.flatnonzero(keep & ~held_out), np.flatnonzero(keep & held_out)
    for name, documents in (("training", train), ("validation", val)):
        if len(documents) == 0:
            raise DataError(
                f"no documents left for {name}: {len(store)} read, {int(keep.sum())} without duplicates, {len(train)} "
                f"to train, {len(val)} to validate; give more documents (data.max_documents, data.document_separator) "
                "or another split (data.val_packages, data.val_fraction, data.val_files)"
            )
    return {"train": np.random.default_rng(cfg.shuffle_seed).permutation(train), "val": val}


def _tokenizer(cfg: DataConfig, store: DocumentStore, train: np.ndarray, progress: Progress) -> Tokenizer:
    if cfg.tokenizer is not None:
        return fetch_tokenizer(cfg.tokenizer)
    sizes = np.cumsum([store.size(int(i)) for i in train])
    sample = train[: int(np.searchsorted(sizes, BPE_SAMPLE_BYTES)) + 1]
    task = _stage(progress, "training the tokenizer", int(sizes[len(sample) - 1]))

    def texts() -> Iterator[str]:
        for i in sample:
            yield store[int(i)].decode()
            progress.advance(task, store.size(int(i)))

    return train_bpe(texts(), cfg.vocab_size)


def _encode(
    store: DocumentStore, order: np.ndarray, tokenizer: Tokenizer, writer: ShardWriter, progress: Progress, split: str
) -> int:
    """Write the documents of a split and return their bytes of UTF-8."""
    total = sum(store.size(int(i)) for i in order)
    task = _stage(progress, f"tokenising {split}", total)
    batch: list[str] = []
    pending = 0
    for position, i in enumerate(order):
        batch.append(store[int(i)].decode())
        pending += store.size(int(i))
        if pending >= _ENCODE_BYTES or position == len(order) - 1:
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                writer.add(encoding.ids)
            progress.advance(task, pending)
            batch, pending = [], 0
    return total


def _provenance(cfg: DataConfig, store: DocumentStore, duplicates: DedupResult) -> dict[str, Any]:
    versions = {"python": sys.version.split()[0], "tokenizers": version("tokenizers")}
    if cfg.source == DataSource.python:
        versions |= python_identity()
    return {
        "settings": cfg.content_settings(),
        "versions": versions,
        "documents_read": len(store),
        "bytes_read": store.num_bytes,
        "exact_duplicates": duplicates.num_exact,
        "near_duplicates": duplicates.num_near,
    }


def _stage(progress: Progress, description: str, total: int | None) -> TaskID:
    """A new bar over `total` bytes; a plain line where there is no terminal."""
    if progress.disable:
        print(f"preparing data: {description}", file=sys.stderr)
    return progress.add_task(description, total=total)


@contextmanager
def _progress() -> Iterator[Progress]:
    """Progress bars with the time left, on a terminal; a pipe gets a line per stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        yield progress
