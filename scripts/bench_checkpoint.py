"""Checkpoints: how long training waits for an asynchronous save and a synchronous one, and the memory of a large table.

    python -m scripts.bench_checkpoint [--rounds 7] [--gib 1.5] [--table-gib 4] [--folder DIR]

A state of `--gib` GiB in fp32 tensors is saved in both ways, in interleaved rounds in one process; before each round
the one before it is on the disk, and every tensor is changed. Then a process of its own saves and loads a memory table
of `--table-gib` GiB, moments included, and notes its anonymous memory. The table goes to `benchmarks/results/`.
"""

import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from scripts.bench_common import arguments, load, machine, paired_ratio, seconds_of, write
from train.checkpoint import Checkpoint
from train.checkpoint_folder import newest_good, verify
from train.checkpoint_writer import CheckpointWriter, WriterOptions
from train.pieces import Piece, whole

GIB = 2**30
TENSORS = 96  # that the state is cut into: those of a model of a dozen layers with its moments
ROW_DIM = 64  # of the table: rows of this width, with two moments and a step count


def state(gib: float) -> list[Piece]:
    """Tensors of `gib` GiB together, none of them zero pages."""
    size = int(gib * GIB / 4 / TENSORS)
    return [whole(f"model.{index}", torch.full((size,), float(index + 1))) for index in range(TENSORS)]


def rounds_of(pieces: list[Piece], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds that training waits, and those until the files are on the disk, of both ways."""
    seconds: dict[str, list[float]] = {"sync": [], "pause": [], "background": [], "verify": []}
    with CheckpointWriter(folder / "a", WriterOptions(buffer_bytes=16 * GIB)) as writer:
        writer.prepare(pieces)
        sync = CheckpointWriter(folder / "b", WriterOptions(asynchronous=False))
        for step in range(rounds + 1):
            for piece in pieces:
                piece.data.add_(1)
            seconds["sync"].append(sync.save(step, pieces, {}).pause_seconds)
            seconds["pause"].append(writer.save(step, pieces, {}).pause_seconds)
            seconds["background"].append(writer.drain())
        path = newest_good(folder / "a", set_aside=False)
        assert path is not None and Checkpoint(path).step == rounds
        seconds["verify"] = [seconds_of(lambda: verify(path))]
    return seconds


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def peak_of(work: Callable[[], object]) -> int:
    """The most anonymous memory while `work` is done, looked at every 2 ms."""
    done, peak = threading.Event(), anonymous_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return max(peak, anonymous_bytes())


def _table_memory(gib: float, buffer_gib: float, mapped: bool, folder: str) -> tuple[int, list[tuple[int, float]]]:
    torch.set_num_threads(1)
    before = anonymous_bytes()
    num_rows = int(gib * GIB / (3 * 4 * ROW_DIM + 4))
    table: dict[str, torch.Tensor] = {}
    for name in ("weight", "exp_avg", "exp_avg_sq", "step"):
        size = num_rows * (1 if name == "step" else ROW_DIM)
        dtype = torch.int32 if name == "step" else torch.float32
        file = f"{folder}/{name}.bin"
        tensor = torch.from_file(file, True, size, dtype=dtype) if mapped else torch.empty(size, dtype=dtype)
        table[name] = tensor.view(num_rows, -1).fill_(3)  # pages of zeros are not there before they are written
    held = anonymous_bytes() - before
    options = WriterOptions(buffer_bytes=int(buffer_gib * GIB))

    def save() -> None:
        with CheckpointWriter(Path(folder) / "checkpoints", options) as writer:
            own = table.items()
            pieces = [whole(f"table_1.{name}", tensor, in_place=tensor.is_shared()) for name, tensor in own]
            writer.save(1, pieces, {})

    def read() -> None:
        path = newest_good(Path(folder) / "checkpoints", set_aside=False)
        assert path is not None
        found = Checkpoint(path)
        for name, tensor in table.items():
            found.read(f"table_1.{name}", out=tensor)

    peaks = []
    for work in (save, read):
        started = time.perf_counter()
        peaks.append((peak_of(work) - before, time.perf_counter() - started))
    return held, peaks


def table_memory(gib: float, buffer_gib: float, mapped: bool, folder: Path) -> tuple[int, list[tuple[int, float]]]:
    """(anonymous bytes of the table, [(peak, seconds) of saving, of loading]), in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_table_memory, gib, buffer_gib, mapped, str(folder)).result()


def report(seconds: dict[str, list[float]], gib: float, tables: list[tuple[Any, ...]], threads: int) -> str:
    """The measured page; the first round has a line of its own."""
    later = {name: times[1:] for name, times in seconds.items() if name != "verify"}
    ratio = paired_ratio(later["pause"], later["sync"])
    whole_seconds = [a + b for a, b in zip(later["pause"], later["background"], strict=True)]
    lines = [
        "# Checkpoints: pause of the training, and memory",
        "",
        f"{machine(threads)}; {gib:g} GiB in {TENSORS} fp32 tensors on the machine's disk; median of "
        f"{len(later['sync'])} interleaved rounds in one process.",
        load(),
        "",
        "| | seconds | ratio |",
        "|---|---|---|",
        f"| synchronous save: training waits | {statistics.median(later['sync']):.2f} | 1.00 |",
        f"| asynchronous save: training waits | {statistics.median(later['pause']):.3f} | {ratio:.3f} |",
        f"| the same, the first time | {seconds['pause'][0]:.3f} | {seconds['pause'][0] / seconds['sync'][0]:.3f} |",
        f"| asynchronous save: until it is on the disk | {statistics.median(whole_seconds):.2f} | "
        f"{paired_ratio(whole_seconds, later['sync']):.2f} |",
        f"| verification of every file | {seconds['verify'][0]:.2f} | |",
    ]
    if tables:
        lines += [
            "",
            "Anonymous memory of a process with one memory table (rows, two moments, step counts), beyond that of its",
            "imports, in GiB:",
            "",
            "| table | `checkpoint_buffer_gib` | table itself | peak of the save | of the load | seconds |",
            "|---|---|---|---|---|---|",
        ]
    for buffer_gib, mapped, size, ((save_peak, save_seconds), (load_peak, load_seconds)) in tables:
        lines.append(
            f"| {'in a shared file mapping' if mapped else 'anonymous'} | {buffer_gib:g} | {size / GIB:.2f} | "
            f"{save_peak / GIB:.2f} | {load_peak / GIB:.2f} | {save_seconds:.1f}, {load_seconds:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__)
    parser.add_argument("--gib", type=float, default=1.5)
    parser.add_argument("--table-gib", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        seconds = rounds_of(state(args.gib), folder, args.rounds)
        print(report(seconds, args.gib, [], args.threads), flush=True)
        shutil.rmtree(folder)
        tables = []
        for buffer_gib, mapped in ((0.5, False), (2.0, True)) if args.table_gib else ():
            folder.mkdir()
            tables.append((buffer_gib, mapped, *table_memory(args.table_gib, buffer_gib, mapped, folder)))
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = report(seconds, args.gib, tables, args.threads)
    write("checkpoint", args.threads, text, {"gib": args.gib, "seconds": seconds, "tables": tables})


if __name__ == "__main__":
    main()
