"""Training step with the memory table's rows in other places: on the device, in host RAM, in a file.

    python -m scripts.bench_host_table [--threads 1] [--rounds 5] [--rows 1000000 10000000 100000000]

One model (that of `scripts.bench_train` with one Engram module), new text at every step, interleaved rounds in one
process. A round takes every form through the same number of steps and waits for what is still being written behind.
On a CPU "device" and "host RAM" are one memory, so the ratio shows what the other path costs, not what a bus costs.
The table goes to `benchmarks/results/`.
"""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.engram import EngramConfig
from models.lazy_adam import MemoryOptimConfig, SecondMoment
from models.loss import IGNORE_INDEX
from models.memory_table import LocalTable, MemoryTable
from models.ngram_hash import NgramHasher, num_rows
from scripts.bench_common import arguments, load, machine, paired_ratio, timed_rounds, write
from scripts.bench_train import BATCH, SEQ, VOCAB, batches, tiny
from train.allocator import keep_freed_memory
from train.build import Memory, build_model
from train.data import Batch, DataConfig, TrainBatches
from train.engine import Engine, EngineConfig, Precision
from train.memory.host import HostTable
from train.memory.place import Place, RowType, TableConfig, host_table
from train.optim import OptimConfig
from train.prepare import open_prepared
from train.shards import DataError

CPU = torch.device("cpu")
LAYER, ROW_DIM = 1, 2  # rows are narrow, so that 1e8 of them in all places together take 8 GiB
STEPS = 3  # of one form in one round
CACHE_MIB = 64
DEVICE = "device, fp32, Adam"


def engram(rows: int) -> EngramConfig:
    """One module with about that many rows in all."""
    cfg = EngramConfig(layers=[LAYER])
    heads = cfg.num_rows_per_token
    return replace(cfg, d_memory=heads * ROW_DIM, table_size=rows // heads)


def text() -> Iterator[Batch]:
    """Windows of the prepared text in their order; without it those of `bench_train`, again and again."""
    try:
        source = TrainBatches(open_prepared(DataConfig()), SEQ, BATCH, seed=0)
        return (source.batch(step) for step in itertools.count())
    except DataError:
        return itertools.cycle(batches())


class Timed:
    """A table that counts the processor time of the thread that calls it."""

    def __init__(self, table: MemoryTable) -> None:
        self.table = table
        self.seconds, self.steps = 0.0, 0
        self.rounds: list[float] = []  # processor seconds of all threads in each round

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.table, name)
        if name not in ("prefetch", "lookup", "accumulate", "grad_sq_norm", "apply"):
            return call

        def timed(*arguments: Any) -> Any:
            start = time.thread_time()
            result = call(*arguments)
            self.seconds += time.thread_time() - start
            self.steps += name == "apply"
            return result

        return timed


@dataclass
class Form:
    """One table in one place."""

    name: str
    table: MemoryTable
    anonymous: int  # bytes of resident memory without a file that making it took
    mapped: int  # bytes of its file

    def __post_init__(self) -> None:
        self.calls = Timed(self.table)


def resident() -> int:
    """Bytes of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def forms(rows: int, folder: Path) -> list[Form]:
    """Every form. Synchronous and asynchronous share one store: times do not depend on the values of rows."""
    cfg, optim = tiny(), MemoryOptimConfig()
    small = MemoryOptimConfig(beta1=0.0, second_moment=SecondMoment.row)
    common: dict[str, Any] = {
        "num_rows": num_rows(engram(rows))[LAYER],
        "row_dim": ROW_DIM,
        "init_std": cfg.init_std,
        "seed": 0,
        "layer": LAYER,
    }
    result = []

    def made(name: str, make: Callable[[], Any]) -> Any:
        before = resident()
        table = make()
        mapped = 0
        if isinstance(table, HostTable) and name.startswith("file"):
            mapped = sum(array.nbytes for array in table.store.arrays.values())
        result.append(Form(name, table, resident() - before, mapped))
        return table

    made(DEVICE, lambda: LocalTable(**common, optim=optim))
    for name, place, dtype, rule in (
        ("host", Place.host, RowType.fp32, optim),
        ("file", Place.file, RowType.fp32, optim),
        ("host", Place.host, RowType.bf16, small),
    ):
        cache = {"cache_mib": CACHE_MIB, "folder": str(folder)} if place is Place.file else {}
        settings = TableConfig(place, dtype, **cache)  # type: ignore[arg-type]
        state = "Adam" if rule is optim else "one number per row"

        def table(settings: TableConfig = settings, rule: MemoryOptimConfig = rule) -> HostTable:
            return host_table(settings, **common, optim=rule, device=CPU, folder=folder)

        store = made(f"{name}, {dtype.value}, {state}", table).store

        def beside(store: Any = store, rule: MemoryOptimConfig = rule) -> HostTable:
            return HostTable(store, rule, CPU, layer=LAYER, asynchronous=True)

        made(f"{name}, {dtype.value}, {state}, asynchronous", beside)
    return result


def steps_of(form: Form, rows: int) -> Callable[[], float]:
    """A round of one form: STEPS training steps as in the loop, and the wait for the last one's update."""
    cfg = replace(tiny(), engram=engram(rows))
    memory = Memory(NgramHasher(engram(rows), torch.arange(VOCAB), pad_id=0), {LAYER: form.calls})
    model = build_model(cfg, 0, CPU)
    settings = EngineConfig(precision=Precision.bf16, num_threads=torch.get_num_threads())
    engine = Engine(model, dict(memory.tables), OptimConfig(lr=1e-3), settings, BATCH, CPU)
    source = text()
    coming = next(source)
    memory.prefetch(coming)

    def step() -> float:
        nonlocal coming
        batch, row_ids = coming, memory.row_ids(coming)
        coming = next(source)
        rows = memory.lookup(row_ids)
        memory.prefetch(coming)
        output = engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)
        assert output.nats is not None and output.stats.expert_counts is not None
        loss = output.nats / (batch.targets != IGNORE_INDEX).sum() + sum(output.aux_losses.values())
        engine.backward(loss, row_ids, rows)
        engine.step(1.0)
        engine.model.update_expert_bias(output.stats.expert_counts)
        return float(loss.detach())

    def block() -> float:
        start = time.process_time()
        loss = [step() for _ in range(STEPS)][-1]
        if isinstance(form.table, HostTable):
            form.table.drain()
        form.calls.rounds.append(time.process_time() - start)
        return loss

    return block


