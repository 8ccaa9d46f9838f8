"""The first numbers of a table, drawn piece by piece."""

import torch
from torch import Tensor

from models.initialize import seed_from_name

# torch fills a CPU tensor with normal numbers in groups of this many, and draws the last group anew where it is short.
_GROUP = 16
_PIECE = 2**20  # numbers drawn at once, 4 MiB


@torch.no_grad()
def fill(weight: Tensor, init_std: float, seed: int, layer: int, first_row: int = 0, total_rows: int = 0) -> None:
    """Gives rows [first_row, first_row + len(weight)) of a table the values that `LocalTable` has there on a CPU.

    One generator makes all numbers of a table in order, so the numbers before the first row are drawn too and thrown
    away; the memory needed is that of one piece. Lower precision takes the nearest value.

    Args:
        weight: (rows, M) on a CPU, written.
        init_std: standard deviation.
        seed: of the run.
        layer: the table's.
        first_row: the first row of this part.
        total_rows: rows of the whole table; 0: this part ends it.
    """
    num_rows, width = weight.shape
    total = (total_rows or first_row + num_rows) * width
    first, last = first_row * width, (first_row + num_rows) * width
    flat = weight.view(-1)
    generator = torch.Generator().manual_seed(seed_from_name(seed, f"memory.{layer}"))
    start = 0
    while start < last:
        end = min(start + _PIECE, total)
        if total - end < _GROUP:  # a piece of its own would be too short for the groups
            end = total
        numbers = torch.empty(end - start).normal_(0, init_std, generator=generator)
        low, high = max(start, first), min(end, last)
        if low < high:
            flat[low - first : high - first] = numbers[low - start : high - start]
        start = end
