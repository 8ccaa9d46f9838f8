"""Copies between the device that trains and this machine's RAM, made beside what the device computes.

On a CPU both are the same tensor. Pinned memory comes from torch's caching allocator: a step uses that of the step
before again.
"""

import torch
from torch import Tensor


class ToHost:
    """Begins to copy a tensor to RAM.

    Args:
        tensor: as far as the current stream has computed it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The copy, in any thread."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor


class ToDevice:
    """Begins to copy a tensor from RAM, on a stream of its own.

    Args:
        tensor: pinned, where `device` is a GPU.
        device: where it is wanted.
        stream: of that device; None on a CPU.
    """

    def __init__(self, tensor: Tensor, device: torch.device, stream: "torch.cuda.Stream | None") -> None:
        self._done: torch.cuda.Event | None = None
        self._tensor = tensor
        if stream is not None:
            with torch.cuda.stream(stream):
                self._tensor = tensor.to(device, non_blocking=True)
                self._done = torch.cuda.Event()
                self._done.record(stream)

    def take(self) -> Tensor:
        """The copy in fp32, for what the current stream computes from now on."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._tensor.device)
            current.wait_event(self._done)
            self._tensor.record_stream(current)
        return self._tensor.float()
