"""What this GPU can do, measured in the same run: copy bandwidth, and dense bf16 matmuls by cuBLAS."""

from functools import partial

import torch

from scripts.gpu_table import Case, Column, Row, Section
from scripts.gpu_timing import Bench

COPY_BYTES, QUICK_COPY_BYTES = 4 << 30, 1 << 30  # of each side; far beyond any second-level cache
# Rows, inner width and columns of large matmuls; the fastest is the ceiling.
DENSE = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192), (8192, 16384, 16384))
# Width, expert width and experts per token of the 27B models (conf/model/moe_27b.yaml), experts of Engram-27B.
D_MODEL, D_EXPERT, TOP_K, NUM_EXPERTS = 2560, 1536, 6, 55


def copy(bench: Bench) -> list[Row]:
    """Bytes read and written per second from one buffer to another."""
    size = QUICK_COPY_BYTES if bench.quick else COPY_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    bench.copy_bandwidth = 2 * source.nbytes / seconds
    return [{"case": f"copy of {source.nbytes / 2**30:.0f} GiB", "seconds": seconds, "bytes": bench.copy_bandwidth}]


def dense(bench: Bench, rows: int, inner: int, columns: int) -> list[Row]:
    """A (rows, inner) bf16 matrix times an (inner, columns) one, 2 rows inner columns FLOPs; keeps the best rate."""
    left, right = bench.random(rows, inner), bench.random(inner, columns, std=inner**-0.5)
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=bench.device)
    seconds = bench.seconds(lambda: torch.mm(left, right, out=out))
    rate = 2 * rows * inner * columns / seconds
    bench.matmul_rate = max(rate, bench.matmul_rate or 0.0)
    return [{"case": f"matmul {rows} x {inner} x {columns}", "seconds": seconds, "flops": rate}]


def expert_shape(bench: Bench, num_tokens: int, inner: int, columns: int) -> list[Row]:
    """The rows of all experts times one matrix, and as a batch of NUM_EXPERTS matmuls of equal size."""
    rows = num_tokens * TOP_K
    each = rows // NUM_EXPERTS
    left, right = bench.random(rows, inner), bench.random(inner, columns, std=inner**-0.5)
    batch = left[: each * NUM_EXPERTS].view(NUM_EXPERTS, each, inner)
    matrices = bench.random(NUM_EXPERTS, inner, columns, std=inner**-0.5)
    found = []
    for name, call, flops in (
        (f"one matrix, {rows}", lambda: torch.mm(left, right), 2 * rows * inner * columns),
        (f"{NUM_EXPERTS} x {each}", lambda: torch.bmm(batch, matrices), 2 * each * NUM_EXPERTS * inner * columns),
    ):
        seconds = bench.seconds(call)
        rate = flops / seconds
        case = f"experts' matmul, {name} x {inner} x {columns}"
        found.append({"case": case, "seconds": seconds, "flops": rate, "share": bench.of_matmul(rate)})
    return found


def section(bench: Bench) -> Section:
    """Ceilings, then the experts' own shapes as dense matmuls."""
    found = [Case("copy", partial(copy, bench))]
    found += [Case("matmul {} x {} x {}".format(*shape), partial(dense, bench, *shape)) for shape in DENSE]
    for num_tokens in (8192,) if bench.quick else (4096, 16384):
        for inner, columns in ((D_MODEL, 2 * D_EXPERT), (D_EXPERT, D_MODEL)):
            name = f"experts' matmuls of {num_tokens} tokens, {inner} x {columns}"
            found.append(Case(name, partial(expert_shape, bench, num_tokens, inner, columns)))
    return Section(
        "ceilings",
        "Ceilings",
        "Copy bandwidth counts bytes read and written. The rate of the fastest of the first matmuls is the dense bf16 "
        "rate of the other tables; those of the experts' shapes are its share that cuBLAS reaches there.",
        [
            Column("case", "case"),
            Column("ms", "seconds", 1e3, ".3f"),
            Column("TB/s", "bytes", 1e-12, ".2f"),
            Column("TFLOP/s", "flops", 1e-12, ".0f"),
            Column("of the dense rate", "share", 1, ".0%"),
        ],
        found,
    )
