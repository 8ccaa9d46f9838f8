"""The live objects of a run to and from a checkpoint, as pieces of named tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from train.build import Memory
from train.checkpoint import Checkpoint
from train.checkpoint_folder import load_latest, remove_leftovers
from train.checkpoint_writer import CheckpointWriter, SaveReport
from train.ema import WeightAverage
from train.engine import Engine
from train.optimizer_state import check_names
from train.pieces import Piece, whole
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


def pieces(engine: Engine, memory: Memory, average: WeightAverage | None, rank: int = 0) -> list[Piece]:
    """What this rank owns: `model.*`, `optim.*`, `table_<layer>.*`, `average.*` and its random-number state.

    Rows in a shared or file mapping are marked to be written from there: a copy would take the memory that the mapping
    was meant to save.
    """
    own = [whole(name, tensor) for name, tensor in engine.state_tensors().items()]
    for layer, table in memory.tables.items():
        for name, tensor in table.state_shards().items():
            own.append(whole(f"table_{layer}.{name}", tensor, in_place=tensor.is_cpu and tensor.is_shared()))
    if average is not None:
        own += [whole(f"average.{name}", tensor) for name, tensor in average.state_tensors().items()]
    own += [whole(f"extra.{name}", tensor) for name, tensor in _random_state(rank).items()]
    return own


def prepare(writer: CheckpointWriter, engine: Engine, memory: Memory, average: WeightAverage | None) -> None:
    """Let the writer make its buffers; see `CheckpointWriter.prepare`."""
    if writer.options.asynchronous:
        writer.prepare(pieces(engine, memory, average, writer.place.rank))


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
    return writer.save(step, pieces(engine, memory, average, writer.place.rank), asdict(state), final)


def resume(
    folder: RunFolder, prepared: PreparedData, engine: Engine, memory: Memory, average: WeightAverage | None
) -> tuple[int, RunState]:
    """Load the newest good checkpoint into the live objects; (step to go on from, state), (0, ...) if there is none.

    Raises:
        ValueError: every checkpoint is damaged, or the newest good one is of other data or another model.
    """
    remove_leftovers(folder.checkpoints)
    found = load_latest(folder.checkpoints, set_aside=True)
    if found is None:
        return 0, RunState(prepared.fingerprint, prepared.tokenizer_sha256, prepared.compression_sha256)
    check_data(found, prepared, folder.path)
    own = engine.state_tensors()  # the live tensors themselves: what is read fills them, and nothing is held twice
    for stem in ("model", "optim"):
        fill(found, stem, {name.split(".", 1)[1]: own[name] for name in own if name.startswith(f"{stem}.")})
    engine.load_state_tensors(own)
    load_tables(found, memory)
    if average is not None:
        load_average(found, average)
    _restore_random_state(found)
    # Earlier checkpoints have the fingerprint alone, which says as much while the data lie prepared.
    sums = {"tokenizer_sha256": prepared.tokenizer_sha256, "compression_sha256": prepared.compression_sha256}
    return found.step, RunState(**(sums | found.state))


def load_tables(found: Checkpoint, memory: Memory) -> None:
    """Rows, moments and step counts of every table, read into the tables themselves.

    Raises:
        ValueError: the checkpoint's tables have other shapes.
    """
    for layer, table in memory.tables.items():
        shards = table.state_shards()
        fill(found, f"table_{layer}", shards)
        table.load_state_shards(shards)


def load_average(found: Checkpoint, average: WeightAverage) -> None:
    """The weight averages, read into place."""
    averages = average.state_tensors()
    fill(found, "average", averages)
    average.load_state_tensors(averages, found.step)


def fill(found: Checkpoint, stem: str, own: Mapping[str, Tensor]) -> None:
    """Read the tensors `<stem>.<name>` into live ones of the same names and shapes, piece by piece.

    Raises:
        ValueError: a name is missing or surplus, or a shape differs; nothing was read then.
    """
    check_names(own, {name: found.tensors[f"{stem}.{name}"] for name in found.names(stem)})
    for name, tensor in own.items():
        found.read(f"{stem}.{name}", out=tensor)


def _random_state(rank: int) -> dict[str, Tensor]:
    state = {f"rng.cpu.rank{rank:05d}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"rng.cuda.rank{rank:05d}"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(found: Checkpoint, rank: int = 0, world_size: int = 1) -> None:
    """Put this rank's generators back, if as many ranks wrote the checkpoint.

    On another number of ranks they stay as the seed of the run made them. That changes no result: nothing in training
    draws random numbers after the initialisation.
    """
    if found.world_size != world_size:
        return
    for kind, restore in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
        for name in (f"extra.rng.{kind}.rank{rank:05d}", f"extra.rng.{kind}"):  # the latter of schema 1
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
