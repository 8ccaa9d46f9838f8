"""Shared set-up: one thread, plain torch and fixed seeds, so that every test is repeatable to the bit."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRITON_INTERPRET"] = (
    "1"  # read when Triton is imported, by whatever test comes first; models on a CPU ignore it
)
os.environ["WANDB_MODE"] = "disabled"  # nobody's dashboard is fed by tests; those of wandb itself say otherwise

import numpy as np
import pytest
import torch

from models import native


@pytest.fixture(autouse=True)
def one_thread_plain_torch_and_fixed_seeds() -> None:
    torch.set_num_threads(1)
    native.use(native.Level.off)  # an engine of an earlier test may have chosen kernels for the process
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
