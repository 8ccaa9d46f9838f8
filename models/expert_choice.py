"""Which expert kernel is fastest on this machine, measured at the shape of a model's layer."""

import statistics
import time
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

import torch

from models.expert_kernels import check_grouped_mm_widths, check_triton_widths
from models.initialize import initialize
from models.kernels import launch
from models.moe import ExpertKernel, MoE
from models.transformer import TransformerConfig

# Timed passes; the median of so few is not moved by one disturbance.
REPEATS = 5
# Of the weights that are timed, small enough that nothing overflows at any width.
INIT_STD = 0.02
_WIDTH_CHECKS = {ExpertKernel.grouped_mm: check_grouped_mm_widths, ExpertKernel.triton: check_triton_widths}


def candidates(cfg: TransformerConfig, device: torch.device) -> list[ExpertKernel]:
    """Kernels that run on `device` at the layer's widths.

    `padded` is for CPUs: it lays its groups out on the host, so that a GPU would have to wait.

    Raises:
        ValueError: the model has no experts.
    """
    if cfg.moe is None:
        raise ValueError("model.moe=null has no expert kernel to choose; set model.moe or leave the choice out")
    kernels = [ExpertKernel.loop, ExpertKernel.grouped_mm]
    if device.type != "cuda":
        kernels.append(ExpertKernel.padded)
    elif launch.INSTALLED and not launch.INTERPRETED:
        kernels.append(ExpertKernel.triton)
    return [kernel for kernel in kernels if _takes_widths(kernel, cfg.d_model, cfg.moe.d_expert)]


def _takes_widths(kernel: ExpertKernel, d_model: int, d_expert: int) -> bool:
    try:
        _WIDTH_CHECKS.get(kernel, lambda *_: None)(d_model, d_expert)
    except ValueError:
        return False
    return True


class Measured(NamedTuple):
    """What became of every candidate."""

    seconds: dict[ExpertKernel, float]  # at least one
    failures: dict[ExpertKernel, str]  # type and first line of the error


def expert_kernel_seconds(
    cfg: TransformerConfig, device: torch.device, num_tokens: int, precision: torch.dtype
) -> Measured:
    """Seconds of one forward and backward pass of one layer, dispatch included, with each candidate that can do it.

    Router and inputs are random, so that the load is about even, and the same for every candidate. The first pass,
    which compiles and tunes, is not timed. The random state of the process stays as it was. A candidate may fail by
    itself (out of memory, no C compiler for Triton, a GPU that it does not compile for); the others are then measured.

    Args:
        cfg: the model; `moe.expert_kernel` plays no part.
        device: where to measure, with nothing else running there.
        num_tokens: T of one micro-batch.
        precision: bf16 for autocast, as the engine does it, or fp32.

    Raises:
        ValueError: no candidate ran, with what each one said.
    """
    seconds: dict[ExpertKernel, float] = {}
    failures: dict[ExpertKernel, str] = {}
    for kernel in candidates(cfg, device):
        try:
            seconds[kernel] = _seconds(cfg, device, num_tokens, precision, kernel)
        except Exception as error:  # whatever it is, the next candidate may do without
            failures[kernel] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        if device.type == "cuda":  # here, where no traceback holds what a failed one had; trials may live beside
            with suppress(RuntimeError):  # after a fault on the device every call fails, as the next candidate says
                torch.cuda.empty_cache()
    if not seconds:
        reasons = "; ".join(f"{kernel.value}: {failure}" for kernel, failure in failures.items())
        raise ValueError(
            f"model.moe.expert_kernel=auto found no kernel that runs one layer with {num_tokens} tokens on {device} "
            f"({reasons}); where memory was short, a smaller train.micro_batch_size may fit"
        )
    return Measured(seconds, failures)


def fastest_expert_kernel(seconds: dict[ExpertKernel, float]) -> ExpertKernel:
    """The candidate with the least of `Measured.seconds`."""
    return min(seconds, key=lambda kernel: seconds[kernel])


def _seconds(
    cfg: TransformerConfig, device: torch.device, num_tokens: int, precision: torch.dtype, kernel: ExpertKernel
) -> float:
    assert cfg.moe is not None  # `candidates` has seen to it
    layer = MoE(replace(cfg.moe, expert_kernel=kernel), cfg.d_model, shared_width=0)
    initialize(layer, seed=0, init_std=INIT_STD)
    layer.to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, cfg.d_model, generator=generator).to(device).requires_grad_()
    times = []
    for _ in range(1 + REPEATS):
        layer.zero_grad()
        _wait(device)
        start = time.perf_counter()
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            update, _ = layer(x)
        update.backward(torch.ones_like(update))
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
