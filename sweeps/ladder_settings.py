"""What a ladder's file says, checked, and the configurations that it describes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sweeps.settings import check_folder_name, refuse_decided
from train.compose import compose
from train.config import Config

SHIPPED = Path(__file__).resolve().parents[1] / "conf" / "ladder" / "tiny.yaml"
_KEYS = {"name", "seeds", "reference", "settings", "rungs"}

# Settings of a single run that a ladder decides for every trial.
_OF_A_RUN = {
    "seed": "use `seeds: [0, 1, 2]` in the ladder's file",
    "run_dir": "use `name: <name>` in the ladder's file: its folder is runs/<name>",
}


class _NoKeyTwice(yaml.SafeLoader):
    """Of two equal keys YAML keeps the last and says nothing: a rung would be gone."""


def _mapping(loader: _NoKeyTwice, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [str(loader.construct_object(key)) for key, _ in node.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.YAMLError(f"{', '.join(twice)} stands twice; give every rung and setting a name of its own")
    return loader.construct_mapping(node, deep=True)


_NoKeyTwice.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


@dataclass(frozen=True)
class Ladder:
    """What conf/ladder/*.yaml says."""

    name: str  # folder below runs/
    seeds: list[int]  # paired: one seed is one order of the data
    reference: str  # the rung that the others are compared with
    settings: list[str]  # of all rungs
    rungs: dict[str, list[str]]  # name -> settings of its own

    @classmethod
    def read(cls, path: Path) -> "Ladder":
        """The ladder of a file.

        Raises:
            ValueError: no such file, or one that is no ladder.
        """
        if not path.is_file():
            raise ValueError(f"--file={path}: there is no such file; shipped: {SHIPPED}")
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=_NoKeyTwice)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict) or set(content) != _KEYS:
            raise ValueError(f"{path} must hold exactly {', '.join(sorted(_KEYS))}")
        try:
            _check(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(**content)


def _check(content: dict[str, Any]) -> None:
    """Types and values of a file that has the right keys."""
    name, seeds, reference, rungs = (content[key] for key in ("name", "seeds", "reference", "rungs"))
    check_folder_name("name", name)
    whole = isinstance(seeds, list) and all(type(seed) is int for seed in seeds)  # True is an int, and no seed
    if not whole or len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ValueError(f"seeds={seeds!r} must be a list of two or more different whole numbers; usual: [0, 1, 2]")
    _check_words("settings", content["settings"])
    if not isinstance(rungs, dict) or not all(isinstance(rung, str) for rung in rungs):
        raise ValueError(f"rungs={rungs!r} must be names with the settings of each, e.g. {{dense: [model=tiny_dense]}}")
    for rung, words in rungs.items():
        _check_words(f"rungs.{rung}", words)
    if reference not in list(rungs):  # a list: what is no name may have no hash
        raise ValueError(f"reference={reference} must be one of the rungs {sorted(rungs)}")


def _check_words(name: str, words: object) -> None:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{name}={words!r} must be a list of settings, e.g. [train.max_steps=400]; nearest: []")


def configs(ladder: Ladder, settings: list[str]) -> dict[str, Config]:
    """{rung: its configuration}; later settings win.

    Raises:
        ValueError: a setting that there is not, or one that the ladder decides itself.
    """
    found = {}
    for rung, own in ladder.rungs.items():
        words = [*ladder.settings, *own, *settings]
        refuse_decided(words, "a ladder", _OF_A_RUN)
        try:
            found[rung] = compose(Config, "train_schema", "train", words)
        except ValueError as error:
            raise ValueError(f"rungs.{rung} with its settings and those of all: {error}") from error
    return found
