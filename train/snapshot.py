"""The live objects of a run to and from a checkpoint."""

from dataclasses import asdict, dataclass

import torch

from train import checkpoint
from train.build import Memory
from train.checkpoint import Checkpoint
from train.ema import WeightAverage
from train.engine import Engine
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


def save(
    folder: RunFolder,
    step: int,
    state: RunState,
    keep: int,
    engine: Engine,
    memory: Memory,
    average: WeightAverage | None,
) -> None:
    """Write the checkpoint of `step` and remove all but the newest `keep`."""
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "model": {},
        "optim": {},
        "extra": {"rng.cpu": torch.get_rng_state()},
    }
    for name, tensor in engine.state_tensors().items():
        stem, rest = name.split(".", 1)
        tensors[stem][rest] = tensor
    for layer, table in memory.tables.items():
        tensors[f"table_{layer}"] = table.state_shards()
    if torch.cuda.is_available():
        tensors["extra"]["rng.cuda"] = torch.cuda.get_rng_state()
    if average is not None:
        tensors["average"] = average.state_tensors()
    checkpoint.save(folder.checkpoints, Checkpoint(step, tensors, asdict(state)), keep)


def resume(
    folder: RunFolder, prepared: PreparedData, engine: Engine, memory: Memory, average: WeightAverage | None
) -> tuple[int, RunState]:
    """Load the newest checkpoint into the live objects; (step to go on from, state), (0, ...) where there is none.

    Raises:
        ValueError: a damaged checkpoint, or one of other data or another model.
    """
    found = checkpoint.load_latest(folder.checkpoints)
    if found is None:
        return 0, RunState(prepared.fingerprint, prepared.tokenizer_sha256, prepared.compression_sha256)
    check_data(found, prepared, folder.path)
    engine.load_state_tensors(
        {f"{stem}.{name}": tensor for stem in ("model", "optim") for name, tensor in found.tensors[stem].items()}
    )
    for layer, table in memory.tables.items():
        table.load_state_shards(dict(found.tensors[f"table_{layer}"]))
    if average is not None:
        average.load_state_tensors(found.tensors["average"], found.step)
    torch.set_rng_state(found.tensors["extra"]["rng.cpu"])
    if "rng.cuda" in found.tensors["extra"]:
        torch.cuda.set_rng_state(found.tensors["extra"]["rng.cuda"])
    # Earlier checkpoints have the fingerprint alone, which says as much while the data lie prepared.
    sums = {"tokenizer_sha256": prepared.tokenizer_sha256, "compression_sha256": prepared.compression_sha256}
    return found.step, RunState(**(sums | found.state))


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
