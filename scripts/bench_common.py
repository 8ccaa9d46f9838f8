"""What the benches on a CPU share: arguments, interleaved rounds, paired ratios, what a report says of the machine."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """What every bench takes; the first line of its docstring is its description."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    return parser


def seconds_of(step: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def timed_rounds(
    steps: Mapping[str, Callable[[], object]], rounds: int, most_seconds: float | None = None, fewest: int = 3
) -> dict[str, list[float]]:
    """Seconds of each step, in interleaved rounds: a shared machine is noisy, ratios within a round are less so.

    Args:
        steps: what is measured, by name.
        rounds: calls of each step.
        most_seconds: after this time no new round begins, but `fewest` rounds are made; None is no limit.
        fewest: see `most_seconds`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= fewest and most_seconds is not None and time.perf_counter() - start > most_seconds:
            break
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))
    return seconds


def paired_ratio(times: list[float], others: list[float]) -> float:
    """Median over the rounds of one step's time over the other's."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def unit() -> str:
    """What multiplies bf16 here; speeds and ratios of one unit say little about another, so each has its own tables."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512" if torch.cpu._is_avx512_bf16_supported() else "plain"


def page(name: str, threads: int) -> str:
    """Name of a report below OUT, without its ending."""
    return f"{name}_cpu_{unit()}_{threads}_threads"


def machine(threads: int) -> str:
    """Date and machine, for the first line of a report."""
    return (
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()} ({unit()}), {os.cpu_count()} cores, {threads} thread(s), "
        f"torch {torch.__version__}"
    )


def load() -> str:
    """How busy the machine is, a line of a report."""
    averages = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return f"Load of the machine: {averages} (1, 5, 15 minutes; this process is 1)."


def write(name: str, threads: int, text: str, record: Any) -> None:
    """Print the report, and keep it and its numbers in OUT."""
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / f"{page(name, threads)}.md").write_text(text)
    (OUT / f"{page(name, threads)}.json").write_text(json.dumps(record, indent=1))
    print(text)
