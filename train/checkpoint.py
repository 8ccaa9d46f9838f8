"""Checkpoints: safetensors by parameter name, and a manifest of SHA-256 sums that is written last.

    checkpoints/step_00000400/
        model.safetensors    weights and buffers, fp32
        optim.safetensors    moments and step counts of the dense parameters
        table_<layer>.safetensors   rows, moments and per-row step counts of one memory table; of an
                                    asynchronous one also the rows before its last update
        extra.safetensors    weight averages and random-number state
        state.json           step and other numbers the loop needs
        manifest.json        size and SHA-256 of each file above; a checkpoint without it does not exist

Nothing is unpickled. The folder is written under a temporary name, fsynced and renamed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.files import sha256, sync
from train.run_folder import SCHEMA_VERSION

MANIFEST = "manifest.json"


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing, short, or not what was written."""


@dataclass
class Checkpoint:
    """What a run needs to go on bit for bit.

    Attributes:
        step: number of applied optimizer steps.
        tensors: {file stem: {tensor name: tensor}}.
        state: plain JSON values.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` below `folder`, unless its step is there already, and remove all but the newest `keep`.

    Raises:
        OSError: if it cannot be written (a full disk, say); earlier checkpoints are untouched.
    """
    final = folder / f"step_{checkpoint.step:08d}"
    if final in _complete(folder):  # the same step of the same run: stopped on its last step, or killed just after it
        return final
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for stem, tensors in checkpoint.tensors.items():
            save_file(_without_shared_storage(tensors), temporary / f"{stem}.safetensors")
        (temporary / "state.json").write_text(
            json.dumps({"schema_version": SCHEMA_VERSION, "step": checkpoint.step, **checkpoint.state})
        )
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temporary.iterdir())
        }
        for path in temporary.iterdir():
            sync(path)
        (temporary / MANIFEST).write_text(json.dumps({"schema_version": SCHEMA_VERSION, "files": files}, indent=1))
        sync(temporary / MANIFEST)
        sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # one without a manifest: complete ones are not written again
        os.replace(temporary, final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints are untouched"
        ) from error
    for old in _complete(folder)[:-keep] if keep else _complete(folder):
        shutil.rmtree(old)
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint below `folder`, every file verified; None if there is none.

    Raises:
        DamagedCheckpointError: naming the file and the remedy.
    """
    path = newest(folder)
    return None if path is None else load(path)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder, verifying every file against the manifest.

    Raises:
        DamagedCheckpointError: naming the file and the remedy.
    """
    remedy = f"remove {path} to go on from the one before it"
    tensors = {
        file.stem: load_file(file) for file in verified_files(path, remedy).values() if file.suffix == ".safetensors"
    }
    state = json.loads((path / "state.json").read_text())
    version = state.pop("schema_version")
    if version != SCHEMA_VERSION:
        raise DamagedCheckpointError(f"{path} has schema_version {version}, this code reads {SCHEMA_VERSION}; {remedy}")
    return Checkpoint(step=state.pop("step"), tensors=tensors, state=state)


def read_manifest(path: Path, remedy: str) -> dict[str, dict[str, Any]]:
    """{file name: its "bytes" and "sha256"} of the checkpoint folder `path`.

    Raises:
        DamagedCheckpointError: with `remedy`.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"{path / MANIFEST} cannot be read ({error}); {remedy}") from error
    return files


def verified_files(path: Path, remedy: str, pattern: str = "*") -> dict[str, Path]:
    """{file name: path} of a checkpoint's files whose name matches `pattern`, each compared with the manifest.

    Raises:
        DamagedCheckpointError: naming the file, with `remedy`.
    """
    files = {}
    for name, expected in read_manifest(path, remedy).items():
        if not fnmatch(name, pattern):
            continue
        files[name] = file = path / name
        if not file.exists():
            raise DamagedCheckpointError(f"{file} is missing; {remedy}")
        if file.stat().st_size != expected["bytes"] or sha256(file) != expected["sha256"]:
            raise DamagedCheckpointError(f"{file} is not what was written (size or SHA-256 differs); {remedy}")
    return files


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder`, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _without_shared_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; views of one storage, such as a flat ZeRO partition's, are cloned: safetensors refuses them."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        else:
            seen.add(storage.data_ptr())
        result[name] = tensor
    return result


def _complete(folder: Path) -> list[Path]:
    """Checkpoints that have a manifest, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).exists())
