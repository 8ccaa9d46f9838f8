"""The processes of a run: which one this is, and the groups they talk in.

A run is W processes (ranks) that torchrun or the deepspeed launcher starts, one per GPU, or one alone. All of them
hold the dense parameters (ZeRO partitions what it partitions), and each trains on its slice of the global batch. With
expert parallelism of degree P, P neighbouring ranks together hold all experts once; the W / P ranks that hold the same
experts average their gradients. DeepSpeed lays its groups out in the same way.

    W = 4, P = 2:   expert groups [0, 1], [2, 3]   (tokens travel here)
                    expert-data groups [0, 2], [1, 3]   (expert gradients are summed here)
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; the default is a run of one process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among the ranks of this node
    expert_parallel: int = 1  # P
    expert_group: dist.ProcessGroup | None = field(default=None, compare=False)  # None: P = 1
    expert_data_group: dist.ProcessGroup | None = field(default=None, compare=False)  # None: P = 1

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes the run's files and talks to the user."""
        return self.rank == 0

    @property
    def expert_rank(self) -> int:
        """Place in the expert group."""
        return self.rank % self.expert_parallel

    def share(self, count: int) -> range:
        """This rank's part of `count` things dealt to all ranks in a row; parts differ by one at most."""
        return part(count, self.rank, self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same bits on every rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; the same answer on all of them."""
        if self.world_size == 1:
            return flag
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())

    def from_main(self, word: str) -> str:
        """Rank 0's `word`: what every rank would choose by its own measurement must be chosen once."""
        if self.world_size == 1:
            return word
        words = [word]
        dist.broadcast_object_list(words, src=0)
        return words[0]

    def join_lists(self, lines: list[str]) -> list[str]:
        """The lines of all ranks, rank 0's first; the same on each."""
        if self.world_size == 1:
            return lines
        lists: list[list[str]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(lists, lines)
        return [line for several in lists for line in several]

    def take_turns(self, items: Iterable[T], idle: Callable[[T], T]) -> Iterator[T]:
        """Deals `items` out: this rank's are number rank, rank + W, ...

        Every rank gets equally many, since ranks that work together must take part in all collectives: where items run
        out, `idle` makes one that counts for nothing out of another.
        """
        rest = iter(items)
        while turn := list(islice(rest, self.world_size)):
            yield turn[self.rank] if self.rank < len(turn) else idle(turn[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


ALONE = Ranks()  # a run of one process


def part(count: int, index: int, parts: int) -> range:
    """The `index`-th of `parts` runs of neighbours that together are 0 .. count - 1; sizes differ by one at most."""
    return range(index * count // parts, (index + 1) * count // parts)


def world_size() -> int:
    """Number of processes that the launcher says it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes that the launcher started on this machine; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))  # torchrun's, DeepSpeed's name


def join(device_type: str, expert_parallel: int = 1, timeout_seconds: float = 600.0) -> Ranks:
    """Meet the other processes of the run, or open a group of one where no launcher started this one.

    Args:
        device_type: "cuda" talks over NCCL, "cpu" over gloo.
        expert_parallel: P, a divisor of the world size.
        timeout_seconds: a collective that waits longer for a rank ends the process.
    """
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in _LAUNCHER.items())
    if not dist.is_initialized():
        if device_type == "cuda":
            torch.cuda.set_device(local_rank)
        backend, timeout = {"cuda": "nccl", "cpu": "gloo"}[device_type], timedelta(seconds=timeout_seconds)
        if world == 1:
            # A private in-process store: trials that run side by side must not meet on one TCP port.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
    if expert_parallel == 1:
        return Ranks(rank, world, local_rank)
    mine: list[dist.ProcessGroup] = []
    for members in (_expert_groups(world, expert_parallel), _expert_data_groups(world, expert_parallel)):
        groups = [dist.new_group(ranks) for ranks in members]  # every rank makes every group, in one order
        mine.append(next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks))
    return Ranks(rank, world, local_rank, expert_parallel, *mine)


_LAUNCHER = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # what launchers set, and what holds without one


def _expert_groups(world: int, expert_parallel: int) -> list[list[int]]:
    return [list(range(first, first + expert_parallel)) for first in range(0, world, expert_parallel)]


def _expert_data_groups(world: int, expert_parallel: int) -> list[list[int]]:
    return [list(range(first, world, expert_parallel)) for first in range(expert_parallel)]
