"""The weights that a run starts from, where they are not random: an import's, or another run's newest ones."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from models.memory_table import LocalTable
from models.transformer import Transformer
from train import checkpoint

WEIGHTS, TABLES = "model.safetensors", "table_*.safetensors"


def weights_sha256(folder: Path) -> str:
    """SHA-256 (hex) of names and SHA-256 sums of the weight files of `folder`'s newest checkpoint.

    From the manifest alone: equal for equal weights, wherever the folder lies. Optimizer states do not count.

    Raises:
        ValueError: there is no checkpoint, or its manifest is damaged.
    """
    path = _newest(folder)
    files = checkpoint.read_manifest(path, _remedy(folder))
    sums = {name: entry["sha256"] for name, entry in files.items() if _holds_weights(name)}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def load_weights(folder: Path, sha256: str | None, model: Transformer, tables: Mapping[int, LocalTable]) -> None:
    """Copy the newest weights below `folder` into a model and its tables, tensor by tensor; moments stay as they are.

    The weights themselves, also where the run that wrote them validated with their average. Tables of which the folder
    says nothing keep their random rows: those of an import, whose value projections are zero.

    Args:
        folder: of an import (`train.importing`) or of a run.
        sha256: `weights_sha256` of it when the run was planned.
        model: with exactly the names and shapes of the folder's.
        tables: {layer: table}.

    Raises:
        ValueError: damaged or changed weights, or weights of another shape; nothing is known of the model then.
    """
    if sha256 is not None and weights_sha256(folder) != sha256:
        raise ValueError(
            f"init_from={folder} no longer holds the weights of init_sha256={sha256}; restore them, or set "
            "init_sha256=null and another run_dir to start from those that it holds now"
        )
    path = _newest(folder)
    weights = checkpoint.verified_files(path, _remedy(folder), WEIGHTS)
    rows = checkpoint.verified_files(path, _remedy(folder), TABLES)
    _copy(weights[WEIGHTS], dict(model.state_dict()), folder)
    if not rows:
        return
    expected = {f"table_{layer}.safetensors": table for layer, table in tables.items()}
    if rows.keys() != expected.keys():
        raise ValueError(
            f"init_from={folder} holds {sorted(rows)}, this model's memory needs {sorted(expected)}; "
            "continue with the model settings that wrote it"
        )
    for name, table in expected.items():
        with safe_open(rows[name], framework="pt") as file:
            weight = file.get_tensor("weight")
        if weight.shape != table.weight.shape:
            raise ValueError(
                f"init_from={folder}: {name} holds rows of shape {tuple(weight.shape)}, this model's memory needs "
                f"{tuple(table.weight.shape)}; continue with the model settings that wrote it"
            )
        table.weight.copy_(weight)


def _copy(path: Path, own: dict[str, torch.Tensor], folder: Path) -> None:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        missing, surplus = sorted(own.keys() - names), sorted(names - own.keys())
        wrong = [n for n in sorted(names & own.keys()) if tuple(file.get_slice(n).get_shape()) != tuple(own[n].shape)]
        if missing or surplus or wrong:
            raise ValueError(
                f"init_from={folder} does not fit this model: missing {missing[:3]} ({len(missing)}), surplus "
                f"{surplus[:3]} ({len(surplus)}), other shapes {wrong[:3]} ({len(wrong)}); continue with the model "
                "settings that wrote it, or add a memory to it first (make import)"
            )
        for name, tensor in own.items():
            tensor.copy_(file.get_tensor(name))


def _newest(folder: Path) -> Path:
    path = checkpoint.newest(folder / "checkpoints")
    if path is None:
        raise ValueError(
            f"init_from={folder} holds no checkpoint; give the folder of an import (make import) or of a run that "
            "kept its last checkpoint"
        )
    return path


def _holds_weights(name: str) -> bool:
    return name == WEIGHTS or Path(name).match(TABLES)


def _remedy(folder: Path) -> str:
    return f"make the import anew, or give another init_from than {folder}"
