"""The live objects of a run to and from a checkpoint, as pieces of named tensors."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from models.memory_table import MemoryTable
from train.build import Memory
from train.checkpoint import Checkpoint
from train.checkpoint_folder import checkpoints, newest_good, remove_leftovers
from train.checkpoint_writer import CheckpointWriter, Place, SaveReport, WriterOptions
from train.ema import WeightAverage
from train.engine import Engine
from train.held import Held, alike, check_fits, pieces_of, slice_of
from train.memory.sharded import ShardedTable
from train.pieces import Piece, whole
from train.ranks import ALONE, Ranks
from train.run_folder import RunFolder
from train.shards import DataError, PreparedData


@dataclass
class RunState:
    """What a checkpoint keeps beside tensors, in state.json."""

    data_fingerprint: str
    tokenizer_sha256: str  # what the weights' token ids mean: a run that starts from them must mean the same
    compression_sha256: str
    train_seconds: float = 0.0  # of training alone, over all starts
    train_loss: float | None = None  # of the last step, nats per predicted token


def held(engine: Engine, memory: Memory, average: WeightAverage | None) -> Iterator[Held]:
    """What lies on this rank of `model.*`, `optim.*`, `table_<layer>.*` and `average.*`; live tensors."""
    yield from engine.held_state()
    for layer, table in memory.tables.items():
        yield from _held_table(layer, table, table.state_shards(), engine.ranks)
    if average is not None:
        yield from _held_average(engine, memory, average)


def pieces(engine: Engine, memory: Memory, average: WeightAverage | None) -> list[Piece]:
    """What this rank saves of it, and its random-number state."""
    return [
        *pieces_of(held(engine, memory, average)),
        *(whole(f"extra.{name}", tensor) for name, tensor in _random_state(engine.ranks.rank).items()),
    ]


def open_writer(folder: RunFolder, options: WriterOptions, ranks: Ranks) -> CheckpointWriter:
    """The writer of this rank; all ranks open theirs together."""
    return CheckpointWriter(
        folder.checkpoints, options, Place(ranks.rank, ranks.world_size, ranks.from_main(str(os.getpid())))
    )


def prepare(writer: CheckpointWriter, engine: Engine, memory: Memory, average: WeightAverage | None) -> None:
    """Let the writer make its buffers; see `CheckpointWriter.prepare`."""
    if writer.options.asynchronous:
        writer.prepare(pieces(engine, memory, average))


def save(
    writer: CheckpointWriter,
    step: int,
    state: RunState,
    engine: Engine,
    memory: Memory,
    average: WeightAverage | None,
    final: bool = False,
) -> SaveReport:
    """Hand the checkpoint of `step` to the writer; see `CheckpointWriter.save`."""
    return writer.save(step, pieces(engine, memory, average), asdict(state), final)


def resume(
    folder: RunFolder, prepared: PreparedData, engine: Engine, memory: Memory, average: WeightAverage | None
) -> tuple[int, RunState]:
    """Load the newest good checkpoint into the live objects; (step to go on from, state), (0, ...) if there is none.

    Raises:
        ValueError: every checkpoint is damaged, or the newest good one is of other data or another model.
    """
    ranks = engine.ranks
    if ranks.is_main:
        remove_leftovers(folder.checkpoints)
    _refuse_other_listings(folder, ranks)
    good = newest_good(folder.checkpoints, True, ranks.rank, ranks.world_size, ranks.join_lists)
    if good is None:
        return 0, RunState(prepared.fingerprint, prepared.tokenizer_sha256, prepared.compression_sha256)
    found = Checkpoint(good)
    check_data(found, prepared, folder.path)
    for stem in ("model", "optim"):
        live = [one for one in engine.held_state() if one.name.startswith(f"{stem}.")]
        check_fits(live, found.shapes(), stem, engine.state_names(stem))
        fill(found, live)
    engine.state_was_filled()
    load_tables(found, memory, ranks)
    if average is not None:
        load_average(found, average, list(_held_average(engine, memory, average)))
    _restore_random_state(found, ranks)
    # Earlier checkpoints have the fingerprint alone, which says as much while the data lie prepared.
    sums = {"tokenizer_sha256": prepared.tokenizer_sha256, "compression_sha256": prepared.compression_sha256}
    return found.step, RunState(**(sums | found.state))


def _refuse_other_listings(folder: RunFolder, ranks: Ranks) -> None:
    """Ranks that see other checkpoints would go on from other steps.

    Raises:
        ValueError: naming what two of them see.
    """
    seen = ranks.join_lists([", ".join(path.name for path in checkpoints(folder.checkpoints)) or "none"])
    other = next((rank for rank, names in enumerate(seen) if names != seen[0]), None)
    if other is not None:
        raise ValueError(
            f"run_dir={folder.path}: rank 0 sees the checkpoints {seen[0]}, rank {other} sees {seen[other]}; every "
            "node must see the same folder: use a shared file system, or start again if its listing was late"
        )


def load_tables(found: Checkpoint, memory: Memory, ranks: Ranks = ALONE) -> None:
    """Rows, moments and step counts of every table, read into the tables themselves.

    Raises:
        ValueError: the checkpoint's tables have other shapes.
    """
    for layer, table in memory.tables.items():
        shards, stem = table.state_shards(), f"table_{layer}"
        held = list(_held_table(layer, table, shards, ranks))
        # What is not there once per row (step counts of the table, rows of an update under way) has any length.
        others = {key for key in shards if f"{stem}.{key}" in found.tensors and len(shards[key]) != _num_local(table)}
        live = [one for one in held if one.name.removeprefix(f"{stem}.") not in others]
        check_fits(live, found.shapes(), stem, [one.name for one in live] + [f"{stem}.{key}" for key in others])
        fill(found, live)
        table.load_state_shards(shards | {key: found.tensor(f"{stem}.{key}") for key in others})


def load_average(found: Checkpoint, average: WeightAverage, live: list[Held]) -> None:
    """The weight averages, read into place."""
    check_fits(live, found.shapes(), "average", [one.name for one in live])
    fill(found, live)
    average.step = found.step


def fill_whole(found: Checkpoint, stem: str, own: Mapping[str, Tensor]) -> None:
    """Read the tensors `<stem>.<name>` into whole live ones, in a process that holds everything.

    Raises:
        ValueError: a name is missing or surplus, or a shape differs; nothing was read then.
    """
    live = [alike(f"{stem}.{name}", tensor) for name, tensor in own.items()]
    check_fits(live, found.shapes(), stem, [one.name for one in live])
    fill(found, live)


def fill(found: Checkpoint, live: Iterable[Held]) -> None:
    """Read what the checkpoint has of live ranges into them."""
    for one in live:
        found.read(one.name, one.start, one.values.numel(), out=one.values)


def _held_table(layer: int, table: MemoryTable, shards: Mapping[str, Tensor], ranks: Ranks) -> Iterator[Held]:
    """What lies here of a table.

    Rows in a shared or file mapping are marked to be written from there: a copy would take the memory that the mapping
    was meant to save.
    """
    first_row = table.rows.start if isinstance(table, ShardedTable) else 0
    for key, tensor in shards.items():
        if 0 in tensor.shape[1:]:
            continue  # a moment that this table does without
        name, mapped = f"table_{layer}.{key}", tensor.is_cpu and tensor.is_shared()
        if len(tensor) == _num_local(table):
            yield slice_of(name, tensor, table.num_rows, first_row, in_place=mapped)
        elif tensor.numel():
            yield alike(name, tensor, ranks.rank, ranks.world_size)


def _num_local(table: MemoryTable) -> int:
    return len(table.rows) if isinstance(table, ShardedTable) else table.num_rows


def _held_average(engine: Engine, memory: Memory, average: WeightAverage) -> Iterator[Held]:
    for name, tensor in average.dense.items():
        yield engine.placed(f"average.dense.{name}", name, tensor)
    for layer, table in memory.tables.items():
        rows = table.rows if isinstance(table, ShardedTable) else range(table.num_rows)
        yield slice_of(f"average.rows.{layer}", average.rows[layer], table.num_rows, rows.start)
        yield slice_of(f"average.last.{layer}", average.last[layer], table.num_rows, rows.start)


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"rng.cpu.rank{rank:05d}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.cuda.rank{rank:05d}"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(found: Checkpoint, ranks: Ranks) -> None:
    """Put this rank's generators back, if as many ranks wrote the checkpoint.

    On another number of ranks they stay as the seed of the run made them. That changes no result: nothing in training
    draws random numbers after the initialisation.
    """
    if found.world_size != ranks.world_size:
        return
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        for name in (f"extra.rng.{kind}.rank{ranks.rank:05d}", f"extra.rng.{kind}"):  # the latter of schema 1
            if name in found.tensors and (kind == "cpu" or torch.cuda.is_available()):
                restore(found.tensor(name))


def check_data(found: Checkpoint, prepared: PreparedData, run_dir: object) -> None:
    """Compare the data a checkpoint was trained on with the data at hand.

    Raises:
        DataError: with both fingerprints and the remedy.
    """
    trained_on = found.state.get("data_fingerprint")
    if trained_on != prepared.fingerprint:
        raise DataError(
            f"the checkpoint in {run_dir} was trained on data of fingerprint {trained_on}, the data prepared now in "
            f"{prepared.path} has {prepared.fingerprint}: text, packages or settings changed; restore them "
            "(data.root may point to the earlier data), or start anew in another run_dir"
        )
