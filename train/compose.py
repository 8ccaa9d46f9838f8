"""From `conf/`, a schema of dataclasses and the words of a command line to plain objects, or one clear line of error.

Used by every entry point; nobody else sees Hydra or OmegaConf.
"""

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import hydra
import yaml
from hydra import initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Settings = TypeVar("Settings")

_MOVED = {"model.attention.rope_theta": "model.rotary.theta"}  # settings of earlier versions
_CONF = Path(__file__).resolve().parents[1] / "conf"  # its folders are Hydra's config groups


def compose(
    schema: type[Settings], schema_name: str, name: str, overrides: list[str], folder: Path | None = None
) -> Settings:
    """The settings of `conf/<name>.yaml`, or of `<folder>/<name>.yaml`, with `overrides`; writes nothing.

    Args:
        schema: dataclass of dataclasses; unknown settings and wrong types are refused.
        schema_name: name under which the files' defaults lists ask for it.
        name: of the file, without its ending, or of a schema with defaults of its own.
        overrides: words `setting=value` of the command line.
        folder: where the file lies, if not in `conf/`.

    Raises:
        ValueError: one line with the setting, its value, and the name that was perhaps meant.
    """
    ConfigStore.instance().store(name=schema_name, node=schema)
    if folder is not None and not (folder / f"{name}.yaml").is_file():
        raise ValueError(f"--config-path={folder} --config-name={name}: there is no file {folder / name}.yaml")
    try:
        with (
            initialize_config_module("conf", version_base="1.3")
            if folder is None
            else initialize_config_dir(str(folder.resolve()), version_base="1.3")
        ):
            words = _setting_words(schema, overrides)
            set_here = {text for text, _, _ in words}
            composed = hydra.compose(name, [text for text in overrides if text not in set_here])
        plain = OmegaConf.to_container(composed, resolve=False)
        assert isinstance(plain, dict)
        plain.pop("schema_version", None)  # of a run's own file
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        for text, key, value in words:
            _set(merged, schema, text, key, value)
        settings = OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException, AssertionError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(_explain(error, overrides, setting_names(schema))) from error
    assert isinstance(settings, schema)
    return settings


def _setting_words(schema: type, overrides: list[str]) -> list[tuple[str, str, Any]]:
    """Word, setting and value of the words `setting=value`. Group choices, additions and deletions are Hydra's."""
    names, words = setting_names(schema), []
    for text in overrides:
        key = text.split("=")[0]
        if "=" in text and key in names and not (_CONF / key).is_dir():
            (override,) = OverridesParser.create().parse_overrides([text])
            if not override.is_sweep_override():  # Hydra says what is wrong with a=1,2
                words.append((text, key, override.value()))
    return words


def _set(config: Any, schema: type, text: str, key: str, value: Any) -> None:
    """Set one setting; `{...}` switches a part on that is null, with its defaults, as it does in a file.

    Raises:
        ValueError: the setting lies below a part that is null.
    """
    above = key.split(".")[:-1]
    for depth in range(1, len(above) + 1):
        part = ".".join(above[:depth])
        if OmegaConf.select(config, part) is None:
            rest, given = key.removeprefix(f"{part}."), text.split("=", 1)[1]
            switch = f"'{part}={_nested(rest, given)}'"  # in quotes: a shell takes braces apart
            raise ValueError(f"{text}: {part} is null; {switch} switches it on")
    if isinstance(value, dict) and OmegaConf.select(config, key) is None:
        OmegaConf.update(config, key, OmegaConf.structured(_part_type(schema, key)), merge=False)
    OmegaConf.update(config, key, value, merge=True)


def _nested(name: str, value: str) -> str:
    """`a.b` and 3 as the word {a:{b:3}}."""
    first, _, rest = name.partition(".")
    return f"{{{first}:{_nested(rest, value) if rest else value}}}"


def _part_type(component: type, key: str) -> type:
    """The dataclass of the part `key`."""
    first, _, rest = key.partition(".")
    kind = get_type_hints(component)[first]
    part = next(inner for inner in (kind, *get_args(kind)) if is_dataclass(inner))
    assert isinstance(part, type)
    return _part_type(part, rest) if rest else part


def setting_names(component: type, prefix: str = "") -> list[str]:
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


def _explain(error: BaseException, overrides: list[str], names: list[str]) -> str:
    """One line on what Hydra or OmegaConf refused."""
    for text in overrides:
        name = text.split("=")[0].lstrip("+~").split("@")[0]
        free = name.startswith(("engine.deepspeed.", "hydra.", "hydra/")) or (_CONF / name).is_dir()
        if name not in names and not free:
            return f"{text}: there is no setting {name}{_closest(name, names)}"
        if "=" not in text and not text.startswith("~"):
            return f"{text}: a setting is given as name=value"
    if isinstance(error, AssertionError | AttributeError):  # from Hydra and OmegaConf, whose messages say nothing
        return (
            f"{' '.join(overrides)}: a setting below a part that is null; give the part itself first, as part={{...}}"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(error).__name__]
    if "Could not find" in lines[0]:  # then come the options that there are, and where was searched
        lines = [line for line in lines if not line.startswith(("Available options", "provider"))]
        options = [line for line in lines[1:] if not line.startswith("Config search path")]
        lines[0] += f"; there are: {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {lines[0]}"
    key = str(getattr(cause, "full_key", None) or "")
    if key and key not in names:
        return f"there is no setting {key}{_closest(key, names)} ({lines[0]})"
    given = next((text for text in overrides if text in str(error) or text.startswith(f"{key}=")), key)
    return f"{given}: {lines[0]}".removeprefix(": ")


def _closest(name: str, names: list[str]) -> str:
    """The existing name nearest to `name`: its new one, by the whole, else by its last part alone."""
    if name in _MOVED:
        return f" any more; it is {_MOVED[name]} now: move its value there"
    found = get_close_matches(name, names, n=1, cutoff=0.7)
    if not found:
        last = {known.split(".")[-1]: known for known in reversed(names)}
        found = [last[part] for part in get_close_matches(name.split(".")[-1], list(last), n=1)]
    return f"; did you mean {found[0]}?" if found else ""
