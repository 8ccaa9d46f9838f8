"""`make bench-gpu` as far as a machine without a GPU can show: its numbers, its tables, its steps, its shapes."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from models.accounting import flops_per_token
from models.kernels import grouped_gemm_triton as k
from models.kernels.gate import bytes_moved
from models.kernels.grouped_swiglu import flops
from models.moe import ExpertKernel
from scripts import bench_gpu, gpu_ceilings, gpu_checks, gpu_experts, gpu_kernels, gpu_table, gpu_training
from scripts.gpu_presets import PRESETS
from scripts.gpu_table import Case, Column, Section, run_section
from scripts.gpu_timing import Bench
from scripts.gpu_training import TrainingStep, fastest_micro_batch, utilization, without_masked_half
from scripts.params import model_config
from tests.interpreted import interpreted_kernels
from tests.tiny import relative_error, tiny_config
from train.engine import Engine
from train.execution import EngineConfig, NativeKernels, Precision
from train.optim import OptimConfig

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def bench() -> Bench:
    return Bench(CPU, quick=True, copy_bandwidth=4e12, matmul_rate=800e12)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_torch_triton_and_numpy_are_all_it_imports():
    command = (
        "import sys, sysconfig; from pathlib import Path; from importlib.util import find_spec;"
        "blocked = ('deepspeed', 'hydra', 'omegaconf', 'yaml', 'scipy', 'transformers', 'safetensors', 'tokenizers');"
        "assert all(find_spec(name) for name in blocked), 'a name that is not installed cannot be missed';"
        "sys.modules.update(dict.fromkeys(blocked));"  # every import of them fails
        "import scripts.bench_gpu;"
        "print(*{name.split('.')[0] for name, module in sys.modules.items() if module is not None})"
    )
    done = python("-c", command)
    assert done.returncode == 0, done.stderr
    ours = {"models", "scripts", "train"}
    imported = set(done.stdout.split())
    assert {"torch", *ours} <= imported and not imported & {"deepspeed", "hydra", "omegaconf", "yaml", "scipy"}


def test_without_a_gpu_one_line_says_so(tmp_path):
    done = python("-m", "scripts.bench_gpu", "--out", str(tmp_path))
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr


def test_a_torch_or_triton_that_is_too_old_is_named(monkeypatch):
    """A CPU refuses what is asked of torch, like an older version."""
    refused = bench_gpu.too_old(CPU)
    assert refused is not None and "adds products of bf16 matrices" in refused
    assert f"of {torch.__version__}: NotImplementedError" in refused and "torch==2.13.0" in refused
    asked = []
    monkeypatch.setattr(torch, "addmm", lambda *tensors, **settings: asked.append(settings["out_dtype"]))
    assert bench_gpu.too_old(CPU) is None and asked == [F32]
    monkeypatch.setattr(bench_gpu.launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_gpu, "too_old", lambda device: f"too old for {device}")
    assert bench_gpu.missing() == "too old for cuda"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "models.kernels.grouped_gemm_triton", None)
    refused = bench_gpu.too_old(CPU)
    assert refused is not None and f"of {triton.__version__}: " in refused and "triton==3.7.1" in refused


@pytest.mark.parametrize("name", list(PRESETS))
def test_shapes_equal_the_presets(name):
    assert PRESETS[name] == model_config(name, []).model


def test_checks_pass_in_the_interpreter_and_a_wrong_kernel_fails(monkeypatch):
    monkeypatch.setattr(gpu_checks, "GATE_CASES", (((1, 3), 2, 33, (F32, F32, F32)), ((1, 3), 4, 40, (F32, BF16, F32))))
    monkeypatch.setattr(gpu_checks, "HEAD_CASES", ((5, 24, 61),))
    monkeypatch.setattr(gpu_checks, "EXPERT_CASES", (([0, 3, 0, 5], 16, 32),))
    for kernel in (k.gate_up_kernel, k.rows_kernel, k.hidden_backward_kernel, k.weight_gradient_kernel):
        blocks = triton.Config(dict.fromkeys(kernel.configs[0].kwargs, 16))
        monkeypatch.setattr(kernel, "configs", [blocks])  # one: nothing is timed
    # To bf16 the interpreter rounds towards zero: twice the error of rounding to the nearest.
    limits = {kind: {F32: by[F32], BF16: 2 * by[BF16]} for kind, by in gpu_checks.LIMITS.items()}
    monkeypatch.setattr(gpu_checks, "LIMITS", limits)
    table = gpu_checks.section(CPU, quick=True)
    with interpreted_kernels():
        run_section(table, time.monotonic() + 60, lambda: None)
    assert gpu_checks.failures(table) == 0, [row for row in table.rows if row.get("verdict") != "ok"]
    assert len(table.rows) == 2 * 2 * 6 + 3 * 4 + 3 * 5
    definition = gpu_checks.engram_gate_definition
    monkeypatch.setattr(gpu_checks, "engram_gate_definition", lambda *a: tuple(x * 1.02 for x in definition(*a)))
    broken = gpu_checks.section(CPU, quick=True)
    broken.cases = broken.cases[:1]
    with interpreted_kernels():
        run_section(broken, time.monotonic() + 60, lambda: None)
    assert gpu_checks.failures(broken) == 6  # 2 % in every tensor
    assert bench_gpu.verdict([broken]) == "**6 checks failed or were not reached.**"
    broken.cases *= 2  # as of a run that ends before the second one
    assert gpu_checks.failures(broken) == 7


class RoundsTheScale(torch.autograd.Function):
    """Hands the gradient from above on in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].bfloat16().to(grads[0].dtype)


