"""The root configuration: one dataclass per component, composed by Hydra, seen by nobody below the entry point.

A default lives in the dataclass beside the class that uses it; `conf/` holds only differences. This file joins them and
checks what concerns more than one component.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from models.memory_table import MemoryOptimConfig
from models.transformer import TransformerConfig
from train.compose import compose
from train.data import DataConfig
from train.execution import EngineConfig, Precision, resolve_native, resolve_precision
from train.identity import identity_hash, to_plain
from train.kernel_choice import resolve_expert_kernel
from train.loop import TrainConfig
from train.memory.place import Place, TableConfig
from train.metrics import LogConfig
from train.optim import OptimConfig
from train.ranks import local_world_size, world_size
from train.run_folder import SCHEMA_VERSION
from train.schedule import ScheduleConfig
from train.start import tokenizer_for, weights_sha256


@dataclass
class Config:
    """Everything that defines a run."""

    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryOptimConfig = field(default_factory=MemoryOptimConfig)
    table: TableConfig = field(default_factory=TableConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    seed: int = 0  # of initialisation and data order
    run_dir: str = "runs/train"  # folder of this run, relative to the working directory
    init_from: str | None = None  # folder of an import or a run whose newest weights are the start; null: random ones
    init_sha256: str | None = None  # content of those weights, filled when a run is planned, checked at its start
    # Settings that may differ from those of init_from although the weights then mean something else, each by its name:
    # [model.rotary.yarn] to stretch positions, [data.tokenizer] to give the token ids another meaning.
    init_changes: list[str] = field(default_factory=list)


def compose_config(folder: Path | None, name: str, overrides: list[str]) -> Config:
    """The run that `conf/<name>.yaml`, or `<folder>/<name>.yaml`, describes, with `overrides`; writes nothing.

    Raises:
        ValueError: one line with the setting, its value, and the name that was perhaps meant.
    """
    config = compose(Config, "train_schema", name, overrides, folder)
    idle = next((word for word in overrides if word.startswith("model.moe.num_shared_experts=")), None)
    if idle is not None and config.model.moe is not None and config.model.moe.shared_widths is not None:
        raise ValueError(
            f"{idle} has no effect beside model.moe.shared_widths={config.model.moe.shared_widths}, which gives the "
            "width of the shared expert layer by layer; set model.moe.shared_widths=null too, or change the widths"
        )
    return config


def load_config(path: Path) -> Config:
    """Read a run's `config.yaml`.

    Raises:
        ValueError: it is not one.
    """
    try:
        return compose(Config, "train_schema", path.stem, [], path.parent)
    except ValueError as error:
        raise ValueError(f"{path} is not the configuration of a run ({error})") from error


def to_yaml(config: Config) -> str:
    """The resolved configuration as written to `<run>/config.yaml`; a run can be repeated from it alone."""
    return yaml.safe_dump({"schema_version": SCHEMA_VERSION, **to_plain(config)}, sort_keys=False)


def config_hash(config: Config) -> str:
    """Identity of the run that `config` describes; see `train.identity`."""
    return identity_hash(to_plain(config))


def resolve(config: Config) -> Config:
    """Fill in place what lies outside (the machine, the weights to start from): it is part of the identity.

    Raises:
        ValueError: kernels that cannot run here, no weights in `init_from`, or none of their tokenizer.
    """
    if config.init_from is not None and config.init_sha256 is None:
        config.init_sha256 = weights_sha256(Path(config.init_from))
        config.data.tokenizer = tokenizer_for(Path(config.init_from), config)
    config.engine.precision = resolve_precision(config.engine.precision)
    if config.engine.num_threads == 0:
        config.engine.num_threads = max(1, len(os.sched_getaffinity(0)) // local_world_size())
    config.engine.native_kernels = resolve_native(config.engine)
    if config.model.moe is not None:
        num_tokens = config.train.micro_batch_size * config.model.seq_len
        precision = torch.bfloat16 if config.engine.precision is Precision.bf16 else torch.float32
        config.model.moe.expert_kernel = resolve_expert_kernel(config.model, num_tokens, precision)
    return config


def validate(config: Config) -> None:
    """Check what concerns more than one component.

    Raises:
        ValueError: with the setting, its value, the rule and the nearest valid value.
    """
    if not config.run_dir.strip():
        raise ValueError("run_dir= is empty: every run needs a folder of its own; usual: run_dir=runs/mine")
    if config.init_from is None and config.init_sha256 is not None:
        raise ValueError(
            f"init_sha256={config.init_sha256} has no effect without init_from; set init_sha256=null, or init_from"
        )
    if config.init_from is None and config.init_changes:
        raise ValueError(
            f"init_changes={config.init_changes} has no effect without init_from; set init_changes=[], or init_from"
        )
    if config.init_from is not None and Path(config.init_from).resolve() == Path(config.run_dir).resolve():
        raise ValueError(
            f"run_dir={config.run_dir} must not be init_from={config.init_from}, whose weights are only read; "
            f"nearest: run_dir={config.init_from}-continued"
        )
    ranks = world_size()
    _validate_ranks(config, ranks)
    per_micro_batch = config.train.micro_batch_size * config.model.seq_len * ranks
    wanted = config.train.global_batch_tokens
    if wanted < per_micro_batch or wanted % per_micro_batch:
        below = wanted // per_micro_batch * per_micro_batch
        nearest = f"{below} or {below + per_micro_batch}" if below else str(per_micro_batch)
        names = "train.micro_batch_size * model.seq_len"
        values = f"{config.train.micro_batch_size} * {config.model.seq_len}"
        if ranks > 1:
            names, values = f"{names} * ranks", f"{values} * {ranks}"
        raise ValueError(
            f"train.global_batch_tokens={wanted} must be a multiple of {names} = {values} = {per_micro_batch}; "
            f"nearest: {nearest}"
        )
    memory = config.model.memory
    if memory is not None and memory.shuffled and config.train.micro_batch_size < 2:
        raise ValueError(
            f"train.micro_batch_size={config.train.micro_batch_size} must be at least 2 where a sequence reads its "
            "neighbour's rows (shuffled=true); nearest: 2"
        )
    if config.train.ema_decay and config.table.place is not Place.device:
        raise ValueError(
            f"train.ema_decay={config.train.ema_decay} needs a second copy of every row on the device and cannot be "
            f"used with table.place={config.table.place.value}; nearest: train.ema_decay=0, or table.place=device"
        )
    if config.train.eval_tokens < config.model.seq_len:
        raise ValueError(
            f"train.eval_tokens={config.train.eval_tokens} must be >= model.seq_len={config.model.seq_len}, one "
            f"window; nearest: {config.model.seq_len}"
        )
    per_source = 2 if memory is not None and memory.shuffled else 1  # windows; shuffled rows need a neighbour
    of_all_sources = len(config.data.mixture) * per_source * config.model.seq_len
    if config.train.eval_tokens < of_all_sources:
        raise ValueError(
            f"train.eval_tokens={config.train.eval_tokens} must hold {per_source} x model.seq_len="
            f"{config.model.seq_len} tokens for each of the {len(config.data.mixture)} sources of data.mixture; "
            f"nearest: {of_all_sources}"
        )
    if config.schedule.warmup_steps >= config.train.max_steps:
        raise ValueError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} must be < train.max_steps={config.train.max_steps}; "
            f"nearest: {max(0, config.train.max_steps - 1)}, usual: a tenth, {config.train.max_steps // 10}"
        )
    if config.model.vocab_size != config.data.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} must equal data.vocab_size={config.data.vocab_size}; "
            f"set model.vocab_size={config.data.vocab_size}"
        )


def _validate_ranks(config: Config, ranks: int) -> None:
    """Check what depends on the number of processes that the launcher started."""
    degree, moe = config.engine.expert_parallel, config.model.moe
    if degree > 1 and moe is None:
        raise ValueError(f"engine.expert_parallel={degree} has no effect on a model without experts; nearest: 1")
    if ranks % degree:
        nearest = max(divisor for divisor in range(1, degree) if ranks % divisor == 0)
        raise ValueError(
            f"engine.expert_parallel={degree} must divide the number of ranks, {ranks}; nearest: {nearest}"
        )
    if moe is not None and degree > moe.num_experts:
        raise ValueError(
            f"engine.expert_parallel={degree} must be at most model.moe.num_experts={moe.num_experts}, so that every "
            f"rank holds an expert; nearest: {moe.num_experts}"
        )
    if ranks > 1 and config.model.memory is not None and config.table.place is not Place.device:
        raise ValueError(
            f"table.place={config.table.place.value} does not work with {ranks} ranks yet: rows spread over ranks lie "
            "on their devices; set table.place=device, or train in one process"
        )
    if ranks > 1 and config.init_from is not None and (config.model.memory is not None or degree > 1):
        raise ValueError(
            f"init_from={config.init_from} does not work with {ranks} ranks yet where rows or experts are spread over "
            "them; take the first steps in one process, and go on with several from its checkpoint"
        )
    if config.engine.zero_stage == 3 and config.train.ema_decay:
        raise ValueError(
            f"train.ema_decay={config.train.ema_decay} does not work with engine.zero_stage=3, which keeps no whole "
            "parameter between steps; set train.ema_decay=0, or engine.zero_stage=2"
        )
