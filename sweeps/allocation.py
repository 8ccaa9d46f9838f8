"""From a base shape and rho to the arm with the same budget: integer experts, prime tables, shared-expert widths.

Definitions (Engram, arXiv 2601.07372, section 3.1 and eq. 7): P_total counts parameters without vocabulary embedding
and head, P_sparse = P_total - P_active, and rho is the share of P_sparse that is routed experts, so rho = 1 is pure MoE
and (1 - rho) of the sparse budget is Engram rows. The number of routed experts follows

    N(rho) = top_k + round(rho * (N_base - top_k))

which reproduces every expert count the paper plots. What pays for the rest is the matching:

`paper`   only routed experts and rows change: the tables take exactly the parameters of the removed experts. The
          module's dense projections come on top, so FLOPs per token grow (the residual says by how much).
`strict`  the shared experts' width (multiples of 8, per layer) pays for the Engram projections and for the router's
          change, so that FLOPs per token stay; the tables take the remaining parameters.
"""

import copy
import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from models.accounting import count_parameters, flops_per_token
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.ngram_hash import num_rows
from models.over_encoding import OverEncodingConfig
from models.transformer import TransformerConfig

# Largest |relative difference| to the rho = 1 arm that `strict` accepts (dimensionless; the project's own limits).
PARAMS_TOLERANCE = 1e-3  # non-embedding parameters
FLOPS_TOLERANCE = 5e-3  # training or forward FLOPs per token, LM head included
# Shared-expert widths move in steps of 8 columns: the smallest step that keeps rows 16-byte aligned in bf16.
WIDTH_MULTIPLE = 8
# Units of shared width tried beside the one with the best FLOPs, where its tables miss the parameter tolerance.
MAX_UNITS_OFF = 4
ONE_ROW = 1  # EngramConfig.table_size of the control whose module has nothing to remember with


class Matching(str, Enum):
    """What is kept equal between arms."""

    strict = "strict"
    paper = "paper"


class AllocationError(ValueError):
    """No integer solution for this rho; the message names setting, value, rule and the nearest feasible rho."""


@dataclass
class Arm:
    """One solved allocation.

    `slots` counts memory in the paper's unit: one slot = d_memory parameters (all heads' rows of one layer together).
    Residuals are (arm - base) / base: non-embedding parameters, and FLOPs per token with the LM head.
    `rho_actual` = inactive routed-expert parameters / all inactive parameters; 1 where no memory is inactive.
    """

    config: TransformerConfig
    rho: float
    rho_actual: float
    num_experts: int
    slots: int
    params_residual: float
    flops_residual: float
    feasible: bool
    message: str


def num_experts_at(rho: float, num_base: int, top_k: int) -> int:
    """N = top_k + round(rho * (num_base - top_k)), halves rounded up."""
    return top_k + int(rho * (num_base - top_k) + 0.5)


