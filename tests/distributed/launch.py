"""Starts `tests.distributed.worker` on one or several ranks, and compares what they wrote."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.worker import Case
from tests.tiny import relative_error

ROOT = Path(__file__).parents[2]
TIMEOUT = 900  # seconds for all cases of one launch


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command that starts `-m module ...` on `ranks` processes of this machine."""
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *address, *arguments]


def launch(cases: list[Case], ranks: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    """{case name: what it wrote} of all cases, run one after the other on `ranks` processes."""
    folder.mkdir(parents=True)
    cases_file = folder / "cases.json"
    cases_file.write_text(json.dumps([asdict(case) for case in cases]))
    command = torchrun(ranks, "-m", "tests.distributed.worker", str(cases_file), str(folder))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-6000:]
    return {case.name: load_file(folder / f"{case.name}.safetensors") for case in cases}


def largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative error of a gradient or norm, and its name; gradients of zero must be zero."""
    names = [name for name in expected if name.startswith(("grad.", "table.")) or name == "norm"]
    assert names and actual.keys() == expected.keys()
    return max((relative_error(actual[name], expected[name]), name) for name in names)
