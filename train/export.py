"""The weights of a run in one folder of whole tensors, to hand on: `python -m train.export RUN FOLDER [--average]`.

<folder>/model-00001-of-00002.safetensors   weights and buffers by parameter name, `table_<layer>.weight`
<folder>/model.safetensors.index.json       which of the files holds which tensor
<folder>/config.yaml tokenizer.json ...     of the run, and the compression table of its memory
<folder>/state.json manifest.json           of a checkpoint: `init_from=<folder>` starts a run from it
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train.checkpoint import SCHEMA_VERSION, STATE, Checkpoint
from train.checkpoint_commit import manifest_body, write_manifest
from train.checkpoint_folder import load_latest
from train.ema import log_products, up_to_date
from train.files import sha256, sync
from train.pieces import DTYPE_NAMES, DTYPES, as_bytes
from train.safetensors_writer import CHUNK_BYTES, Entry, write_safetensors
from train.shards import COMPRESSION_TABLE, TOKENIZER
from train.start import recorded_tokenizer

if TYPE_CHECKING:
    from train.config import Config

INDEX = "model.safetensors.index.json"
SHARD_GIB = 4.0  # of one file, at most: what file systems and hubs of any age take


def export(run: Path, to: Path, average: bool = False, shard_gib: float = SHARD_GIB) -> Path:
    """Write the newest good weights of `run` to `to`; returns `to`.

    Args:
        run: folder of a run that kept its last checkpoint.
        to: new or empty.
        average: the weight average in the place of the weights.
        shard_gib: GiB of one file, at most; a larger tensor has a file of its own.

    Raises:
        ValueError: there is no run, no good checkpoint, no average, or `to` is not empty.
        OSError: `to` cannot be written; nothing is left of it then.
    """
    from train.config import load_config, to_yaml  # it imports much that a reader of this file does not need

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already and not empty; give another folder, or remove it")
    if not shard_gib > 0:
        raise ValueError(f"--shard-gib={shard_gib} must be positive; usual: {SHARD_GIB:g}")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{run} is not a run's folder (no config.yaml); give the run_dir of a `make train`")
    found = load_latest(run / "checkpoints")
    if found is None:
        raise ValueError(f"{run} holds no checkpoint; give a run that kept its last one (train.final_checkpoint=true)")
    config = load_config(run / "config.yaml")
    if average and not found.names("average"):
        raise ValueError(f"{run} has no weight average (train.ema_decay=0 there); leave out --average")
    config = replace(config, run_dir=f"{to}-continued", init_from=str(to), init_sha256=None, init_changes=[])
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / "config.yaml").write_text(to_yaml(config))
        _copy_tokenizer(run, config, temporary)
        _write(found, config, temporary, average, int(shard_gib * 2**30))
        sync(temporary)
        os.replace(temporary, to)  # an empty folder gives way
        sync(to.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return to


def _copy_tokenizer(run: Path, config: "Config", to: Path) -> None:
    recorded = recorded_tokenizer(run, [Path(config.data.root)])
    if recorded is None or recorded.path is None:
        print(f"warning: the tokenizer of {run} lies no more below {config.data.root}; left out", file=sys.stderr)
        return
    for name in (TOKENIZER, COMPRESSION_TABLE):
        if (recorded.path.parent / name).is_file():
            shutil.copyfile(recorded.path.parent / name, to / name)


def _write(found: Checkpoint, config: "Config", to: Path, average: bool, shard_bytes: int) -> None:
    """Weights, index, state and manifest into `to`, where the other files lie already."""
    entries = [_entry(found, name, config, average) for name in sorted(found.tensors) if _is_weight(name)]
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.num_bytes for other in shards[-1]) + entry.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[file] = write_safetensors(to / file, shard)
        for entry in shard:
            name = entry.key if entry.key.startswith("table_") else f"model.{entry.key}"
            numel = entry.num_bytes // entry.dtype.itemsize
            pieces = [[file, entry.key, 0, numel]]
            tensors[name] = {"shape": list(entry.shape), "dtype": DTYPE_NAMES[entry.dtype], "pieces": pieces}
            weight_map[entry.key] = file
    index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
    (to / INDEX).write_text(json.dumps(index, indent=1))
    state = {"schema_version": SCHEMA_VERSION, "step": found.step, **found.state, "averaged": average}
    (to / STATE).write_text(json.dumps(state))
    for path in to.iterdir():
        sync(path)
        files.setdefault(path.name, {"bytes": path.stat().st_size, "sha256": sha256(path)})
    write_manifest(to, manifest_body(found.step, 1, files, tensors))


def _is_weight(name: str) -> bool:
    return name.startswith("model.") or (name.startswith("table_") and name.endswith(".weight"))


def _entry(found: Checkpoint, name: str, config: "Config", average: bool) -> Entry:
    tensor = found.tensors[name]
    key = name if name.startswith("table_") else name.removeprefix("model.")
    chunks = partial(_chunks, found, name)
    if average and f"average.dense.{key}" in found.tensors:  # buffers, such as the router's bias, have none
        chunks = partial(_chunks, found, f"average.dense.{key}")
    elif average and name != f"model.{key}":
        chunks = partial(_averaged_rows, found, name, config)
    return Entry(key, DTYPES[tensor.dtype], tensor.shape, chunks)


def _chunks(found: Checkpoint, name: str) -> Iterator[Tensor]:
    size = CHUNK_BYTES // DTYPES[found.tensors[name].dtype].itemsize
    total = found.tensors[name].numel
    for start in range(0, total, size):
        yield as_bytes(found.read(name, start, min(size, total - start)))


def _averaged_rows(found: Checkpoint, name: str, config: "Config") -> Iterator[Tensor]:
    """The averages of a table's rows, brought up to date; a row that rested has the closed form of `train.ema`."""
    layer = name.split(".")[0].removeprefix("table_")
    log_product = log_products(config.train.ema_decay, config.train.max_steps)
    num_rows, row_dim = found.tensors[name].shape
    size = max(1, CHUNK_BYTES // (4 * row_dim))
    for start in range(0, num_rows, size):
        count = min(size, num_rows - start)
        weight, rows = (
            found.read(source, start * row_dim, count * row_dim).view(count, row_dim)
            for source in (name, f"average.rows.{layer}")
        )
        last = found.read(f"average.last.{layer}", start, count)
        yield as_bytes(up_to_date(weight, rows, last, found.step, log_product))


def main(arguments: list[str]) -> int:
    """Export; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a run that kept its last checkpoint")
    parser.add_argument("folder", type=Path, help="where the export goes; new or empty")
    parser.add_argument("--average", action="store_true", help="the weight average in the place of the weights")
    parser.add_argument("--shard-gib", type=float, default=SHARD_GIB, help="GiB of one file, default %(default)s")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        export(args.run, args.folder, args.average, args.shard_gib)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: train on with make continue FROM={args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