def measure(rows: int, rounds: int) -> list[dict[str, Any]]:
    """One record per form at one number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        made = forms(rows, Path(folder))
        blocks = {form.name: steps_of(form, rows) for form in made}
        for name, block in blocks.items():
            print(f"  ready: {rows:.0e} rows, {name} (loss {block():.3f})", flush=True)
        for form in made:
            form.calls.seconds, form.calls.steps, form.calls.rounds = 0.0, 0, []
        seconds = timed_rounds(blocks, rounds)
    return [
        {
            "rows": rows,
            "name": form.name,
            "milliseconds": 1e3 * statistics.median(seconds[form.name]) / STEPS,
            "processor_milliseconds": 1e3 * statistics.median(form.calls.rounds) / STEPS,
            "processor_ratio": paired_ratio(form.calls.rounds, made[0].calls.rounds),
            "milliseconds_in_calls": 1e3 * form.calls.seconds / form.calls.steps,
            "ratio": paired_ratio(seconds[form.name], seconds[DEVICE]),
            "anonymous_mib": form.anonymous / 2**20,
            "mapped_mib": form.mapped / 2**20,
            "hit_rate": form.table.hit_rate if isinstance(form.table, HostTable) else None,
            "seconds": seconds[form.name],
        }
        for form in made
    ]


def report(records: list[dict[str, Any]], threads: int, rounds: int) -> str:
    """The committed table."""
    cores = len(os.sched_getaffinity(0))
    lines = [
        "# Training step with rows in other places, on a CPU",
        "",
        f"{machine(threads)}, of which this process may use {cores}; the model of `bench_train` in bf16 with one "
        f"Engram module, rows {ROW_DIM} wide, {engram(10**6).num_rows_per_token} read per token, {BATCH} x {SEQ} "
        f"tokens of new text at every step; median of {rounds} interleaved rounds of {STEPS} steps, the wait for the "
        f"last update included. The file has a cache of {CACHE_MIB} MiB, and lies in the kernel's page cache as far "
        "as there is memory.",
        load(),
        "",
        "| rows | place, row, second moment | ms per step | ratio to the device | processor ms | ratio | ms in calls "
        "| anonymous MiB | file MiB | hit rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        hits = "" if r["hit_rate"] is None else f"{r['hit_rate']:.2f}"
        shared = r["name"].endswith("asynchronous")
        sizes = "same store | " if shared else f"{r['anonymous_mib']:.0f} | {r['mapped_mib']:.0f}"
        lines.append(
            f"| {r['rows']:.0e} | {r['name']} | {r['milliseconds']:.0f} | {r['ratio']:.3f} | "
            f"{r['processor_milliseconds']:.0f} | {r['processor_ratio']:.3f} | {r['milliseconds_in_calls']:.1f} | "
            f"{sizes} | {hits} |"
        )
    lines += [
        "",
        "Processor ms: of all threads, which other work on the machine changes less than the clock. In calls of the "
        "table: processor time of the training thread between steps' computations (prefetch, lookup, "
        "accumulate, norm, apply); what another thread does and what is waited for is not in it.",
        "",
        "Anonymous MiB when the table is made: pages of moments come with the first update of a row. On a CPU the "
        "device's memory is host memory too, so the columns show what each place takes of it; on a GPU "
        "`torch.cuda.memory_allocated()` must be the same at every number of rows for `host` and `file`. An "
        "asynchronous table has something to gain where a core is free beside those that compute, or a GPU computes.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    records = [record for rows in args.rows for record in measure(rows, args.rounds)]
    write("host_table", args.threads, report(records, args.threads, args.rounds), records)


if __name__ == "__main__":
    main()
