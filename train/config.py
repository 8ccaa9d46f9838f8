"""The root configuration: one dataclass per component, composed by Hydra, seen by nobody below the entry point.

A default lives in the dataclass beside the class that uses it; `conf/` holds only differences. This file joins them,
turns a composed DictConfig into plain objects, and checks what concerns more than one component.
"""

import os
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from models.memory_table import MemoryOptimConfig
from models.transformer import TransformerConfig
from train.data import DataConfig
from train.engine import EngineConfig, resolve_native, resolve_precision
from train.identity import identity_hash
from train.loop import TrainConfig
from train.metrics import LogConfig
from train.optim import OptimConfig
from train.run_folder import SCHEMA_VERSION
from train.schedule import ScheduleConfig


@dataclass
class Config:
    """Everything that defines a run."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryOptimConfig = field(default_factory=MemoryOptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0  # of initialisation and data order
    run_dir: str = "runs/train"  # folder of this run, relative to the working directory


def register_schema() -> None:
    """Make the dataclasses the schema that Hydra checks `conf/` and the command line against."""
    ConfigStore.instance().store(name="train_schema", node=Config)


def from_dictconfig(composed: DictConfig) -> Config:
    """Plain dataclasses from what Hydra composed; unknown settings and wrong types fail with the full path.

    Raises:
        ValueError, omegaconf.errors.OmegaConfBaseException: naming the setting.
    """
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("schema_version", None)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    return config


def load_config(path: Path) -> Config:
    """Read a run's `config.yaml`."""
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return from_dictconfig(loaded)


def to_plain(config: Any) -> Any:
    """Nested dicts of numbers and strings: enums by value, ready for YAML or JSON."""

    def convert(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        return value

    return convert(asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as written to `<run>/config.yaml`; a run can be repeated from it alone."""
    return yaml.safe_dump({"schema_version": SCHEMA_VERSION, **to_plain(config)}, sort_keys=False)


def config_hash(config: Config) -> str:
    """Identity of the run that `config` describes; see `train.identity`."""
    return identity_hash(to_plain(config))


def resolve(config: Config) -> Config:
    """Fill in place what depends on the machine (precision, threads, kernels): it is part of the identity."""
    config.engine.precision = resolve_precision(config.engine.precision)
    if config.engine.num_threads == 0:
        config.engine.num_threads = len(os.sched_getaffinity(0))
    config.engine.native_kernels = resolve_native(config.engine)
    return config


def validate(config: Config) -> None:
    """Check what concerns more than one component.

    Raises:
        ValueError: with the setting, its value, the rule and the nearest valid value.
    """
    per_micro_batch = config.train.micro_batch_size * config.model.seq_len
    wanted = config.train.global_batch_tokens
    if wanted < per_micro_batch or wanted % per_micro_batch:
        below = wanted // per_micro_batch * per_micro_batch
        nearest = f"{below} or {below + per_micro_batch}" if below else str(per_micro_batch)
        raise ValueError(
            f"train.global_batch_tokens={wanted} must be a multiple of train.micro_batch_size * model.seq_len = "
            f"{config.train.micro_batch_size} * {config.model.seq_len} = {per_micro_batch}; nearest: {nearest}"
        )
    if config.schedule.warmup_steps >= config.train.max_steps:
        raise ValueError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} must be < train.max_steps={config.train.max_steps}; "
            f"nearest: {max(0, config.train.max_steps - 1)}"
        )
    if config.model.vocab_size != config.data.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must equal data.vocab_size={config.data.vocab_size}; "
            f"set model.vocab_size={config.data.vocab_size}"
        )
