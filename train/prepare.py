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
from dataclasses import replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.corpus import python_identity
from train.data_config import DataConfig, DataSource
from train.external import local_files
from train.files import write_json
from train.mixture import MixedData, mix
from train.progress_lines import Display
from train.shards import MANIFEST, DataError, NotPreparedError, PreparedData, open_folder
from train.stages import FORMAT, build
from train.tokenizer import load_tokenizer

__all__ = ["PreparedData", "open_prepared", "prepare"]

WHOLE = "whole"  # folder inside the working folder where the result is put together


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
            shared = replace(cfg, tokenizer=str(first.tokenizer_path.resolve()), eos_token=eos_token)
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
    settings: dict[str, Any] = {**cfg.content_settings(), "format": FORMAT, "tokenizers": version("tokenizers")}
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
    """Prepare in a working folder, rename the result to its fingerprint, and enter it in the index.

    What a killed preparation had finished in the working folder is taken over: the key says that it is of the same
    request, and every file there is whole.
    """
    work = root / f".preparing-{key}"
    with _removed_on_error(work), Display() as display:
        fingerprint = build(cfg, work, work / WHOLE, display)
        label = cfg.source.value if cfg.path is None else Path(cfg.path).name
        folder = root / f"{label}-{fingerprint[:12]}"
        if not folder.is_dir():  # else the same content was reached by other settings or touched files
            os.rename(work / WHOLE, folder)
        write_json(root / "index" / f"{key}.json", {"folder": folder.name, "fingerprint": fingerprint})
    shutil.rmtree(work)
    return folder


@contextmanager
def _removed_on_error(work: Path) -> Iterator[None]:
    """A working folder that disappears if the data or the disk end the block; a full disk becomes a message.

    It stays where the process is stopped or a worker is killed: the same command goes on from there.
    """
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except (DataError, OSError) as error:
        written = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(work.parent).free
            raise DataError(
                f"no space left in {work.parent.resolve()} while preparing data: {written:,} bytes were written and "
                f"removed again, at least {2 * written:,} bytes must be free, {free:,} are; free some, or set "
                "data.root to a folder on another disk"
            ) from error
        raise
