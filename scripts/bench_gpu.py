"""Triton kernels on a GPU: right first, then over what this GPU can do; and training steps of `small` and `medium`.

    make bench-gpu [ARGS="--quick"]

On a bare machine nothing but torch, Triton and numpy is needed, no DeepSpeed and no config framework. Written for torch
2.13 and Triton 3.7; what an older one lacks is said, before anything is measured or in the row that fails:

    pip install torch==2.13.0 triton==3.7.1 numpy
    python -m scripts.bench_gpu [--quick] [--minutes 9] [--only experts gate]

1. Every kernel against its definition in plain torch in fp64. A failure makes the exit code 1, after all has run.
2. Ceilings, measured in the same run: copy bandwidth, dense bf16 matmuls.
3. Gate over the copy bandwidth, experts and head over the dense rate, attention with the document mask.
4. Training steps: tokens per second, MFU, peak memory; eager, then through torch.compile.

Sections run in the order of their weight until the minutes are over; what is left out is named, and `--only` takes it
up. Much of the time goes into compiling the experts' configurations, for every size of model anew. The tables in
`benchmarks/results/gpu_<device>.{md,json}` are written after every case, so that a run that is killed leaves what it
had. A row that fails says why.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from models.kernels import launch
from scripts import gpu_ceilings, gpu_checks, gpu_experts, gpu_kernels, gpu_training
from scripts.gpu_table import Section, message, report, run_section
from scripts.gpu_timing import Bench

OUT = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
MINUTES = 9.0  # of the whole run
Facts = dict[str, str]


def missing() -> str | None:
    """What this machine lacks, in one line; None if it has all."""
    if not launch.INSTALLED:
        return "bench-gpu needs Triton, which cannot be imported; pip install triton"
    if not torch.cuda.is_available():
        return f"bench-gpu needs a CUDA device, and torch {torch.__version__} sees none"
    if launch.INTERPRETED:
        return "bench-gpu needs compiled kernels, and TRITON_INTERPRET is set; unset it"
    return too_old(torch.device("cuda"))


def too_old(device: torch.device) -> str | None:
    """What the installed torch or Triton cannot do that all of the bench needs: asked of them, not of their numbers."""
    try:
        import_module("models.kernels.grouped_gemm_triton")
    except Exception as error:  # whatever an older Triton makes of it
        version = import_module("triton").__version__
        return f"bench-gpu needs Triton 3.7 or one like it; of {version}: {message(error)}; pip install triton==3.7.1"
    total, factor = (torch.zeros(16, 16, dtype=dtype, device=device) for dtype in (torch.float32, torch.bfloat16))
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)  # as models.kernels.cross_entropy does
    except (TypeError, RuntimeError) as error:
        return (
            "bench-gpu needs a torch that adds products of bf16 matrices to an fp32 one, as 2.13 does; of "
            f"{torch.__version__}: {message(error)}; pip install torch==2.13.0"
        )
    return None


def sections(bench: Bench) -> dict[str, Callable[[], Section]]:
    """All sections, the most telling first; each is made when its turn comes."""
    return {
        "checks": partial(gpu_checks.section, bench.device, bench.quick),
        "ceilings": partial(gpu_ceilings.section, bench),
        "gate": partial(gpu_kernels.gate_section, bench),
        "experts": partial(gpu_experts.section, bench, gpu_experts.ENGRAM_27B),
        "cross_entropy": partial(gpu_kernels.head_section, bench),
        "attention": partial(gpu_kernels.attention_section, bench),
        "training": partial(gpu_training.section, bench, compiled=False),
        "training_compiled": partial(gpu_training.section, bench, compiled=True),
        "experts_72": partial(gpu_experts.section, bench, gpu_experts.MOE_27B),
    }


def machine(device: torch.device) -> Facts:
    """Device, driver, clocks and versions."""
    facts = {"device": str(device), "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["multiprocessors"] = str(properties.multi_processor_count)
        facts["CUDA of torch"] = str(torch.version.cuda)
        if shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                facts["driver, highest clock, power limit"] = " or ".join(sorted(set(done.stdout.splitlines())))
    facts["torch"] = torch.__version__
    if launch.INSTALLED:
        facts["triton"] = import_module("triton").__version__
    facts["python"] = platform.python_version()
    return facts


def write(folder: Path, facts: Facts, done: list[Section], label: str) -> Path:
    """Both files, `gpu_<device><label>`, whole or not at all; the path of the page."""
    name = "gpu_" + re.sub(r"[^a-z0-9]+", "_", facts["device"].lower()).strip("_") + label
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": facts, "sections": {section.key: section.to_dict() for section in done}}
    lines = [f"{', '.join(f'{key} {value}' for key, value in facts.items())}. `make bench-gpu`", ""]
    lines.append(f"Medians, CUDA events, second-level cache flushed. {verdict(done)}")
    for suffix, text in (
        (".md", report("Kernels and training steps on a GPU", lines, done)),
        (".json", json.dumps(record, indent=1)),
    ):
        temporary = folder / f".{name}{suffix}.tmp"
        temporary.write_text(text)
        temporary.replace(folder / f"{name}{suffix}")
    return folder / f"{name}.md"


def verdict(done: list[Section]) -> str:
    """How the checks went, in a sentence."""
    tables = [section for section in done if section.key == "checks"]
    if not tables:
        return "**The checks were left out.**"
    failed = sum(map(gpu_checks.failures, tables))
    if failed:
        return f"**{failed} checks failed or were not reached.**"
    return f"All {len(tables[0].rows)} checks passed."


def run(bench: Bench, chosen: list[str], seconds: float, folder: Path, label: str = "") -> int:
    """All chosen sections; the exit code."""
    deadline, done, facts = time.monotonic() + seconds, [], machine(bench.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    for key, make in sections(bench).items():
        if key not in chosen:
            continue
        section = make()
        done.append(section)

        def after_case() -> None:
            bench.free()
            write(folder, facts, done, label)

        run_section(section, deadline, after_case)
        path = write(folder, facts, done, label)
        print(f"  {section.seconds:.0f} s; written: {path}", flush=True)
    print(f"\n{verdict(done).strip('*')}", flush=True)
    return 1 if sum(gpu_checks.failures(section) for section in done if section.key == "checks") else 0


def main(arguments: list[str]) -> int:
    """Measure, print and write; 0, 1 where a check failed, 2 where nothing can be measured."""
    names = list(sections(Bench(torch.device("cpu"))))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repetitions")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="a section that has no time left is skipped")
    parser.add_argument("--only", nargs="+", choices=names, help="these and the ceilings, in files of their own")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the tables")
    args = parser.parse_args(arguments)
    lacking = missing()
    if lacking is not None:
        print(lacking, file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is fp32, on both sides of every comparison
    bench = Bench(torch.device("cuda", torch.cuda.current_device()), args.quick)
    chosen = names if args.only is None else ["ceilings", *args.only]
    label = "".join(f"_{word}" for word in (["quick"] if args.quick else []) + (args.only or []))
    return run(bench, chosen, 60 * args.minutes, args.out, label)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
