"""Where the Triton kernels run: the one place that decides it. Nothing here imports Triton."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

# Whether Triton can be imported, and whether it will then interpret kernels instead of compiling them.
INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"

# Whether tensors on a CPU go to the kernels. Only tests set it: the interpreter is a thousand times slower than torch.
interpret_on_cpu = False

# Multiprocessors that the interpreter is taken to have: with more than one, partial sums of programs are exercised.
INTERPRETED_MULTIPROCESSORS = 3

# What the kernels read and write. They compute in fp32 inside, which would be less than fp64 promises.
DTYPES = (torch.float32, torch.bfloat16)

# Shared memory of one multiprocessor of sm_90 (H100, H200), bytes: CUDA C++ programming guide, compute capabilities.
SHARED_MEMORY_SM90 = 228 * 1024


def can_run(x: Tensor, *others: Tensor) -> bool:
    """Whether Triton kernels can work on `x` and the `others` beside it.

    All are of DTYPES, Triton is installed, and it compiles for the GPU that holds `x`. Where it interprets, tensors on
    a GPU are left to torch, and those on a CPU are taken if `interpret_on_cpu` says so.
    """
    if not INSTALLED or any(tensor.dtype not in DTYPES for tensor in (x, *others)):
        return False
    if x.device.type == "cpu":
        return interpret_on_cpu
    return x.is_cuda and not INTERPRETED


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """For launches: Triton takes the current GPU and its stream, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU (132 on an H200); fixes the number of partial sums, hence the result to the bit."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def shared_memory(device: torch.device) -> int:
    """Shared memory of one multiprocessor, in bytes, for all programs on it together."""
    if device.type != "cuda":
        return SHARED_MEMORY_SM90
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
