"""Global tensors dealt out unevenly over ranks, and ranks that write them at once, for tests of checkpoints."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint import Checkpoint
from train.checkpoint_writer import CheckpointWriter, Place, WriterOptions
from train.pieces import Piece

STATE = {"train_seconds": 1.5}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Some of every kind that a run saves: matrices, stacked experts, rows, counts, a scalar, an empty one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model.embed": normal(31, 8),
        "model.experts": normal(5, 7, 3),
        "model.half": normal(13).bfloat16(),
        "optim.embed.step": torch.tensor(float(seed)),
        "optim.embed.exp_avg": normal(31, 8),
        "table_1.weight": normal(101, 4),
        "table_1.step": torch.randint(0, 9, (101,), dtype=torch.int32, generator=generator),
        "table_1.global_step": torch.tensor([seed]),
        "table_1.exp_avg": torch.empty(0, 4),
    }


def deal(named: dict[str, Tensor], world_size: int, seed: int = 0) -> list[list[Piece]]:
    """The pieces of each rank: ranges of random lengths, some empty, some ranks with two of one tensor."""
    chance = random.Random(seed)
    dealt: list[list[Piece]] = [[] for _ in range(world_size)]
    for name, tensor in named.items():
        flat, cuts = tensor.reshape(-1), sorted(chance.randint(0, tensor.numel()) for _ in range(world_size))
        for start, end in zip([0, *cuts], [*cuts, tensor.numel()], strict=True):
            rank = chance.randrange(world_size)
            dealt[rank].append(Piece(name, tuple(tensor.shape), start, flat[start:end].clone()))
    return dealt


def write(
    folder: Path, step: int, dealt: list[list[Piece]], options: WriterOptions | None = None, attempt: str = "a"
) -> Path:
    """All ranks write one checkpoint, in threads; its folder."""
    options = replace(options or WriterOptions(keep=3), timeout_seconds=20)
    with ThreadPoolExecutor(len(dealt)) as pool:

        def save(rank: int) -> None:
            writer = CheckpointWriter(folder, options, Place(rank, len(dealt), attempt))
            writer.save(step, dealt[rank], STATE, final=True)

        list(pool.map(save, range(len(dealt))))
    return folder / f"step_{step:08d}"


def same(found: Checkpoint, named: dict[str, Tensor]) -> bool:
    """Whether a checkpoint holds exactly these tensors, bit for bit."""
    return found.tensors.keys() == named.keys() and all(
        torch.equal(found.tensor(name), tensor) and found.tensor(name).dtype == tensor.dtype
        for name, tensor in named.items()
    )
