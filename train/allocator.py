"""Keep freed memory in the process: a training step allocates and frees the same hundreds of megabytes every time."""

import ctypes
import platform

# mallopt's parameters (malloc.h of glibc): trim threshold, padding of each growth of the heap, number of mappings.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tell glibc not to return large freed blocks to the kernel, which would have to clear them again page by page.

    Measured on the tiny MoE in bf16, one thread: page faults per step 25 000 -> 700, time per step 539 -> 465 ms. The
    process keeps the memory of its fullest moment. Must run before the large allocations.

    Returns:
        Whether the settings were taken; False off glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    return all(libc.mallopt(parameter, value) == 1 for parameter, value in settings)
