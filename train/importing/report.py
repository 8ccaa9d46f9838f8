"""What became of every tensor of a checkpoint, and where every tensor of our model came from."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from rich.table import Column, Table


class Fate(str, Enum):
    """How a tensor of our model got its values."""

    loaded = "loaded"  # as they are in the checkpoint
    transformed = "transformed"  # joined, stacked, transposed or reordered; no value was changed
    new = "new"  # the checkpoint has nothing for it


@dataclass(frozen=True)
class Own:
    """One tensor of our model."""

    name: str
    parameters: int
    fate: Fate
    how: str  # what was done, or how it was initialised
    sources: list[str]  # tensors of the checkpoint; none for a new one


@dataclass(frozen=True)
class Left:
    """One tensor of the checkpoint that went nowhere."""

    name: str
    parameters: int
    why: str


@dataclass
class Report:
    """The account of one import; `own` and `ignored` name every tensor of both sides exactly once."""

    source: str  # folder
    own: list[Own]
    ignored: list[Left]
    notes: list[str] = field(default_factory=list)

    def parameters(self, fate: Fate) -> int:
        """Of all tensors with that fate."""
        return sum(tensor.parameters for tensor in self.own if tensor.fate is fate)

    def to_dict(self) -> dict[str, Any]:
        """Totals, then every tensor."""
        totals = {fate.value: self.parameters(fate) for fate in Fate}
        totals["ignored in the source"] = sum(tensor.parameters for tensor in self.ignored)
        return {
            "source": self.source,
            "parameters": totals,
            "notes": self.notes,
            **{fate.value: [asdict(tensor) for tensor in self.own if tensor.fate is fate] for fate in Fate},
            "ignored": [asdict(tensor) for tensor in self.ignored],
        }

    def table(self) -> Table:
        """One line for all tensors that differ only in numbers (layers, experts) and shared their fate."""
        table = Table("fate", Column("tensors", overflow="fold"), "of", "parameters", "how")
        for fate in Fate:
            rows = [(tensor.name, tensor.how, tensor.parameters) for tensor in self.own if tensor.fate is fate]
            _add_rows(table, fate.value, rows)
        _add_rows(table, "ignored", [(tensor.name, tensor.why, tensor.parameters) for tensor in self.ignored])
        return table


def _add_rows(table: Table, fate: str, rows: Iterable[tuple[str, str, int]]) -> None:
    grouped: dict[tuple[str, str], list[int]] = {}
    for name, how, parameters in rows:
        grouped.setdefault((re.sub(r"\d+", "*", name), how), []).append(parameters)
    for (name, how), counts in grouped.items():
        table.add_row(fate, name, str(len(counts)), f"{sum(counts):,}", how)
