"""The training engine: DeepSpeed for the dense parameters, memory tables beside it, and one global clipping.

This is the only file that imports deepspeed. How the pieces fit (see docs/decisions.md):

* DeepSpeed runs with `managed_gradient_accumulation: false`: `backward` only accumulates into `parameter.grad`, and
  `step` is the boundary. Between the two every gradient is there, raw: that is the one point where the global norm
  over parameters *and* tables is taken and both are scaled. It lies before ZeRO partitions gradients and before Muon
  orthogonalises them. DeepSpeed's own `gradient_clipping` stays 0: with Muon at ZeRO stage >= 1 it would rescale
  already orthogonalised gradients, and the model would not learn.
* Parameters are fp32 (the master weights); `bf16` means autocast inside the model's forward.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from models import native
from models.memory_table import MemoryTable
from models.transformer import Output, Transformer
from train.finite import check_finite
from train.optim import OptimConfig, OptimizerKind, ParameterGroup, parameter_groups
from train.optimizer_state import check_names, moments, refresh_masters


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

    zero_stage: int = 0  # 0: nothing partitioned; 1: optimizer state partitioned over ranks
    precision: Precision = Precision.auto
    num_threads: int = 0  # CPU threads of this process; 0: its share of the cores; resolved when a run is planned
    native_kernels: NativeKernels = NativeKernels.auto
    deepspeed: dict[str, Any] = field(default_factory=dict)  # extra DeepSpeed settings, of DEEPSPEED_SETTINGS

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1):
            raise ValueError(f"engine.zero_stage={self.zero_stage} is not supported; use 0 or 1")
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


@dataclass
class StepReport:
    """What one optimizer step did. Norms are L2, over the mean gradient of the global batch, before clipping."""

    grad_norm: float  # parameters and tables together
    table_grad_norm: float
    clip_factor: float  # min(1, grad_clip / (grad_norm + 1e-6)), torch's clip_grad_norm_ convention


class _AutocastModel(nn.Module):
    """The model with autocast *inside* its forward: DeepSpeed switches off an autocast that surrounds it."""

    def __init__(self, model: Transformer, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.device_type = device.type
        self.precision = precision

    def forward(
        self, token_ids: Tensor, document_ids: Tensor, memory_rows: Mapping[int, Tensor], targets: Tensor
    ) -> Output:
        use_bf16 = self.precision is Precision.bf16
        with torch.autocast(self.device_type, torch.bfloat16) if use_bf16 else nullcontext():
            output: Output = self.model(token_ids, document_ids, dict(memory_rows), targets)
        return output


class Engine:
    """Forward, backward and step of a Transformer and its memory tables.

    Args:
        model: the module to train; moved to `device`.
        tables: {layer: table}; may be empty. They are not DeepSpeed parameters.
        optim: rule of the dense parameters, and the global clipping norm.
        cfg: ZeRO stage, precision, extra DeepSpeed settings; `precision` must be resolved.
        micro_batch_size: sequences of one forward.

    Raises:
        ValueError: for a combination that is known not to train, or is not tested.
    """

    def __init__(
        self,
        model: Transformer,
        tables: dict[int, MemoryTable],
        optim: OptimConfig,
        cfg: EngineConfig,
        micro_batch_size: int,
        device: torch.device,
    ) -> None:
        _refuse_many_ranks()
        native.use(native.Level(resolve_native(cfg).value))
        self.model = model
        self.tables = tables
        self.device = device
        self.optim = optim
        self.cfg = cfg
        self.parameters = list(model.named_parameters())  # once: finding them takes longer than using them
        self.groups = parameter_groups(model, optim)
        self.ds_config = deepspeed_config(cfg, micro_batch_size)
        self._engine = self._initialize(_AutocastModel(model, device, resolve_precision(cfg.precision)))

    def _initialize(self, wrapped: nn.Module) -> Any:
        deepspeed = _import_deepspeed()
        engine, *_ = deepspeed.initialize(
            model=wrapped,
            optimizer=_make_optimizer(self.groups, self.optim),
            config=self.ds_config,
            dist_init_required=False,
        )
        if self.cfg.zero_stage == 0:
            # One rank has nobody to reduce with, but DeepSpeed would still copy all gradients into a flat buffer and
            # back, 10 ms of a 300 ms step. (ZeRO needs the reduction: there it fills the partition.)
            engine.enable_backward_allreduce = False
        return engine

    def forward(
        self, token_ids: Tensor, document_ids: Tensor, memory_rows: Mapping[int, Tensor], targets: Tensor
    ) -> Output:
        """Run the model on (B, S) token ids, document ids, targets, {layer: (B, S, R, M)} rows; `Output` has nats."""
        output: Output = self._engine(token_ids, document_ids, memory_rows, targets)
        return output

    def backward(self, loss: Tensor, row_ids: Mapping[int, Tensor], memory_rows: Mapping[int, Tensor]) -> None:
        """Add the gradient of `loss` (already scaled by 1 / accumulation) to parameters and tables."""
        self._engine.backward(loss, scale_wrt_gas=False)
        for layer, table in self.tables.items():
            if not memory_rows[layer].requires_grad:  # a frozen table's
                continue
            gradient = memory_rows[layer].grad
            assert gradient is not None, f"no gradient reached the memory rows of layer {layer}"
            table.accumulate(row_ids[layer], gradient)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, accumulated gradient) of every parameter that has one; valid between `backward` and `step`."""
        for name, parameter in self.parameters:
            if parameter.grad is not None:
                yield name, parameter.grad

    def step(self, lr_scale: float) -> StepReport:
        """Clip by one global norm over parameters and tables, then update both and clear the gradients.

        factor = min(1, grad_clip / (norm + 1e-6)), norm^2 = sum over parameters |g|^2 + sum over tables |g|^2.

        Raises:
            NonFiniteLossError: the norm is not a number; parameters, tables and moments are as they were.
        """
        gradients = [gradient for _, gradient in self.gradients()]
        dense_sq = float(torch.stack(torch._foreach_norm(gradients)).double().square().sum())
        table_sq = sum(float(table.grad_sq_norm()) for table in self.tables.values())
        norm = (dense_sq + table_sq) ** 0.5
        check_finite("gradient norm", norm)
        factor = min(1.0, self.optim.grad_clip / (norm + 1e-6)) if self.optim.grad_clip > 0 else 1.0
        if factor < 1.0:
            torch._foreach_mul_(gradients, factor)
        self._set_lr(lr_scale)
        with _eager_muon(self.optim.kind):
            self._engine.step()
        for table in self.tables.values():
            table.apply(factor, self.optim.lr * lr_scale)
        return StepReport(grad_norm=norm, table_grad_norm=table_sq**0.5, clip_factor=factor)

    def _set_lr(self, lr_scale: float) -> None:
        for group in self._engine.optimizer.param_groups:
            base = self.optim.muon_lr if group.get("use_muon") else self.optim.lr
            group["lr"] = base * lr_scale

    def state_tensors(self) -> dict[str, Tensor]:
        """fp32 weights, moments and step counts by name: `model.<parameter>`, `optim.<parameter>.<moment>`.

        The same names and full shapes at every ZeRO stage. Buffers of the model (router bias) are under `model.`.
        """
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for group in self.groups:
            for name, parameter in group.parameters:
                for key, tensor in self._moments(parameter, group).items():
                    state[f"optim.{name}.{key}"] = tensor
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; every name and shape must match.

        Raises:
            ValueError: naming the first tensors that are missing, surplus, or of another shape.
        """
        own = self.state_tensors()
        check_names(own, state)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(state[f"model.{name}"])
            for group in self.groups:
                for name, parameter in group.parameters:
                    for key, tensor in self._moments(parameter, group).items():
                        tensor.copy_(state[f"optim.{name}.{key}"])
            if self.cfg.zero_stage > 0:
                refresh_masters(self._engine.optimizer)

    def _moments(self, parameter: nn.Parameter, group: ParameterGroup) -> dict[str, Tensor]:
        return moments(self._engine.optimizer, parameter, group.use_muon, self.cfg.zero_stage)


def deepspeed_config(cfg: EngineConfig, micro_batch_size: int) -> dict[str, Any]:
    """The whole DeepSpeed configuration, generated; written to the run folder as `ds_config.json`."""
    generated = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # unmanaged: the caller of backward decides when to step
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": cfg.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # never: metrics are ours
    }
    return {**generated, **cfg.deepspeed}


def _import_deepspeed() -> Any:
    """Import DeepSpeed and join a process group.

    Imported here and not at the top because it takes seconds, and plans and reports need only `EngineConfig`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    # One process shares memory with nobody: without this DeepSpeed compiles a C++ shared-memory extension on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    if not torch.distributed.is_initialized():
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        # A private in-process store: trials that run side by side must not meet on one TCP port.
        torch.distributed.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _refuse_many_ranks() -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ValueError(f"WORLD_SIZE={world_size} is not supported: a run is one process; start it without a launcher")


