"""What this rank holds of a run's state: live ranges of named global tensors, to be saved and to be filled.

A rank saves what it owns, and fills all that it holds: parameters that every rank holds alike are owned in shares, a
fragment of ZeRO's, an expert or a row of a table by its one holder.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from train.pieces import Piece
from train.ranks import part


@dataclass(frozen=True)
class Held:
    """Elements [start, start + values.numel()) of the flattened global tensor `name`, live on this rank."""

    name: str
    shape: tuple[int, ...]  # of the global tensor
    start: int
    values: Tensor  # contiguous, of any shape
    owned: range  # positions in the flattened `values` that this rank saves; over all ranks, each element once
    in_place: bool = False  # see `Piece`

    def piece(self) -> Piece | None:
        """What this rank saves of it; None where that is nothing."""
        if not self.owned:
            return None
        if len(self.owned) == self.values.numel() == _numel(self.shape):
            return Piece(self.name, self.shape, 0, self.values.detach(), self.in_place)
        data = self.values.detach().view(-1)[self.owned.start : self.owned.stop]
        return Piece(self.name, self.shape, self.start + self.owned.start, data, self.in_place)


def alike(name: str, tensor: Tensor, index: int = 0, count: int = 1) -> Held:
    """A whole tensor that `count` ranks hold alike, of which this one is number `index`."""
    return Held(name, tuple(tensor.shape), 0, tensor, part(tensor.numel(), index, count))


def slice_of(
    name: str, tensor: Tensor, num_rows: int, first_row: int, index: int = 0, count: int = 1, in_place: bool = False
) -> Held:
    """Rows from `first_row` on of a tensor of `num_rows`, held alike by `count` ranks, of which this one is `index`."""
    shape = (num_rows, *tensor.shape[1:])
    return Held(name, shape, first_row * _numel(shape[1:]), tensor, part(tensor.numel(), index, count), in_place)


def pieces_of(held: Iterable[Held]) -> list[Piece]:
    """What this rank saves."""
    return [piece for one in held if (piece := one.piece()) is not None]


def check_fits(held: Iterable[Held], stored: Mapping[str, tuple[int, ...]], stem: str, names: Iterable[str]) -> None:
    """Compare a checkpoint's tensors {name: shape} of one stem with those of the live objects.

    `names` are all of the live objects' names, also those of which this rank holds nothing.

    Raises:
        ValueError: naming the first tensors that are missing, surplus, or of another shape.
    """
    # Tensors without an element (a frozen table's moments) have no piece, and nobody misses them.
    given = {name: shape for name, shape in stored.items() if name.startswith(f"{stem}.") and 0 not in shape}
    own: dict[str, tuple[int, ...] | None] = dict.fromkeys(names)
    _refuse_others(own | {one.name: one.shape for one in held}, given)


def check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """The same for whole tensors by name."""
    _refuse_others(*({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (own, given)))


def _refuse_others(own: Mapping[str, tuple[int, ...] | None], given: Mapping[str, tuple[int, ...]]) -> None:
    """`own` has None where this rank does not know the shape."""
    missing, surplus = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(name for name, shape in own.items() if shape is not None and given.get(name, shape) != shape)
    if missing or surplus or wrong:
        raise ValueError(
            "the checkpoint does not fit this model: "
            f"missing {missing[:3]} ({len(missing)}), surplus {surplus[:3]} ({len(surplus)}), "
            f"other shapes {wrong[:3]} ({len(wrong)}); resume with the configuration that wrote it"
        )


def _numel(shape: tuple[int, ...]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
