"""What makes two runs the same run: a hash of the settings that decide what is computed.

Apart from `train.config` so that plans and reports can use it without torch or a config framework.
"""

import copy
import hashlib
import json
from dataclasses import asdict
from enum import Enum
from typing import Any

# Where a run lies, what it prints and when it saves does not change what it computes.
_NOT_IDENTITY: dict[tuple[str, ...], tuple[str, ...]] = {
    # The weights to start from count by their content, init_sha256; init_changes only lets a setting pass a check.
    (): ("run_dir", "log", "schema_version", "init_from", "init_changes"),
    ("data",): ("root", "num_workers"),
    ("table",): ("folder", "cache_mib"),
    ("train",): (
        "checkpoint_interval",
        "keep_checkpoints",
        "final_checkpoint",
        "async_checkpoint",
        "checkpoint_buffer_gib",
    ),
}

# Settings that came after runs had been recorded, each with the value that stands for what was computed before. At that
# value they leave the identity as it was, so that earlier runs can be continued and earlier sweeps extended. Not those
# from before `model.rotary`: there the rotary base was `model.attention.rope_theta`, and their identity is another one.
# They can start new runs (`init_from`) once the setting is moved in their config.yaml.
_LATER: dict[tuple[str, ...], dict[str, Any]] = {
    (): {"init_sha256": None},
    ("data",): {"mixture": []},
    ("model",): {"mla": None, "over_encoding": None, "hyper_connections": None},
    ("model", "moe", "router"): {
        "kind": "sigmoid",
        "normalize": True,
        "num_groups": 1,
        "top_groups": 1,
        "balance_coef": 1e-2,
        "capacity_factor": 1.25,
    },
    ("model", "engram"): {"multi_branch": True, "compress": True, "gate": True, "shuffled": False},
    ("sweep", "engram"): {"multi_branch": True, "compress": True, "gate": True, "shuffled": False},
    ("memory",): {"frozen": False, "second_moment": "element"},
    ("table",): {"place": "device", "dtype": "fp32", "asynchronous": False},
    ("engine",): {"expert_parallel": 1},
}

# How a run is dealt out: that moves the last bits of sums and nothing else. A run may go on with others, and says so.
_LAYOUT: dict[tuple[str, ...], tuple[str, ...]] = {("engine",): ("zero_stage", "expert_parallel", "num_threads")}


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


def identity_settings(plain_config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a resolved configuration, given as nested dicts, without the settings that change no result."""
    identity = copy.deepcopy(plain_config)
    for path, names in _NOT_IDENTITY.items():
        part = _part(identity, path)
        for name in names:
            part.pop(name, None)
    for path, values in _LATER.items():
        part = _part(identity, path)
        for name, value in values.items():
            if part.get(name, value) == value:
                part.pop(name, None)
        parent = _part(identity, path[:-1])
        if path and parent.get(path[-1]) == {}:  # a component that came later as a whole
            del parent[path[-1]]
    return identity


def differ_in_layout_alone(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two `identity_settings` are the same run, dealt out over ranks and threads in another way."""
    rest = [copy.deepcopy(first), copy.deepcopy(second)]
    for settings in rest:
        for path, names in _LAYOUT.items():
            for name in names:
                _part(settings, path).pop(name, None)
    return rest[0] == rest[1]


def _part(plain_config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The nested dict at `path`; an empty one where it, or a part on the way, is absent or null."""
    part = plain_config
    for key in path:
        part = part.get(key) or {}
    return part


def identity_hash(plain_config: dict[str, Any]) -> str:
    """SHA-256 (hex) of the canonical JSON of `identity_settings`."""
    return hashlib.sha256(json.dumps(identity_settings(plain_config), sort_keys=True).encode()).hexdigest()


def differing_settings(first: dict[str, Any], second: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names and both values of every setting in which two configurations differ."""
    lines = []
    for key in sorted(first.keys() | second.keys()):
        one, two = first.get(key), second.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            lines += differing_settings(one, two, f"{prefix}{key}.")
        elif one != two:
            lines.append(f"{prefix}{key}: {one!r} -> {two!r}")
    return lines