def test_a_factor_that_is_rounded_fails(monkeypatch):
    """All values of a gradient are then off by the same quarter of a per cent, less than bf16 matmuls are allowed."""
    kernel = gpu_checks.linear_cross_entropy
    monkeypatch.setattr(gpu_checks, "linear_cross_entropy", lambda *args: RoundsTheScale.apply(kernel(*args)))
    with interpreted_kernels():
        for dtype, autocast in ((BF16, False), (F32, True)):
            rows = gpu_checks.check_cross_entropy("head", (5, 24, 61), dtype, autocast, CPU)
            assert {row["tensor"]: row["verdict"] for row in rows}["factor"] == "FAILED"


def test_a_check_of_torch_against_torch_is_refused():
    table = gpu_checks.section(CPU, quick=True)
    table.cases = table.cases[:1]
    run_section(table, time.monotonic() + 60, lambda: None)
    assert "do not run here" in table.rows[0]["error"] and gpu_checks.failures(table) == 1


def example(cases: list[Case]) -> Section:
    columns = [Column("case", "case"), Column("ms", "seconds", 1e3, ".2f"), Column("of copy", "share", 1, ".0%")]
    return Section("gate", "Gate", "What is measured.", columns, cases)


def test_rows_failures_and_what_found_no_time(capsys):
    def fails() -> list[gpu_table.Row]:
        raise torch.OutOfMemoryError("CUDA out of memory | tried to allocate 2 GiB\nmore")

    cleaned = []
    good = Case("good", lambda: [{"case": "good", "seconds": 0.00125, "share": 0.834}, {"case": "half"}])
    table = example([good, Case("large", fails)])
    run_section(table, time.monotonic() + 60, lambda: cleaned.append(1))
    assert len(cleaned) == 2 and not table.skipped
    assert "| good | 1.25 | 83% |\n| half | - | - |" in table.markdown()
    assert "| large | OutOfMemoryError: CUDA out of memory \\| tried to allocate 2 GiB |  |" in table.markdown()
    late = example([good])
    run_section(late, time.monotonic() - 1, lambda: None)
    assert not late.rows and "Skipped, the time was over: good." in late.markdown()
    printed = capsys.readouterr().out
    assert "case good  ms 1.25  of copy 83%" in printed and "skipped, the time is over: good" in printed


