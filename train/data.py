"""Batches as a pure function of (seed, step), read from prepared token shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import torch

from train.dedup import DedupConfig
from train.shards import SPLITS, DataError, PreparedData, TokenStream
from train.tokenizer import MIN_BPE_VOCAB

IGNORE_INDEX = -100  # target positions that carry no loss


class DataSource(str, Enum):
    """Where documents come from."""

    python = "python"  # the embedded corpus: standard library and pinned packages, no download
    datasets = "datasets"  # a Hugging Face dataset, or local text, jsonl and parquet files


# Whole top-level packages, 4 % of the text, from the kinds of code that the training packages hold: networking and
# parsing in the standard library, arrays and plots, arithmetic, data frames and hub access, a web framework, templates.
VAL_PACKAGES = ("asyncio", "datasets", "email", "jinja2", "mpl_toolkits", "mpmath", "werkzeug")


@dataclass
class DataConfig:
    """Which text, which tokenizer, which split."""

    source: DataSource = DataSource.python
    root: str = "data"  # folder of prepared data, relative to the working directory
    vocab_size: int = 4096  # ids of the BPE trained here; with `tokenizer`, at least as many as it has
    tokenizer: str | None = None  # None trains a byte-level BPE; else a Hugging Face name, or a folder
    eos_token: str | None = None  # token that ends a document; None asks the tokenizer
    max_documents: int | None = None  # fewer documents: evenly spread (python), the first ones (datasets)
    shuffle_seed: int = 0  # order of training documents in the token stream
    dedup: DedupConfig = field(default_factory=DedupConfig)
    val_packages: list[str] = field(default_factory=lambda: list(VAL_PACKAGES))  # python: top-level, held out
    path: str | None = None  # datasets: name on the Hugging Face hub, or the folder of a dataset
    name: str | None = None  # datasets: configuration of `path`
    revision: str | None = None  # datasets: commit or tag of `path`; None takes the newest
    split: str = "train"  # datasets: split of `path` to train on
    val_split: str | None = None  # datasets: split of `path` that validates; None holds out val_fraction
    data_files: list[str] = field(default_factory=list)  # datasets: local .txt, .md, .jsonl, .json, .parquet; globs
    val_files: list[str] = field(default_factory=list)  # datasets: local files that validate; none: val_fraction
    text_field: str = "text"  # datasets: column of the text in jsonl and parquet
    document_separator: str | None = None  # datasets: cuts .txt and .md files into documents, "\n" is a line end
    val_fraction: float = 0.02  # datasets: share of documents held out, chosen by the hash of their text
    fingerprint: str = ""  # identity of the prepared data, filled when a plan is made, checked at start; "" takes any

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_BPE_VOCAB and self.tokenizer is None:
            raise ValueError(f"data.vocab_size={self.vocab_size} must be at least {MIN_BPE_VOCAB}: 256 bytes and EOS")
        if self.document_separator == "":
            raise ValueError("data.document_separator is empty; give the text between documents, or null")
        if self.max_documents is not None and self.max_documents < 2:
            raise ValueError(f"data.max_documents={self.max_documents} must be at least 2: one to validate; or null")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1; the usual value is 0.02")
        if self.source == DataSource.python and (self.path is not None or self.data_files or self.val_files):
            raise ValueError(
                "data.path, data.data_files and data.val_files belong to data.source=datasets; set data=datasets"
            )
        if self.path is not None and self.data_files:
            raise ValueError("data.path and data.data_files are both set; give one of them, the other stays empty")
        if self.val_split is not None and (self.val_files or self.path is None):
            raise ValueError("data.val_split is a split of data.path; with local files give data.val_files instead")


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
    tokens = np.stack([stream.read(int(start), seq_len + 1) for start in starts])  # (B, S + 1)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()  # (B, S)
    ends = inputs == eos_id
    targets[ends] = IGNORE_INDEX
    document_ids = np.cumsum(ends, axis=1, dtype=np.int64) - ends
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(document_ids))


class TrainBatches:
    """The training stream as a pure function of (seed, step).

    Window w holds tokens w * S ... w * S + S of the stream: neighbours share one token, the target of the one and the
    first input of the other, so each token is a target once. An epoch visits the windows in the order of a permutation
    drawn from (seed, epoch); batches follow one another across epochs, so a batch may hold windows of two.

    Raises:
        DataError: The split is shorter than one window.
    """

    def __init__(self, prepared: PreparedData, seq_len: int, global_batch_size: int, seed: int) -> None:
        _check_window(prepared, "train", seq_len)
        if global_batch_size < 1 or seed < 0:
            raise ValueError(f"global_batch_size={global_batch_size} must be at least 1, seed={seed} at least 0")
        self._stream, self._eos_id = prepared.train, prepared.eos_id
        self._seq_len, self._global_batch_size, self._seed = seq_len, global_batch_size, seed
        self.num_windows = (len(self._stream) - 1) // seq_len
        self._orders: dict[int, np.ndarray] = {}

    @property
    def tokens_per_epoch(self) -> int:
        """Input tokens of one pass over the windows: num_windows * S."""
        return self.num_windows * self._seq_len

    def batch(self, step: int) -> Batch:
        """Batch of 0-based `step`: (global_batch_size, S), the same for every world size and history."""
        first = step * self._global_batch_size
        chosen = [self._window(position) for position in range(first, first + self._global_batch_size)]
        return windows(self._stream, np.array(chosen) * self._seq_len, self._seq_len, self._eos_id)

    def epoch(self, step: int) -> int:
        """0-based epoch of the last window of `step`'s batch."""
        return ((step + 1) * self._global_batch_size - 1) // self.num_windows

    def epochs_needed(self, max_steps: int) -> float:
        """max_steps * global_batch_size / num_windows; above 1 the run reads some text twice."""
        return max_steps * self._global_batch_size / self.num_windows

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.num_windows)
        if epoch not in self._orders:
            # A batch touches at most two neighbouring epochs unless it is larger than one; older orders are dropped.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self.num_windows)
        return int(self._orders[epoch][index])


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
    for split in SPLITS:
        _check_window(prepared, split, seq_len)


def _check_window(prepared: PreparedData, split: str, seq_len: int) -> None:
    tokens = {"train": prepared.num_train_tokens, "val": prepared.num_val_tokens}[split]
    if not 1 <= seq_len < tokens:
        raise DataError(
            f"model.seq_len={seq_len} must be at least 1 and at most {tokens - 1}: split {split} of {prepared.path} "
            f"has {tokens} tokens, and a window is seq_len + 1 of them; lower model.seq_len or prepare more text"
        )
