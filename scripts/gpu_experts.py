"""The routed experts at 27B shapes: Triton, torch's grouped_mm and the plain loop over the dense bf16 rate."""

import time
from functools import partial

import torch
from torch import Tensor

from models.expert_kernels import swiglu_grouped_mm, swiglu_loop
from models.initialize import initialize
from models.kernels.grouped_swiglu import flops, grouped_swiglu
from models.router import Router, RouterConfig
from scripts.gpu_ceilings import D_EXPERT, D_MODEL, TOP_K
from scripts.gpu_table import Case, Column, Row, Section
from scripts.gpu_timing import Bench, wait

KERNELS = {"triton": grouped_swiglu, "grouped_mm": swiglu_grouped_mm, "loop": swiglu_loop}
LOADS = ("balanced", "skewed", "routed")
# Routed experts of Engram-27B and MoE-27B (Engram, arXiv 2601.07372, table 5).
ENGRAM_27B, MOE_27B = 55, 72
TOKENS = (8192, 16384, 4096)
ROUTER_STD = 0.006  # of the 27B models' weights at the start (conf/model/moe_27b.yaml)


def rows_per_expert(load: str, num_tokens: int, num_experts: int, top_k: int, d_model: int) -> list[int]:
    """Loads that sum to num_tokens * top_k.

    balanced: equal up to one row; skewed: falling as 1 / sqrt(rank), the fullest at 4 times the mean of 55; routed:
    what a fresh sigmoid router does with normal hidden states.
    """
    rows = num_tokens * top_k
    generator = torch.Generator().manual_seed(0)
    if load == "routed":
        router = Router(RouterConfig(top_k=top_k), d_model, num_experts)
        initialize(router, seed=0, init_std=ROUTER_STD)
        with torch.no_grad():
            counts: list[int] = router(torch.randn(1, num_tokens, d_model, generator=generator)).counts.tolist()
        return counts
    shares = torch.ones(num_experts, dtype=torch.float64)
    if load == "skewed":
        shares = (1 + torch.randperm(num_experts, generator=generator)).double() ** -0.5
    ends = (shares.cumsum(0) / shares.sum() * rows).round().long()
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()


def operands(bench: Bench, counts: list[int], d_model: int, d_expert: int) -> tuple[list[Tensor], Tensor]:
    """Rows, gate values and both stacks of matrices in bf16, which require grad, and the counts on the device."""
    rows, num_experts = sum(counts), len(counts)
    leaves = [
        bench.random(rows, d_model),
        bench.random(rows, 1).abs(),
        bench.random(num_experts, d_model, 2 * d_expert, std=d_model**-0.5),
        bench.random(num_experts, d_expert, d_model, std=d_expert**-0.5),
    ]
    return [leaf.requires_grad_() for leaf in leaves], torch.tensor(counts, device=bench.device)


def experts(bench: Bench, name: str, counts: list[int], sizes: tuple[int, int], kernel: str) -> list[Row]:
    """Forward, and forward with backward; 6 R D F and 18 R D F FLOPs."""
    leaves, sizes_on_device = operands(bench, counts, *sizes)
    tokens, weights, gate_up, down = leaves
    upstream = torch.ones_like(tokens)

    def forward() -> Tensor:
        return KERNELS[kernel](tokens, weights, sizes_on_device, gate_up, down)

    def both() -> None:
        torch.autograd.grad(forward(), leaves, upstream)

    start = time.perf_counter()
    both()
    wait(bench.device)
    first = time.perf_counter() - start
    work = flops(sum(counts), *sizes)
    with torch.no_grad():
        seconds = bench.seconds(forward)
    seconds_both = bench.seconds(both)
    rate, rate_both = work.forward / seconds, sum(work) / seconds_both
    return [
        {"case": name, "kernel": kernel, "seconds": seconds, "flops": rate, "share": bench.of_matmul(rate),
         "seconds_both": seconds_both, "flops_both": rate_both, "share_both": bench.of_matmul(rate_both),
         "first": first}
    ]  # fmt: skip


def _case(bench: Bench, name: str, load: str, num_tokens: int, num_experts: int, kernel: str) -> list[Row]:
    counts = rows_per_expert(load, num_tokens, num_experts, TOP_K, D_MODEL)
    return experts(bench, name, counts, (D_MODEL, D_EXPERT), kernel)


def section(bench: Bench, num_experts: int) -> Section:
    """All loads and kernels, the most telling number of tokens first."""
    found = []
    for num_tokens in TOKENS[:1] if bench.quick else TOKENS:
        for load in LOADS:
            name = f"T={num_tokens} {load}"
            for kernel in KERNELS:
                run = partial(_case, bench, name, load, num_tokens, num_experts, kernel)
                found.append(Case(f"{name} {kernel}", run))
    return Section(
        "experts" if num_experts == ENGRAM_27B else f"experts_{num_experts}",
        f"{num_experts} routed experts at 27B shapes",
        f"D={D_MODEL}, F={D_EXPERT}, top-{TOP_K}, bf16 rows and matrices, without dispatch and combine; FLOP rate over "
        "the dense bf16 rate. Aim: at least 70 %. `first` is the first pass, with compiling and tuning.",
        [
            Column("case", "case"),
            Column("kernel", "kernel"),
            Column("forward ms", "seconds", 1e3, ".2f"),
            Column("TFLOP/s", "flops", 1e-12, ".0f"),
            Column("of dense", "share", 1, ".0%"),
            Column("forward + backward ms", "seconds_both", 1e3, ".2f"),
            Column("TFLOP/s", "flops_both", 1e-12, ".0f"),
            Column("of dense", "share_both", 1, ".0%"),
            Column("first s", "first", 1, ".1f"),
        ],
        found,
    )
