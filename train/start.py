"""The weights that a run starts from, where they are not random: an import's, an export's, or another run's newest.

Equal names and shapes are not enough for weights to mean what they meant: token ids and the settings of the model
have a part in it. So both are compared with what the folder records, before anything is loaded.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models.memory_table import MemoryTable
from models.transformer import Transformer
from train import checkpoint
from train.checkpoint_folder import newest
from train.files import sha256 as sha256_of
from train.identity import differing_settings, to_plain
from train.shards import COMPRESSION_TABLE, TOKENIZER, DataError, PreparedData, prepared_folders

if TYPE_CHECKING:
    from train.config import Config

WEIGHTS = ("model*.safetensors", "table_*.safetensors")  # files of a checkpoint that hold weights

# Settings of the model that leave the function of loaded weights as it is; every other one is theirs.
FREE_SETTINGS = (
    "seq_len", "activation_checkpointing", "init_std", "embedding_init_std", "moe.expert_kernel",
    "moe.router.sequence_balance_coef", "moe.router.balance_coef", "moe.router.bias_update_rate",
)  # fmt: skip
_TOKENIZER = "data.tokenizer"  # as a word of init_changes


def weights_sha256(folder: Path) -> str:
    """SHA-256 (hex) of names and SHA-256 sums of the weight files of `folder`'s newest checkpoint.

    From the manifest alone: equal for equal files of weights, wherever the folder lies. Files of the dense optimizer do
    not count. The same weights in other files, as another number of ranks cuts them, have another sum.

    Raises:
        ValueError: there is no checkpoint, or its manifest is damaged.
    """
    path = weights_of(folder)
    files = checkpoint.read_manifest(path, _remedy(folder)).files
    sums = {name: entry["sha256"] for name, entry in files.items() if _holds_weights(name)}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def check_model(folder: Path, config: "Config") -> None:
    """Compare the model's settings with those that the weights in `folder` were trained under.

    Raises:
        ValueError: one that changes the weights' function differs and is not in `init_changes`, or is there in vain.
    """
    source = _source(folder)
    # Weights of a memory that is new are missing, and `load_weights` says how they are added.
    free = FREE_SETTINGS if source.model.memory is not None else (*FREE_SETTINGS, "engram", "over_encoding")
    changes = differing_settings(to_plain(source.model), to_plain(config.model))
    named = {f"model.{change.split(':')[0]}": change for change in changes if not _among(change, free)}
    refused = [name for name in named if not _among(name, config.init_changes)]
    if refused:
        raise ValueError(
            f"{'; '.join(f'model.{named[name]}' for name in refused[:4])} would change what the weights of "
            f"init_from={folder} compute; leave it as it was there, or say that it is meant: "
            f"init_changes=[{','.join(sorted({*config.init_changes, *refused}))}]"
        )
    for word in config.init_changes:
        if word != _TOKENIZER and not any(_among(name, [word]) for name in named):
            rest = ",".join(other for other in config.init_changes if other != word)
            raise ValueError(
                f"init_changes={config.init_changes}: {word} lets no setting pass that differs from init_from={folder} "
                f"and changes what its weights compute; set init_changes=[{rest}]"
            )


def _among(change: str, names: Iterable[str]) -> bool:
    """Whether a setting, or the line on how it differs, is one of `names` or below one."""
    name = change.split(":")[0]
    return any(name == other or name.startswith(f"{other}.") for other in names)


@dataclass(frozen=True)
class RecordedTokenizer:
    """The tokenizer whose ids some weights were trained on."""

    sha256: str  # of tokenizer.json
    compression_sha256: str | None  # of the compression table's file, if that matters: the memory of an import is new
    fingerprint: str | None  # of the data, if they were prepared here
    path: Path | None  # where its tokenizer.json lies, if it was found


def recorded_tokenizer(folder: Path, roots: Iterable[Path]) -> RecordedTokenizer | None:
    """What the newest checkpoint below `folder` says of its tokenizer; None where nothing is known.

    Checkpoints of earlier versions name the fingerprint of their data alone, which leads on while those lie prepared.

    Args:
        folder: of an import or of a run.
        roots: folders of prepared data to look in.
    """
    path = weights_of(folder)
    state: dict[str, Any] = json.loads(
        checkpoint.verified_files(path, _remedy(folder), "state.json")["state.json"].read_text()
    )
    sha256, compression = state.get("tokenizer_sha256"), state.get("compression_sha256")
    fingerprint = state.get("data_fingerprint", state.get("imported_data_fingerprint"))
    folders = [found for root in roots for found in prepared_folders(root)]
    # First the very data of the weights: its path enters a run's identity, and must not change as others are prepared.
    for prepared, found, sums in sorted(folders, key=lambda folder: folder[1] != fingerprint):
        if sums[TOKENIZER] == sha256 or (sha256 is None and found == fingerprint):
            if sha256 is None:
                compression = sums[COMPRESSION_TABLE]
            return RecordedTokenizer(sums[TOKENIZER], compression, fingerprint, prepared / TOKENIZER)
    if sha256 is None:
        return None
    enclosed = folder / TOKENIZER  # of an export
    found_here = enclosed.is_file() and sha256_of(enclosed) == sha256
    return RecordedTokenizer(sha256, compression, fingerprint, enclosed if found_here else None)


def tokenizer_for(folder: Path, config: "Config") -> str | None:
    """`data.tokenizer` of a run that starts from `folder`: where none is set, the one of the weights there.

    Raises:
        ValueError: that one is not known or not found; a new one would be trained under the old weights.
    """
    if config.data.tokenizer is not None or _TOKENIZER in config.init_changes:
        return config.data.tokenizer
    source = _source(folder)
    if source.data.tokenizer is not None:
        return source.data.tokenizer
    recorded = recorded_tokenizer(folder, _roots(source, config))
    same = [replace(data, root="", fingerprint="", num_workers=0) for data in (source.data, config.data)]
    if recorded is not None and same[0] == same[1]:
        return None  # the same text gives the same tokenizer; `check_tokenizer` sees to it
    if recorded is not None and recorded.path is not None:
        return str(recorded.path)
    where = " or ".join(sorted({str(root) for root in _roots(source, config)}))
    raise ValueError(
        f"data.tokenizer=null would train a new tokenizer under the weights of init_from={folder}, and theirs "
        f"{'is not known' if recorded is None else f'lies no more below {where}'}; give data.tokenizer=<folder with "
        f"their tokenizer.json>, or say that other token ids are meant: init_changes=[{_TOKENIZER}]"
    )


def check_tokenizer(folder: Path, config: "Config", prepared: PreparedData) -> None:
    """Compare the tokenizer and the compression table of the data with those of the weights in `folder`.

    Nothing is compared where nothing is known of the weights' tokenizer and `data.tokenizer` names one.

    Raises:
        DataError: they differ and `init_changes` does not name data.tokenizer, or names it in vain.
    """
    source = _source(folder)
    recorded = recorded_tokenizer(folder, _roots(source, config))
    if recorded is None:
        return
    differs = []
    if prepared.tokenizer_sha256 != recorded.sha256:
        differs.append("tokenizer")
    compression = recorded.compression_sha256
    memory = source.model.memory
    if memory is not None and memory.compress and compression not in (None, prepared.compression_sha256):
        differs.append("compression of token ids")
    meant = _TOKENIZER in config.init_changes
    if differs and not meant:
        raise DataError(
            f"data.tokenizer={config.data.tokenizer or 'null'}: the {' and the '.join(differs)} of {prepared.path} "
            f"differ from what the weights of init_from={folder} were trained with, so that token ids mean other "
            f"text; set data.tokenizer={recorded.path or '<folder with their tokenizer.json>'}, or say that it is "
            f"meant: init_changes=[{','.join([*config.init_changes, _TOKENIZER])}]"
        )
    if meant and not differs:
        raise DataError(
            f"init_changes={config.init_changes}: {_TOKENIZER} is that of init_from={folder}; leave the word out"
        )


def _source(folder: Path) -> "Config":
    from train.config import load_config  # it imports this file

    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"init_from={folder} has no config.yaml, which says how its weights are to be read; give the folder of an "
            "import (make import) or of a run"
        )
    return load_config(folder / "config.yaml")


def _roots(*configs: "Config") -> list[Path]:
    return [Path(config.data.root) for config in configs]


@torch.no_grad()
def load_weights(folder: Path, sha256: str | None, model: Transformer, tables: Mapping[int, MemoryTable]) -> None:
    """Copy the newest weights below `folder` into a model and its tables, tensor by tensor; moments stay as they are.

    The weights themselves, also where the run that wrote them validated with their average. Tables of which the folder
    says nothing keep their random rows: those of an import, whose value projections are zero.

    Args:
        folder: of an import (`train.importing`), of an export (`train.export`) or of a run.
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
    path = weights_of(folder)
    for pattern in WEIGHTS:
        checkpoint.verified_files(path, _remedy(folder), pattern)
    found = checkpoint.Checkpoint(path, _remedy(folder))
    _check_fits(found, model.state_dict(), folder)
    rows = sorted(name for name in found.tensors if name.startswith("table_") and name.endswith(".weight"))
    expected = {f"table_{layer}.weight": table.weight for layer, table in tables.items()}
    if rows and rows != sorted(expected):
        raise ValueError(
            f"init_from={folder} holds {rows}, this model's memory needs {sorted(expected)}; "
            "continue with the model settings that wrote it"
        )
    for name in rows:
        if found.tensors[name].shape != expected[name].shape:
            raise ValueError(
                f"init_from={folder}: {name} holds rows of shape {found.tensors[name].shape}, this model's memory "
                f"needs {tuple(expected[name].shape)}; continue with the model settings that wrote it"
            )
    for name, tensor in model.state_dict().items():
        found.read(f"model.{name}", out=tensor)
    for name in rows:
        expected[name].copy_(found.tensor(name))  # rows may be of another type here


