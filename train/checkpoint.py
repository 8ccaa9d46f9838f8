"""Checkpoints that any number of ranks wrote and any other number reads: safetensors and a manifest, written last.

    checkpoints/step_00000400/
        model.rank00000.safetensors    weights and buffers, fp32, as far as rank 0 owns them
        optim.rank00000.safetensors    moments and step counts of the dense parameters
        table_<layer>.rank00000.safetensors   rows, moments and per-row step counts of one memory table; of an
                                       asynchronous one also the rows before its last update
        average.rank00000.safetensors  weight averages
        extra.rank00000.safetensors    random-number state of each rank
        state.json                     step and other numbers the loop needs
        manifest.json                  size and SHA-256 of each file above, and where the pieces of each tensor lie

A tensor that lies in one piece keeps its name and shape in the file; part of one is flat and called `<name>@<start>`.
Large files are cut (`optim.rank00000-1.safetensors`). Nothing is unpickled. `train.checkpoint_writer` writes these
files, `train.checkpoint_folder` finds the newest good ones. The first schema is read as well: one process, whole
tensors (`model.safetensors`), no list of tensors in the manifest.
"""

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.files import sha256
from train.pieces import DTYPES, coverage_fault

MANIFEST, STATE = "manifest.json", "state.json"
SCHEMA_VERSION = 2  # 1: one process, whole tensors


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing, short, or not what was written."""


class CheckpointVersionError(ValueError):
    """A checkpoint of a schema that this code does not know; it may be whole."""


@dataclass(frozen=True)
class Stored:
    """Where one piece lies: elements [start, start + numel) of its tensor are tensor `key` of `file`."""

    file: str
    key: str
    start: int
    numel: int


@dataclass(frozen=True)
class GlobalTensor:
    """One tensor of a checkpoint; `pieces` in the order of their starts, each element in exactly one."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors names it
    pieces: tuple[Stored, ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says; schema 1 has neither step nor tensors."""

    version: int
    files: dict[str, dict[str, Any]]  # {file name: its "bytes" and "sha256"}
    step: int | None
    world_size: int
    tensors: dict[str, GlobalTensor] | None


def sign(body: Mapping[str, Any]) -> dict[str, Any]:
    """`body` with the SHA-256 of its canonical JSON, by which a manifest that was changed is known."""
    canonical = json.dumps(body, sort_keys=True).encode()
    return {**body, "manifest_sha256": hashlib.sha256(canonical).hexdigest()}


def read_manifest(path: Path, remedy: str) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises:
        DamagedCheckpointError: it is missing or not what was written; with `remedy`.
        CheckpointVersionError: it is of a schema that is not known here.
    """
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, signed = body["schema_version"], body.pop("manifest_sha256", None)
        if (signed is not None or version == SCHEMA_VERSION) and sign(body)["manifest_sha256"] != signed:
            raise ValueError("its own SHA-256 differs")
        if version not in (1, SCHEMA_VERSION):
            raise CheckpointVersionError(f"{path} has schema_version {version}, this code reads 1 and {SCHEMA_VERSION}")
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in body["files"].items()
        }
        if version == 1:
            return Manifest(1, files, None, 1, None)
        tensors = {
            name: GlobalTensor(tuple(t["shape"]), t["dtype"], tuple(Stored(*piece) for piece in t["pieces"]))
            for name, t in body["tensors"].items()
        }
        return Manifest(version, files, body["step"], body["world_size"], tensors)
    except CheckpointVersionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST} cannot be read ({error}); {remedy}") from error


