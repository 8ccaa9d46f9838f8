"""Several prepared sources read as one: whose turn it is at every position of the training sequence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from train.shards import DataError, PreparedData

PERIOD = 10_000  # sequences after which every source has had exactly its share: weights count to 0.01 %
_SCHEDULE = 2**31  # tells the schedule's random numbers from those of the sources' orders, [seed, epoch, source]


def shares(weights: Sequence[float]) -> list[int]:
    """Sequences of each source in PERIOD: weights over their sum by largest remainders, the first on a tie.

    The weights are not negative and their sum is positive.
    """
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * PERIOD
    result = np.floor(exact).astype(np.int64)
    largest = np.argsort(result - exact, kind="stable")
    result[largest[: PERIOD - int(result.sum())]] += 1
    return [int(share) for share in result]


class Schedule:
    """Which source the n-th sequence of a run comes from, as a pure function of (shares, seed, n).

    In every period of P = sum(shares) sequences source i comes exactly shares_i times: its j-th sequence at the random
    time (j + u) / shares_i, u uniform in [0, 1), and the period is all of them in the order of their times. So shares
    hold all along, not only on average: of the first n sequences at most 1 + w (k - 2) more or fewer than n w are
    those of a source with weight w = shares_i / P among k >= 2 sources.
    """

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        self._shares, self._seed = np.array(shares, dtype=np.int64), seed
        self._length = int(self._shares.sum())
        self._periods: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, number of this sequence within its source) of the positions first ... last - 1, two (n,) arrays."""
        sources, numbers = [], []
        while first < last:
            period, start = divmod(first, self._length)
            stop = min(self._length, start + last - first)
            order, occurrence = self._period(period)
            sources.append(order[start:stop])
            numbers.append(occurrence[start:stop] + period * self._shares[order[start:stop]])
            first += stop - start
        return np.concatenate(sources), np.concatenate(numbers)

    def counts(self, position: int) -> np.ndarray:
        """(sources,) sequences of each source before `position`."""
        period, start = divmod(position, self._length)
        within = np.bincount(self._period(period)[0][:start], minlength=len(self._shares))
        return period * self._shares + within

    def _period(self, period: int) -> tuple[np.ndarray, np.ndarray]:
        if period not in self._periods:
            self._periods = {p: order for p, order in self._periods.items() if p == period - 1}
            occurrence = np.concatenate([np.arange(share) for share in self._shares])
            sources = np.repeat(np.arange(len(self._shares)), self._shares)
            jitter = np.random.default_rng([self._seed, period, _SCHEDULE]).random(self._length)
            order = np.argsort((occurrence + jitter) / self._shares[sources], kind="stable")
            self._periods[period] = sources[order], occurrence[order]
        return self._periods[period]


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    label: str
    share: int  # sequences of PERIOD; 0: validates only
    data: PreparedData

    @property
    def weight(self) -> float:
        """Share of the sequences, which is that of the tokens."""
        return self.share / PERIOD


@dataclass(frozen=True)
class MixedData(PreparedData):
    """Several prepared sources with one tokenizer; what describes tokens is that of the first.

    `num_train_tokens` are the tokens of the mixture after which the first of its sources begins a second epoch,
    `num_val_tokens` those of all sources, `bytes_per_token_val` the weighted mean. Shards are those of the parts.
    """

    parts: tuple[Part, ...]

    @cached_property
    def compression_sha256(self) -> str:
        """SHA-256 (hex) of the compression table's file."""
        return self.parts[0].data.compression_sha256


def parts_of(prepared: PreparedData) -> tuple[Part, ...]:
    """The sources of a mixture; one without a label where there is none."""
    return prepared.parts if isinstance(prepared, MixedData) else (Part("", PERIOD, prepared),)


def mix(root: Path, labels: Sequence[str], weights: Sequence[float], sources: Sequence[PreparedData]) -> MixedData:
    """One data set of several with the same tokenizer.

    Args:
        root: folder that messages name.
        labels: names of the sources.
        weights: shares of the sequences, over their sum.
        sources: what lies prepared.

    Raises:
        DataError: the sources' token ids mean different text.
    """
    first = sources[0]
    for label, other in zip(labels, sources, strict=True):
        differs = [
            what
            for what, mine, theirs in (
                ("tokenizer", first.tokenizer_sha256, other.tokenizer_sha256),
                ("end of a document", first.eos_id, other.eos_id),
                ("compression of token ids", first.compression_sha256, other.compression_sha256),
            )
            if mine != theirs
        ]
        if differs:
            raise DataError(
                f"data.mixture: the {' and the '.join(differs)} of source {label} ({other.path}) is not that of source "
                f"{labels[0]} ({first.path}), and one model reads one kind of tokens; prepare {label} with "
                f"data.tokenizer={first.tokenizer_path}, or give the settings of its text in the place of `prepared`"
            )
    parts = tuple(Part(label, share, data) for label, share, data in zip(labels, shares(weights), sources, strict=True))
    return MixedData(
        path=root,
        fingerprint=_fingerprint(parts),
        vocab_size=first.vocab_size,
        eos_id=first.eos_id,
        pad_id=first.pad_id,
        num_train_tokens=min(part.data.num_train_tokens * PERIOD // part.share for part in parts if part.share > 0),
        num_val_tokens=sum(part.data.num_val_tokens for part in parts),
        bytes_per_token_val=sum(part.weight * part.data.bytes_per_token_val for part in parts),
        compression_table=first.compression_table,
        tokenizer_path=first.tokenizer_path,
        provenance=_provenance(parts),
        shards={},
        parts=parts,
    )


def _fingerprint(parts: Sequence[Part]) -> str:
    """Identity of a mixture: which data in which order and shares. Labels are no part of it."""
    identity = {"period": PERIOD, "parts": [[part.data.fingerprint, part.share] for part in parts]}
    return hashlib.sha256(json.dumps(identity, separators=(",", ":")).encode()).hexdigest()


def _provenance(parts: Sequence[Part]) -> dict[str, Any]:
    """Counts of all sources together, and what is known of each."""
    counts = ("documents_read", "bytes_read", "exact_duplicates", "near_duplicates")
    return {
        **{name: sum(part.data.provenance.get(name, 0) for part in parts) for name in counts},
        "mixture": {
            part.label: {"weight": part.weight, "fingerprint": part.data.fingerprint, **part.data.provenance}
            for part in parts
        },
    }
