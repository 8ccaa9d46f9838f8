"""Prepare data once, before any run: `python -m scripts.prepare_data data=python data.vocab_size=4096`.

Takes the overrides of the config group `data` (conf/data/*.yaml); see docs/data.md.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import yaml

from train.compose import compose
from train.data_config import DataConfig
from train.identity import to_plain
from train.prepare import prepare


@dataclass
class PrepareDataConfig:
    """The config group `data` alone."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"data": "python"}])
    data: DataConfig = field(default_factory=DataConfig)


def main(overrides: list[str]) -> int:
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        print(yaml.safe_dump({"data": to_plain(DataConfig())}, sort_keys=False))
        return 0
    started = time.monotonic()
    try:
        prepared = prepare(compose(PrepareDataConfig, "prepare_data", "prepare_data", overrides).data)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = prepared.provenance
    print(
        f"{prepared.path}: {prepared.num_train_tokens:,} training and {prepared.num_val_tokens:,} validation tokens, "
        f"{prepared.vocab_size:,} ids, {int(prepared.compression_table.max()) + 1:,} after compression\n"
        f"{source['documents_read']:,} documents of {source['bytes_read'] / 1e6:,.1f} MB read, "
        f"{source['exact_duplicates']:,} exact and {source['near_duplicates']:,} near duplicates removed\n"
        f"fingerprint {prepared.fingerprint} ({time.monotonic() - started:.1f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
