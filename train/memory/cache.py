"""Rows of a file kept in RAM."""

from collections.abc import Mapping

import torch
from torch import Tensor


class CachedStore:
    """A store in a file, before which the rows in use lie in RAM.

    What is read and is not there is brought in, in the place of rows chosen by the clock algorithm (Corbato 1968): a
    hand goes round the places, spares those read again since it last came by, and takes the others. So rows that were
    drawn once leave before rows that are drawn often. Changed rows are written to the file when they leave or at
    `flush`. Where a step draws more rows than there are places, the rest is read from and written to the file.

    Args:
        arrays: the file's, by name, with equally many rows each (`train.memory.store`).
        num_places: rows kept in RAM; beside them 4 bytes for every row of the table, to find them.
    """

    def __init__(self, arrays: dict[str, Tensor], num_places: int) -> None:
        self.arrays = arrays
        num_rows = len(arrays["weight"])
        self.num_places = max(1, min(num_places, num_rows))
        self._kept = {
            name: torch.empty((self.num_places, *array.shape[1:]), dtype=array.dtype)
            for name, array in arrays.items()
            if len(array)
        }
        self._place_of = torch.full((num_rows,), -1, dtype=torch.int32)  # -1: not in RAM
        self._row_of = torch.full((self.num_places,), -1, dtype=torch.int64)
        self._again = torch.zeros(self.num_places, dtype=torch.bool)  # read again since the hand came by
        self._dirty = torch.zeros(self.num_places, dtype=torch.bool)
        self._hand = 0
        self.lookups = 0  # rows looked up, repeats counted
        self.hits = 0  # those of them that were in RAM

    def lookup(self, rows: Tensor, out: Tensor) -> None:
        """Copies rows of `weight`; what was missing is then in RAM as far as there is room."""
        places = self._places(rows)
        here = places >= 0
        self.lookups += len(rows)
        self.hits += int(here.sum())
        self._again[places[here]] = True
        if not here.all():
            places = self._bring(rows[~here].unique(), rows)
        self._copy("weight", rows, places, out)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Copies of rows of every array."""
        places = self._places(rows)
        if bool((places < 0).any()):
            places = self._bring(rows[places < 0], rows)
        values = {name: kept.new_empty((len(rows), *kept.shape[1:])) for name, kept in self._kept.items()}
        for name, value in values.items():
            self._copy(name, rows, places, value)
        return values

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Puts values into rows, in RAM where they are there."""
        places = self._places(rows)
        here = places >= 0
        inside, outside = places[here], rows[~here]
        self._dirty[inside] = True
        for name, value in values.items():
            self._kept[name].index_copy_(0, inside, value[here])
            if len(outside):
                self.arrays[name].index_copy_(0, outside, value[~here])

    def flush(self) -> None:
        """Writes changed rows to the file."""
        self._write_back(self._dirty.nonzero()[:, 0])

    def forget(self) -> None:
        """Empties the cache without writing anything."""
        self._place_of.fill_(-1)
        self._row_of.fill_(-1)
        self._dirty.zero_()
        self._again.zero_()

    def _places(self, rows: Tensor) -> Tensor:
        return self._place_of.index_select(0, rows).long()

    def _copy(self, name: str, rows: Tensor, places: Tensor, out: Tensor) -> None:
        outside = places < 0
        torch.index_select(self._kept[name], 0, places.clamp(min=0), out=out)
        if bool(outside.any()):
            out[outside] = self.arrays[name].index_select(0, rows[outside])

    def _bring(self, missing: Tensor, rows: Tensor) -> Tensor:
        """Brings distinct missing rows in, as many as there are places; the places of `rows` afterwards."""
        missing = missing[: self.num_places]
        places = self._free_places(len(missing))
        for name, kept in self._kept.items():
            kept.index_copy_(0, places, self.arrays[name].index_select(0, missing))
        self._row_of[places] = missing
        self._place_of[missing] = places.int()
        self._again[places] = False
        return self._places(rows)

    def _free_places(self, wanted: int) -> Tensor:
        """Empties that many places and returns them; the hand goes at most twice round."""
        chosen = []
        while wanted:
            ahead = torch.arange(self._hand, self._hand + min(self.num_places, 2 * wanted + 64)) % self.num_places
            taken = (~self._again[ahead]).nonzero()[:wanted, 0]
            passed = int(taken[-1]) + 1 if len(taken) == wanted else len(ahead)
            places = ahead[taken]
            self._again[ahead[:passed]] = False
            self._again[places] = True  # so that the second round does not take them again
            self._hand = (self._hand + passed) % self.num_places
            wanted -= len(places)
            chosen.append(places)
        places = torch.cat(chosen)
        self._write_back(places[self._dirty[places]])
        old = self._row_of[places]
        self._place_of[old[old >= 0]] = -1
        return places

    def _write_back(self, places: Tensor) -> None:
        rows = self._row_of[places]
        for name, kept in self._kept.items():
            self.arrays[name].index_copy_(0, rows, kept.index_select(0, places))
        self._dirty[places] = False
