"""The optimizer's state of single parameters, by name and with the parameter's shape, at every ZeRO stage."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def moments(optimizer: Any, parameter: nn.Parameter, use_muon: bool, zero_stage: int) -> dict[str, Tensor]:
    """Live optimizer tensors of one parameter, created as the optimizer would create them before its first step.

    Views with the parameter's shape, except the scalar step count. `optimizer` is what `deepspeed.initialize` made: a
    torch optimizer at stage 0, ZeRO's wrapper at stage 1.
    """
    if zero_stage == 0:
        return _plain_moments(optimizer, parameter, use_muon)
    return _partitioned_moments(optimizer, parameter, use_muon)


def refresh_masters(optimizer: Any) -> None:
    """Copy restored weights into the flat fp32 copy that ZeRO >= 1 updates instead of the weights."""
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        master.data.copy_(optimizer.parallel_partitioned_bit16_groups[index][0].data)


def check_names(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> None:
    """Compare a checkpoint's tensors, or what is known of their shapes, with those of the live objects.

    Raises:
        ValueError: naming the first tensors that are missing, surplus, or of another shape.
    """
    missing, surplus = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    wrong = sorted(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape)
    if missing or surplus or wrong:
        raise ValueError(
            "the checkpoint does not fit this model: "
            f"missing {missing[:3]} ({len(missing)}), surplus {surplus[:3]} ({len(surplus)}), "
            f"other shapes {wrong[:3]} ({len(wrong)}); resume with the configuration that wrote it"
        )


def _plain_moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, use_muon: bool) -> dict[str, Tensor]:
    """Optimizer state of one parameter at ZeRO stage 0, created as the optimizer would create it."""
    state = optimizer.state[parameter]
    if not state:
        state.update(_fresh_moments(parameter, use_muon))
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _partitioned_moments(optimizer: Any, parameter: nn.Parameter, use_muon: bool) -> dict[str, Tensor]:
    """The same at ZeRO stage 1, where the state belongs to the flat fp32 partition that holds the parameter."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    flat = optimizer.single_partition_of_fp32_groups[_group_index(optimizer, parameter)]
    state = optimizer.optimizer.state[flat]
    if not state:
        state.update(_fresh_moments(flat, use_muon))
    address = mapping.get_hp_fragment_address()
    views = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            views[key] = value.narrow(0, address.start, address.numel).view(parameter.shape)
        elif isinstance(value, Tensor):
            views[key] = value  # one step count for the whole partition, saved under each parameter
    return views


def _group_index(optimizer: Any, parameter: nn.Parameter) -> int:
    for index, group in enumerate(optimizer.bit16_groups):
        if any(parameter is member for member in group):
            return index
    raise AssertionError("a parameter is in no ZeRO group")


def _fresh_moments(parameter: Tensor, use_muon: bool) -> dict[str, Tensor]:
    if use_muon:
        return {"momentum_buffer": torch.zeros_like(parameter)}
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
