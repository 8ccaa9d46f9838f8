"""Seconds and bytes of calls on one device, and what all measurements of `make bench-gpu` share."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Bytes read before every timed call. Beyond any second-level cache (50 MB on an H200), so that nothing of the call's
# operands is left there, and nothing that waits to be written back; and LEAD of these passes keep the GPU busy for
# about 1 ms at 4 TB/s, in which the host gets ahead, so that its own time to launch kernels is not measured.
FLUSH_BYTES, LEAD = 1 << 30, 4
WARM_UP = 3  # calls before the timed ones
REPEATS, QUICK_REPEATS = 20, 7  # timed calls, of which the median counts
MOST_SECONDS = 1.0  # spent on the timed calls of one measurement; at least MIN_REPEATS are made
MIN_REPEATS = 3


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Bench:
    """Where to measure, how often, and the ceilings that the first sections find."""

    device: torch.device
    quick: bool = False
    copy_bandwidth: float | None = None  # bytes read and written per second by a large copy
    matmul_rate: float | None = None  # FLOP per second of the fastest large bf16 matmul
    micro_batches: dict[str, int] = field(default_factory=dict)  # model -> sequences that were fastest
    _flush: Tensor | None = None

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median seconds of `call` on the device after warm-up, with the second-level cache flushed before each call.

        With CUDA events, so that the time is the GPU's; on a CPU with the clock.
        """
        for _ in range(WARM_UP):
            call()
        once = self._once(call)
        wanted = QUICK_REPEATS if self.quick else REPEATS
        repeats = max(MIN_REPEATS, min(wanted, int(MOST_SECONDS / max(once, 1e-9))))
        return statistics.median(self._once(call) for _ in range(repeats))

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if self._flush is None:
            self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=self.device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(LEAD):
            self._flush.sum()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Most device memory that `call` held beyond what was there before; None on a CPU."""
        if self.device.type != "cuda":
            return None
        wait(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        wait(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> None:
        """Give back what the last case held: graphs of torch.compile, cycles, cached memory, the buffer for flushing.

        After a fault on the device every call fails, this one too; the next case says so in its row.
        """
        self._flush = None
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            with suppress(RuntimeError):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)

    def of_copy(self, rate: float) -> float | None:
        """Share of the copy bandwidth, or None where that could not be measured."""
        return None if self.copy_bandwidth is None else rate / self.copy_bandwidth

    def of_matmul(self, rate: float) -> float | None:
        """Share of the dense bf16 rate, or None where that could not be measured."""
        return None if self.matmul_rate is None else rate / self.matmul_rate

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16, std: float = 1.0) -> Tensor:
        """Normal values, drawn on the device."""
        return (torch.randn(shape, device=self.device, dtype=torch.float32) * std).to(dtype)


def backward_of(outputs: Tensor, leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """A call that runs the backward pass of `outputs` once more, with ones from above and nothing accumulated."""
    upstream = torch.ones_like(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
