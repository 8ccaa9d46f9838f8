"""The expert kernel of a run: measured on a GPU once, then written into the configuration and kept.

Kernels round differently, so the choice belongs to a run's identity, and a measurement must not be repeated for a run
that has begun: a second one may come out otherwise.
"""

import json
from functools import cache
from pathlib import Path

import torch
import yaml

from models.expert_choice import expert_kernel_seconds, fastest_expert_kernel
from models.moe import ExpertKernel
from models.transformer import TransformerConfig
from train.identity import to_plain

# Choices of this process by what was measured: a sweep plans twice, before and after its data are prepared.
_measured: dict[str, ExpertKernel] = {}


def resolve_expert_kernel(model: TransformerConfig, num_tokens: int, precision: torch.dtype) -> ExpertKernel:
    """`auto` -> on a CPU `padded`, unmeasured; on a GPU the fastest for one layer of the model, in some seconds.

    Args:
        model: the run's, with experts.
        num_tokens: T of one micro-batch.
        precision: of the matmuls, bf16 or fp32.
    """
    assert model.moe is not None  # the caller has looked
    if model.moe.expert_kernel is not ExpertKernel.auto:
        if model.moe.expert_kernel is ExpertKernel.padded and torch.cuda.is_available():
            _say_that_padded_waits()
        return model.moe.expert_kernel
    if not torch.cuda.is_available():
        return ExpertKernel.padded
    key = json.dumps([to_plain(model.moe), model.d_model, num_tokens, str(precision)])
    if key not in _measured:
        seconds, failures = expert_kernel_seconds(model, torch.device("cuda"), num_tokens, precision)
        _measured[key] = fastest_expert_kernel(seconds)
        for kernel, failure in failures.items():
            print(f"expert kernel: {kernel.value} is left out ({failure})", flush=True)
        times = ", ".join(f"{kernel.value} {1e3 * value:.3g}" for kernel, value in seconds.items())
        what = f"ms forward and backward of one layer, {num_tokens} tokens"
        print(f"expert kernel: {_measured[key].value} ({what}: {times})", flush=True)
    return _measured[key]


@cache
def _say_that_padded_waits() -> None:
    """Once per process: a run that was begun on a CPU has `padded` in its configuration, which stays."""
    print(
        "expert kernel: padded, as set or recorded by a run on a CPU, lays its groups out on the host, for which a GPU "
        "waits in every layer; a new run may measure the others with model.moe.expert_kernel=auto",
        flush=True,
    )


def keep_expert_kernel(model: TransformerConfig, run_dir: Path) -> None:
    """Where the kernel is open, take the one that the run in `run_dir` was started with, if one was."""
    path = run_dir / "config.yaml"
    if model.moe is None or model.moe.expert_kernel is not ExpertKernel.auto or not path.is_file():
        return
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError):
        return  # the run's folder is refused, with the reason, when it is taken
    kernel = expert_kernel_of(begun)
    if kernel is not None:
        model.moe.expert_kernel = kernel


def expert_kernel_of(plain_config: object) -> ExpertKernel | None:
    """The kernel in a configuration as nested dicts, or None where there is none."""
    part = plain_config
    for key in ("model", "moe", "expert_kernel"):
        part = part.get(key) if isinstance(part, dict) else None
    return ExpertKernel(part) if part in [kernel.value for kernel in ExpertKernel] else None
