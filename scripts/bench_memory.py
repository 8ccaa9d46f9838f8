"""Training step with memory tables: our lazy rows against `nn.Embedding` with dense AdamW.

    python -m scripts.bench_memory [--threads 1] [--rounds 7] [--rows 1000000]

Both sides train the same model on the same batches (that of `scripts.bench_train`, with two Engram modules) and read
the same number of rows; they differ in who holds the rows. The usual way is a parameter like any other: its gradient is
as large as the table, and AdamW passes over all of it, once with `fused=True` and ten times by default. Interleaved
rounds in one process; the table goes to `benchmarks/results/`.
"""

import itertools
import statistics
from dataclasses import replace

import torch
from torch import Tensor, nn

from models import native
from models.engram import EngramConfig
from models.loss import IGNORE_INDEX
from models.ngram_hash import NgramHasher, num_rows
from scripts.bench_common import arguments, load, machine, page, paired_ratio, write
from scripts.bench_train import BATCH, SEQ, VOCAB, Step, batches, measure, our_step, tiny
from train.allocator import keep_freed_memory
from train.build import build_model
from train.execution import EngineConfig, Precision, resolve_native

OURS = "outside the model, lazy Adam on the rows drawn"


def memory(rows_per_head: int) -> EngramConfig:
    """Two modules of 8 heads per order, as in the paper's models (arXiv 2601.07372, table 5), d_memory = d_model."""
    return EngramConfig(layers=[1, 3], num_hash_heads=8, d_memory=tiny().d_model, table_size=rows_per_head)


def dense_step(precision: Precision, engram: EngramConfig, fused: bool) -> Step:
    """The same model with rows in `nn.Embedding`s, trained by one torch AdamW (rows at 5 times the lr, not decayed)."""
    engine = EngineConfig(precision=precision, num_threads=torch.get_num_threads())
    native.use(native.Level(resolve_native(engine).value))
    cfg = replace(tiny(), engram=engram)
    hasher = NgramHasher(engram, torch.arange(VOCAB), pad_id=0)
    model = build_model(cfg, 0, torch.device("cpu"))
    tables = {layer: nn.Embedding(rows, engram.row_dim) for layer, rows in num_rows(engram).items()}
    for table in tables.values():
        nn.init.normal_(table.weight, std=cfg.init_std)
    rows_of_tables = [table.weight for table in tables.values()]
    groups = [{"params": list(model.parameters())}, {"params": rows_of_tables, "lr": 5e-3, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)
    parameters = [*model.parameters(), *rows_of_tables]
    source = itertools.cycle(batches())
    draw = torch.Generator().manual_seed(1)

    def loss_of(token_ids: Tensor, document_ids: Tensor, targets: Tensor) -> Tensor:
        rows = {layer: tables[layer](ids) for layer, ids in hasher(token_ids, document_ids).items()}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.bf16):
            output = model(token_ids, document_ids, rows, targets)
        return output.nats / (targets != IGNORE_INDEX).sum() + sum(output.aux_losses.values())

    def step() -> float:
        batch = next(source)
        token_ids = torch.randint(0, VOCAB, batch.token_ids.shape, generator=draw)  # new n-grams, as in our step
        loss = loss_of(token_ids, batch.document_ids, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def report(seconds: dict[str, list[float]], rows: int, threads: int) -> tuple[str, dict[str, float]]:
    """The committed table, and the ratio of each form to ours."""
    ratios = {name: paired_ratio(times, seconds[OURS]) for name, times in seconds.items()}
    engram = memory(rows)
    parameters = sum(num_rows(engram).values()) * engram.row_dim
    lines = [
        "# Training step with memory tables on a CPU",
        "",
        f"{machine(threads)}; the model of `{page('train', threads)}.md` in bf16 with {len(engram.layers)} Engram "
        f"modules: {rows:,} rows for each of {engram.num_rows_per_token} heads, {engram.row_dim} wide, "
        f"{parameters / 1e6:.0f}M parameters in all; {BATCH} x {SEQ} tokens with new n-grams at every step; forward, "
        f"backward, clipping over everything, optimizer; median of {len(seconds[OURS])} interleaved rounds.",
        load(),
        "",
        "| rows | milliseconds per step | ratio |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {1e3 * statistics.median(times):.0f} | {ratios[name]:.2f} |" for name, times in seconds.items()
    ]
    return "\n".join(lines) + "\n", ratios


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=10**6, help="rows per hash head")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    engram = memory(args.rows)
    steps = {
        OURS: our_step(Precision.bf16, engram),
        "`nn.Embedding`, dense AdamW (fused)": dense_step(Precision.bf16, engram, fused=True),
        "`nn.Embedding`, dense AdamW (torch's default)": dense_step(Precision.bf16, engram, fused=False),
    }
    seconds = measure(steps, args.rounds, warm_up=3)
    text, ratios = report(seconds, args.rows, args.threads)
    write("memory", args.threads, text, {"rows_per_head": args.rows, "ratios": ratios, "seconds": seconds})


if __name__ == "__main__":
    main()
