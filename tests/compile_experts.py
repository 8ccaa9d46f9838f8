"""Compile the grouped SwiGLU's kernels for sm_90 (H100, H200) at the 27B shapes, without a GPU.

`python -m tests.compile_experts [all]` prints what each needs, as JSON; `all` takes every configuration. A process of
its own, because Triton's interpreter, which the tests use, is chosen when Triton is imported.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels import grouped_gemm_triton as kernels
from models.kernels.grouped_swiglu import HIDDEN_COLUMNS

NUM_EXPERTS, D_MODEL, D_EXPERT = 64, 2560, 1536
LAYER = {"NUM_EXPERTS": NUM_EXPERTS, "D_MODEL": D_MODEL, "D_EXPERT": D_EXPERT}
CASES: dict[str, tuple[Any, list[triton.Config], dict[str, Any]]] = {
    "gate_up": (kernels.gate_up_kernel, kernels.GATE_UP_CONFIGS, {**LAYER, "KEEP_PRE": True}),
    "down": (
        kernels.rows_kernel,
        kernels.ROWS_CONFIGS,
        {"NUM_EXPERTS": NUM_EXPERTS, "INNER": D_EXPERT, "WIDTH": D_MODEL, "TRANSPOSED": False},
    ),
    "grad_x": (
        kernels.rows_kernel,
        kernels.ROWS_CONFIGS,
        {"NUM_EXPERTS": NUM_EXPERTS, "INNER": 2 * D_EXPERT, "WIDTH": D_MODEL, "TRANSPOSED": True},
    ),
    "hidden_backward": (kernels.hidden_backward_kernel, kernels.HIDDEN_CONFIGS, {**LAYER, "BLOCK_N": HIDDEN_COLUMNS}),
    "grad_weights": (
        kernels.weight_gradient_kernel,
        kernels.WEIGHT_CONFIGS,
        {"NUM_EXPERTS": NUM_EXPERTS, "HEIGHT": D_MODEL, "WIDTH": 2 * D_EXPERT},
    ),
}
# Of other types than the rows: the bounds, the parts of the gradient of w, and weight gradients under bf16 rows.
FIXED_TYPES = {"bounds": "*i64", "partial": "*fp32"}


def compile_kernel(name: str, config: triton.Config, rows: str) -> dict[str, Any]:
    """What the kernel needs: registers, bytes on the stack and in local memory per thread, bytes of shared memory."""
    kernel, _, constants = CASES[name]
    constants = {**constants, **config.kwargs}
    arguments = kernel.fn.arg_names
    types = {**dict.fromkeys(arguments, rows), **FIXED_TYPES, **dict.fromkeys(constants, "constexpr")}
    if name == "grad_weights":
        types["out"] = "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(arguments) if argument not in constants}
    source = ASTSource(kernel.fn, {argument: types[argument] for argument in arguments}, constants, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "name": f"{name}, {rows}, {config}",
        "rows": rows,
        "num_warps": config.num_warps,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async.sync.aligned"),
        "async_copies": compiled.asm["ptx"].count("cp.async.cg"),
        "tf32": "tf32" in compiled.asm["ptx"],
    }


def main() -> None:
    results = []
    for name, (_, configs, _) in CASES.items():
        if "all" in sys.argv:
            results += [compile_kernel(name, config, "*bf16") for config in configs[:-1]]
        elif name != "down":  # ptxas unrolls all of its 24 steps, which takes ten seconds
            results.append(compile_kernel(name, configs[0], "*bf16"))
        results.append(compile_kernel(name, configs[-1], "*fp32"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
