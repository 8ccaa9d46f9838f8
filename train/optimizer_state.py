"""The optimizer's state of single parameters, as ranges of tensors of the parameter's shape, at every ZeRO stage.

Stage 0: a torch optimizer has it whole, on every rank. Stage 1 and 2: the flat partition of this rank has a fragment of
it (Muon's momentum is whole on every rank whose partition touches the parameter). Stage 3: this rank's range.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HeldState(NamedTuple):
    """Part of one tensor of state, live on this rank."""

    key: str  # exp_avg, exp_avg_sq, momentum_buffer, or step
    start: int  # place of the first element in the flattened parameter
    values: Tensor  # a scalar for step
    owned: range | None  # positions in `values` that this rank answers for; None: all ranks hold it alike


def state_keys(use_muon: bool) -> tuple[str, ...]:
    """Names of the tensors that the optimizer keeps per parameter."""
    return ("momentum_buffer",) if use_muon else ("step", "exp_avg", "exp_avg_sq")


def held_state(
    optimizer: Any, parameter: nn.Parameter, use_muon: bool, zero_stage: int, rank: int
) -> Iterator[HeldState]:
    """Live state of one parameter, created as the optimizer would create it before its first step.

    `optimizer` is what `deepspeed.initialize` made: a torch optimizer at stage 0, ZeRO's wrapper at the others.
    """
    if zero_stage == 0:
        state = optimizer.state[parameter]
        if not state:
            state.update(_fresh(parameter, parameter.numel(), use_muon))
        for key in state_keys(use_muon):
            yield HeldState(key, 0, state[key], None)
    elif zero_stage == 3:
        yield from _held_range(optimizer, parameter, use_muon, rank)
    elif parameter._hp_mapping is not None:  # type: ignore[attr-defined]
        yield from _held_fragment(optimizer, parameter, use_muon)


def refresh_masters(optimizer: Any, zero_stage: int) -> None:
    """Copy restored weights into the fp32 copies that ZeRO updates instead of the weights."""
    if zero_stage == 3:
        for index, parameters in enumerate(optimizer.fp16_groups):
            for parameter in parameters:
                _, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
                master = optimizer.fp32_partitioned_groups_flat[index]
                master.data.narrow(0, offset, parameter.ds_tensor.numel()).copy_(parameter.ds_tensor.view(-1))
        return
    for index, master in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[index])
        master.data.copy_(optimizer.parallel_partitioned_bit16_groups[index][rank].data)


def range_of(parameter: nn.Parameter, rank: int) -> range:
    """Elements of a flattened parameter that lie on `rank` at stage 3; the last ranges are padded, or empty."""
    numel = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    total: int = parameter.ds_numel  # type: ignore[attr-defined]
    return range(min(rank * numel, total), min((rank + 1) * numel, total))


def _held_range(optimizer: Any, parameter: nn.Parameter, use_muon: bool, rank: int) -> Iterator[HeldState]:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    state = optimizer.optimizer.state[flat]
    if not state:
        state.update(_fresh(flat, flat.numel(), use_muon))
    here = range_of(parameter, rank)
    for key in state_keys(use_muon):
        if state[key].ndim == 0:
            yield HeldState(key, 0, state[key], range(1 if rank == 0 else 0))
        elif here:
            yield HeldState(key, here.start, state[key].narrow(0, offset, len(here)), range(len(here)))


def _held_fragment(optimizer: Any, parameter: nn.Parameter, use_muon: bool) -> Iterator[HeldState]:
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    group, inside = mapping.param_group_index, mapping.lp_fragment_address
    flat = optimizer.single_partition_of_fp32_groups[group]
    state = optimizer.optimizer.state[flat]
    members = optimizer.params_in_partition[group]
    if not state:
        state.update(_fresh(flat, sum(p.numel() for p in members) if use_muon else flat.numel(), use_muon))
    if use_muon:
        offset = sum(p.numel() for p in members[: next(i for i, p in enumerate(members) if p is parameter)])
        whole = state["momentum_buffer"].narrow(0, offset, parameter.numel())
        yield HeldState("momentum_buffer", 0, whole, range(inside.start, inside.start + inside.numel))
        return
    place = mapping.get_hp_fragment_address()
    for key in state_keys(use_muon):
        if state[key].ndim == 0:  # one step count for the whole partition, saved under each parameter
            yield HeldState(key, 0, state[key], range(1 if inside.start == 0 else 0))
        else:
            values = state[key].narrow(0, place.start, place.numel)
            yield HeldState(key, inside.start, values, range(inside.numel))


def _fresh(like: Tensor, numel: int, use_muon: bool) -> dict[str, Tensor]:
    moment = torch.zeros_like(like, requires_grad=False) if numel == like.numel() else like.new_zeros(numel)
    if use_muon:
        return {"momentum_buffer": moment}
    step = torch.zeros((), dtype=torch.float32, device=like.device)
    return {"step": step, "exp_avg": moment, "exp_avg_sq": moment.clone()}