class Checkpoint:
    """An opened checkpoint folder: its numbers, and ranges of its tensors from whichever files hold them.

    Files are mapped, so only what is asked for is read, and nothing is held beside what the caller asked for.

    Args:
        path: of the folder; its files are not verified here (see `train.checkpoint_folder`).
        remedy: what messages about damage advise.

    Attributes:
        step: number of applied optimizer steps.
        world_size: of the ranks that wrote it.
        state: plain JSON values.
        tensors: {global name, `<stem>.<rest>`: where it lies}.

    Raises:
        DamagedCheckpointError: manifest or state cannot be read.
    """

    def __init__(self, path: Path, remedy: str | None = None) -> None:
        self.path = path
        self._remedy = remedy if remedy is not None else f"remove {path} to go on from the one before it"
        manifest = read_manifest(path, self._remedy)
        self._files: dict[str, Any] = {}
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            state.pop("schema_version")
            self.step: int = state.pop("step")
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path / STATE} cannot be read ({error}); {self._remedy}") from error
        self.state: dict[str, Any] = state
        self.world_size = manifest.world_size
        self.tensors = manifest.tensors if manifest.tensors is not None else self._first_schema(manifest)
        for name, tensor in self.tensors.items():
            fault = coverage_fault(tensor.numel, [(piece.start, piece.numel) for piece in tensor.pieces])
            if fault is not None:
                raise DamagedCheckpointError(f"{path / MANIFEST}: {name}: {fault}; {self._remedy}")

    def names(self, stem: str) -> list[str]:
        """Names of the tensors `<stem>.<name>`."""
        return [name[len(stem) + 1 :] for name in self.tensors if name.startswith(f"{stem}.")]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{global name: shape}."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, a copy."""
        return self.read(name).view(self.tensors[name].shape)

    @torch.no_grad()
    def read(self, name: str, start: int = 0, numel: int | None = None, out: Tensor | None = None) -> Tensor:
        """Elements [start, start + numel) of the flattened tensor `name`; all from `start` on where numel is None.

        Args:
            name: global name.
            start: first element.
            numel: how many.
            out: filled and returned, on any device; else a new (numel,) tensor on the CPU.

        Raises:
            ValueError: there is no such tensor or range, or `out` has another size or type.
            DamagedCheckpointError: a file does not hold what the manifest says.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path} holds no tensor {name}")
        tensor = self.tensors[name]
        numel = tensor.numel - start if numel is None else numel
        dtype = DTYPES[tensor.dtype]
        if not 0 <= start <= start + numel <= tensor.numel:
            raise ValueError(f"{self.path}: {name} has {tensor.numel} elements, not {start} to {start + numel}")
        if out is None:
            out = torch.empty(numel, dtype=dtype)
        if out.numel() != numel or out.dtype != dtype:
            raise ValueError(
                f"{self.path}: {numel} elements of {name} are {dtype}, they do not fit {out.numel()} of {out.dtype}"
            )
        flat = out.view(-1) if out.is_contiguous() else torch.empty(numel, dtype=dtype, device=out.device)
        first = max(0, bisect_right([piece.start for piece in tensor.pieces], start) - 1)
        for piece in tensor.pieces[first:]:
            begin, end = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if begin < end:
                part = self._mapped(name, piece)[begin - piece.start : end - piece.start]
                flat[begin - start : end - start].copy_(part)
            if end >= start + numel:
                break
        if not out.is_contiguous():
            out.copy_(flat.view(out.shape))
        return out

    def _mapped(self, name: str, piece: Stored) -> Tensor:
        """A stored piece, flat, as a view of its mapped file."""
        try:
            flat: Tensor = self._open(piece.file).get_tensor(piece.key).view(-1)
        except (OSError, SafetensorError) as error:
            raise DamagedCheckpointError(f"{self.path / piece.file}: {error}; {self._remedy}") from error
        if flat.numel() != piece.numel or flat.dtype != DTYPES[self.tensors[name].dtype]:
            raise DamagedCheckpointError(
                f"{self.path / piece.file}: {piece.key} holds {flat.numel()} of {flat.dtype}, the manifest says "
                f"{piece.numel} of {self.tensors[name].dtype}; {self._remedy}"
            )
        return flat

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="pt")
        return self._files[file]

    def _first_schema(self, manifest: Manifest) -> dict[str, GlobalTensor]:
        """Tensors of a checkpoint of schema 1, from the headers of its files."""
        tensors = {}
        for file in (name for name in manifest.files if name.endswith(".safetensors")):
            try:
                opened = self._open(file)
                for key in opened.keys():  # noqa: SIM118, no mapping
                    part = opened.get_slice(key)
                    shape = tuple(part.get_shape())
                    stored = Stored(file, key, 0, math.prod(shape))
                    tensors[f"{file.split('.')[0]}.{key}"] = GlobalTensor(shape, part.get_dtype(), (stored,))
            except (OSError, SafetensorError) as error:
                raise DamagedCheckpointError(f"{self.path / file}: {error}; {self._remedy}") from error
        return tensors


def verified_files(path: Path, remedy: str, pattern: str = "*") -> dict[str, Path]:
    """{file name: path} of a checkpoint's files whose name matches `pattern`, each compared with the manifest.

    Raises:
        DamagedCheckpointError: naming the file, with `remedy`.
    """
    files = {}
    for name, expected in read_manifest(path, remedy).files.items():
        if not fnmatch(name, pattern):
            continue
        files[name] = path / name
        fault = file_fault(path / name, expected)
        if fault is not None:
            raise DamagedCheckpointError(f"{fault}; {remedy}")
    return files


def file_fault(file: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with one file, None where it is what the manifest's entry `expected` says."""
    try:
        if not file.exists():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            return f"{file} is not what was written (size or SHA-256 differs)"
    except OSError as error:
        return f"{file} cannot be read ({error})"
    return None
