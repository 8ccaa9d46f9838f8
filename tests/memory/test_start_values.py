"""Start values drawn in pieces against those of a table drawn at once."""

import pytest
import torch

from models.memory_table import LocalTable
from train.memory import start_values
from train.memory.start_values import fill


@pytest.mark.parametrize("piece", [16, 48, 2**20])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (16, 1), (17, 1), (33, 1), (49, 1), (31, 7), (100, 16)])
def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch, rows: int, width: int, piece: int) -> None:
    """Around every number where torch's groups of 16, or a last piece of fewer than 16, could differ."""
    monkeypatch.setattr(start_values, "_PIECE", piece)
    whole = LocalTable(rows, width, 0.3, seed=6, layer=3).weight
    ours = torch.full((rows, width), float("nan"))
    fill(ours, 0.3, 6, 3)
    assert torch.equal(ours, whole)
    for first in range(0, rows, max(1, rows // 5)):
        last = min(rows, first + rows // 3 + 1)
        part = torch.full((last - first, width), float("nan"))
        fill(part, 0.3, 6, 3, first, rows)
        assert torch.equal(part, whole[first:last]), (first, last)


def test_bf16_is_the_nearest() -> None:
    ours = torch.empty(40, 5, dtype=torch.bfloat16)
    fill(ours, 0.3, 6, 3)
    assert torch.equal(ours, LocalTable(40, 5, 0.3, seed=6, layer=3).weight.bfloat16())