def test_results_are_written_after_every_section(tmp_path, monkeypatch, bench):
    seen = []

    def second() -> list[gpu_table.Row]:
        seen.append(json.loads((tmp_path / "gpu_cpu_quick.json").read_text()))
        return [{"case": "b"}]

    checks = gpu_checks.section(CPU, quick=True)
    checks.cases = [Case("a", lambda: [{"case": "a", "relative_error": 1.0, "limit": 0.1, "verdict": "FAILED"}])]
    made = {"checks": lambda: checks, "gate": lambda: example([Case("b", second)]), "experts": lambda: example([])}
    monkeypatch.setattr(bench_gpu, "sections", lambda bench: made)
    assert bench_gpu.run(bench, ["checks", "gate"], 60, tmp_path, "_quick") == 1
    assert list(seen[0]["sections"]) == ["checks"]
    record = json.loads((tmp_path / "gpu_cpu_quick.json").read_text())
    assert list(record["sections"]) == ["checks", "gate"] and record["machine"]["torch"] == torch.__version__
    page = (tmp_path / "gpu_cpu_quick.md").read_text()
    assert "**1 checks failed or were not reached.**" in page and "| a | - | 1.0e+00 | 1.0e-01 | FAILED |" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_cpu_quick.json", "gpu_cpu_quick.md"]
    assert bench_gpu.run(bench, ["gate"], 60, tmp_path) == 0 and (tmp_path / "gpu_cpu.md").exists()


def test_every_section_of_the_command_has_its_own_key(bench):
    for key, make in bench_gpu.sections(bench).items():
        section = make()
        names = [case.name for case in section.cases]
        assert section.key == key and names and len(set(names)) == len(names)


def test_ceilings_count_what_a_copy_and_a_matmul_do(monkeypatch):
    bench = Bench(CPU)
    monkeypatch.setattr(Bench, "seconds", lambda self, call: (call(), 0.5)[1])
    monkeypatch.setattr(gpu_ceilings, "COPY_BYTES", 1 << 20)
    assert gpu_ceilings.copy(bench)[0]["bytes"] == bench.copy_bandwidth == 2 * 2**20 / 0.5
    assert gpu_ceilings.dense(bench, 8, 16, 32)[0]["flops"] == bench.matmul_rate == 2 * 8 * 16 * 32 / 0.5
    gpu_ceilings.dense(bench, 8, 16, 16)
    assert bench.matmul_rate == 2 * 8 * 16 * 32 / 0.5  # the best so far
    whole, batched = gpu_ceilings.expert_shape(bench, 55, 16, 32)
    assert whole["flops"] == batched["flops"] == 2 * 55 * 6 * 16 * 32 / 0.5 and whole["share"] == whole["flops"] / 16384


def test_gate_rows(monkeypatch, bench):
    monkeypatch.setattr(Bench, "seconds", lambda self, call: (call(), 2.0)[1])
    for types in gpu_kernels.GATE_TYPES.values():
        hidden, rows = torch.zeros(7, 4, 24, dtype=types[0]), torch.zeros(7, 5, 24, dtype=types[1])
        expected = bytes_moved(hidden, rows, hidden)
        for way in ("kernel", "definition"):
            forward, backward = gpu_kernels.gate(bench, "x", (7, 4, 24), types, way)
            assert (forward["bytes"], backward["bytes"]) == (expected[0] / 2, expected[1] / 2)
            assert forward["share"] == expected[0] / 2 / 4e12 and backward["pass"] == "backward"


def test_head_rows(monkeypatch, bench):
    monkeypatch.setattr(Bench, "seconds", lambda self, call: (call(), 2.0)[1])
    monkeypatch.setattr(Bench, "peak_bytes", lambda self, call: (call(), 10)[1])
    ours: gpu_table.Row = {}
    for way in ("kernel", "torch, logits held", "definition"):
        (row,) = gpu_kernels.head(bench, (9, 16, 50), way, ours)
        assert row["flops"] == 6 * 9 * 16 * 50 / 2 and row["slower"] == row["larger"] == 1


def test_loads_have_all_rows():
    for num_experts in (55, 72):
        balanced, skewed, routed = (
            gpu_experts.rows_per_expert(load, 512, num_experts, top_k=6, d_model=64) for load in gpu_experts.LOADS
        )
        assert sum(balanced) == sum(skewed) == sum(routed) == 512 * 6
        assert max(balanced) - min(balanced) <= 1
        assert max(skewed) < 512 and max(skewed) > 3 * 512 * 6 / num_experts and min(skewed) > 0
        assert 1 < max(routed) / (512 * 6 / num_experts) < 4


