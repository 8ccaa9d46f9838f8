"""What this rank holds of gradients at each ZeRO stage, between backward and step.

Stage 0 and 1: every rank has the whole gradient of all its parameters. Stage 2: DeepSpeed has reduced the gradients in
backward, and a rank keeps those of its own partition (whole tensors, of which the partition may cover a part). Stage 3:
a rank keeps the range of each gradient that belongs to its range of the parameter.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.ranks import Ranks


class OwnedRange(NamedTuple):
    """A range of one parameter's gradient. Over all ranks, every element of every parameter is in one range."""

    name: str
    start: int  # place of the first element in the flattened parameter (in that of this rank's experts)
    values: Tensor  # (n,)


def owned_gradients(
    optimizer: Any, parameters: Sequence[tuple[str, nn.Parameter]], zero_stage: int, ranks: Ranks
) -> Iterator[OwnedRange]:
    """The ranges that this rank answers for, of the mean gradient over the global batch.

    `optimizer` is what DeepSpeed made: ZeRO's wrapper at stage 1 and above.
    """
    if zero_stage < 2:
        for index, (name, parameter) in enumerate(parameters):
            # Several ranks hold the same gradient; they take turns in answering for it.
            degree = ranks.expert_parallel if _is_expert(parameter) else 1
            if parameter.grad is not None and index % (ranks.world_size // degree) == ranks.rank // degree:
                yield OwnedRange(name, 0, parameter.grad.flatten())
        return
    names = {id(parameter): name for name, parameter in parameters}
    for parameter, held in _held(optimizer, zero_stage):
        if zero_stage == 2:
            address = parameter._hp_mapping.lp_fragment_address  # type: ignore[attr-defined]
            yield OwnedRange(names[id(parameter)], address.start, held.flatten()[address.start :][: address.numel])
        else:
            start = ranks.rank * held.numel()  # equal ranges, the last of them padded
            numel = min(held.numel(), max(0, parameter.ds_numel - start))  # type: ignore[attr-defined]
            if numel:
                yield OwnedRange(names[id(parameter)], start, held.flatten()[:numel])


def scale_gradients(
    optimizer: Any, parameters: Sequence[tuple[str, nn.Parameter]], zero_stage: int, factor: float
) -> None:
    """Multiply every gradient that this rank holds by `factor`."""
    if zero_stage < 2:
        held = [parameter.grad for _, parameter in parameters if parameter.grad is not None]
    else:
        held = [gradient for _, gradient in _held(optimizer, zero_stage)]
    torch._foreach_mul_(held, factor)


def mark_expert(parameter: nn.Parameter, group: str) -> None:
    """Tell DeepSpeed that ranks hold different values under this name, which are reduced over the group `group`."""
    parameter.allreduce = False  # type: ignore[attr-defined]
    parameter.group_name = group  # type: ignore[attr-defined]


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _held(optimizer: Any, zero_stage: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, reduced gradient or the part of it that DeepSpeed keeps here), at stage 2 or 3."""
    if zero_stage == 2:
        for index, parameters in enumerate(optimizer.params_in_partition):
            yield from zip(parameters, optimizer.all_grad_tensors[index] or [], strict=True)
    else:
        for index, parameters in enumerate(optimizer.fp16_groups):
            yield from zip(parameters, optimizer.averaged_gradients[index], strict=True)
