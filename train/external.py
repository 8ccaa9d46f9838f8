"""Documents of the source `datasets`: a Hugging Face dataset, or local text, jsonl and parquet files.

Everything is streamed in its own order: rows as they come, files sorted by path.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.corpus import Document
from train.shards import DataError

if TYPE_CHECKING:
    from train.data_config import TextConfig

_BUILDERS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_READ_CHUNK = 2**22  # characters of a file that are cut into documents at once
_CHECK_CHUNK = 2**24  # bytes of a file that are decoded at once while it is checked


def local_files(patterns: list[str], setting: str) -> list[Path]:
    """Files that the names, folders and globs of a setting stand for, sorted, each once.

    Raises:
        DataError: A pattern stands for no file, or a file has an unknown ending.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [file for file in path.rglob("*") if file.suffix in _BUILDERS and file.is_file()]
        else:
            matches = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not matches:
            raise DataError(
                f"data.{setting}={pattern} is no file, no folder with {' '.join(_BUILDERS)} files and no glob that "
                f"matches any (working directory: {Path.cwd()}); correct the path"
            )
        found.update(matches)
    for file in sorted(found):
        if file.suffix not in _BUILDERS:
            raise DataError(f"data.{setting}: {file} must end in one of {' '.join(_BUILDERS)}; rename or convert it")
        if file.stat().st_size == 0:
            raise DataError(f"data.{setting}: {file} is empty; remove it from the setting")
    return sorted(found)


@dataclass(frozen=True)
class Unit:
    """What is read by itself, in order: local files, or a split of a dataset."""

    held_out: bool | None  # validation (true) or training (false); None: decided by the hash of the text
    files: tuple[Path, ...] = ()
    split: str | None = None


def external_units(cfg: TextConfig) -> list[Unit]:
    """The parts of a source that can be read independently: a local file each, unless a number of documents is set.

    Raises:
        DataError: no files, or neither a dataset nor files are given.
    """
    apart = bool(cfg.val_files) or cfg.val_split is not None
    training = False if apart else None
    if cfg.data_files:
        units = _file_units(cfg, local_files(cfg.data_files, "data_files"), training)
    elif cfg.path is not None:
        units = [Unit(training, split=cfg.split)]
    else:
        raise DataError("data.source=datasets needs data.path=<hub dataset> or data.data_files=[<files>]; give one")
    if cfg.val_files:
        units += _file_units(cfg, local_files(cfg.val_files, "val_files"), True)
    elif cfg.val_split is not None:
        units.append(Unit(True, split=cfg.val_split))
    return units


def _file_units(cfg: TextConfig, files: list[Path], held_out: bool | None) -> list[Unit]:
    if cfg.max_documents is not None:
        return [Unit(held_out, tuple(files))]
    return [Unit(held_out, (file,)) for file in files]


def unit_documents(cfg: TextConfig, unit: Unit) -> Iterator[Document]:
    """Documents of a unit.

    A .txt or .md file is one document unless `document_separator` cuts it; a row of jsonl or parquet is one document.
    Documents of white space alone are left out.

    Raises:
        DataError: Missing file or field, no text in a row, bytes that are no UTF-8, no network.
    """
    texts = _read_hub(cfg, unit.split) if unit.split is not None else _read_files(cfg, unit.files)
    count = 0
    for name, text in texts:
        if count == cfg.max_documents:
            break
        if text.strip():
            count += 1
            try:
                yield Document(name, text.encode("utf-8"), unit.held_out)
            except UnicodeEncodeError as error:
                raise DataError(f"{name} is no UTF-8 text: {error.reason} at character {error.start}") from error


def _read_files(cfg: TextConfig, files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        builder = _BUILDERS[file.suffix]
        if builder != "parquet":
            check_utf8(file)
        if builder == "text" and cfg.document_separator is not None:
            separator = cfg.document_separator.replace("\\n", "\n")  # a command line can hardly hold a line break
            yield from ((f"{file}.{i}", part) for i, part in enumerate(_cut(file, separator)))
            continue
        options: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        rows = _load(builder, f"file {file}", data_files=[str(file)], split="train", **options)
        field = "text" if builder == "text" else cfg.text_field
        yield from _texts(rows, field, str(file))


def _cut(file: Path, separator: str) -> Iterator[str]:
    """The texts between separators, read piece by piece: only the longest one has to fit into memory."""
    rest = ""
    with open(file, encoding="utf-8") as handle:
        while piece := handle.read(_READ_CHUNK):
            *whole, rest = (rest + piece).split(separator)
            yield from whole
    yield rest


def _read_hub(cfg: TextConfig, split: str) -> Iterator[tuple[str, str]]:
    what = f"dataset {cfg.path}, split {split}"
    rows = _load(cfg.path, what, name=cfg.name, revision=cfg.revision, split=split)
    yield from _texts(rows, cfg.text_field, what)


def _load(path: str | None, what: str, **options: Any) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(path, streaming=True, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{what} could not be opened; check its name, data.name, data.split and data.revision, and whether there "
            f"is a network (local files need none: data.data_files). Cause: {type(error).__name__}: {error}"
        ) from error
    return rows


def _texts(rows: Iterable[dict[str, Any]], field: str, what: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each row."""
    iterator = iter(rows)
    number = -1
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # whatever a reader of some format or the network raises
            cause = error.__cause__ or error
            place = f"after row {number}" if number >= 0 else "at its first row"
            raise DataError(f"{what} could not be read {place}: {type(cause).__name__}: {cause}") from error
        number += 1
        if field not in row:
            raise DataError(
                f"data.text_field={field} is not a field of {what}, row {number}; it has {', '.join(sorted(row))}: "
                "set data.text_field to one of them"
            )
        text = row[field]
        if not isinstance(text, str):
            raise DataError(
                f"data.text_field={field} must be text; row {number} of {what} has {type(text).__name__} there; "
                "choose another field, or remove the row"
            )
        yield f"{what}:{number}", text


def check_utf8(file: Path) -> None:
    """Raise DataError with the byte's offset where a text file holds a NUL byte or is no UTF-8."""
    offset = 0
    tail = b""
    with open(file, "rb") as handle:
        while True:
            chunk = handle.read(_CHECK_CHUNK)
            data = tail + chunk
            nul = data.find(b"\0")
            if offset == 0 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(
                    f"{file} is UTF-16, not UTF-8; convert it with `iconv -f utf-16 -t utf-8`, or remove it"
                )
            if nul >= 0:
                raise DataError(f"{file} has a NUL byte at byte {offset + nul}: it is binary, not text; remove it")
            try:
                data.decode("utf-8")
                tail = b""
            except UnicodeDecodeError as error:
                if not chunk or error.reason != "unexpected end of data":
                    raise DataError(
                        f"{file} is not UTF-8 at byte {offset + error.start} ({error.reason}); convert it, for example "
                        f"with `iconv -f latin1 -t utf-8`, or remove it"
                    ) from error
                tail = data[error.start :]
            if not chunk:
                return
            offset += len(data) - len(tail)
