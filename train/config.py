"""The root configuration: one dataclass per component, composed by Hydra, seen by nobody below the entry point.

A default lives in the dataclass beside the class that uses it; `conf/` holds only differences. This file joins them,
turns a composed DictConfig into plain objects, and checks what concerns more than one component.
"""

import os
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from models.memory_table import MemoryOptimConfig
from models.transformer import TransformerConfig
from train.data import DataConfig
from train.engine import EngineConfig, resolve_native, resolve_precision
from train.identity import identity_hash, to_plain
from train.loop import TrainConfig
from train.metrics import LogConfig
from train.optim import OptimConfig
from train.run_folder import SCHEMA_VERSION
from train.schedule import ScheduleConfig

_CONF = Path(__file__).resolve().parents[1] / "conf"  # its folders are Hydra's config groups


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


def compose_config(folder: Path | None, name: str, overrides: list[str]) -> Config:
    """The configuration of `conf/<name>.yaml`, or of `<folder>/<name>.yaml`, with `overrides`; writes nothing.

    Raises:
        ValueError: one line with the setting, its value, and the name that was perhaps meant.
    """
    register_schema()
    if folder is not None and not (folder / f"{name}.yaml").is_file():
        raise ValueError(f"--config-path={folder} --config-name={name}: there is no file {folder / name}.yaml")
    try:
        with (
            initialize_config_module("conf", version_base="1.3")
            if folder is None
            else initialize_config_dir(str(folder.resolve()), version_base="1.3")
        ):
            return from_dictconfig(compose(name, overrides=overrides))
    except (HydraException, OmegaConfBaseException, AssertionError, yaml.YAMLError) as error:
        raise ValueError(_explain(error, overrides)) from error


def load_config(path: Path) -> Config:
    """Read a run's `config.yaml`.

    Raises:
        ValueError: it is not one.
    """
    try:
        loaded = OmegaConf.load(path)
        assert isinstance(loaded, DictConfig)
        return from_dictconfig(loaded)
    except (OmegaConfBaseException, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not the configuration of a run ({_explain(error, [])})") from error


def setting_names(component: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings, also of the parts that a model need not have."""
    names = []
    types = get_type_hints(component)
    for setting in fields(component):
        inner = [part for part in (types[setting.name], *get_args(types[setting.name])) if is_dataclass(part)]
        names.append(prefix + setting.name)
        for part in inner:
            assert isinstance(part, type)
            names += setting_names(part, f"{prefix}{setting.name}.")
    return names


def _explain(error: BaseException, overrides: list[str]) -> str:
    """One line on what Hydra or OmegaConf refused."""
    names = setting_names()
    for text in overrides:
        name = text.split("=")[0].lstrip("+~").split("@")[0]
        free = name.startswith(("engine.deepspeed.", "hydra.", "hydra/")) or (_CONF / name).is_dir()
        if name not in names and not free:
            return f"{text}: there is no setting {name}{_closest(name, names)}"
        if "=" not in text and not text.startswith("~"):
            return f"{text}: a setting is given as name=value"
    if isinstance(error, AssertionError):  # from Hydra, whose message says nothing
        return f"{' '.join(overrides)}: a setting below a part that is null; choose one that has it (model=tiny_engram)"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(error).__name__]
    if "Could not find" in lines[0]:  # then come the options that there are, and where was searched
        lines = [line for line in lines if not line.startswith(("Available options", "provider"))]
        options = [line for line in lines[1:] if not line.startswith("Config search path")]
        lines[0] += f"; there are: {', '.join(options)}"
    key = str(getattr(cause, "full_key", None) or "")
    if key and key not in names:
        return f"there is no setting {key}{_closest(key, names)} ({lines[0]})"
    given = next((text for text in overrides if text in str(error) or text == getattr(error, "override", None)), key)
    return f"{given}: {lines[0]}".removeprefix(": ")


def _closest(name: str, names: list[str]) -> str:
    """The existing name nearest to `name`: by the whole, else by its last part alone."""
    found = get_close_matches(name, names, n=1, cutoff=0.7)
    if not found:
        last = {known.split(".")[-1]: known for known in reversed(names)}
        found = [last[part] for part in get_close_matches(name.split(".")[-1], list(last), n=1)]
    return f"; did you mean {found[0]}?" if found else ""


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
    if config.train.eval_tokens < config.model.seq_len:
        raise ValueError(
            f"train.eval_tokens={config.train.eval_tokens} must be >= model.seq_len={config.model.seq_len}, one "
            f"window; nearest: {config.model.seq_len}"
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
