"""Fused CPU kernels in C, compiled once per machine: what torch does in ten passes over memory they do in one.

`elementwise.c` holds norms and activations, `split_heads.c` norm and rotation of attention's heads, `router.c` and
`top_k.c` the choice of experts, `streams.c` the residual streams of hyper-connections; `experts.c`, `attention.c`,
`attention_backward.c` and `head.c` whole layers on the processor's unit for products of bf16 (AMX, or the dot products
of AVX-512), through `tiles.h`. Each caller keeps its definition in plain torch, which runs wherever `available` or
`matrices_available` says no: on other devices, in other types, and on machines without a C compiler. `docs/log.md` has
the time of a training step before and after.

Threads: independent parts of a kernel (experts, heads, blocks of rows) run on torch's own pool, as many at once as
`torch.set_num_threads` says, through OpenMP, whose library the loader finds already there. Sums over parts are made in
a fixed order, so a kernel gives the same bits with any number of threads.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from enum import Enum
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from models.precision import compute_dtype

FOLDER = Path(__file__).parent
SOURCES, HEADERS = sorted(FOLDER.glob("*.c")), sorted(FOLDER.glob("*.h"))
# Sums may be reordered, so that they become vectors; infinities and NaN keep their meaning (no -ffast-math).
FLAGS = [
    "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-freciprocal-math", "-shared", "-fPIC",
]  # fmt: skip
THREADS = ["-fopenmp"]  # left out where the compiler lacks its library: the kernels then serve one thread
Argument = Tensor | int | float | None


class Level(str, Enum):
    """Which kernels a process uses. They round differently from torch's passes, so a run records its level."""

    off = "off"
    elementwise = "elementwise"  # elementwise.c, split_heads.c, router.c, streams.c
    matrices = "matrices"  # these, and experts.c, attention.c and head.c on the matrix unit


_level = Level.off  # see `use`; like torch's own backend switches, one for the process


def use(level: Level) -> None:
    """Choose the kernels of this process.

    Raises:
        ValueError: if they cannot be built or run here.
    """
    global _level
    if level is not Level.off and library() is None:
        raise ValueError(
            f"engine.native_kernels={level.value} needs an x86-64 processor and a C compiler (cc, or what CC names); "
            "install one, or start a new run with engine.native_kernels=off"
        )
    if level is Level.matrices and not matrix_unit():
        raise ValueError(
            "engine.native_kernels=matrices needs a processor that multiplies bf16: AVX-512 with its bf16 part, or AMX "
            "and Linux 5.16; and a compiler that knows it (gcc 11, clang 12); go on where the run was started, or "
            "start a new one with engine.native_kernels=elementwise"
        )
    _level = level


def available(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels are in use and can work on `x`: on CPU, of type `dtype`, with the threads of this process."""
    if _level is Level.off or x.device.type != "cpu" or x.dtype != dtype:
        return False
    return torch.get_num_threads() == 1 or several_threads()


def matrices_available(x: Tensor) -> bool:
    """Whether the kernels of the matrix unit are in use and matmuls on `x` run in bf16: its own type, or autocast's."""
    return _level is Level.matrices and available(x, x.dtype) and compute_dtype(x) == torch.bfloat16


def call(name: str, *arguments: Argument) -> None:
    """Run the kernel `name`. Tensors must be contiguous; None is a null pointer.

    Raises:
        MemoryError: the kernel found no working memory.
    """
    loaded = library()
    assert loaded is not None, "call native.available first"
    kernel = getattr(loaded, name)  # which ctypes keeps, with what is declared here
    if kernel.argtypes is None:
        kernel.argtypes = [_kind(argument) for argument in arguments]
    if kernel(*[_address(argument) if isinstance(argument, Tensor) else argument for argument in arguments]) != 0:
        raise MemoryError(f"no memory left for the native kernel {name}; use smaller micro-batches")


def _kind(argument: Argument) -> type[ctypes._SimpleCData]:
    """What a kernel takes in this place: a pointer, which may be null, or a number of one type."""
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_long


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous(), "native kernels take contiguous tensors"
    return tensor.data_ptr()


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels, built on first use; None without a compiler or off x86."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if platform.machine() != "x86_64" or not compiler or shutil.which(compiler[0]) is None:
        return None
    path = _cached_path(compiler)
    try:
        if not path.exists():
            _compile(compiler, path)
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:  # a damaged file, or one of another C library
            path.unlink()
            _compile(compiler, path)
            loaded = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else ""
        logging.getLogger(__name__).warning("C kernels are not used, training is slower: %s\n%s", error, said)
        return None
    loaded["matrix_unit"]()  # asks the system for the unit: without that, its first instruction ends the process
    return loaded


@lru_cache(maxsize=1)
def matrix_unit() -> bool:
    """Whether this processor multiplies bf16, and the kernel of the system lets us use what does it."""
    loaded = library()
    return loaded is not None and loaded["matrix_unit"]() != 0


@lru_cache(maxsize=1)
def several_threads() -> bool:
    """Whether the kernels can use more than one thread: the compiler knows OpenMP and has its library."""
    loaded = library()
    return loaded is not None and loaded["several_threads"]() != 0


def _cached_path(compiler: list[str]) -> Path:
    """One file per source, flags, compiler, C library and processor: several machines may share a home directory."""
    processor = next((line for line in _cpuinfo() if line.startswith("flags")), platform.processor())
    texts = [path.read_text() for path in (*SOURCES, *HEADERS)]
    identity = "\n".join([*texts, *FLAGS, *THREADS, *compiler, *platform.libc_ver(), processor])
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "engram-lab"
    return root / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _compile(compiler: list[str], path: Path) -> None:
    """Compile beside the final place and rename: trials that start together must not load half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*compiler, *FLAGS, *(str(path) for path in SOURCES), "-o", str(built), "-lm"]
        if subprocess.run([*command, *THREADS], capture_output=True).returncode != 0:
            subprocess.run(command, check=True, capture_output=True)
        with open(built, "rb") as file:
            os.fsync(file.fileno())  # half a library would end every process that loads it
        os.replace(built, path)
