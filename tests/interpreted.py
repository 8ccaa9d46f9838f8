"""Triton kernels on a CPU: interpreted, with memory that starts as NaN, so that an element nobody writes is seen."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from models.kernels import launch


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """CPU tensors go to the kernels; what `torch.empty` and its like give holds NaN."""
    assert launch.INTERPRETED, "Triton compiles in this process; set TRITON_INTERPRET=1 before it is imported"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "interpret_on_cpu", True)
        torch.use_deterministic_algorithms(True)  # fills new memory, and refuses what is not repeatable
        try:
            assert torch.empty(1).isnan() and torch.empty_like(torch.ones(1)).isnan()
            yield
        finally:
            torch.use_deterministic_algorithms(False)
