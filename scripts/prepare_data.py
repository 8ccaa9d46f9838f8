"""Prepare data once, before any run: `python -m scripts.prepare_data data=python data.vocab_size=4096`.

Takes the overrides of the config group `data` (conf/data/*.yaml); see docs/data.md.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.data import DataConfig
from train.prepare import prepare


@dataclass
class PrepareDataConfig:
    """The config group `data` alone."""

    defaults: list[Any] = field(default_factory=lambda: ["_self_", {"data": "python"}])
    data: DataConfig = field(default_factory=DataConfig)


def main(overrides: list[str]) -> int:
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        print(OmegaConf.to_yaml(OmegaConf.structured(DataConfig)))
        return 0
    ConfigStore.instance().store(name="prepare_data", node=PrepareDataConfig)
    started = time.monotonic()
    try:
        with initialize_config_module("conf", version_base="1.3"):
            cfg = OmegaConf.to_object(compose("prepare_data", overrides).data)
        assert isinstance(cfg, DataConfig)
        prepared = prepare(cfg)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = (
            f" ({str(error.__cause__).splitlines()[0]})"
            if isinstance(error, HydraException) and error.__cause__
            else ""
        )
        print(f"error: {error}{cause}", file=sys.stderr)
        return 1
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