def _make_optimizer(groups: list[ParameterGroup], optim: OptimConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW, or DeepSpeed's Muon with that AdamW for the groups that Muon does not treat.

    Muon is built here and not through DeepSpeed's configuration, which tags parameters by its own rule: every tensor of
    two dimensions that is not called `embed` or `lm_head`, so also norms with one row per branch, routers and our head.
    """
    adamw: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    records: list[dict[str, Any]] = [
        {"params": [p for _, p in group.parameters], "weight_decay": group.weight_decay, "name": group.name}
        for group in groups
    ]
    if optim.kind is OptimizerKind.adamw:
        return torch.optim.AdamW(records, fused=True, **adamw)
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group, record in zip(groups, records, strict=True):
        for parameter in record["params"]:
            parameter.use_muon = group.use_muon
            parameter.is_expert_group = parameter.ndim == 3  # stacked expert matrices are orthogonalised one by one
        record |= {"use_muon": True, "lr": optim.muon_lr, "momentum": optim.muon_momentum} if group.use_muon else adamw
        record.setdefault("use_muon", False)
    return MuonWithAuxAdam(records, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


@contextmanager
def _eager_muon(kind: OptimizerKind) -> Iterator[None]:
    """DeepSpeed wraps its Newton-Schulz iteration in torch.compile; on CPU that costs more than it saves."""
    if kind is not OptimizerKind.muon or torch.cuda.is_available():
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
