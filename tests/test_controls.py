"""Controls: what each has, lacks and costs, against the arm it belongs to and against real modules."""

import dataclasses

import pytest

from models.accounting import flops_per_token
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.router import RouterConfig
from sweeps import controls
from sweeps.allocation import AllocationError, Arm, Matching, solve
from sweeps.figures import CONTROL_SYMBOLS
from sweeps.gains import CONTROLS
from sweeps.plot import CONTROL_LABELS, CONTROL_MARKERS
from sweeps.trial import CONTROL_KINDS
from tests.test_allocation import ENGRAM, base, module_parameters, table_parameters

BOTH = pytest.mark.parametrize("matching", list(Matching))


def original() -> dict[str, Arm]:
    return {
        "a": controls.one_row_pure(base(), Matching.strict, ENGRAM),
        "b": controls.no_module(base(), 0.4, Matching.strict, ENGRAM),
        "c": controls.one_row(base(), 0.4, Matching.strict, ENGRAM),
    }


def test_controls_keep_the_flops() -> None:
    for arm in original().values():
        assert abs(arm.flops_residual) <= 5e-3


def test_control_shapes() -> None:
    arm, found, base_parameters = solve(base(), 0.4, Matching.strict, ENGRAM), original(), module_parameters(base())
    a, b, c = (found[key] for key in "abc")
    assert (a.num_experts, b.num_experts, c.num_experts) == (64, arm.num_experts, arm.num_experts)
    assert a.config.engram.table_size == 1  # type: ignore[union-attr]
    assert table_parameters(a.config) == 128
    assert abs(a.params_residual) < 1e-3  # the shared width that pays the FLOPs pays the parameters too
    assert b.config.engram is None
    assert b.params_residual == pytest.approx(module_parameters(b.config) / base_parameters - 1, abs=1e-12)
    assert b.params_residual < -0.3
    rows_back = dataclasses.replace(c.config.engram, table_size=arm.config.engram.table_size)  # type: ignore[type-var, union-attr]
    assert dataclasses.replace(c.config, engram=rows_back) == arm.config


@pytest.mark.parametrize("solve_control", [controls.one_row, controls.shuffled, controls.frozen, controls.extra_shared])
def test_a_control_of_an_arm_needs_a_module(solve_control: object) -> None:
    with pytest.raises(AllocationError, match="choose a control rho below 1"):
        solve_control(base(), 1.0, Matching.strict, ENGRAM)  # type: ignore[operator]


def test_every_control_is_named_and_drawn() -> None:
    kinds = {kind.value for kind in CONTROL_KINDS}
    assert set(CONTROLS) == set(CONTROL_LABELS) == set(CONTROL_MARKERS) == set(CONTROL_SYMBOLS) == kinds
    assert len(set(CONTROL_MARKERS.values())) == len(set(CONTROL_SYMBOLS.values())) == len(kinds)


@BOTH
def test_shuffled_and_frozen_are_the_arm_in_every_size(matching: Matching) -> None:
    arm = solve(base(), 0.4, matching, ENGRAM)
    frozen, shuffled = (f(base(), 0.4, matching, ENGRAM) for f in (controls.frozen, controls.shuffled))
    assert frozen.config == arm.config
    assert shuffled.config != arm.config
    straight = dataclasses.replace(shuffled.config.engram, shuffled=False)  # type: ignore[type-var]
    assert dataclasses.replace(shuffled.config, engram=straight) == arm.config
    for control in (frozen, shuffled):
        assert (control.rho, control.rho_actual, control.slots) == (arm.rho, arm.rho_actual, arm.slots)
        assert (control.params_residual, control.flops_residual) == (arm.params_residual, arm.flops_residual)


@BOTH
@pytest.mark.parametrize("layers", [[1], [0, 3]])
def test_extra_shared_experts_have_the_size_of_the_modules(matching: Matching, layers: list[int]) -> None:
    engram = EngramConfig(layers=layers, d_memory=128 // len(layers))
    arm, control = solve(base(), 0.4, matching, engram), controls.extra_shared(base(), 0.4, matching, engram)
    assert control.config.engram is None and control.num_experts == arm.num_experts
    before = [arm.config.moe.shared_width(i) for i in range(4)]  # type: ignore[union-attr]
    after = [control.config.moe.shared_width(i) for i in range(4)]  # type: ignore[union-attr]
    assert all((wide > narrow) == (i in layers) for i, (narrow, wide) in enumerate(zip(before, after, strict=True)))
    # A module by hand: key and value projection and four taps; a column of a shared expert: three matrices.
    module = 2 * (2 * engram.d_memory * 128 + 4 * 128)  # FLOPs of a token
    for layer in layers:
        assert abs(2 * 3 * 128 * (after[layer] - before[layer]) - module) <= 2 * 3 * 128 * 8 / 2
    flops = [flops_per_token(config).with_head for config in (arm.config, control.config)]
    assert abs(flops[1] - flops[0]) <= len(layers) * 2 * 3 * 128 * 8 / 2
    removed = module_parameters(arm.config) - table_parameters(arm.config) - module_parameters(control.config)
    assert abs(removed) <= len(layers) * (3 * 128 * 8 / 2 + 3 * 128)  # half a step of width, and the module's norms
    assert module_parameters(control.config) == pytest.approx(module_parameters(base()) * (1 + control.params_residual))


def test_extra_shared_where_no_module_is_the_same_size_but_spread() -> None:
    spread, concentrated = (
        f(base(), 0.4, Matching.strict, ENGRAM).config for f in (controls.no_module, controls.extra_shared)
    )
    widths = [[c.moe.shared_width(i) for i in range(4)] for c in (spread, concentrated)]  # type: ignore[union-attr]
    assert abs(sum(widths[0]) - sum(widths[1])) <= 8
    assert max(widths[0]) - min(widths[0]) <= 8 < max(widths[1]) - min(widths[1])


def test_extra_shared_in_a_dense_layer_and_where_nothing_is_shared() -> None:
    control = controls.extra_shared(base(num_dense_layers=2), 0.4, Matching.paper, ENGRAM)
    assert control.config.moe.shared_widths == [128 + 88, 128]  # type: ignore[union-attr]
    moe = MoEConfig(num_experts=64, num_shared_experts=0, router=RouterConfig(top_k=4))
    control = controls.extra_shared(base(moe=moe), 0.4, Matching.paper, ENGRAM)
    assert control.config.moe.shared_widths == [0, 88, 0, 0]  # type: ignore[union-attr]


def test_extra_shared_that_no_width_can_match() -> None:
    moe = MoEConfig(num_experts=16, d_expert=8, num_shared_experts=1, router=RouterConfig(top_k=2))
    shape = base(moe=moe, vocab_size=8, seq_len=8, d_model=8, num_layers=1)
    with pytest.raises(AllocationError, match=r"extra_shared at rho=0.5: steps of 8.*off the arm's"):
        controls.extra_shared(shape, 0.5, Matching.paper, EngramConfig(layers=[0], num_hash_heads=1, d_memory=14))