@pytest.mark.parametrize("kernel", ["grouped_mm", "loop"])
def test_expert_rows(monkeypatch, bench, kernel):
    monkeypatch.setattr(Bench, "seconds", lambda self, call: (call(), 2.0)[1])
    (row,) = gpu_experts.experts(bench, "x", [5, 0, 7], (16, 32), kernel)
    work = flops(12, 16, 32)
    assert work == (6 * 12 * 16 * 32, 12 * 12 * 16 * 32)
    assert row["flops"] == work.forward / 2 and row["flops_both"] == 18 * 12 * 16 * 32 / 2
    assert row["share"] == row["flops"] / 800e12


@pytest.mark.parametrize("kind", ["latent", "grouped queries"])
def test_attention_says_which_operator_ran(bench, kind):
    cfg = replace(gpu_kernels.ATTENTION, seq_len=640, d_model=32, mla=replace(gpu_kernels.ATTENTION.mla, num_heads=2))
    if kind == "grouped queries":
        heads = replace(gpu_kernels.GROUPED.attention, num_heads=4, num_kv_heads=2, head_dim=8)
        cfg = replace(gpu_kernels.GROUPED, seq_len=640, d_model=32, attention=heads)
    (row,) = gpu_kernels.attention(bench, cfg, 1, None)
    assert row["ran"] in ("flash_attention_for_cpu", "attention_math")
    assert row["case"] == f"{kind}, as the layer chooses"
    (row,) = gpu_kernels.attention(bench, cfg, 1, gpu_kernels.SDPBackend.MATH)
    assert row["ran"] == "attention_math"
    counts = flops_per_token(cfg)
    expected = 3 * (counts.attention_projections + counts.attention_scores) * 640
    assert row["flops"] * row["seconds"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["moe", "moe_engram"])
