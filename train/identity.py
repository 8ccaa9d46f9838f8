"""What makes two runs the same run: a hash of the settings that decide what is computed.

Apart from `train.config` so that plans and reports can use it without torch or a config framework.
"""

import copy
import hashlib
import json
from typing import Any

# Where a run lies, what it prints and when it saves does not change what it computes.
_NOT_IDENTITY: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("run_dir", "log", "schema_version"),
    ("data",): ("root",),
    ("train",): ("checkpoint_interval", "keep_checkpoints", "final_checkpoint"),
}


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
