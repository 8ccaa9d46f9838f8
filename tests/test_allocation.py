"""Arms against the paper's published counts, against real modules, and against brute force."""

import dataclasses
import math
import time

import pytest

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.ngram_hash import table_sizes
from models.over_encoding import OverEncodingConfig
from models.router import RouterConfig, RouterKind
from models.transformer import Transformer, TransformerConfig
from sweeps import allocation
from sweeps.allocation import AllocationError, Matching, solve

ENGRAM = EngramConfig()
# Expert counts read off the paper's figure 3 (rho in percent -> routed experts), at 2e20 and 6e20 FLOPs.
PAPER_2E20 = dict(
    zip((40, 51, 60, 70, 75, 80, 85, 90, 95, 100), (46, 57, 66, 76, 81, 86, 91, 96, 101, 106), strict=True)
)
PAPER_6E20 = dict(
    zip(
        (39.7, 50.5, 60.2, 69.8, 75.2, 79.5, 84.9, 90.3, 94.6, 100),
        (43, 53, 62, 71, 76, 80, 85, 90, 94, 99),
        strict=True,
    )
)


def base(num_experts: int = 64, top_k: int = 4, **changes: object) -> TransformerConfig:
    moe = MoEConfig(num_experts=num_experts, router=RouterConfig(top_k=top_k))
    return TransformerConfig(**{"moe": moe, **changes})


def module_parameters(config: TransformerConfig) -> int:
    """Non-embedding parameters, counted in the real module, plus the tables' primes times their width."""
    dense = sum(p.numel() for name, p in Transformer(config).named_parameters() if name not in VOCABULARY)
    return dense + table_parameters(config)


VOCABULARY = {
    name for name, p in Transformer(base()).named_parameters() if tuple(p.shape) == (4096, 128)
}  # embedding and head


def table_parameters(config: TransformerConfig) -> int:
    if config.engram is None:
        return 0
    rows = [n for orders in table_sizes(config.engram).values() for heads in orders for n in heads]
    return sum(rows) * config.engram.d_memory // (config.engram.num_orders * config.engram.num_hash_heads)


@pytest.mark.parametrize(("num_base", "counts"), [(106, PAPER_2E20), (99, PAPER_6E20)])
def test_expert_counts_of_the_paper(num_base: int, counts: dict[float, int]) -> None:
    for percent, wanted in counts.items():
        assert allocation.num_experts_at(percent / 100, num_base, 6) == wanted
    arm = solve(base(num_base, 6), 0.40, Matching.paper, ENGRAM)
    assert arm.num_experts == arm.config.moe.num_experts == counts[min(counts)]  # type: ignore[union-attr]


def test_engram_27b() -> None:
    """Table 5 of the paper: 72 -> 55 experts and 5.7B of memory; expert width 1536 is mHC's for the same shape."""
    shape = TransformerConfig(
        vocab_size=129_280,
        seq_len=4096,
        num_layers=30,
        num_dense_layers=1,
        d_model=2560,
        d_ff=12_288,
        attention=AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128),
        moe=MoEConfig(num_experts=72, d_expert=1536, num_shared_experts=2, router=RouterConfig(top_k=6)),
    )
    module = EngramConfig(layers=[1, 14], max_ngram_size=3, num_hash_heads=8, d_memory=1280)
    began = time.perf_counter()
    arm = solve(shape, 0.743, Matching.paper, module)
    assert time.perf_counter() - began < 5.0  # seconds: integers only, no table is ever made
    assert arm.num_experts == 55
    assert 5.79e9 <= table_parameters(arm.config) <= 5.82e9
    freed = 17 * 29 * 3 * 2560 * 1536
    assert abs(table_parameters(arm.config) - freed) / freed < 1e-4
    assert arm.slots == round(table_parameters(arm.config) / 1280)
    assert arm.rho_actual == pytest.approx(49 / 66, abs=1e-4)
    rows = [n for orders in table_sizes(arm.config.engram).values() for heads in orders for n in heads]  # type: ignore[arg-type]
    assert len(set(rows)) == 32
    assert all(n % d for n in rows[:2] for d in range(2, math.isqrt(n) + 1))


@pytest.mark.parametrize("rho", [0.0, 0.15, 0.4, 0.7, 0.9])
def test_paper_matching_changes_experts_and_rows_only(rho: float) -> None:
    shape = base()
    arm = solve(shape, rho, Matching.paper, ENGRAM)
    freed = (64 - arm.num_experts) * 4 * 3 * 128 * 64  # experts * layers * matrices * d_model * d_expert
    assert abs(table_parameters(arm.config) - freed) < 0.001 * freed
    unchanged = dataclasses.replace(arm.config, engram=None, moe=shape.moe)
    assert unchanged == shape
    assert arm.flops_residual > 0  # the projections come on top