def test_a_step_lowers_the_loss_of_its_batch(kind):
    cfg = tiny_config(kind)
    step = TrainingStep(cfg, CPU)
    (batch,) = step.batches(2, 1)
    assert batch[0].shape == (2, cfg.seq_len) and torch.equal(batch[0][:, 1:], batch[1][:, :-1])
    losses = [float(step(*batch)) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    assert set(step.tables) == (set() if cfg.engram is None else set(cfg.engram.layers))
    assert all(table.rows_touched > 0 for table in step.tables.values())


def test_steps_are_those_of_the_engine():
    """Three steps with a clipping that binds: weights, router biases, rows and their moments."""
    cfg = tiny_config("moe_engram")
    ours, other = TrainingStep(cfg, CPU), TrainingStep(cfg, CPU)  # of the other one the initial values
    optim = OptimConfig(lr=gpu_training.LR, grad_clip=0.1)
    ours.optim = optim
    settings = EngineConfig(precision=Precision.bf16, native_kernels=NativeKernels.off, num_threads=1)
    engine = Engine(other.model, dict(other.tables), optim, settings, 2, CPU)
    assert other.hasher is not None
    for token_ids, targets, document_ids in ours.batches(2, 3):
        loss = ours(token_ids, targets, document_ids)
        row_ids = other.hasher(token_ids, document_ids)
        rows = {layer: other.tables[layer].lookup(ids) for layer, ids in row_ids.items()}
        output = engine.forward(token_ids, document_ids, rows, targets)
        mean = output.nats / targets.numel()
        engine.backward(mean + sum(output.aux_losses.values()), row_ids, rows)
        assert engine.step(1.0).clip_factor < 1
        engine.model.update_expert_bias(output.stats.expert_counts)
        assert relative_error(loss, mean) < 1e-6
    for (name, a), b in zip(ours.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert relative_error(a.float(), b.float()) < 1e-6, name
    for layer, table in ours.tables.items():
        for name, value in table.state_shards().items():
            assert relative_error(value, other.tables[layer].state_shards()[name]) < 1e-6, name


def test_start_values_are_shared_by_the_cases_of_a_preset(monkeypatch):
    cfg = tiny_config("moe_engram")
    monkeypatch.setitem(PRESETS, "small", cfg)
    gpu_training.start_values.cache_clear()
    start = gpu_training.start_values("small")
    other = replace(cfg, moe=replace(cfg.moe, expert_kernel=ExpertKernel.loop))
    steps = TrainingStep(other, CPU, start), TrainingStep(cfg, CPU)
    for (name, a), b in zip(steps[0].model.state_dict().items(), steps[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(steps[0].model.blocks[0].attention.rotary, steps[1].model.blocks[0].attention.rotary)
    gpu_training.start_values.cache_clear()


def test_micro_batches_double_until_it_does_not_pay(monkeypatch):
    step = TrainingStep(tiny_config("moe"), CPU)
    rates = {1: 100.0, 2: 190.0, 4: 191.0, 8: 300.0}
    monkeypatch.setattr(gpu_training, "tokens_per_second", lambda step, size, steps: rates[size])
    found = fastest_micro_batch(step, [1, 2, 4, 8], 1)
    assert (found.micro_batch, found.rate) == (4, 191.0) and found.tried == "1: 0.1k, 2: 0.19k, 4: 0.191k"

    def out_of_memory(step: TrainingStep, size: int, steps: int) -> float:
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5.0

    monkeypatch.setattr(gpu_training, "tokens_per_second", out_of_memory)
    found = fastest_micro_batch(step, [1, 2, 4], 1)
    assert found.micro_batch == 1 and found.tried.endswith("2: OutOfMemoryError: CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        fastest_micro_batch(step, [2, 4], 1)


def test_utilization(monkeypatch, bench):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    cfg = PRESETS["medium"]
    counts = flops_per_token(cfg)
    per_token = 3 * counts.with_head
    # Half of 4 S H C multiply-adds' FLOPs per layer, three times.
    assert without_masked_half(counts) == per_token - 3 * 12 * (4 * 2048 * 12 * 64) / 2
    row = utilization(Bench(torch.device("cuda"), matmul_rate=800e12), cfg, 2e5)
    assert row["mfu_measured"] == per_token * 2e5 / 800e12 and row["mfu_sheet"] == per_token * 2e5 / 989e12
    assert utilization(bench, cfg, 2e5)["mfu_sheet"] is None  # a CPU has no such data sheet


def test_a_row_of_the_training_table(monkeypatch, bench):
    monkeypatch.setitem(PRESETS, "small", tiny_config("moe"))
    monkeypatch.setattr(gpu_training, "FIRST_MICRO_BATCH", PRESETS["small"].seq_len)
    monkeypatch.setattr(gpu_training, "MOST_MICRO_BATCH", 2 * PRESETS["small"].seq_len)
    gpu_training.start_values.cache_clear()
    table = gpu_training.section(bench, compiled=False)
    table.cases = [Case("small", partial(gpu_training.train, bench, "small", ExpertKernel.loop, False))]
    run_section(table, time.monotonic() + 60, lambda: None)
    (row,) = table.rows
    assert row["micro_batch"] == bench.micro_batches["small"] and row["tokens_per_second"] > 0

    def half_fits(step: TrainingStep, size: int, steps: int) -> float:
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 5.0

    bench.micro_batches["small"] = 4
    monkeypatch.setattr(gpu_training, "tokens_per_second", half_fits)
    assert gpu_training.train(bench, "small", ExpertKernel.loop, False)[0]["micro_batch"] == 2
    gpu_training.start_values.cache_clear()
    assert "Megatron-LM #5728" in table.markdown() and "21.4 %" in table.note and "28 %" in table.note


@pytest.mark.parametrize(
    ("times", "median"),
    [([0.1, 5.0, 0.2, 0.3, 0.2, 0.2, 0.3, 0.1], 0.2), ([0.5, 0.4, 0.6, 9.0], 0.6)],  # seven timed calls, or a second's
)
def test_the_timer_takes_the_median(monkeypatch, times, median):
    bench, calls, remaining = Bench(CPU, quick=True), [], iter(times)
    monkeypatch.setattr(Bench, "_once", lambda self, call: next(remaining))
    assert bench.seconds(lambda: calls.append(1)) == median
    assert len(calls) == 3 and not list(remaining)  # warm-up goes by itself
