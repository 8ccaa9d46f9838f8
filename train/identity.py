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
    (): ("run_dir", "log", "schema_version"),
    ("data",): ("root",),
    ("train",): ("checkpoint_interval", "keep_checkpoints", "final_checkpoint"),
}


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
        part = identity
        for key in path:
            part = part.get(key, {})
        for name in names:
            part.pop(name, None)
    return identity


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
