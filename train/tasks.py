"""The tasks of a preparation (`train.workers`): read a unit, hash a part, compare a batch, tokenise a piece.

Each is a function of what lies in the folder and of its number, so its files are the same whoever does it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from train.copies import Batch, hash_documents, near_copies
from train.corpus import Document, python_documents
from train.data_config import DataConfig, DataSource
from train.dedup import DedupConfig
from train.document_store import LOCATION, PartReader, PartRecord, write_parts
from train.external import Unit, external_units, unit_documents
from train.files import read_json, write_array, write_json, write_through
from train.shards import TOKENIZER, DataError, token_dtype
from train.tokenizer import load_tokenizer
from train.workers import Advance, record

ENCODE_BYTES = 2**19  # of text encoded at once: the library keeps 126 bytes for each (measured), 66 MB
SETTINGS = "settings.json"
PARTS = "parts.json"


def begin(folder: Path, cfg: DataConfig, part_bytes: int, sizes: list[int]) -> None:
    """Leave the settings for the tasks; what was finished under others, by an earlier version, is removed.

    Args:
        folder: of the preparation.
        cfg: what is prepared.
        part_bytes: of text after which a part ends.
        sizes: what else decides how the work is cut into tasks.
    """
    settings = {"data": cfg.content_settings(), "part_bytes": part_bytes, "sizes": sizes}
    if read_json(folder / SETTINGS) != json.loads(json.dumps(settings)):
        shutil.rmtree(folder)
        folder.mkdir()
        write_json(folder / SETTINGS, settings)


def _settings(folder: Path) -> tuple[DataConfig, int]:
    found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    plain: dict[str, Any] = found["data"]
    plain |= {"source": DataSource(plain["source"]), "dedup": DedupConfig(**plain["dedup"])}
    return DataConfig(**plain), int(found["part_bytes"])


def read_units(cfg: DataConfig) -> list[Unit]:
    """What is read by itself; the embedded corpus is one unit, sorted over all its files."""
    return [Unit(None)] if cfg.source == DataSource.python else external_units(cfg)


def _unit_documents(cfg: DataConfig, number: int) -> Iterator[Document]:
    if cfg.source == DataSource.python:
        return python_documents(cfg.val_packages, cfg.max_documents)
    return unit_documents(cfg, external_units(cfg)[number])


def read(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """Read a unit into parts."""
    cfg, part_bytes = _settings(folder)
    parts = []
    for part in write_parts(folder, f"unit{number:05d}", _unit_documents(cfg, number), part_bytes):
        parts.append(asdict(part))
        advance(part.num_bytes)
    return {"parts": parts, "bytes": sum(part["num_bytes"] for part in parts)}


def collect_parts(folder: Path, num_units: int) -> list[PartRecord]:
    """The parts of all units in their order, also left for the tasks that follow."""
    records = [record(folder, "read", number) for number in range(num_units)]
    plain = [part for found in records if found is not None for part in found["parts"]]
    write_json(folder / PARTS, {"parts": plain})
    return [PartRecord(**part) for part in plain]


def read_parts(folder: Path) -> list[PartRecord]:
    """The parts of all units in their order."""
    return [PartRecord(**part) for part in json.loads((folder / PARTS).read_text(encoding="utf-8"))["parts"]]


def _part_texts(folder: Path, part: PartRecord) -> Iterator[bytes]:
    offsets = np.load(folder / f"{part.name}.offsets.npy", allow_pickle=False)
    with PartReader(folder, [part.name]) as reader:
        text = reader.read(0, 0, part.num_bytes)
    yield from (text[start:stop] for start, stop in pairwise(offsets.tolist()))


def digest(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """SHA-256 of all documents in order, each with what its source says of the split: one sum, so one task."""
    content = hashlib.sha256()
    total = 0
    for part in read_parts(folder):
        decided = np.load(folder / f"{part.name}.decided.npy", allow_pickle=False)
        for text, held_out in zip(_part_texts(folder, part), decided.tolist(), strict=True):
            content.update(f"{len(text)} {None if held_out < 0 else bool(held_out)}\n".encode())
            content.update(text)
        total += part.num_bytes
        advance(part.num_bytes)
    return {"content_sha256": content.hexdigest(), "bytes": total}


def hash_part(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """What the search for copies and the split need to know of a part's documents."""
    (cfg, _), part = _settings(folder), read_parts(folder)[number]
    texts = list(_part_texts(folder, part))
    if cfg.dedup.enabled:
        hash_documents(folder, part.name, texts, cfg.dedup)
    decided = np.load(folder / f"{part.name}.decided.npy", allow_pickle=False)
    # The first 64 bits of SHA-256 as a fraction of 2**64: a document keeps its side when others come or go.
    hashes = (int.from_bytes(hashlib.sha256(text).digest()[:8], "big") for text in texts)
    drawn = np.array([number < cfg.val_fraction * 2**64 for number in hashes])
    write_array(folder / f"{part.name}.held_out.npy", np.where(decided < 0, drawn, decided == 1))
    advance(part.num_bytes)
    return {"bytes": part.num_bytes}


