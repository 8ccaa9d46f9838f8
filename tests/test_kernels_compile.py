"""Every kernel compiles for an H200 and fits it; no GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = 227 * 1024  # bytes that one program can have on sm_90
REGISTERS = 64 * 1024  # of one multiprocessor
# Bytes per thread: the backward gate keeps the weights and their gradient of four branches in registers, and lacks a
# few. Spilled values stay in the first-level cache, and each is written and read once per token.
SPILLED = 160


def test_kernels_compile_for_sm_90(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.compile_sm90"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    kernels = json.loads(done.stdout)
    assert len(kernels) == 6  # the gate forward and backward for four and one branches, the softmax both ways
    for kernel in kernels:
        assert kernel["cubin"] > 0 and kernel["shared"] <= SHARED_MEMORY, kernel
        assert kernel["registers"] * 32 * kernel["num_warps"] <= REGISTERS, kernel
        assert kernel["spilled"] <= (SPILLED if "backward 4" in kernel["name"] else 0), kernel
