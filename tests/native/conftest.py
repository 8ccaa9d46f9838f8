"""The C kernels in the forms of all processors, for the tests of the matrix kernels."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from models import native

# With which flags the kernels are compiled, so that what other processors would run is tested on this one too.
WITHOUT_AMX = ["-mno-amx-tile", "-mno-amx-bf16"]
EMULATED_AMX = [*WITHOUT_AMX, "-D__AMX_BF16__", "-include", str(Path(__file__).parent / "emulated_amx.h")]
UNITS: dict[str, list[str]] = {"plain C": [*WITHOUT_AMX, "-mno-avx512bf16"], "emulated AMX": EMULATED_AMX}
if native.matrix_unit():
    UNITS["unit"] = []
    if torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_bf16_supported():
        UNITS["dot products"] = WITHOUT_AMX


@pytest.fixture(params=UNITS)
def calls(request, monkeypatch, tmp_path_factory):
    """The test runs on the unit, where there is one, and on what stands in for it; gives the kernels called."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    if UNITS[request.param]:
        path = tmp_path_factory.getbasetemp() / f"{request.param.replace(' ', '_')}.so"
        if not path.exists():
            sources = [str(source) for source in native.SOURCES]
            flags = [*native.FLAGS, *native.THREADS, *UNITS[request.param]]
            subprocess.run(["cc", *flags, *sources, "-o", str(path), "-lm"], check=True)
        library = ctypes.CDLL(str(path))
        if request.param != "emulated AMX":  # it asks the system for the unit
            assert library.matrix_unit() == (request.param == "dot products")
        monkeypatch.setattr(native, "library", lambda: library)
        monkeypatch.setattr(native, "matrix_unit", lambda: True)  # let the modules take these paths all the same
    called: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (called.append(name), call(name, *arguments))[1])
    native.use(native.Level.matrices)
    yield called
    native.use(native.Level.off)
    torch.set_num_threads(threads)
