"""Training steps of `small` and `medium`, pure MoE and with Engram: tokens per second, MFU, peak memory."""

import statistics
import time
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.accounting import FlopCounts, flops_per_token
from models.initialize import initialize
from models.loss import IGNORE_INDEX
from models.memory_table import LocalTable
from models.moe import ExpertKernel
from models.ngram_hash import NgramHasher, num_rows
from models.transformer import Transformer, TransformerConfig
from scripts.gpu_presets import PRESETS
from scripts.gpu_table import Case, Column, Row, Section, message
from scripts.gpu_timing import Bench, wait
from train.optim import OptimConfig, parameter_groups

LR = 1e-3
BATCHES = 4  # that the steps go through in turn
DOCUMENT = 600  # tokens; every sequence starts somewhere within one
WARM_UP, STEPS, QUICK_STEPS = 3, 10, 5
FIRST_MICRO_BATCH = 16 * 1024  # tokens; doubled for as long as it pays
MOST_MICRO_BATCH = 256 * 1024
LEAST_GAIN = 1.02  # in tokens per second, for which the micro-batch is doubled once more
NOTE = (
    "bf16 autocast, fp32 weights; forward, backward, clipping, fused AdamW, memory rows on the device. MFU: training "
    "FLOPs per token in closed form (`models.accounting`, with the head and all S^2 pairs of attention) times tokens "
    "per second, over the dense rate measured here and over the data sheet's 989 TFLOP/s; `causal` without the masked "
    "half of the pairs, over the data sheet. Published training of Qwen3-30B-A3B on H100, for comparison, over the "
    "data sheet: 21.4 % (transformers with expert parallelism, 64 GPUs, huggingface/transformers #45436), 24 % "
    "(Megatron recipe, 240.5 TFLOP/s, NVIDIA/Megatron-LM #5728), 28 % (277 TFLOP/s, NeMo AutoModel, 8 GPUs, quoted in "
    "NVIDIA/Megatron-LM #2762). That model is larger and ran on many GPUs."
)
# Dense bf16 peak of the SXM modules of H100 and H200, FLOP/s (NVIDIA's data sheets, without sparsity).
DATA_SHEET = {"H100": 989e12, "H200": 989e12}


@lru_cache(maxsize=1)
def start_values(name: str) -> dict[str, Tensor]:
    """Initial weights of a preset, kept on the host for its other cases; the expert kernel plays no part."""
    return _initialized(PRESETS[name]).state_dict()


def _initialized(cfg: TransformerConfig) -> Transformer:
    model = Transformer(cfg)
    initialize(model, seed=0)
    return model


class TrainingStep:
    """Forward, backward, one clipping over parameters and tables, fused AdamW, lazy Adam of the drawn rows.

    What `train.engine` does at ZeRO 0 without accumulation, without DeepSpeed: fp32 weights, bf16 autocast, the
    optimizer's groups and defaults of `train.optim`. The tables lie on the device.

    Args:
        cfg: the model.
        device: where all of it lies.
        start: initial weights by name; by default fresh ones.
        compiled: forward and backward through torch.compile.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        device: torch.device,
        start: dict[str, Tensor] | None = None,
        compiled: bool = False,
    ):
        self.cfg, self.device = cfg, device
        if start is None:
            self.model = _initialized(cfg).to(device)
        else:
            with torch.device(device):
                self.model = Transformer(cfg)
            self.model.load_state_dict(start)
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.optim = OptimConfig(lr=LR)
        self.parameters = list(self.model.parameters())
        groups = parameter_groups(self.model, self.optim)
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in group.parameters], "weight_decay": group.weight_decay} for group in groups],
            lr=LR, betas=(self.optim.beta1, self.optim.beta2), eps=self.optim.eps, fused=True,
        )  # fmt: skip
        self.hasher: NgramHasher | None = None
        self.tables: dict[int, LocalTable] = {}
        if cfg.memory is not None:
            self.hasher = NgramHasher(cfg.memory, torch.arange(cfg.vocab_size), pad_id=0, device=device)
            self.tables = {
                layer: LocalTable(rows, cfg.memory.row_dim, cfg.init_std, seed=0, device=device, layer=layer)
                for layer, rows in num_rows(cfg.memory).items()
            }

    def batches(self, micro_batch: int, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(token_ids, targets, document_ids), each (B, S): ids with a Zipf-like spread, DOCUMENT tokens a document."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        weights = 1.0 / torch.arange(1, self.cfg.vocab_size + 1, device=self.device)
        seq_len, result = self.cfg.seq_len, []
        for _ in range(number):
            drawn = torch.multinomial(weights, micro_batch * (seq_len + 1), replacement=True, generator=generator)
            ids = drawn.view(micro_batch, seq_len + 1)
            starts = torch.randint(0, DOCUMENT, (micro_batch, 1), device=self.device, generator=generator)
            document_ids = (torch.arange(seq_len, device=self.device) + starts) // DOCUMENT
            result.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), document_ids))
        return result

    def __call__(self, token_ids: Tensor, targets: Tensor, document_ids: Tensor) -> Tensor:
        """One step; the mean loss before it, a scalar on the device."""
        row_ids = {} if self.hasher is None else self.hasher(token_ids, document_ids)
        rows = {layer: self.tables[layer].lookup(ids) for layer, ids in row_ids.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.forward(token_ids, document_ids, rows, targets)
        assert output.nats is not None
        loss = output.nats / (targets != IGNORE_INDEX).sum()
        (loss + sum(output.aux_losses.values())).backward()
        for layer, ids in row_ids.items():
            grad = rows[layer].grad
            assert grad is not None
            self.tables[layer].accumulate(ids, grad)
        self._update()
        if output.stats.expert_counts is not None:
            self.model.update_expert_bias(output.stats.expert_counts)
        return loss.detach()

    def _update(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        dense_sq = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())
        norm = (dense_sq + sum(table.grad_sq_norm() for table in self.tables.values())) ** 0.5
        factor = min(1.0, self.optim.grad_clip / (norm + 1e-6))
        if factor < 1.0:
            torch._foreach_mul_(gradients, factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for table in self.tables.values():
            table.apply(factor, LR)


def tokens_per_second(step: TrainingStep, micro_batch: int, steps: int) -> float:
    """Tokens of a step over its median seconds, the host's time included."""
    batches = step.batches(micro_batch, BATCHES)
    seconds = []
    for index in range(WARM_UP + steps):
        wait(step.device)
        start = time.perf_counter()
        step(*batches[index % BATCHES])
        wait(step.device)
        seconds.append(time.perf_counter() - start)
    return micro_batch * step.cfg.seq_len / statistics.median(seconds[WARM_UP:])


