"""Rows of a file kept in RAM."""

from collections.abc import Mapping

import torch
from torch import Tensor


class CachedStore:
    """A store in a file, before which the rows in use lie in RAM.

    What is read and is not there is brought in, instead of rows chosen by the clock algorithm (Corbato 1968): a
    hand goes round the slots, spares those read again since it last came by, and takes the others. So rows that were
    drawn once leave before rows that are drawn often. Changed rows are written to the file when they leave or at
    `flush`. Where a step draws more rows than there are slots, the rest is read from and written to the file.

    Args:
        arrays: the file's, by name, with equally many rows each (`train.memory.store`).
        num_slots: rows kept in RAM; beside them 4 bytes for every row of the table, to find them.
    """

    def __init__(self, arrays: dict[str, Tensor], num_slots: int) -> None:
        self.arrays = arrays
        num_rows = len(arrays["weight"])
        self.num_slots = max(1, min(num_slots, num_rows))
        self._kept = {
            name: torch.empty((self.num_slots, *array.shape[1:]), dtype=array.dtype)
            for name, array in arrays.items()
            if len(array)
        }
        self._slot_of = torch.full((num_rows,), -1, dtype=torch.int32)  # -1: not in RAM
        self._row_of = torch.full((self.num_slots,), -1, dtype=torch.int64)
        self._again = torch.zeros(self.num_slots, dtype=torch.bool)  # read again since the hand came by
        self._dirty = torch.zeros(self.num_slots, dtype=torch.bool)
        self._hand = 0
        self.lookups = 0  # rows looked up, repeats counted
        self.hits = 0  # those of them that were in RAM

    def lookup(self, rows: Tensor, out: Tensor) -> None:
        """Copies rows of `weight`; what was missing is then in RAM as far as there is room."""
        slots = self._slots(rows)
        here = slots >= 0
        self.lookups += len(rows)
        self.hits += int(here.sum())
        self._again[slots[here]] = True
        if not here.all():
            slots = self._bring(rows[~here].unique(), rows)
        self._copy("weight", rows, slots, out)

    def read(self, rows: Tensor) -> dict[str, Tensor]:
        """Copies of rows of every array."""
        slots = self._slots(rows)
        if bool((slots < 0).any()):
            slots = self._bring(rows[slots < 0], rows)
        values = {name: kept.new_empty((len(rows), *kept.shape[1:])) for name, kept in self._kept.items()}
        for name, value in values.items():
            self._copy(name, rows, slots, value)
        return values

    def write(self, rows: Tensor, values: Mapping[str, Tensor]) -> None:
        """Puts values into rows, in RAM where they are there."""
        slots = self._slots(rows)
        here = slots >= 0
        inside, outside = slots[here], rows[~here]
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
        self._slot_of.fill_(-1)
        self._row_of.fill_(-1)
        self._dirty.zero_()
        self._again.zero_()

    def _slots(self, rows: Tensor) -> Tensor:
        return self._slot_of.index_select(0, rows).long()

    def _copy(self, name: str, rows: Tensor, slots: Tensor, out: Tensor) -> None:
        outside = slots < 0
        torch.index_select(self._kept[name], 0, slots.clamp(min=0), out=out)
        if bool(outside.any()):
            out[outside] = self.arrays[name].index_select(0, rows[outside])

    def _bring(self, missing: Tensor, rows: Tensor) -> Tensor:
        """Brings distinct missing rows in, as many as there are slots; the slots of `rows` afterwards."""
        missing = missing[: self.num_slots]
        slots = self._free_slots(len(missing))
        for name, kept in self._kept.items():
            kept.index_copy_(0, slots, self.arrays[name].index_select(0, missing))
        self._row_of[slots] = missing
        self._slot_of[missing] = slots.int()
        self._again[slots] = False
        return self._slots(rows)

    def _free_slots(self, wanted: int) -> Tensor:
        """Empties that many slots and returns them; the hand goes at most twice round."""
        chosen = []
        while wanted:
            ahead = torch.arange(self._hand, self._hand + min(self.num_slots, 2 * wanted + 64)) % self.num_slots
            taken = (~self._again[ahead]).nonzero()[:wanted, 0]
            passed = int(taken[-1]) + 1 if len(taken) == wanted else len(ahead)
            slots = ahead[taken]
            self._again[ahead[:passed]] = False
            self._again[slots] = True  # so that the second round does not take them again
            self._hand = (self._hand + passed) % self.num_slots
            wanted -= len(slots)
            chosen.append(slots)
        slots = torch.cat(chosen)
        self._write_back(slots[self._dirty[slots]])
        old = self._row_of[slots]
        self._slot_of[old[old >= 0]] = -1
        return slots

    def _write_back(self, slots: Tensor) -> None:
        rows = self._row_of[slots]
        for name, kept in self._kept.items():
            self.arrays[name].index_copy_(0, rows, kept.index_select(0, slots))
        self._dirty[slots] = False