def solve(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> Arm:
    """Solve one arm.

    Args:
        base: the rho = 1 shape: experts, no Engram.
        rho: requested share of the inactive parameters that are routed experts, in [0, 1].
        matching: what stays equal.
        engram: template of the module; its `table_size` is replaced by the solution.

    Raises:
        AllocationError: rho outside [0, 1], a base that is no rho = 1 shape, or no integer solution within tolerance.
    """
    moe = check_base(base, rho)
    if rho == 1:
        return measure(base, copy.deepcopy(base), rho, "the base shape")
    arm = _solve_for_experts(base, num_experts_at(rho, moe.num_experts, moe.router.top_k), rho, matching, engram)
    if not arm.feasible:
        nearest = nearest_feasible(base, rho, matching, engram)
        raise AllocationError(
            f"rho={rho:g} with matching={matching.value}: {arm.message}; nearest feasible rho: {nearest:.4g}"
        )
    return arm


def nearest_feasible(base: TransformerConfig, rho: float, matching: Matching, engram: EngramConfig) -> float:
    """The rho closest to the requested one whose expert count has a solution (1 is always one)."""
    moe = check_base(base, rho)
    span = moe.num_experts - moe.router.top_k
    for candidate in sorted((n / span for n in range(span)), key=lambda value: abs(value - rho)):
        if abs(candidate - rho) >= 1 - rho:
            break
        num_experts = num_experts_at(candidate, moe.num_experts, moe.router.top_k)
        if _solve_for_experts(base, num_experts, candidate, matching, engram).feasible:
            return candidate
    return 1.0


def memory_parameters(memory: EngramConfig | OverEncodingConfig) -> int:
    """Parameters of all tables: sum over layers, orders and heads of prime rows * row_dim. Nothing is allocated."""
    return memory.row_dim * sum(num_rows(memory).values())


Template = TypeVar("Template", EngramConfig, OverEncodingConfig)


def fit_table_size(memory: Template, target: int) -> Template | None:
    """The template with the table_size whose prime tables hold as near `target` parameters as primes allow.

    Memory never falls when table_size grows, so two neighbours enclose the target; the nearer wins.

    Returns:
        The filled config, or None where even the smallest tables hold more than twice the target.
    """

    def at(rows: int) -> int:
        return memory_parameters(dataclasses.replace(memory, table_size=rows))

    low, high = ONE_ROW + 1, max(ONE_ROW + 2, target // memory.row_dim + 2)
    if at(low) > 2 * target:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) <= target else (low, middle)
    rows = min((low, high), key=lambda value: abs(at(value) - target))
    return dataclasses.replace(memory, table_size=rows)


def check_base(base: TransformerConfig, rho: float) -> MoEConfig:
    """Refuse what is no allocation problem; returns the base's experts."""
    if not 0 <= rho <= 1:
        raise AllocationError(
            f"rho={rho:g} must lie in [0, 1]: it is the share of inactive parameters that are experts; "
            f"nearest: {min(max(rho, 0.0), 1.0):g}"
        )
    if base.moe is None:
        raise AllocationError(
            "model.moe=null: a sweep divides the parameters of routed experts; choose a model with experts"
        )
    if base.engram is not None:
        raise AllocationError(
            "model.engram must be null in a sweep: the base is the rho = 1 shape; describe the module in sweep.engram"
        )
    if base.over_encoding is not None:
        raise AllocationError("model.over_encoding must be null in a sweep, which divides a budget with Engram")
    if base.moe.router.num_groups > 1:
        raise AllocationError(
            f"model.moe.router.num_groups={base.moe.router.num_groups} must be 1 in a sweep: arms differ by single "
            "experts, groups must stay of equal size"
        )
    if base.moe.num_experts <= base.moe.router.top_k:
        raise AllocationError(
            f"model.moe.num_experts={base.moe.num_experts} must exceed model.moe.router.top_k={base.moe.router.top_k}: "
            "otherwise no expert is inactive and there is nothing to divide"
        )
    return base.moe


def _solve_for_experts(
    base: TransformerConfig, num_experts: int, rho: float, matching: Matching, engram: EngramConfig
) -> Arm:
    """The arm with this many experts; `feasible` says whether it keeps what the matching promises."""
    smallest = dataclasses.replace(engram, table_size=ONE_ROW)
    config = dataclasses.replace(with_experts(base, num_experts), engram=smallest)
    assert base.moe is not None
    if num_experts == base.moe.num_experts:
        step = 1 / (num_experts - base.moe.router.top_k)
        return measure(base, config, rho, f"no expert is removed (rho moves in steps of {step:.3g})", feasible=False)
    if matching is Matching.paper:
        freed = count_parameters(base).experts - count_parameters(config).experts
        return _fill_tables(base, config, rho, freed)
    widths, reason = shared_widths_for_equal_flops(base, config)
    arm = measure(base, config, rho, reason, feasible=False)
    for candidate in widths:
        counts = count_parameters(with_widths(config, candidate))
        target = count_parameters(base).total - (counts.total - counts.memory)
        arm = _within_tolerance(_fill_tables(base, with_widths(config, candidate), rho, target), params=True)
        if arm.feasible:
            break
    return arm


def _fill_tables(base: TransformerConfig, config: TransformerConfig, rho: float, target: int) -> Arm:
    """The arm whose tables hold as near `target` parameters as primes allow."""
    assert config.engram is not None
    filled = fit_table_size(config.engram, target)
    if filled is None:
        return measure(base, config, rho, f"{target:,} parameters are too few for prime tables", feasible=False)
    return measure(base, dataclasses.replace(config, engram=filled), rho, "")


def shared_widths_for_equal_flops(base: TransformerConfig, config: TransformerConfig) -> tuple[list[list[int]], str]:
    """Shared widths per MoE layer that keep the base's FLOPs within the tolerance, the best first.

    FLOPs are linear in the width, so one unit of 8 columns measured on the config itself gives the number of units.
    They are spread evenly; the first layers take the remainder.

    Returns:
        (candidates, why there are none where there are none).
    """
    widths = shared_widths(config)
    if min(widths) == 0:
        return [], (
            "no shared expert pays for the Engram projections: "
            "set model.moe.num_shared_experts >= 1 or use matching=paper"
        )
    base_flops = flops_per_token(base).with_head
    excess = flops_per_token(config).with_head - base_flops
    one_more = with_widths(config, [widths[0] + WIDTH_MULTIPLE, *widths[1:]])
    unit = flops_per_token(one_more).with_head - flops_per_token(config).with_head
    nearest = round(excess / unit)
    steps = sorted(range(nearest - MAX_UNITS_OFF, nearest + MAX_UNITS_OFF + 1), key=lambda n: abs(excess - n * unit))
    allowed = [n for n in steps if abs(excess - n * unit) <= FLOPS_TOLERANCE * base_flops]
    if not allowed:
        off = (excess - nearest * unit) / base_flops
        return [], (
            f"steps of {WIDTH_MULTIPLE} in the shared width leave FLOPs per token {off:+.2%} off "
            f"(allowed {FLOPS_TOLERANCE:.1%}); use a larger model"
        )
    solved = [w for w in (_narrowed(widths, n) for n in allowed) if min(w) >= WIDTH_MULTIPLE]
    if not solved:
        return [], (
            f"the Engram projections cost {excess:,.0f} FLOPs per token, more than the shared experts of width "
            f"{widths[0]} can pay; use a smaller sweep.engram.d_memory, fewer layers, or wider shared experts"
        )
    return solved, ""


def _narrowed(widths: list[int], units: int) -> list[int]:
    """Widths with `units` steps of 8 columns taken off in all (given, where negative), as evenly as possible."""
    share, rest = divmod(abs(units), len(widths))
    step = WIDTH_MULTIPLE if units >= 0 else -WIDTH_MULTIPLE
    return [width - step * (share + (i < rest)) for i, width in enumerate(widths)]


def _within_tolerance(arm: Arm, params: bool) -> Arm:
    """The arm, marked infeasible with a reason where a residual exceeds what `strict` allows."""
    reasons = []
    if params and abs(arm.params_residual) > PARAMS_TOLERANCE:
        reasons.append(f"parameters differ by {arm.params_residual:+.3%} (allowed {PARAMS_TOLERANCE:.1%})")
    if abs(arm.flops_residual) > FLOPS_TOLERANCE:
        reasons.append(f"FLOPs per token differ by {arm.flops_residual:+.3%} (allowed {FLOPS_TOLERANCE:.1%})")
    return dataclasses.replace(arm, feasible=not reasons, message="; ".join(reasons) or arm.message)


def measure(base: TransformerConfig, config: TransformerConfig, rho: float, message: str, feasible: bool = True) -> Arm:
    """Residuals against `base` and rho_actual of a config, from the exact accounting."""
    counts, base_counts = count_parameters(config), count_parameters(base)
    base_flops = flops_per_token(base).with_head
    return Arm(
        config=config,
        rho=rho,
        rho_actual=counts.rho,
        num_experts=config.moe.num_experts if config.moe is not None else 0,
        slots=round(counts.memory / config.memory.d_memory) if config.memory is not None else 0,
        params_residual=(counts.total - base_counts.total) / base_counts.total,
        flops_residual=(flops_per_token(config).with_head - base_flops) / base_flops,
        feasible=feasible,
        message=message,
    )


def shared_widths(config: TransformerConfig) -> list[int]:
    """Width of the shared expert of each MoE layer."""
    assert config.moe is not None
    return [config.moe.shared_width(layer) for layer in range(config.num_moe_layers)]


def with_experts(base: TransformerConfig, num_experts: int) -> TransformerConfig:
    """A copy of the base with another number of routed experts."""
    config = copy.deepcopy(base)
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, num_experts=num_experts))


def with_widths(config: TransformerConfig, widths: list[int]) -> TransformerConfig:
    """A copy with these shared widths, one per MoE layer."""
    assert config.moe is not None
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, shared_widths=list(widths)))