class Fastest(NamedTuple):
    """The micro-batch with the most tokens per second."""

    micro_batch: int  # sequences
    rate: float  # tokens per second
    peak: int | None  # bytes of device memory; None on a CPU
    tried: str  # all sizes and their rates, in words


def fastest_micro_batch(step: TrainingStep, sizes: list[int], steps: int) -> Fastest:
    """Tries `sizes` in their order until memory ends or a size gains less than LEAST_GAIN over the best before it.

    Raises:
        RuntimeError: what the first size raised.
    """
    best, on_gpu = Fastest(0, 0.0, None, ""), step.device.type == "cuda"
    tried: list[str] = []
    for size in sizes:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(step.device)
        try:
            rate = tokens_per_second(step, size, steps)
        except RuntimeError as error:
            if not tried:
                raise
            tried.append(f"{size}: {message(error)[:40]}")
            break
        tried.append(f"{size}: {rate / 1e3:.3g}k")
        before = best.rate
        if rate > before:
            best = Fastest(size, rate, torch.cuda.max_memory_allocated(step.device) if on_gpu else None, "")
        if rate < LEAST_GAIN * before:
            break
    return best._replace(tried=", ".join(tried))


def without_masked_half(counts: FlopCounts) -> float:
    """Training FLOPs per token without the half of all S^2 pairs that lies in the future."""
    return counts.training - 3 * counts.attention_scores / 2


def utilization(bench: Bench, cfg: TransformerConfig, rate: float) -> Row:
    """Model FLOPs per second over the measured dense rate and over the data sheet; no recomputation is counted."""
    counts = flops_per_token(cfg)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    sheet = next((peak for key, peak in DATA_SHEET.items() if key in name), None)
    return {
        "mfu_measured": bench.of_matmul(counts.training * rate),
        "mfu_sheet": None if sheet is None else counts.training * rate / sheet,
        "mfu_causal": None if sheet is None else without_masked_half(counts) * rate / sheet,
    }


def train(bench: Bench, name: str, kernel: ExpertKernel, compiled: bool) -> list[Row]:
    """One preset with one expert kernel, at the micro-batch that was fastest with the first one, or half of it."""
    cfg = PRESETS[name]
    assert cfg.moe is not None
    cfg = replace(cfg, moe=replace(cfg.moe, expert_kernel=kernel))
    step = TrainingStep(cfg, bench.device, start_values(name), compiled)
    first = FIRST_MICRO_BATCH // cfg.seq_len
    sizes = [first << doubled for doubled in range((MOST_MICRO_BATCH // FIRST_MICRO_BATCH).bit_length())]
    if name in bench.micro_batches:
        sizes = [bench.micro_batches[name]]
    steps, found = QUICK_STEPS if bench.quick else STEPS, None
    with suppress(torch.OutOfMemoryError):
        found = fastest_micro_batch(step, sizes, steps)
    if found is None:  # what fits with one kernel need not with the other; here, where no traceback holds memory
        found = fastest_micro_batch(step, [max(1, sizes[0] // 2)], steps)
    bench.micro_batches.setdefault(name, found.micro_batch)
    row: Row = {"case": name, "kernel": kernel.value, "mode": "compiled" if compiled else "eager"}
    row |= {"micro_batch": found.micro_batch, "tokens_per_second": found.rate, "peak": found.peak, "tried": found.tried}
    return [row | utilization(bench, cfg, found.rate)]


def section(bench: Bench, compiled: bool) -> Section:
    """Every preset with both kernels; the compiled steps are a section of their own, since they take longest."""
    kernels = (ExpertKernel.triton, ExpertKernel.grouped_mm)
    found = [
        Case(f"{name} {kernel.value}", partial(train, bench, name, kernel, compiled))
        for name in ("medium_engram", "medium", "small_engram", "small")
        for kernel in kernels
    ]
    return Section(
        "training_compiled" if compiled else "training",
        "Training step" + (", torch.compile" if compiled else ""),
        NOTE,
        [
            Column("model", "case"),
            Column("experts", "kernel"),
            Column("mode", "mode"),
            Column("sequences", "micro_batch", 1, "d"),
            Column("tokens/s", "tokens_per_second", 1, ",.0f"),
            Column("MFU, measured peak", "mfu_measured", 1, ".1%"),
            Column("MFU, data sheet", "mfu_sheet", 1, ".1%"),
            Column("causal", "mfu_causal", 1, ".1%"),
            Column("peak GB", "peak", 1e-9, ".1f"),
            Column("tried", "tried"),
        ],
        found,
    )
