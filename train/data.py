"""Batches as a pure function of (seed, step), read from prepared token shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

import torch

from train.dedup import DedupConfig
from train.shards import PreparedData
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
    document_separator: str | None = None  # datasets: cuts .txt and .md files into documents; None: a file is one
    val_fraction: float = 0.02  # datasets: share of documents held out, chosen by the hash of their text
    fingerprint: str = ""  # identity of the prepared data, filled when a plan is made, checked at start; "" takes any

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_BPE_VOCAB and self.tokenizer is None:
            raise ValueError(f"data.vocab_size={self.vocab_size} must be at least {MIN_BPE_VOCAB}: 256 bytes and EOS")
        if self.max_documents is not None and self.max_documents < 2:
            raise ValueError(f"data.max_documents={self.max_documents} must be at least 2: one to validate; or null")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"data.val_fraction={self.val_fraction} must lie between 0 and 1; the usual value is 0.02")
        if self.source is DataSource.datasets and self.path is not None and self.data_files:
            raise ValueError("data.path and data.data_files are both set; give one of them, the other stays empty")
        if self.source is DataSource.datasets and self.val_split is not None and self.val_files:
            raise ValueError("data.val_split and data.val_files are both set; give one of them")


@dataclass
class Batch:
    """One batch of windows of the token stream.

    All three tensors are int64 of shape (B, S).
    """

    token_ids: torch.Tensor  # (B, S) inputs
    targets: torch.Tensor  # (B, S) next token, IGNORE_INDEX where it belongs to another document than the input
    document_ids: torch.Tensor  # (B, S) 0, 1, ... counting documents inside the window


class TrainBatches:
    """The training stream as a pure function of (seed, step)."""

    def __init__(self, prepared: PreparedData, seq_len: int, global_batch_size: int, seed: int) -> None:
        raise NotImplementedError

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens read in one pass over the training windows."""
        raise NotImplementedError

    def batch(self, step: int) -> Batch:
        """Batch of 0-based `step`: (global_batch_size, seq_len)."""
        raise NotImplementedError

    def epoch(self, step: int) -> int:
        """0-based epoch of the last window of `step`'s batch."""
        raise NotImplementedError

    def epochs_needed(self, max_steps: int) -> float:
        """max_steps * windows per batch / windows per epoch; above 1 the run reads text twice."""
        raise NotImplementedError


def validation_batches(
    prepared: PreparedData, seq_len: int, micro_batch_size: int, max_tokens: int
) -> Iterator[Batch]:
    """Fixed windows spread evenly over the validation split, the same for every trial."""
    raise NotImplementedError


def check_fits(prepared: PreparedData, vocab_size: int, seq_len: int) -> None:
    """Raise ValueError where the model's vocabulary or sequence length does not fit the prepared data."""
    raise NotImplementedError
