"""Controls: arms in which one thing is missing, so that a gain can be laid at the door of what it is due to.

Each has the experts of an arm (`one_row_pure`: of rho = 1) and differs from it in what its name says. Those that keep
the arm's tables keep its parameters and FLOPs too; the others say in their residuals what they lack.
"""

import copy
import dataclasses

from models.accounting import flops_per_token
from models.engram import EngramConfig
from models.transformer import TransformerConfig
from sweeps.allocation import (
    FLOPS_TOLERANCE,
    ONE_ROW,
    WIDTH_MULTIPLE,
    AllocationError,
    Arm,
    Matching,
    check_base,
    measure,
    shared_widths,
    shared_widths_for_equal_flops,
    solve,
    with_experts,
    with_widths,
)


def one_row_pure(base: TransformerConfig, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (a): the rho = 1 experts with a module of one row per head: what the module's own path is worth.

    `strict` takes the projections' FLOPs out of the shared experts, so that parameters and FLOPs both match the base.
    """
    check_base(base, 1.0)
    config = dataclasses.replace(copy.deepcopy(base), engram=dataclasses.replace(engram, table_size=ONE_ROW))
    return _matched(base, config, 1.0, matching, "all experts and a one-row module")


def no_module(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (b): the experts of `rho` without the module: what fewer, better-trained experts alone are worth.

    `strict` gives the shared experts back what the module had taken, so that FLOPs match the base. Total parameters
    are fewer by design: `params_residual` says by how much.
    """
    num_experts = solve(base, rho, matching, engram).num_experts
    return _matched(base, with_experts(base, num_experts), rho, matching, f"the experts of rho={rho:g}, no module")


def one_row(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (c): the arm at `rho` in everything but its tables, which have one row per head.

    FLOPs equal the arm's; total parameters are fewer by the tables.
    """
    config, module = _arm_with_module(base, rho, matching, engram)
    config = dataclasses.replace(config, engram=dataclasses.replace(module, table_size=ONE_ROW))
    return measure(base, config, rho, f"the arm of rho={rho:g} with one-row tables")


def shuffled(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (d): the arm at `rho`, each sequence with the rows of its neighbour (`models.ngram_hash.NgramHasher`).

    Parameters, FLOPs and row traffic equal the arm's; what is lost is that rows belong to n-grams of the text.
    """
    config, module = _arm_with_module(base, rho, matching, engram)
    config = dataclasses.replace(config, engram=dataclasses.replace(module, shuffled=True))
    return measure(base, config, rho, f"the arm of rho={rho:g} with its neighbours' rows")


def frozen(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (e): the arm at `rho`, whose plan sets memory.frozen: rows tell n-grams apart, but learn nothing.

    Parameters and FLOPs equal the arm's, rows that are never trained counted like any other.
    """
    config, _ = _arm_with_module(base, rho, matching, engram)
    return measure(base, config, rho, f"the arm of rho={rho:g} with random tables that are not trained")


def extra_shared(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Control (f): the arm at `rho`, each module replaced by a shared expert of its size in its layer.

    The shared expert of the module's layer (of the first MoE layer, where that is a dense one) becomes wider by as many
    steps of 8 columns as come nearest to the module's FLOPs. As nearly all of the module's parameters are in its
    projections, 2 FLOPs each, like an expert's, its parameters without the tables are replaced likewise. So FLOPs per
    token equal the arm's under both matchings, and total parameters are fewer by the tables. `no_module` has the same
    FLOPs under `strict`, but spread over all layers; under `paper` it has fewer.

    Raises:
        AllocationError: the nearest width misses the arm's FLOPs by more than the tolerance.
    """
    arm, module = _arm_with_module(base, rho, matching, engram)
    config = dataclasses.replace(arm, engram=None)
    widths = shared_widths(config)
    one_more = with_widths(config, [widths[0] + WIDTH_MULTIPLE, *widths[1:]])
    unit = flops_per_token(one_more).with_head - flops_per_token(config).with_head
    per_module = (flops_per_token(arm).with_head - flops_per_token(config).with_head) / len(module.layers)
    for layer in module.layers:
        widths[config.moe_index(layer) or 0] += round(per_module / unit) * WIDTH_MULTIPLE
    config = with_widths(config, widths)
    off = (flops_per_token(config).with_head - flops_per_token(arm).with_head) / flops_per_token(base).with_head
    if abs(off) > FLOPS_TOLERANCE:
        raise AllocationError(
            f"control extra_shared at rho={rho:g}: steps of {WIDTH_MULTIPLE} in the shared width leave FLOPs per token "
            f"{off:+.2%} off the arm's (allowed {FLOPS_TOLERANCE:.1%}); use a larger model"
        )
    return measure(base, config, rho, f"the experts of rho={rho:g}, wider shared experts in place of the modules")


def _arm_with_module(
    base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig
) -> tuple[TransformerConfig, EngramConfig]:
    """The arm's shape and its module."""
    config = solve(base, rho, matching, engram).config
    if config.engram is None:
        raise AllocationError(
            f"control_rho={rho:g} has no module that a control could change; choose a control rho below 1"
        )
    return config, config.engram


def _matched(base: TransformerConfig, config: TransformerConfig, rho: float, matching: Matching, message: str) -> Arm:
    """Measure a control whose FLOPs `strict` keeps through the shared width."""
    if matching is Matching.strict:
        widths, reason = shared_widths_for_equal_flops(base, config)
        if not widths:
            raise AllocationError(f"control at rho={rho:g}: {reason}")
        config = with_widths(config, widths[0])
    return measure(base, config, rho, message)