def _check_fits(found: checkpoint.Checkpoint, own: Mapping[str, torch.Tensor], folder: Path) -> None:
    names = set(found.names("model"))
    missing, surplus = sorted(own.keys() - names), sorted(names - own.keys())
    wrong = [name for name in sorted(names & own.keys()) if found.tensors[f"model.{name}"].shape != own[name].shape]
    if missing or surplus or wrong:
        raise ValueError(
            f"init_from={folder} does not fit this model: missing {missing[:3]} ({len(missing)}), surplus "
            f"{surplus[:3]} ({len(surplus)}), other shapes {wrong[:3]} ({len(wrong)}); continue with the model "
            "settings that wrote it, or add a memory to it first (make import)"
        )


def weights_of(folder: Path) -> Path:
    """The newest checkpoint of a run or an import; an export is one itself.

    Raises:
        ValueError: there is none.
    """
    path = folder if (folder / checkpoint.MANIFEST).is_file() else newest(folder / "checkpoints")
    if path is None:
        raise ValueError(
            f"init_from={folder} holds no checkpoint; give the folder of an import (make import), of an export "
            "(make export) or of a run that kept its last checkpoint"
        )
    return path


def _holds_weights(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WEIGHTS)


def _remedy(folder: Path) -> str:
    return f"make the import anew, or give another init_from than {folder}"
