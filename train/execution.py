"""How a model is executed: arithmetic, threads, kernels, and how its state is dealt out over ranks."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from models import native


class Precision(str, Enum):
    """Arithmetic of the forward and backward matmuls; weights, gradients and optimizer state are always fp32."""

    auto = "auto"  # bf16 with a GPU or a processor that multiplies bf16, else fp32; resolved when a run is planned
    fp32 = "fp32"
    bf16 = "bf16"


class NativeKernels(str, Enum):
    """The C kernels of `models.native` that a CPU run uses: a `native.Level`, or `auto`."""

    auto = "auto"  # for bf16 in one thread the most that works here, else off; resolved when a run is planned
    off = "off"
    elementwise = "elementwise"
    matrices = "matrices"


# DeepSpeed settings that only report; tests/test_engine.py shows that steps are the same to the bit with them.
DEEPSPEED_SETTINGS = ("dump_state", "memory_breakdown", "steps_per_print")

# What to use instead of the settings that are generated here.
_OURS = {
    "gradient_clipping": "use optim.grad_clip, since DeepSpeed's clipping does not see the memory tables, and with "
    "Muon at ZeRO stage >= 1 it rescales orthogonalised gradients and the model does not learn",
    "optimizer": "use the optim group",
    "scheduler": "use the schedule group",
    "zero_optimization": "use engine.zero_stage",
    "bf16": "use engine.precision",
    "fp16": "use engine.precision=bf16, fp16 is not supported",
    "torch_autocast": "use engine.precision",
    "managed_gradient_accumulation": "it must stay false, clipping happens between backward and step",
    "gradient_accumulation_steps": "use train.global_batch_tokens and train.micro_batch_size",
    "train_batch_size": "use train.global_batch_tokens",
    "train_micro_batch_size_per_gpu": "use train.micro_batch_size",
    "wall_clock_breakdown": "DeepSpeed's timers fail where accumulation is not its, perf/* of the metrics has times",
}


@dataclass
class EngineConfig:
    """How the model is executed. All of it is part of a run's identity, since it changes numerics."""

    # What is partitioned over ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too.
    zero_stage: int = 0
    expert_parallel: int = 1  # ranks over which the experts of a layer are spread; 1: every rank holds all of them
    precision: Precision = Precision.auto
    num_threads: int = 0  # CPU threads of this process; 0: its share of the cores; resolved when a run is planned
    native_kernels: NativeKernels = NativeKernels.auto
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed settings, of DEEPSPEED_SETTINGS

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(f"engine.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        if self.expert_parallel < 1:
            raise ValueError(f"engine.expert_parallel={self.expert_parallel} must be at least 1; nearest: 1")
        if self.expert_parallel > 1 and self.zero_stage == 3:
            raise ValueError(
                f"engine.zero_stage=3 does not work with engine.expert_parallel={self.expert_parallel}: DeepSpeed "
                "would partition each rank's own experts over ranks that hold others; use engine.zero_stage=2, or "
                "engine.expert_parallel=1"
            )
        if self.num_threads < 0:
            raise ValueError(f"engine.num_threads={self.num_threads} must be >= 0; 0 chooses for you")
        for key, value in self.deepspeed.items():
            if key not in DEEPSPEED_SETTINGS:
                why = _OURS.get(key, "it is not known to leave training as it is")
                raise ValueError(
                    f"engine.deepspeed.{key}={value!r} is refused: {why}; accepted: {', '.join(DEEPSPEED_SETTINGS)}"
                )


def resolve_precision(precision: Precision) -> Precision:
    """`auto` -> bf16 on a GPU or on a CPU that multiplies bf16 (AMX, or dot products of AVX-512), else fp32."""
    if precision is not Precision.auto:
        return precision
    cpu_multiplies_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    if torch.cuda.is_available() or cpu_multiplies_bf16:
        return Precision.bf16
    return Precision.fp32


def resolve_native(cfg: EngineConfig) -> NativeKernels:
    """`auto` -> the most that can be used: bf16 on a CPU, with a compiler, with a matrix unit.

    Raises:
        ValueError: kernels are asked for where none of them could run.
    """
    asked = cfg.native_kernels not in (NativeKernels.auto, NativeKernels.off)
    if asked and torch.cuda.is_available():
        raise ValueError(
            f"engine.native_kernels={cfg.native_kernels.value} works on a CPU only, and this machine has a GPU; use "
            "engine.native_kernels=off"
        )
    threads_served = cfg.num_threads == 1 or native.several_threads()
    if asked and native.library() is not None and not threads_served:
        raise ValueError(
            f"engine.native_kernels={cfg.native_kernels.value} serves one thread here, since the C compiler lacks "
            f"OpenMP, not engine.num_threads={cfg.num_threads}; use one thread, or install OpenMP's library"
        )
    if cfg.native_kernels is not NativeKernels.auto:
        return cfg.native_kernels
    on_cpu_in_bf16 = cfg.precision is Precision.bf16 and not torch.cuda.is_available()
    if not on_cpu_in_bf16 or native.library() is None or not threads_served:
        return NativeKernels.off
    return NativeKernels.matrices if native.matrix_unit() else NativeKernels.elementwise