def near(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """Find the near copies of a batch of documents that may be alike."""
    cfg = _settings(folder)[0].dedup
    first, last = np.load(folder / "near.bounds.npy", allow_pickle=False)[number : number + 2].tolist()
    groups = np.load(folder / "near.groups.npy", mmap_mode="r", allow_pickle=False)[first:last]
    batch = Batch(_locations(folder / "near.locations", first, last), np.array(groups))
    names = [part.name for part in read_parts(folder)]
    copies = np.zeros(last - first, dtype=bool)
    with PartReader(folder, names) as texts, PartReader(folder, names, "signatures") as signatures:
        for row, copy in near_copies(batch, texts, signatures, cfg):
            copies[row] = copy
            advance(int(batch.locations[row]["size"]))
    write_array(folder / f"near-{number:05d}.npy", copies)
    return {"bytes": int(batch.locations["size"].sum())}


def write_locations(path: Path, locations: Callable[[int, int], np.ndarray], count: int) -> None:
    """Write (count,) LOCATION, `locations(first, last)` at a time."""
    step = 2**16
    write_through(path, (locations(first, min(first + step, count)).tobytes() for first in range(0, count, step)))


def _locations(path: Path, first: int, last: int) -> np.ndarray:
    return np.fromfile(path, dtype=LOCATION, count=last - first, offset=first * LOCATION.itemsize)


def _encode(folder: Path, split: str, number: int, advance: Advance) -> dict[str, Any]:
    """Tokenise one piece of a split: ids with the end of each document behind it, and the documents' lengths."""
    first, last = np.load(folder / f"{split}.bounds.npy", allow_pickle=False)[number : number + 2].tolist()
    places = _locations(folder / f"{split}.locations", first, last)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    meta = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    dtype, eos_id = token_dtype(meta["vocab_size"]), meta["eos_id"]
    pieces: list[np.ndarray] = []
    batch: list[str] = []
    pending = 0
    with PartReader(folder, [part.name for part in read_parts(folder)]) as reader:
        for position, (part, _, offset, size) in enumerate(places.tolist()):
            batch.append(reader.read(part, offset, size).decode())
            pending += size
            if pending >= ENCODE_BYTES or position == len(places) - 1:
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array([*encoding.ids, eos_id], dtype=dtype)
                    if (ids[:-1] == eos_id).any():
                        raise DataError(
                            f"the tokenizer gives the end-of-document id {eos_id} inside a document of split {split}; "
                            "name another token with data.eos_token"
                        )
                    pieces.append(ids)
                advance(pending)
                batch, pending = [], 0
    write_through(folder / f"{split}-{number:05d}.ids", [np.concatenate(pieces).data])
    write_array(folder / f"{split}-{number:05d}.lengths.npy", np.array([len(ids) for ids in pieces], dtype=np.int64))
    return {"bytes": int(places["size"].sum())}


def encode_train(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """Tokenise a piece of the training split."""
    return _encode(folder, "train", number, advance)


def encode_val(folder: Path, number: int, advance: Advance) -> dict[str, Any]:
    """Tokenise a piece of the validation split."""
    return _encode(folder, "val", number, advance)


TASKS: dict[str, Callable[[Path, int, Advance], dict[str, Any]]] = {
    "read": read,
    "digest": digest,
    "hash": hash_part,
    "compare": near,
    "encode_train": encode_train,
    "encode_val": encode_val,
}
