"""Training on several ranks equals training on one: gradients, routing, the global norm, and losses.

Some pairs of every two choices run always; `make test-distributed-full` runs all combinations.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.distributed.launch import largest_difference, launch
from tests.distributed.worker import Case

GRADIENTS = 1e-5  # relative norm of every gradient before the first optimizer step
CURVES = 3e-4  # least relative distance of losses that counts, after 50 steps

Results = dict[str, dict[str, Tensor]]


def case(ranks: int, **settings: object) -> Case:
    name = "_".join([f"ranks{ranks}", *(f"{key}-{value}" for key, value in settings.items())])
    return Case(name=name, **settings)  # type: ignore[arg-type]


SOME = {
    2: [
        case(2, zero_stage=0, expert_parallel=2, accumulation=4, optimizer="muon", steps=3),
        case(2, zero_stage=1, expert_parallel=1, accumulation=1, optimizer="adamw", steps=3),
        case(2, zero_stage=2, expert_parallel=2, accumulation=1, optimizer="adamw", steps=3),
        case(2, zero_stage=3, expert_parallel=1, accumulation=2, optimizer="muon", steps=3),
        case(2, zero_stage=0, model="dense"),
        case(2, zero_stage=3, model="dense", optimizer="muon"),
        case(2, zero_stage=1, expert_parallel=2, model="mla_hyper_moe_engram", recompute=True),
        case(2, zero_stage=3, model="mla_hyper_moe_engram", recompute=True),
    ],
    4: [
        case(4, zero_stage=0, expert_parallel=1, accumulation=2, optimizer="adamw", steps=3),
        case(4, zero_stage=1, expert_parallel=4, accumulation=1, optimizer="muon", steps=3),
        case(4, zero_stage=2, expert_parallel=2, accumulation=2, optimizer="muon", steps=3),
        case(4, zero_stage=3, expert_parallel=1, accumulation=1, optimizer="adamw", steps=3),
        case(4, zero_stage=2, expert_parallel=4, model="moe_gshard"),
        case(4, zero_stage=1, expert_parallel=2, model="moe_hash"),
        case(4, zero_stage=0, expert_parallel=4, model="moe_softmax", accumulation=2),
    ],
}

ALL = {
    ranks: [
        case(
            ranks,
            zero_stage=stage,
            expert_parallel=degree,
            accumulation=accumulation,
            optimizer=optimizer,
            grad_clip=clip,
            steps=3,
        )
        for stage in (0, 1, 2, 3)
        for degree in (1, 2, 4)
        for accumulation in (1, 2)
        for optimizer in ("adamw", "muon")
        for clip in (0.05, 0.0)
        if degree <= ranks and (stage < 3 or degree == 1)
    ]
    for ranks in (2, 4)
}


def reference(of: Case, ranks: int) -> Case:
    """The same in one process: the same micro-batches one after the other, all experts, nothing partitioned."""
    settings = {"model": of.model, "accumulation": of.accumulation * ranks, "optimizer": of.optimizer}
    return case(1, **settings, grad_clip=of.grad_clip, steps=of.steps)


def check(cases: dict[int, list[Case]], folder: Path) -> None:
    """All of them at their numbers of ranks against one process."""
    alone = {one.name: one for ranks, several in cases.items() for one in (reference(c, ranks) for c in several)}
    expected = launch(list(alone.values()), 1, folder / "1")
    for ranks, several in cases.items():
        actual = launch(several, ranks, folder / str(ranks))
        for one in several:
            compare(one, actual[one.name], expected[reference(one, ranks).name])


def compare(one: Case, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    error, name = largest_difference(actual, expected)
    assert error <= GRADIENTS, (one.name, name, error)
    assert torch.equal(actual["counts"], expected["counts"]), one.name
    assert float(expected["norm"][2]) < 1 or one.grad_clip == 0, "clipping was meant to be active"
    assert torch.allclose(actual["losses"], expected["losses"], rtol=1e-6, atol=0), one.name


@pytest.mark.slow
def test_some_combinations_equal_one_process(tmp_path: Path) -> None:
    check(SOME, tmp_path)


@pytest.mark.distributed_full
def test_all_combinations_equal_one_process(tmp_path: Path) -> None:
    check(ALL, tmp_path)


@pytest.mark.slow
def test_fifty_steps_part_no_further_than_orders_of_one_batch(tmp_path: Path) -> None:
    """Rounding alone parts two runs; ranks must not part them further than another order of the sequences does."""
    orders = [case(1, accumulation=4, steps=50, order=order) for order in (0, 1, 2, 3)]
    alone = [run["losses"] for run in launch(orders, 1, tmp_path / "1").values()]
    noise = max(distance(first, second) for first in alone for second in alone)
    for ranks, several in {
        2: [case(2, zero_stage=2, expert_parallel=2, accumulation=2, steps=50)],
        4: [case(4, zero_stage=3, steps=50), case(4, zero_stage=1, expert_parallel=4, steps=50)],
    }.items():
        for name, run in launch(several, ranks, tmp_path / str(ranks)).items():
            assert distance(run["losses"], alone[0]) <= max(noise, CURVES), name


def distance(first: Tensor, second: Tensor) -> float:
    """Largest relative difference of two curves of losses."""
    return float(((first - second).abs() / second).max())
