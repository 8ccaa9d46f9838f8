"""Which files one rank writes its pieces to, and what it says of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.host_buffer import aligned
from train.pieces import DTYPE_NAMES, Piece, cut
from train.safetensors_writer import Entry, entry_of, write_safetensors


@dataclass
class RankFile:
    """A file to be written: pieces of one stem, all buffered or none."""

    name: str
    buffered: bool
    pieces: list[Piece] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class Attempt:
    """One checkpoint that this rank is writing."""

    step: int
    temporary: Path
    final: Path
    num_bytes: int
    files: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)


def plan_files(pieces: Iterable[Piece], rank: int, file_bytes: int, buffer_bytes: int) -> list[RankFile]:
    """The file of each piece, by stem, and whether it goes through the buffers: small ones first, while they fit."""
    parts = [part for piece in pieces for part in cut(piece, file_bytes) if part.numel or part.is_whole]
    buffered: set[int] = set()
    for index, part in sorted(enumerate(parts), key=lambda item: item[1].num_bytes):
        size = aligned(part.num_bytes)
        if not part.in_place and buffer_bytes > 0 and size <= buffer_bytes:
            buffered.add(index)
            buffer_bytes -= size
    files: list[RankFile] = []
    filling: dict[tuple[str, bool], RankFile] = {}
    count: dict[str, int] = {}
    for index, part in enumerate(parts):
        stem = part.name.split(".", 1)[0]
        file = filling.get((stem, index in buffered))
        if file is None or file.num_bytes + part.num_bytes > file_bytes:
            number = count[stem] = count.get(stem, -1) + 1
            name = f"{stem}.rank{rank:05d}{f'-{number}' if number else ''}.safetensors"
            file = filling[stem, index in buffered] = RankFile(name, index in buffered)
            files.append(file)
        file.pieces.append(part)
        file.num_bytes += part.num_bytes
    return files


def write_file(attempt: Attempt, file: RankFile) -> None:
    """Write one file, and note its sums and where each piece lies."""
    entries: list[Entry] = []
    for piece in file.pieces:
        name = piece.name.split(".", 1)[1]
        key = name if piece.is_whole else f"{name}@{piece.start}"
        dtype = DTYPE_NAMES[piece.data.dtype]
        shape = piece.shape if piece.is_whole else (piece.numel,)
        entries.append(entry_of(key, shape, piece.data))
        tensor = attempt.tensors.setdefault(piece.name, {"shape": list(piece.shape), "dtype": dtype, "pieces": []})
        tensor["pieces"].append([file.name, key, piece.start, piece.numel])
    attempt.files[file.name] = write_safetensors(attempt.temporary / file.name, entries)
