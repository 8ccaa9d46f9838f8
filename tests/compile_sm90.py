"""Compile kernels for sm_90 (H100, H200) without a GPU: `python -m tests.compile_sm90` prints what they need as JSON.

A process of its own, because Triton's interpreter, which the other tests use, is chosen when Triton is imported.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels import cross_entropy_triton, gate_triton


@dataclass
class Compiled:
    """What one compiled kernel takes of a multiprocessor."""

    name: str
    registers: int  # per thread
    spilled: int  # bytes per thread that found no register
    shared: int  # bytes of shared memory per program
    num_warps: int
    cubin: int  # bytes of machine code and its headers


def compile_sm90(name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Compiled:
    """Compile `kernel` for pointers aligned to 16 bytes, as torch's are.

    Args:
        name: of the result.
        kernel: a function under `triton.jit`.
        types: of the arguments that are no constants, "*bf16" for a pointer to bf16, "i32:16" for a multiple of 16.
        constants: values of the `tl.constexpr` arguments, and num_warps.
    """
    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {arg: "constexpr" if arg in constants else types[arg].removesuffix(":16") for arg in kernel.arg_names}
    aligned = [arg not in constants and (types[arg][0] == "*" or types[arg].endswith(":16")) for arg in signature]
    attributes = {(place,): [["tt.divisibility", 16]] for place, is_aligned in enumerate(aligned) if is_aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spilled = assembler_report(compiled.asm["ptx"])
    return Compiled(
        name, registers, spilled, compiled.metadata.shared, compiled.metadata.num_warps, len(compiled.asm["cubin"])
    )


def assembler_report(ptx: str) -> tuple[int, int]:
    """Registers per thread and bytes spilled, which only the assembler knows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", said)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", said)
    return int(registers), int(spilled)


def gate_kernels() -> list[Compiled]:
    """Both kernels: in bf16 at the width of the 27B models, and with the fp32 stream that autocast leaves."""
    compiled = []
    for branches, width, stream, rows in ((4, 2560, "bf16", "bf16"), (1, 2560, "fp32", "bf16")):
        types = dict.fromkeys(("hidden", "out", "grad_out", "grad_hidden"), f"*{stream}")
        types |= dict.fromkeys(("value_keys", "grad_value_keys"), f"*{rows}")
        fp32 = ("hidden_norm", "key_norm", "gates", "grad_gates", "statistics", "partial_sums")
        types |= dict.fromkeys(fp32, "*fp32") | {"eps": "fp32", "scale": "fp32", "num_tokens": "i32"}
        constants = {"WIDTH": width, "BRANCHES": branches, "RESIDUAL": True}
        name = f"{branches} x {width} {stream}, {rows}"
        element_sizes = {"bf16": 2, "fp32": 4}
        sizes = gate_triton.backward_sizes(branches, width, element_sizes[stream], element_sizes[rows])
        kernels = {
            "forward": (gate_triton.gate_forward_kernel, gate_triton.forward_sizes(width)),
            "backward": (gate_triton.gate_backward_kernel, sizes),
        }
        for direction, (kernel, sizes) in kernels.items():
            compiled.append(compile_sm90(f"gate {direction} {name}", kernel, types, constants | sizes))
    return compiled


def cross_entropy_kernels() -> list[Compiled]:
    """At the vocabulary of the papers with gradient, and without it for rows that start anywhere."""
    compiled = []
    for element, with_gradient, multiple in (("bf16", True, ":16"), ("fp32", False, "")):
        types = {"logits": f"*{element}", "targets": "*i64", "losses": "*fp32", "vocab_size": f"i32{multiple}"}
        constants = {"IGNORE_INDEX": -100, "WITH_GRADIENT": with_gradient, **cross_entropy_triton.sizes(129_280)}
        kernel = cross_entropy_triton.softmax_cross_entropy_kernel
        compiled.append(compile_sm90(f"cross-entropy {element}, gradient {with_gradient}", kernel, types, constants))
    return compiled


if __name__ == "__main__":
    print(json.dumps([asdict(compiled) for compiled in gate_kernels() + cross_entropy_kernels()]))
