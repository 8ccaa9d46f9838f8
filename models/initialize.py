"""The one place where parameters get their start values."""

import hashlib
from collections.abc import Container

import torch
from torch import Tensor, nn

from models.hyper_connections import HyperConnection
from models.moe import Experts


def seed_from_name(seed: int, name: str) -> int:
    """Seed of the generator of one tensor: the first 63 bits of SHA-256("seed:name")."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _fill_normal(tensor: Tensor, std: float, seed: int, name: str) -> None:
    """Normal values from a CPU generator keyed by name, so that they are the same on every device."""
    generator = torch.Generator().manual_seed(seed_from_name(seed, name))
    tensor.copy_(torch.empty(tensor.shape, dtype=torch.float32).normal_(0, std, generator=generator))


@torch.no_grad()
def initialize(model: nn.Module, seed: int, init_std: float | None = None, only: Container[str] | None = None) -> None:
    """Matrices normal(0, init_std), embedding normal(0, embedding_init_std), norms one, taps and biases zero.

    Hyper-connections start as the plain residual: projections zero (as the input-dependent part in arXiv
    2409.19606), gates `gate_init`, biases `HyperConnection.initial_bias`.

    Every parameter has its own generator, keyed by (seed, parameter name), and every routed expert its own, keyed by
    (seed, parameter name, expert): two models with different numbers of experts, layers or tables share all values
    where names and shapes agree, and a process that holds some of the experts gives them the same values. Output
    projections are not scaled down by depth, as in DeepSeek-V3 (4.2: one standard deviation for all parameters).

    Args:
        model: a `Transformer` or a part of one.
        seed: of the run.
        init_std: standard deviation; by default the model's own `cfg.init_std`.
        only: names of the parameters that get values, the same as without it; by default all.

    Raises:
        RuntimeError: a parameter's name tells no rule, so that it would keep whatever its memory held.
    """
    std = init_std if init_std is not None else float(model.cfg.init_std)  # type: ignore[union-attr, arg-type]
    embedding_std = std
    if init_std is None and model.cfg.embedding_init_std is not None:  # type: ignore[union-attr]
        embedding_std = float(model.cfg.embedding_init_std)  # type: ignore[union-attr, arg-type]
    expert_stacks = {
        f"{name}.{key}" if name else key: module.first
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for key in ("gate_up", "down")
    }
    connections = {name: module for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    for name, parameter in model.named_parameters():
        if only is not None and name not in only:
            continue
        prefix, _, last = name.rpartition(".")
        owner = name.rsplit(".", 2)[-2] if "." in name else ""
        if name in expert_stacks:
            for expert, weights in enumerate(parameter, start=expert_stacks[name]):
                _fill_normal(weights, std, seed, f"{name}.{expert}")
        elif prefix in connections:
            connection = connections[prefix]
            starts = {"projection": 0.0, "gates": connection.cfg.gate_init, "bias": connection.initial_bias()}
            parameter.copy_(torch.as_tensor(starts[last]))
        elif last.endswith("norm") or owner.endswith("norm"):
            parameter.fill_(1.0)
        elif last in ("taps", "bias"):
            parameter.zero_()
        elif name == "embedding.weight":
            _fill_normal(parameter, embedding_std, seed, name)
        elif last == "weight" and parameter.dim() == 2:
            _fill_normal(parameter, std, seed, name)
        else:
            raise RuntimeError(f"models/initialize.py has no rule for the parameter {name!r}")
