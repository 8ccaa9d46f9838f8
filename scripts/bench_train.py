"""Training step of the tiny MoE against Hugging Face's Dots1, and against the size of the memory table.

    python -m scripts.bench_train [--threads 1] [--rounds 7]

Both sides are measured in one process, in interleaved rounds, and reported as medians and ratios: a shared machine is
noisy, ratios within a round are not. Twice: with glibc's settings, which give freed memory back to the system and are
what everybody has who sets none; and with ours (`train/allocator.py`), lent to the peers too. The table goes to
`benchmarks/results/`.
"""

import itertools
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.loss import IGNORE_INDEX
from models.memory_table import LocalTable, MemoryOptimConfig
from models.moe import MoEConfig
from models.ngram_hash import NgramHasher, num_rows
from models.transformer import TransformerConfig
from scripts.bench_common import arguments, load, machine, paired_ratio, seconds_of, timed_rounds, write
from train.allocator import keep_freed_memory
from train.build import Memory, build_model
from train.data import Batch, DataConfig, TrainBatches
from train.engine import Engine
from train.execution import EngineConfig, Precision
from train.optim import OptimConfig
from train.prepare import open_prepared
from train.shards import DataError

BATCH, SEQ, VOCAB = 16, 256, 4096
NUM_BATCHES = 16  # both sides go through the same ones, in turn
Step = Callable[[], float]
WARM_UP = 10  # steps before the measured rounds
SLOW = 4  # peers that need more than this many times our step are timed once, outside the rounds


def tiny() -> TransformerConfig:
    """The shape both sides share."""
    return TransformerConfig(
        vocab_size=VOCAB,
        seq_len=SEQ,
        num_layers=4,
        d_model=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, qk_norm=True),
        moe=MoEConfig(num_experts=64, d_expert=64, num_shared_experts=2),
    )


def batches() -> list[Batch]:
    """The first windows of the prepared text, so that the routers see what they see in training.

    Without prepared data: ids with a Zipf-like spread in one document.
    """
    try:
        source = TrainBatches(open_prepared(DataConfig()), SEQ, BATCH, seed=0)
        return [source.batch(step) for step in range(NUM_BATCHES)]
    except DataError as error:
        print(f"  no prepared text ({error}); random ids with a Zipf-like spread instead", flush=True)
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, VOCAB + 1)
    result = []
    for _ in range(NUM_BATCHES):
        ids = torch.multinomial(weights, BATCH * (SEQ + 1), replacement=True, generator=generator).view(BATCH, SEQ + 1)
        inputs = ids[:, :-1].contiguous()
        result.append(Batch(inputs, ids[:, 1:].contiguous(), torch.zeros_like(inputs)))
    return result


def our_step(precision: Precision, engram: EngramConfig | None = None) -> Step:
    """Forward, backward, clipping and AdamW through our engine; with Engram modules and their tables if asked."""
    cfg = replace(tiny(), engram=engram)
    memory = Memory(None, {})
    if engram is not None:
        tables = {
            layer: LocalTable(rows, engram.row_dim, cfg.init_std, 0, MemoryOptimConfig(), layer=layer)
            for layer, rows in num_rows(engram).items()
        }
        memory = Memory(NgramHasher(engram, torch.arange(VOCAB), pad_id=0), tables)
    model = build_model(cfg, 0, torch.device("cpu"))
    engine_cfg = EngineConfig(precision=precision, num_threads=torch.get_num_threads())
    engine = Engine(model, dict(memory.tables), OptimConfig(lr=1e-3), engine_cfg, BATCH, torch.device("cpu"))
    source = itertools.cycle(batches())
    draw = torch.Generator().manual_seed(1)

    def step() -> float:
        batch = next(source)
        if memory.hasher is not None:  # new n-grams at every step, so that rows are not found in the cache
            batch.token_ids = torch.randint(0, VOCAB, batch.token_ids.shape, generator=draw)
        row_ids = memory.row_ids(batch)
        rows = memory.lookup(row_ids)
        output = engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)
        assert output.nats is not None and output.stats.expert_counts is not None
        loss = output.nats / (batch.targets != IGNORE_INDEX).sum() + sum(output.aux_losses.values())
        engine.backward(loss, row_ids, rows)
        engine.step(1.0)
        engine.model.update_expert_bias(output.stats.expert_counts)
        return float(loss.detach())

    return step