@pytest.mark.parametrize("num_dense_layers", [0, 1])
@pytest.mark.parametrize("rho", [0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0])
def test_strict_keeps_the_parameters_of_the_real_module(rho: float, num_dense_layers: int) -> None:
    shape = base(num_dense_layers=num_dense_layers)
    arm = solve(shape, rho, Matching.strict, ENGRAM)
    expected = module_parameters(shape)
    residual = (module_parameters(arm.config) - expected) / expected
    assert abs(residual) <= 1e-3
    assert arm.params_residual == pytest.approx(residual, abs=1e-12)
    assert abs(arm.flops_residual) <= 5e-3
    assert arm.feasible
    widths = arm.config.moe.shared_widths  # type: ignore[union-attr]
    assert widths is None or all(width % 8 == 0 for width in widths)


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("rho", [0.0, 0.4, 0.7])
@pytest.mark.parametrize(("kind", "top_k"), [("softmax", 4), ("gshard", 2), ("switch", 1), ("hash", 1)])
def test_every_router_has_its_sweep(kind: str, top_k: int, rho: float, matching: Matching) -> None:
    router = RouterConfig(RouterKind(kind), top_k)
    shape = base(moe=MoEConfig(num_experts=40, router=router))
    arm = solve(shape, rho, matching, ENGRAM)
    assert arm.num_experts == top_k + round(rho * (40 - top_k))
    assert arm.config.moe.router == router  # type: ignore[union-attr]
    expected = module_parameters(shape)
    residual = (module_parameters(arm.config) - expected) / expected
    assert arm.params_residual == pytest.approx(residual, abs=1e-12)
    assert abs(arm.rho_actual - rho) < 0.02
    if matching is Matching.strict:
        assert abs(residual) <= 1e-3 and abs(arm.flops_residual) <= 5e-3


def test_strict_pays_the_projections_with_the_shared_width() -> None:
    """FLOPs per token of what changed, by hand: 2 per weight; attention, head and routed experts stay."""
    arm = solve(base(), 0.4, Matching.strict, ENGRAM)
    saved_by_router = 2 * 4 * 128 * (64 - arm.num_experts)
    projections = 2 * 2 * 128 * 128  # key and value, d_memory -> d_model
    convolution = 2 * 4 * 128  # 4 taps a channel
    saved_by_width = sum(2 * 3 * 128 * (128 - width) for width in arm.config.moe.shared_widths)  # type: ignore[union-attr]
    half_a_unit = 2 * 3 * 128 * 8 / 2
    assert abs(projections + convolution - saved_by_router - saved_by_width) <= half_a_unit


def test_rho_actual_is_the_share_of_inactive_parameters() -> None:
    arm = solve(base(), 0.4, Matching.strict, ENGRAM)
    experts = (arm.num_experts - 4) * 4 * 3 * 128 * 64
    memory = table_parameters(arm.config) - 128  # one row of every head is read: d_memory parameters
    assert arm.rho_actual == pytest.approx(experts / (experts + memory), abs=1e-12)
    assert abs(arm.rho_actual - 0.4) < 0.5 / 60 + 1e-3


def test_ends_of_the_curve() -> None:
    shape = base()
    pure, dense = solve(shape, 1.0, Matching.strict, ENGRAM), solve(shape, 0.0, Matching.strict, ENGRAM)
    assert pure.config == shape
    assert pure.config is not shape
    assert (pure.rho_actual, pure.params_residual, pure.flops_residual, pure.slots) == (1.0, 0.0, 0.0, 0)
    assert dense.num_experts == 4
    assert dense.rho_actual == 0.0


