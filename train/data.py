"""Batches as a pure function of (seed, step), read from prepared token shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from train.data_config import DataConfig, DataSource, MixtureSource
from train.mixture import Schedule, parts_of
from train.shards import SPLITS, DataError, PreparedData, TokenStream

__all__ = [
    "Batch", "DataConfig", "DataSource", "MixtureSource", "TrainBatches", "check_fits", "validation_batches", "windows",
]  # fmt: skip

IGNORE_INDEX = -100  # target positions that carry no loss


@dataclass
class Batch:
    """One batch of windows of the token stream.

    All three tensors are int64 of shape (B, S).
    """

    token_ids: torch.Tensor  # (B, S) inputs
    targets: torch.Tensor  # (B, S) next token, IGNORE_INDEX where it belongs to another document than the input
    document_ids: torch.Tensor  # (B, S) 0, 1, ... counting documents inside the window

    def without_targets(self) -> Batch:
        """The same windows with nothing to predict."""
        return Batch(self.token_ids, torch.full_like(self.targets, IGNORE_INDEX), self.document_ids)


def windows(stream: TokenStream, starts: np.ndarray, seq_len: int, eos_id: int) -> Batch:
    """Batch of the windows that begin at `starts`: inputs t ... t + S - 1, targets one token further.

    A target is IGNORE_INDEX where its input is an end of document, since it opens another document. A window's first
    document has id 0, wherever in the document the window begins.
    """
    return _as_batch([stream.read(int(start), seq_len + 1) for start in starts], eos_id)


def _as_batch(read: list[np.ndarray], eos_id: int) -> Batch:
    tokens = np.stack(read)  # (B, S + 1)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()  # (B, S)
    ends = inputs == eos_id
    targets[ends] = IGNORE_INDEX
    document_ids = np.cumsum(ends, axis=1, dtype=np.int64) - ends
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(document_ids))


class _SourceWindows:
    """The windows of one source, epoch after epoch, each in an order of its own."""

    def __init__(self, prepared: PreparedData, seq_len: int, seed: int, source: int) -> None:
        _check_window(prepared, "train", seq_len)
        self._stream, self._seq_len, self._seed, self._source = prepared.train, seq_len, seed, source
        self.num_windows = (len(self._stream) - 1) // seq_len
        self._orders: dict[int, np.ndarray] = {}

    def read(self, number: int) -> np.ndarray:
        """(S + 1,) tokens of the `number`-th window that is read of this source."""
        epoch, index = divmod(number, self.num_windows)
        if epoch not in self._orders:
            # A batch touches at most two neighbouring epochs unless it is larger than one; older orders are dropped.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            # numpy pads a seed with zeros: the first source's order is that of a run without a mixture, [seed, epoch].
            rng = np.random.default_rng([self._seed, epoch, self._source])
            self._orders[epoch] = rng.permutation(self.num_windows)
        return self._stream.read(int(self._orders[epoch][index]) * self._seq_len, self._seq_len + 1)


class TrainBatches:
    """The training stream as a pure function of (seed, step).

    Window w of a source holds tokens w * S ... w * S + S of its stream: neighbours share one token, the target of the
    one and the first input of the other, so each token is a target once. An epoch visits the windows in the order of a
    permutation drawn from (seed, epoch, source); batches follow one another across epochs, so a batch may hold windows
    of two. Which source a sequence comes from is `train.mixture.Schedule`'s.

    Raises:
        DataError: A split is shorter than one window.
    """

    def __init__(self, prepared: PreparedData, seq_len: int, global_batch_size: int, seed: int) -> None:
        if global_batch_size < 1 or seed < 0:
            raise ValueError(f"global_batch_size={global_batch_size} must be at least 1, seed={seed} at least 0")
        # A source of weight 0 only validates.
        self._parts = [part for part in parts_of(prepared) if part.share > 0]
        self._sources = [_SourceWindows(part.data, seq_len, seed, i) for i, part in enumerate(self._parts)]
        self._schedule = Schedule([part.share for part in self._parts], seed)
        self._eos_id, self._seq_len, self.global_batch_size = prepared.eos_id, seq_len, global_batch_size
        self.num_windows = sum(source.num_windows for source in self._sources)

    @property
    def tokens_per_epoch(self) -> int:
        """Input tokens of one pass over the windows of all sources: num_windows * S."""
        return self.num_windows * self._seq_len

    def batch(self, step: int, first: int = 0, last: int | None = None) -> Batch:
        """Sequences first ... last - 1 of the batch of 0-based `step`, by default all: (last - first, S).

        The same for every world size and history: the batches of ranks that take slices of their own are, one after
        another, the global batch. Nothing is read but the slice.

        Raises:
            IndexError: the slice is empty or leaves the batch.
        """
        last = self.global_batch_size if last is None else last
        if not 0 <= first < last <= self.global_batch_size:
            raise IndexError(f"sequences {first} to {last} of a global batch of {self.global_batch_size}")
        start = step * self.global_batch_size
        sources, numbers = self._schedule.at(start + first, start + last)
        read = [self._sources[i].read(n) for i, n in zip(sources.tolist(), numbers.tolist(), strict=True)]
        return _as_batch(read, self._eos_id)

    def epoch(self, step: int) -> int:
        """0-based epoch of the last window of `step`'s batch; of a mixture, of the source that has been read most."""
        counts = self._schedule.counts((step + 1) * self.global_batch_size)
        return max(0, *((n - 1) // s.num_windows for n, s in zip(counts.tolist(), self._sources, strict=True)))

    def source_epochs(self, num_steps: int) -> dict[str, float]:
        """{label: windows read in `num_steps` steps / windows there are} of a mixture's sources; empty without one."""
        labels = [part.label for part in self._parts if part.label]
        return dict(zip(labels, self._passes(num_steps), strict=True)) if labels else {}

    def source_sequences(self, num_steps: int) -> dict[str, int]:
        """{label: sequences read in `num_steps` steps} of a mixture's sources; empty without one."""
        counts = self._schedule.counts(num_steps * self.global_batch_size).tolist()
        return {part.label: n for part, n in zip(self._parts, counts, strict=True) if part.label}

    def epochs_needed(self, max_steps: int) -> float:
        """Windows read in `max_steps` steps / windows there are, the largest of all sources.

        Above 1 the run reads some text twice.
        """
        return max(self._passes(max_steps))

    def epoch_notes(self, max_steps: int) -> list[str]:
        """A line for each source whose text a run of `max_steps` reads more than once."""
        return [
            f"{epochs:.2f} epochs over {part.data.num_train_tokens:,} training tokens"
            f"{f' of {part.label}' if part.label else ''}: text is read again"
            for part, epochs in zip(self._parts, self._passes(max_steps), strict=True)
            if epochs > 1
        ]

    def _passes(self, num_steps: int) -> list[float]:
        counts = self._schedule.counts(num_steps * self.global_batch_size).tolist()
        return [n / source.num_windows for n, source in zip(counts, self._sources, strict=True)]


def validation_batches(
    prepared: PreparedData, seq_len: int, micro_batch_size: int, max_tokens: int, apart: bool = False
) -> Iterator[Batch]:
    """Fixed windows spread evenly over the validation split, the same for every trial.

    Of the split's n = (tokens - 1) // S windows, m = min(n, max_tokens // S) are read: numbers floor(i * n / m). The
    last batch may be smaller.

    Args:
        prepared: the data.
        seq_len: S.
        micro_batch_size: windows of a batch.
        max_tokens: input tokens of all windows together, at most.
        apart: the same windows, dealt out instead of in a row: of k batches, batch j holds windows j, j + k, j + 2k,
            ..., about n / micro_batch_size windows apart in the text. No batch holds one window alone; where pairs
            leave one over, the first batch holds three.

    Raises:
        DataError: The split is shorter than one window (two with `apart`), or `max_tokens` holds none (or one).
    """
    _check_window(prepared, "val", seq_len)
    if max_tokens < seq_len:
        raise DataError(f"max_tokens={max_tokens} of validation must hold a window of seq_len={seq_len}; raise it")
    available = (prepared.num_val_tokens - 1) // seq_len
    count = min(available, max_tokens // seq_len)
    starts = np.arange(count) * available // count * seq_len
    if apart:
        if count < 2:
            raise DataError(
                f"shuffled rows need two windows of seq_len={seq_len} to validate on, and max_tokens={max_tokens} of "
                f"the split's {prepared.num_val_tokens} tokens hold {count}; nearest: train.eval_tokens={2 * seq_len}"
            )
        num_batches = min(-(-count // micro_batch_size), count // 2)
        return (windows(prepared.val, starts[j::num_batches], seq_len, prepared.eos_id) for j in range(num_batches))
    return (
        windows(prepared.val, starts[i : i + micro_batch_size], seq_len, prepared.eos_id)
        for i in range(0, count, micro_batch_size)
    )


def check_fits(prepared: PreparedData, vocab_size: int, seq_len: int) -> None:
    """Check a model's vocabulary and sequence length against the prepared data.

    Raises:
        DataError: With the setting, its value, the rule and the nearest valid value.
    """
    if vocab_size < prepared.vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size} must be at least {prepared.vocab_size}, the ids of the tokenizer of "
            f"{prepared.path}; set model.vocab_size={prepared.vocab_size} or prepare with a smaller data.vocab_size"
        )
    for part in parts_of(prepared):
        for split in SPLITS if part.share > 0 else SPLITS[1:]:
            _check_window(part.data, split, seq_len)


def _check_window(prepared: PreparedData, split: str, seq_len: int) -> None:
    tokens = {"train": prepared.num_train_tokens, "val": prepared.num_val_tokens}[split]
    if not 1 <= seq_len < tokens:
        raise DataError(
            f"model.seq_len={seq_len} must be at least 1 and at most {tokens - 1}: split {split} of {prepared.path} "
            f"has {tokens} tokens, and a window is seq_len + 1 of them; lower model.seq_len or prepare more text"
        )
