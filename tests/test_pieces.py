"""Pieces of global tensors against slices of the whole."""

import math

import pytest
import torch

from train.pieces import DTYPES, Piece, as_bytes, coverage_fault, cut, rows_of, share_of, whole


def flat(piece: Piece, tensor: torch.Tensor) -> bool:
    """Whether a piece holds what the same range of the whole tensor holds."""
    return torch.equal(piece.data.view(-1), tensor.reshape(-1)[piece.start : piece.start + piece.numel])


def test_a_shard_of_rows_is_a_flat_range() -> None:
    tensor = torch.arange(60.0).view(5, 3, 4)
    piece = rows_of("model.experts", 5, 2, tensor[2:4])
    assert (piece.shape, piece.start, piece.numel) == ((5, 3, 4), 24, 24) and flat(piece, tensor)
    assert whole("model.experts", tensor.transpose(0, 1)).data.is_contiguous()
    scalar = whole("optim.step", torch.tensor(3.0))
    assert (scalar.shape, scalar.numel, scalar.is_whole) == ((), 1, True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 4)])
def test_shares_cover_once_and_differ_by_one_element(shape: tuple[int, ...], world_size: int) -> None:
    tensor = torch.arange(float(math.prod(shape))).view(shape)
    shares = [share_of("model.a", tensor, rank, world_size) for rank in range(world_size)]
    assert coverage_fault(tensor.numel(), [(share.start, share.numel) for share in shares]) is None
    assert all(flat(share, tensor) for share in shares)
    assert max(share.numel for share in shares) - min(share.numel for share in shares) <= 1


def test_cut_pieces_hold_the_same_elements() -> None:
    tensor = torch.arange(10.0)
    piece = Piece("model.a", (20,), 7, tensor, in_place=True)
    parts = cut(piece, 12)
    assert [(part.start, part.numel, part.in_place) for part in parts] == [
        (7, 3, True), (10, 3, True), (13, 3, True), (16, 1, True),
    ]  # fmt: skip
    assert torch.equal(torch.cat([part.data for part in parts]), tensor)
    assert cut(piece, 40) == [piece] and len(cut(piece, 1)) == 10


@pytest.mark.parametrize(
    ("ranges", "fault"),
    [
        ([(0, 4), (4, 6)], None),
        ([(4, 6), (0, 4), (4, 0)], None),
        ([(0, 4), (5, 5)], "elements 4 to 5 are in no piece"),
        ([(0, 4)], "elements 4 to 10 are in no piece"),
        ([(0, 6), (4, 6)], "elements 4 to 6 are in two pieces"),
        ([(0, 10), (2, 3)], "elements 2 to 5 are in two pieces"),
        ([(0, 12)], "pieces reach to 12 of 10"),
        ([], "elements 0 to 10 are in no piece"),
    ],
)
def test_coverage(ranges: list[tuple[int, int]], fault: str | None) -> None:
    assert coverage_fault(10, ranges) == fault


def test_every_type_as_bytes() -> None:
    for dtype in DTYPES.values():
        tensor = torch.tensor([[0, 1], [1, 0]]).to(dtype)
        data = as_bytes(tensor)
        assert data.dtype == torch.uint8 and len(data) == 4 * tensor.element_size()
        assert torch.equal(data.view(dtype).view(2, 2), tensor)
    assert len(as_bytes(torch.empty(0, 3))) == 0


def test_what_is_no_piece_is_refused() -> None:
    tensor = torch.arange(6.0)
    with pytest.raises(ValueError, match=r"model.a: elements 4 to 10 do not lie in a tensor of shape \(3, 3\)"):
        Piece("model.a", (3, 3), 4, tensor)
    with pytest.raises(ValueError, match="not contiguous"):
        Piece("model.a", (3, 2), 0, tensor.view(2, 3).t())
    with pytest.raises(ValueError, match="complex64 is not saved; saved are F64"):
        Piece("model.a", (6,), 0, tensor.to(torch.complex64))