@pytest.mark.parametrize("target", [9_000, 50_000, 123_457, 1_769_472])
def test_table_size_is_the_nearest_of_all(target: int) -> None:
    found = allocation.fit_table_size(ENGRAM, target)
    assert found is not None
    sizes = range(2, 2 + target // (8 * 16) * 2)
    best = min(abs(allocation.memory_parameters(dataclasses.replace(ENGRAM, table_size=n)) - target) for n in sizes)
    assert abs(allocation.memory_parameters(found) - target) == best


@pytest.mark.parametrize("target", [200_000, 1_769_472])
def test_two_modules_share_a_budget_by_narrower_or_by_fewer_rows(target: int) -> None:
    """The paper divides one budget among two modules by a smaller d_mem (6.2), which leaves the rows per head alone."""
    one = EngramConfig(layers=[1], num_hash_heads=2, d_memory=128)
    narrower, fewer = dataclasses.replace(one, layers=[1, 3], d_memory=64), dataclasses.replace(one, layers=[1, 3])
    found = [allocation.fit_table_size(template, target) for template in (one, narrower, fewer)]
    for config in found:
        assert config is not None
        assert allocation.memory_parameters(config) == pytest.approx(target, rel=0.02)
        per_layer = [sum(map(sum, sizes)) for sizes in table_sizes(config).values()]
        assert max(per_layer) / min(per_layer) < 1.05  # primes are shared out, so the second layer has the larger ones
    sizes = [config.table_size for config in found]  # type: ignore[union-attr]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert sizes[2] == pytest.approx(sizes[0] / 2, rel=0.04)


@pytest.mark.parametrize("matching", list(Matching))
def test_an_arm_with_two_modules_keeps_the_budget_of_one(matching: Matching) -> None:
    two = EngramConfig(layers=[1, 3], d_memory=64)
    arms = [solve(base(), 0.4, matching, engram) for engram in (ENGRAM, two)]
    one_table, both = (table_parameters(arm.config) for arm in arms)
    assert both == pytest.approx(one_table, rel=0.01)
    assert arms[0].num_experts == arms[1].num_experts
    assert arms[1].flops_residual == pytest.approx(arms[0].flops_residual, abs=5e-3)


def test_over_encoding_takes_the_budget_of_an_engram() -> None:
    """At equal widths of a row: the same primes, so the same table."""
    engram = allocation.fit_table_size(ENGRAM, 1_769_472)
    over_encoding = allocation.fit_table_size(OverEncodingConfig(), 1_769_472)
    assert engram is not None and over_encoding is not None
    assert (engram.table_size, engram.row_dim) == (over_encoding.table_size, over_encoding.row_dim)
    assert allocation.memory_parameters(engram) == allocation.memory_parameters(over_encoding)


def test_no_tables_for_a_target_below_the_smallest_primes() -> None:
    assert allocation.fit_table_size(ENGRAM, 100) is None


@pytest.mark.parametrize("rho", [-0.1, 1.5, float("nan")])
def test_rho_outside_the_interval(rho: float) -> None:
    with pytest.raises(AllocationError, match=r"must lie in \[0, 1\]"):
        solve(base(), rho, Matching.strict, ENGRAM)


def test_infeasible_rho_names_the_nearest_feasible_one() -> None:
    shape = base()
    with pytest.raises(AllocationError, match=r"rho=0\.999.*no expert is removed.*nearest feasible rho: 1"):
        solve(shape, 0.999, Matching.strict, ENGRAM)
    nearest = allocation.nearest_feasible(shape, 0.999, Matching.strict, ENGRAM)
    assert solve(shape, nearest, Matching.strict, ENGRAM).feasible


def test_module_too_dear_for_the_shared_experts() -> None:
    module = EngramConfig(layers=[0, 1, 2, 3], d_memory=2048)
    with pytest.raises(AllocationError, match=r"smaller sweep.engram.d_memory.*nearest feasible rho: 1"):
        solve(base(), 0.4, Matching.strict, module)
    assert solve(base(), 0.4, Matching.paper, module).feasible


def test_nobody_to_pay() -> None:
    shape = base(moe=MoEConfig(num_shared_experts=0))
    with pytest.raises(AllocationError, match="num_shared_experts >= 1 or use matching=paper"):
        solve(shape, 0.4, Matching.strict, ENGRAM)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (base(moe=None), "model.moe=null"),
        (base(engram=ENGRAM), "model.engram must be null"),
        (base(over_encoding=OverEncodingConfig()), "model.over_encoding must be null"),
        (base(4), "must exceed model.moe.router.top_k=4"),
        (
            base(moe=MoEConfig(router=RouterConfig(num_groups=8, top_groups=4))),
            r"model\.moe\.router\.num_groups=8 must be 1 in a sweep",
        ),
    ],
)
def test_bases_that_are_no_pure_arm(shape: TransformerConfig, message: str) -> None:
    with pytest.raises(AllocationError, match=message):
        solve(shape, 0.4, Matching.strict, ENGRAM)


def test_the_base_is_never_changed() -> None:
    shape = base()
    before = dataclasses.asdict(shape)
    for rho in (0.0, 0.5, 1.0):
        solve(shape, rho, Matching.strict, ENGRAM).config.moe.router.top_k = 99  # type: ignore[union-attr]
    assert dataclasses.asdict(shape) == before