def hugging_face_step(precision: Precision, experts: str, compiled: bool) -> Step:
    """The same step with transformers' Dots1 (grouped-query attention, QK-norm, the same experts) and fused AdamW."""
    from transformers import Dots1Config, Dots1ForCausalLM

    torch.manual_seed(0)
    config = Dots1Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=384, moe_intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, n_shared_experts=2, n_routed_experts=64,
        num_experts_per_tok=4, first_k_dense_replace=0, n_group=1, topk_group=1, norm_topk_prob=True,
        max_position_embeddings=SEQ, layer_types=["full_attention"] * 4, attn_implementation="sdpa",
        experts_implementation=experts, use_cache=False,
    )  # fmt: skip
    model: Any = Dots1ForCausalLM(config)
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    source = itertools.cycle(batches())

    def step() -> float:
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16) if precision is Precision.bf16 else nullcontext():
            logits = forward(input_ids=batch.token_ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def measure(steps: dict[str, Step], rounds: int, warm_up: int = WARM_UP) -> dict[str, list[float]]:
    """Seconds of each step, in interleaved rounds after a warm-up."""
    for name, step in steps.items():
        for _ in range(warm_up):
            loss = step()
        print(f"  ready: {name} (loss {loss:.3f})", flush=True)
    return timed_rounds(steps, rounds)


def candidates(precision: Precision, with_compile: bool) -> tuple[dict[str, Step], dict[str, float]]:
    """Steps of the peers worth interleaving, and seconds of those that are more than SLOW times ours.

    The latter run two steps each, of which the second counts: batched_mm copies every expert for every token.
    """
    ours = our_step(precision)
    steps, slow = {"ours": ours}, {}
    limit = SLOW * min(seconds_of(ours) for _ in range(3))
    for experts in ("grouped_mm", "eager", "batched_mm"):
        for compiled in (False, True) if with_compile else (False,):
            name = f"Hugging Face Dots1, {experts}, {'compiled' if compiled else 'eager'}"
            if compiled and f"Hugging Face Dots1, {experts}, eager" in slow and experts == "batched_mm":
                print(f"  left out: {name}: its eager form is more than {SLOW} times slower than ours", flush=True)
                continue
            try:
                torch._dynamo.reset()
                step = hugging_face_step(precision, experts, compiled)
                step()
                taken = seconds_of(step)
            except Exception as error:  # a peer's variant that does not run is reported, not hidden
                print(f"  does not run: {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            if taken > limit:
                slow[name] = taken
            else:
                steps[name] = step
    return steps, slow


def peers(
    precision: Precision, keeps_memory: bool, threads: int, rounds: int, with_compile: bool
) -> list[dict[str, Any]]:
    """Rows of the table for one precision and one setting of glibc; in a process of its own, since that is for good."""
    if keeps_memory:
        keep_freed_memory()
    torch.set_num_threads(threads)
    print(f"{precision.value}, freed memory {'kept' if keeps_memory else 'given back'}", flush=True)
    steps, slow = candidates(precision, with_compile)
    seconds = measure(steps, rounds)
    common = {"precision": precision.value, "freed_memory": "kept" if keeps_memory else "given back"}
    tokens = BATCH * SEQ
    rows = [
        {**common, "name": name, "tokens_per_second": tokens / statistics.median(times),
         "ratio": paired_ratio(times, seconds["ours"])}
        for name, times in seconds.items()
    ]  # fmt: skip
    ours = statistics.median(seconds["ours"])
    rows += [
        {**common, "name": f"{name} (one step)", "tokens_per_second": tokens / s, "ratio": s / ours}
        for name, s in slow.items()
    ]
    return rows


def in_new_process(function: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """What the function returns there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def table_growth(precision: Precision, threads: int, rounds: int) -> list[dict[str, Any]]:
    """Whole training step at 1e5, 1e6 and 1e7 rows."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    heads = EngramConfig().num_hash_heads * 2
    steps = {
        f"{rows:.0e} rows": our_step(precision, EngramConfig(table_size=rows // heads))
        for rows in (10**5, 10**6, 10**7)
    }
    seconds = measure(steps, rounds)
    names = list(steps)
    result = []
    for previous, name in zip([names[0], *names], names, strict=False):
        ratio = paired_ratio(seconds[name], seconds[previous])
        median = statistics.median(seconds[name])
        result.append({"rows": name, "milliseconds": 1e3 * median, "ratio_to_tenth": ratio})
    return result


def report(rows: list[dict[str, Any]], growth: list[dict[str, Any]], threads: int, rounds: int) -> str:
    """The committed table."""
    import transformers

    lines = [
        "# Training step on a CPU",
        "",
        f"{machine(threads)}, transformers {transformers.__version__}; {BATCH} x {SEQ} tokens, d_model 128, 4 layers, "
        f"64 experts of width 64, top-4, two shared, vocabulary {VOCAB}; forward, backward, clipping, AdamW; median of "
        f"{rounds} interleaved rounds after {WARM_UP} steps on text. Freed memory is given back to the system, as "
        "glibc does unless told otherwise, or kept in the process, as training sets it (`train/allocator.py`); in both "
        "cases for all sides.",
        load(),
        "",
        "| precision | freed memory | implementation | tokens/s | ours is faster by |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['precision']} | {row['freed_memory']} | {row['name']} | {row['tokens_per_second']:.0f} | "
            f"{row['ratio']:.2f} |"
        )
    for case in dict.fromkeys((row["precision"], row["freed_memory"]) for row in rows):
        others = [r for r in rows if (r["precision"], r["freed_memory"]) == case and r["name"] != "ours"]
        best = min(others, key=lambda r: r["ratio"])
        lines.append(
            f"\n**{case[0]}, freed memory {case[1]}: {best['ratio']:.2f} times the best peer** ({best['name']})."
        )
    lines += ["", "Whole training step against the number of rows of the memory table (new n-grams at every step):", ""]
    lines += ["| table | milliseconds | ratio to a tenth of the rows |", "|---|---|---|"]
    lines += [f"| {g['rows']} | {g['milliseconds']:.0f} | {g['ratio_to_tenth']:.3f} |" for g in growth]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled peers")
    args = parser.parse_args()
    rows = [
        row
        for precision in (Precision.bf16, Precision.fp32)
        for keeps in (False, True)
        for row in in_new_process(peers, precision, keeps, args.threads, args.rounds, not args.no_compile)
    ]
    growth = in_new_process(table_growth, Precision.bf16, args.threads, args.rounds)
    text = report(rows, growth, args.threads, args.rounds)
    write("train", args.threads, text, {"peers": rows, "rows": growth})


if __name__ == "__main__":
    main()
