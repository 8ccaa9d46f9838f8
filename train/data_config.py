"""The settings of data: where text comes from, its tokenizer, and mixtures of several sources. Imports no torch."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import ClassVar

from train.dedup import DedupConfig
from train.mixture import PERIOD, shares
from train.tokenizer import MIN_BPE_VOCAB


class DataSource(str, Enum):
    """Where documents come from."""

    python = "python"  # the embedded corpus: standard library and pinned packages, no download
    datasets = "datasets"  # a Hugging Face dataset, or local text, jsonl and parquet files


# Whole top-level packages, 4 % of the text, from the kinds of code that the training packages hold: networking and
# parsing in the standard library, arrays and plots, arithmetic, data frames and hub access, a web framework, templates.
VAL_PACKAGES = ("asyncio", "datasets", "email", "jinja2", "mpl_toolkits", "mpmath", "werkzeug")


@dataclass
class TextConfig:
    """Where the text of one data set comes from, and what of it validates."""

    SETTING: ClassVar[str] = "data"  # where these fields stand, for messages

    source: DataSource = DataSource.python
    max_documents: int | None = None  # fewer documents: evenly spread (python), the first ones (datasets)
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

    def __post_init__(self) -> None:
        at = self.SETTING
        if self.document_separator == "":
            raise ValueError(f"{at}.document_separator is empty; give the text between documents, or null")
        if self.max_documents is not None and self.max_documents < 2:
            raise ValueError(f"{at}.max_documents={self.max_documents} must be at least 2: one to validate; or null")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"{at}.val_fraction={self.val_fraction} must lie between 0 and 1; the usual value is 0.02")
        if self.source == DataSource.python and (self.path is not None or self.data_files or self.val_files):
            raise ValueError(
                f"{at}.path, {at}.data_files and {at}.val_files belong to {at}.source=datasets; set "
                f"{'data' if at == 'data' else 'source'}=datasets"
            )
        if self.path is not None and self.data_files:
            raise ValueError(f"{at}.path and {at}.data_files are both set; give one of them, the other stays empty")
        if self.val_split is not None and (self.val_files or self.path is None):
            raise ValueError(f"{at}.val_split is a split of {at}.path; with local files give {at}.val_files instead")

    def changed_text_settings(self) -> list[str]:
        """Names of the fields of the text that are not at their defaults."""
        default = TextConfig()
        return [f.name for f in fields(TextConfig) if getattr(self, f.name) != getattr(default, f.name)]


@dataclass
class MixtureSource(TextConfig):
    """One source of a mixture: its weight, and the settings of its text or a folder that lies prepared."""

    SETTING: ClassVar[str] = "data.mixture[...]"

    weight: float = 1.0  # share of the sequences, over the sum of all weights; 0: validates only
    label: str = ""  # its name in metrics and results; empty: that of the folder, the dataset, the first file
    prepared: str | None = None  # name of a prepared folder below data.root, in the place of settings of the text

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.weight) or self.weight < 0:
            raise ValueError(
                f"data.mixture: weight={self.weight} of source {self.title} must be a number of at least 0; 0 leaves "
                "its text to validation"
            )
        if self.label and not re.fullmatch(r"[A-Za-z0-9._-]+", self.label):
            raise ValueError(
                f"data.mixture: label={self.label} names metrics and must hold letters, digits, '.', '_' and '-' "
                f"alone; nearest: {_as_label(self.label)}"
            )
        changed = self.changed_text_settings()
        if self.prepared is not None and changed:
            raise ValueError(
                f"data.mixture: source {self.title} gives prepared={self.prepared}, beside which {', '.join(changed)} "
                "has no effect; leave one of the two out"
            )

    @property
    def title(self) -> str:
        """The source's name in metrics, results and messages."""
        name = self.prepared or self.path or (self.data_files[0] if self.data_files else self.source.value)
        return self.label or _as_label(Path(name).name)


def _as_label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_") or "source"


@dataclass
class DataConfig(TextConfig):
    """Which text, which tokenizer, which split."""

    root: str = "data"  # folder of prepared data, relative to the working directory
    vocab_size: int = 4096  # ids of the BPE trained here; with `tokenizer`, at least as many as it has
    tokenizer: str | None = None  # None trains a byte-level BPE; else a Hugging Face name, or a folder
    eos_token: str | None = None  # token that ends a document; None asks the tokenizer
    shuffle_seed: int = 0  # order of training documents in the token stream
    dedup: DedupConfig = field(default_factory=DedupConfig)
    mixture: list[MixtureSource] = field(default_factory=list)  # several sources with weights; empty: the text above
    num_workers: int = 0  # processes that prepare; 0: one for each core. The result does not depend on it
    fingerprint: str = ""  # identity of the prepared data, filled when a plan is made, checked at start; "" takes any

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size < MIN_BPE_VOCAB and self.tokenizer is None:
            raise ValueError(f"data.vocab_size={self.vocab_size} must be at least {MIN_BPE_VOCAB}: 256 bytes and EOS")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers} must be at least 1, or 0 for all cores; nearest: 0")
        if self.mixture:
            self._check_mixture()

    def _check_mixture(self) -> None:
        # The config group alone sets `source`; it says nothing that a mixture could contradict.
        idle = [name for name in self.changed_text_settings() if name != "source"]
        if idle:
            raise ValueError(
                f"data.{idle[0]}={getattr(self, idle[0])} has no effect beside data.mixture; write it into the sources "
                "that it is meant for"
            )
        titles = [source.title for source in self.mixture]
        twice = [title for title, count in Counter(titles).items() if count > 1]
        if twice:
            raise ValueError(
                f"data.mixture: {titles.count(twice[0])} sources are called {twice[0]}; give each a label of its own"
            )
        weights = [source.weight for source in self.mixture]
        if not sum(weights) > 0:
            raise ValueError(
                f"data.mixture: the weights of {', '.join(titles)} are all 0, so there is nothing to train on; give at "
                "least one of them a weight above 0"
            )
        for source, share in zip(self.mixture, shares(weights), strict=True):
            if source.weight > 0 and share == 0:
                raise ValueError(
                    f"data.mixture: weight={source.weight} of source {source.title} is less than one sequence of "
                    f"{PERIOD:,}; nearest: {sum(weights) / PERIOD:.3g}, or 0 to validate only"
                )

    def of_source(self, source: MixtureSource) -> DataConfig:
        """The settings by which one source of the mixture is prepared: its text, and what all sources share."""
        text = {f.name: getattr(source, f.name) for f in fields(TextConfig)}
        return replace(self, **text, mixture=[], fingerprint="")

    def content_settings(self) -> dict[str, object]:
        """The settings that decide what one data set holds, as nested dicts."""
        settings = asdict(self)
        for name in ("root", "fingerprint", "mixture", "num_workers"):
            del settings[name]
        return settings

    @property
    def processes(self) -> int:
        """Processes that prepare."""
        return self.num_workers or len(os.sched_getaffinity(0))
