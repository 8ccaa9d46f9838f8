"""Memory-mapped token shards: write, verify, open.

A prepared folder holds, per split, streams of token ids (`train-00000.bin`, little-endian uint16 or uint32, each
document followed by the end-of-document id) with the documents' offsets beside them, the tokenizer, the compression
table, and `manifest.json`, written last, with the SHA-256 of every other file. The fingerprint is the SHA-256 of the
manifest without its provenance, so it covers every byte that training reads and every setting that led to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from train.files import sha256, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
COMPRESSION_TABLE = "compression_table.npy"
SPLITS = ("train", "val")
SHARD_TOKENS = 2**28  # tokens after which a new shard begins: files of at most about 1 GiB
STAMP = "verified.json"  # sizes and times under which the checksums were last found right


class DataError(ValueError):
    """Something about the data that its user can mend; the message names what, the rule and the remedy."""


class NotPreparedError(DataError):
    """Nothing has been prepared with these settings yet; `prepare` would do it."""


@dataclass(frozen=True)
class Shard:
    """One token file of a split."""

    tokens: str  # file name of the ids
    offsets: str  # file name of (documents + 1,) int64 offsets into it, in tokens
    num_tokens: int
    num_documents: int


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest little-endian unsigned type of 16 or 32 bits that holds ids 0 ... vocab_size - 1."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


class ShardWriter:
    """Append documents to the shards of one split; use as a context manager, so that files are closed on an error."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, eos_id: int, shard_tokens: int = SHARD_TOKENS):
        self._folder, self._split, self._dtype, self._eos_id = folder, split, dtype, eos_id
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._offsets = [np.zeros(1, dtype=np.int64)]
        self._num_tokens = 0  # of the shard that is being written
        self.shards: list[Shard] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._finish_shard()
        elif self._file is not None:
            self._file.close()

    def add(self, ids: list[int] | np.ndarray) -> None:
        """Append one document, without its end-of-document id, which is added here."""
        document = np.array([*ids, self._eos_id], dtype=self._dtype)
        if (document[:-1] == self._eos_id).any():
            raise DataError(
                f"the tokenizer gives the end-of-document id {self._eos_id} inside a document of split {self._split}; "
                "name another token with data.eos_token"
            )
        self.add_documents(document, np.array([len(document)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents, one after another in `tokens`, each with the end-of-document id as its last."""
        ends = np.cumsum(lengths)
        first, start = 0, 0  # document and token from which on nothing is written yet
        while first < len(lengths):
            last = int(np.searchsorted(ends, start + self._shard_tokens - self._num_tokens, side="right"))
            if last == first and self._file is not None:
                self._finish_shard()
                continue
            last = max(last, first + 1)  # a document longer than a shard has one of its own
            stop = int(ends[last - 1])
            if self._file is None:
                self._file = open(self._folder / f"{self._name()}.bin", "wb")  # noqa: SIM115 - _finish_shard closes it
            self._file.write(np.ascontiguousarray(tokens[start:stop], dtype=self._dtype).data)
            self._offsets.append(ends[first:last] - start + self._num_tokens)
            self._num_tokens += stop - start
            first, start = last, stop

    def _name(self) -> str:
        return f"{self._split}-{len(self.shards):05d}"

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        name = self._name()
        offsets = np.concatenate(self._offsets).astype(np.int64)
        save_array(self._folder / f"{name}.offsets.npy", offsets)
        self.shards.append(Shard(f"{name}.bin", f"{name}.offsets.npy", self._num_tokens, len(offsets) - 1))
        self._file, self._offsets, self._num_tokens = None, [np.zeros(1, dtype=np.int64)], 0


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file through to the disk."""
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def write_manifest(folder: Path, content: dict[str, Any], provenance: dict[str, Any]) -> str:
    """Write manifest.json over every file of `folder`, and return the fingerprint.

    Args:
        folder: Holds all other files already.
        content: vocab_size, eos_id, pad_id, dtype, splits, settings: all that identifies the data beside the files.
        provenance: Where the text came from; described, not part of the identity.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, STAMP)
    }
    identity = {"schema_version": SCHEMA_VERSION, **content, "files": files}
    fingerprint = _fingerprint(identity)
    write_json(folder / MANIFEST, {**identity, "fingerprint": fingerprint, "provenance": provenance})
    return fingerprint


def _fingerprint(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class TokenStream:
    """The shards of one split as one long array of token ids, read from disk as needed."""

    def __init__(self, folder: Path, shards: list[Shard], dtype: np.dtype) -> None:
        self._parts = [np.memmap(folder / s.tokens, dtype=dtype, mode="r", shape=(s.num_tokens,)) for s in shards]
        self._starts = np.concatenate([[0], np.cumsum([s.num_tokens for s in shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """(length,) int64 ids from position `start`."""
        if not 0 <= start <= start + length <= len(self):
            raise IndexError(f"tokens {start} to {start + length} of a stream of {len(self)}")
        result = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            part = int(np.searchsorted(self._starts, start + done, side="right")) - 1
            offset = start + done - int(self._starts[part])
            piece = self._parts[part][offset : offset + length - done]
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result


@dataclass(frozen=True)
class PreparedData:
    """A prepared, verified data folder."""

    path: Path  # the folder
    fingerprint: str  # hex SHA-256 of content and settings: the identity of this data
    vocab_size: int  # number of ids of the tokenizer; the model's vocabulary must be at least this
    eos_id: int  # end of document
    pad_id: int  # fills history before a document; never in the stream as padding
    num_train_tokens: int  # EOS included
    num_val_tokens: int  # EOS included
    bytes_per_token_val: float  # UTF-8 bytes of the validation text / its predicted tokens
    compression_table: np.ndarray  # (V,) int64, raw id -> compressed id
    tokenizer_path: Path  # tokenizer.json; train.tokenizer.load_tokenizer reads it
    provenance: dict[str, Any]  # where the text came from
    shards: dict[str, list[Shard]]  # of splits train and val

    @cached_property
    def tokenizer_sha256(self) -> str:
        """SHA-256 (hex) of tokenizer.json: equal wherever the same tokenizer was prepared."""
        return sha256(self.tokenizer_path)

    @cached_property
    def compression_sha256(self) -> str:
        """SHA-256 (hex) of the compression table's file."""
        return sha256(self.path / COMPRESSION_TABLE)

    @cached_property
    def train(self) -> TokenStream:
        """The training stream."""
        return TokenStream(self.path, self.shards["train"], token_dtype(self.vocab_size))

    @cached_property
    def val(self) -> TokenStream:
        """The validation stream."""
        return TokenStream(self.path, self.shards["val"], token_dtype(self.vocab_size))


def open_folder(folder: Path) -> PreparedData:
    """Verify a prepared folder and open it.

    Sizes are compared at every opening, checksums whenever a file's size or time differs from those of the last
    successful comparison.

    Raises:
        DataError: Naming the file, the rule it breaks and the remedy.
    """
    manifest = _read_manifest(folder)
    _verify_files(folder, manifest["files"])
    splits = manifest["splits"]
    shards = {split: [Shard(**record) for record in splits[split]["shards"]] for split in SPLITS}
    num_tokens = {split: sum(shard.num_tokens for shard in shards[split]) for split in SPLITS}
    # A document's first token is never a target while its EOS is: as many targets as tokens of text.
    num_val_targets = num_tokens["val"] - sum(shard.num_documents for shard in shards["val"])
    return PreparedData(
        path=folder,
        fingerprint=manifest["fingerprint"],
        vocab_size=manifest["vocab_size"],
        eos_id=manifest["eos_id"],
        pad_id=manifest["pad_id"],
        num_train_tokens=num_tokens["train"],
        num_val_tokens=num_tokens["val"],
        bytes_per_token_val=splits["val"]["text_bytes"] / num_val_targets,
        compression_table=np.load(folder / COMPRESSION_TABLE, allow_pickle=False),
        tokenizer_path=folder / TOKENIZER,
        provenance=manifest["provenance"],
        shards=shards,
    )


def prepared_folders(root: Path) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """Folder, fingerprint and {file name: SHA-256} of what lies prepared below `root`, unless damaged."""
    for path in sorted(root.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(DataError):
            manifest = _read_manifest(path.parent)
            sums = {name: record["sha256"] for name, record in manifest["files"].items()}
            yield path.parent, manifest["fingerprint"], sums


def _remedy(folder: Path) -> str:
    return f"delete the folder {folder} and prepare again (make prepare)"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{path} is missing, and a prepared folder is complete only with it; {_remedy(folder)}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity = {key: value for key, value in manifest.items() if key not in ("fingerprint", "provenance")}
        fingerprint, version = manifest["fingerprint"], manifest["schema_version"]
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not a manifest of prepared data ({error}); {_remedy(folder)}") from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path} has schema_version {version}, this code reads {SCHEMA_VERSION}; {_remedy(folder)}")
    if fingerprint != _fingerprint(identity):
        raise DataError(f"{path} was altered: its content does not have its fingerprint; {_remedy(folder)}")
    return manifest


def _verify_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    found: dict[str, list[int]] = {}
    for name, record in files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing, and {MANIFEST} lists it; {_remedy(folder)}")
        status = path.stat()
        if status.st_size != record["bytes"]:
            raise DataError(
                f"{path} has {status.st_size} bytes, {MANIFEST} says {record['bytes']}: it was truncated or altered; "
                f"{_remedy(folder)}"
            )
        found[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    stamp = folder / STAMP
    try:
        if json.loads(stamp.read_text(encoding="utf-8")) == found:
            return
    except (OSError, ValueError):
        pass  # no stamp yet, or half a stamp: compare the checksums
    for name, record in files.items():
        if sha256(folder / name) != record["sha256"]:
            raise DataError(f"{folder / name} was altered: its SHA-256 is not that of {MANIFEST}; {_remedy(folder)}")
    with contextlib.suppress(OSError):  # a read-only folder is compared again next time
        write_json(stamp, found)


def shard_records(shards: list[Shard]) -> list[dict[str, Any]]:
    """The shards of a split as the manifest lists them."""
    return [asdict(shard) for shard in shards]
