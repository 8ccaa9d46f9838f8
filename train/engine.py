"""The training engine: DeepSpeed for the dense parameters, memory tables beside it, and one global clipping.

This is the only file that imports deepspeed. How the pieces fit (see docs/decisions.md):

* DeepSpeed runs with `managed_gradient_accumulation: false`: `backward` accumulates, and `step` is the boundary.
  Between the two every gradient is there, reduced over ranks but otherwise raw: that is the one point where the global
  norm over parameters *and* tables is taken and both are scaled (train/zero.py says who holds what). It lies before
  Muon orthogonalises. DeepSpeed's own `gradient_clipping` stays 0: with Muon at ZeRO stage >= 1 it would rescale
  already orthogonalised gradients, and the model would not learn.
* ZeRO 0 and 1 reduce once per step, with DeepSpeed's all-reduce, called here because the clipping needs the result;
  ZeRO 2 and 3 reduce in every backward.
* Experts of other ranks are not replicas. DeepSpeed reduces them over the expert-data group alone once it is told that
  the model has experts, which it otherwise believes only of its own classes.
* Parameters are fp32 (the master weights); `bf16` means autocast inside the model's forward.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import native
from models.memory_table import MemoryTable
from models.moe import Experts
from models.transformer import Block, Output, Transformer
from train.execution import EngineConfig, Precision, resolve_native, resolve_precision
from train.finite import check_finite
from train.held import Held
from train.optim import OptimConfig, OptimizerKind, ParameterGroup, parameter_groups
from train.optimizer_state import held_state, range_of, refresh_masters, state_keys
from train.ranks import ALONE, Ranks, join
from train.ranks import part as share
from train.zero import OwnedRange, owned_gradients, scale_gradients


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
        ranks: the processes of the run; several must have joined.

    Raises:
        ValueError: for a combination that is known not to train, or is not tested.
    """

    def __init__(
        self,
        model: Transformer,
        tables: Mapping[int, MemoryTable],
        optim: OptimConfig,
        cfg: EngineConfig,
        micro_batch_size: int,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        native.use(native.Level(resolve_native(cfg).value))
        self.model = model
        self.tables = tables
        self.device = device
        join(device.type)  # a group of one where nobody has joined yet
        self.ranks = ranks
        self.optim = optim
        self.cfg = cfg
        self.parameters = list(model.named_parameters())  # once: finding them takes longer than using them
        self._places = _places(model, self.ranks)
        self.groups = parameter_groups(model, optim, self._expert_group)
        self.ds_config = deepspeed_config(cfg, optim.kind, micro_batch_size, self._one_bucket())
        self._engine = self._initialize(_AutocastModel(model, device, resolve_precision(cfg.precision)))

    @property
    def _expert_group(self) -> str | None:
        """DeepSpeed's name of the groups that reduce experts, where ranks hold different ones."""
        return f"ep_size_{self.ranks.expert_parallel}" if self.ranks.expert_parallel > 1 else None

    def _one_bucket(self) -> int | None:
        """Elements of all gradients of the fullest rank, where ranks must not reduce in more than one go.

        ZeRO 2 fills buckets of a fixed size with gradients as they come. Where ranks hold unequally many experts they
        would cut at other parameters, and reduce buckets that do not match.
        """
        degree, total = self.ranks.expert_parallel, 0
        shares = [place for place in self._places.values() if place.degree > 1]
        if self.cfg.zero_stage != 2 or not any(place.shape[0] % degree for place in shares):
            return None
        for name, parameter in self.parameters:
            shape = self._places[name].shape
            fullest = -(-shape[0] // degree) if self._places[name].degree > 1 else shape[0]
            total += fullest * (parameter.numel() // parameter.shape[0])
        return total

    def _initialize(self, wrapped: nn.Module) -> Any:
        deepspeed = _import_deepspeed()
        optimizer = _make_optimizer(self.groups, self.optim)
        if self.cfg.zero_stage == 3:
            # A block is fetched and released whole: its parts read one another's parameters.
            deepspeed.utils.set_z3_leaf_modules(wrapped, [Block])
        if self._expert_group is None:
            engine, *_ = deepspeed.initialize(
                model=wrapped, optimizer=optimizer, config=self.ds_config, dist_init_required=False
            )
        else:
            engine = _expert_parallel_engine(wrapped, optimizer, self.ds_config, self._expert_group, self.ranks)
        if self.cfg.zero_stage == 0:
            engine.enable_backward_allreduce = False  # `_reduce` does it, before the clipping
        elif self.cfg.zero_stage == 1:
            # The same, but here DeepSpeed's own reduction also fills the partitions, so only its communication goes.
            engine.optimizer.average_tensor = lambda tensor, dtype: None
        return engine

    def forward(
        self, token_ids: Tensor, document_ids: Tensor, memory_rows: Mapping[int, Tensor], targets: Tensor
    ) -> Output:
        """Run the model on (B, S) token ids, document ids, targets, {layer: (B, S, R, M)} rows; `Output` has nats."""
        output: Output = self._engine(
            token_ids, document_ids, dict(memory_rows), targets
        )  # ZeRO 3 writes into the dict
        return output

    def backward(self, loss: Tensor, row_ids: Mapping[int, Tensor], memory_rows: Mapping[int, Tensor]) -> None:
        """Add the gradient of `loss` to parameters and tables.

        The mean over ranks and the sum over micro-batches of `loss` is the loss of the global batch.
        """
        self._engine.backward(loss, scale_wrt_gas=False)
        for layer, table in self.tables.items():
            if not memory_rows[layer].requires_grad:  # a frozen table's
                continue
            gradient = memory_rows[layer].grad
            assert gradient is not None, f"no gradient reached the memory rows of layer {layer}"
            if self.ranks.world_size > 1:
                gradient = gradient / self.ranks.world_size  # tables add up what ranks send
            table.accumulate(row_ids[layer], gradient)

    def gradients(self) -> Iterator[OwnedRange]:
        """The ranges of the mean gradient that this rank answers for; valid between `reduce` and `step`."""
        return owned_gradients(self._engine.optimizer, self.parameters, self.cfg.zero_stage, self.ranks)

    def reduce(self) -> None:
        """Average the accumulated gradients over ranks, where backward has not done so; once, before `step`."""
        if self.cfg.zero_stage < 2 and self.ranks.world_size > 1:
            self._engine.buffered_allreduce_fallback()

    def step(self, lr_scale: float) -> StepReport:
        """Clip by one global norm over parameters and tables, then update both and clear the gradients.

        factor = min(1, grad_clip / (norm + 1e-6)), norm^2 = sum over parameters |g|^2 + sum over tables |g|^2.

        Raises:
            NonFiniteLossError: the norm is not a number; parameters, tables and moments are as they were.
        """
        owned = [gradient.values for gradient in self.gradients()]
        dense_sq = torch.stack(torch._foreach_norm(owned)).double().square().sum() if owned else 0.0
        table_sq = sum(float(table.grad_sq_norm()) for table in self.tables.values())
        squares = self.ranks.sum(torch.tensor([float(dense_sq), table_sq], dtype=torch.float64, device=self.device))
        dense_sq, table_sq = squares.tolist()
        norm = (dense_sq + table_sq) ** 0.5
        check_finite("gradient norm", norm)
        factor = min(1.0, self.optim.grad_clip / (norm + 1e-6)) if self.optim.grad_clip > 0 else 1.0
        if factor < 1.0:
            scale_gradients(self._engine.optimizer, self.parameters, self.cfg.zero_stage, factor)
        self._set_lr(lr_scale)
        with _eager_muon(self.optim.kind):
            self._engine.step()
        if not self._engine.was_step_applied():  # DeepSpeed looks once more, after Muon
            check_finite("norm of the optimizer's update", math.inf)
        for table in self.tables.values():
            table.apply(factor, self.optim.lr * lr_scale)
        return StepReport(grad_norm=norm, table_grad_norm=table_sq**0.5, clip_factor=factor)

    def _set_lr(self, lr_scale: float) -> None:
        for group in self._engine.optimizer.param_groups:
            base = self.optim.muon_lr if group.get("use_muon") else self.optim.lr
            group["lr"] = base * lr_scale

    def held_state(self) -> Iterator[Held]:
        """fp32 weights, moments and step counts that lie on this rank: `model.<name>`, `optim.<name>.<key>`; live.

        The same names and shapes at every number of ranks and ZeRO stage. Buffers (router bias) are under `model.`.
        After they were filled from a checkpoint, call `state_was_filled`.
        """
        parameters = dict(self.parameters)
        for name, tensor in self.model.state_dict().items():
            parameter = parameters.get(name)
            if self.cfg.zero_stage == 3 and parameter is not None:
                here = range_of(parameter, self.ranks.rank)
                local: Tensor = parameter.ds_tensor.view(-1)  # type: ignore[attr-defined]
                yield self.placed(f"model.{name}", name, local[: len(here)], here.start, range(len(here)))
            else:
                yield self.placed(f"model.{name}", name, tensor)
        optimizer, stage = self._engine.optimizer, self.cfg.zero_stage
        for group in self.groups:
            for name, parameter in group.parameters:
                for part in held_state(optimizer, parameter, group.use_muon, stage, self.ranks.rank):
                    yield self.placed(f"optim.{name}.{part.key}", name, part.values, part.start, part.owned)

    def placed(self, key: str, name: str, values: Tensor, start: int = 0, owned: range | None = None) -> Held:
        """A range of something of a parameter's shape, or a scalar of it, as that of a global tensor `key`.

        `start` counts within what this rank holds of the parameter; `owned` is None where all its holders hold it
        alike.
        """
        place = self._places.get(name)
        degree = place.degree if place is not None else 1
        if owned is None:
            owned = share(values.numel(), self.ranks.rank // degree, self.ranks.world_size // degree)
        if place is None:
            return Held(key, tuple(values.shape), start, values, owned)
        if values.ndim == 0:  # counted once for all experts
            return Held(key, (), 0, values, owned if place.start == 0 else range(0))
        return Held(key, place.shape, place.start + start, values, owned)

    def state_names(self, stem: str) -> list[str]:
        """Names of all tensors of `model` or `optim`, also of those of which this rank holds nothing."""
        if stem == "model":
            return [f"model.{name}" for name in self.model.state_dict()]
        return [
            f"optim.{name}.{key}"
            for group in self.groups
            for name, _ in group.parameters
            for key in state_keys(group.use_muon)
        ]

    def state_was_filled(self) -> None:
        """Take over what was written into `held_state`."""
        if self.cfg.zero_stage > 0:
            with torch.no_grad():
                refresh_masters(self._engine.optimizer, self.cfg.zero_stage)


class _Place(NamedTuple):
    """Where a parameter of this rank lies in the global tensor of its name."""

    shape: tuple[int, ...]  # of the global tensor
    start: int  # flat offset of this rank's first element
    degree: int  # ranks that hold different parts of it


def _places(model: Transformer, ranks: Ranks) -> dict[str, _Place]:
    """{name: place} of every parameter, before ZeRO takes them apart."""
    places = {name: _Place(tuple(tensor.shape), 0, 1) for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, Experts) and model.cfg.moe is not None:
            for name, tensor in module.named_parameters():
                shape = (model.cfg.moe.num_experts, *tensor.shape[1:])
                places[f"{path}.{name}"] = _Place(shape, module.first * tensor[0].numel(), ranks.expert_parallel)
    return places


def deepspeed_config(
    cfg: EngineConfig, kind: OptimizerKind, micro_batch_size: int, bucket: int | None = None
) -> dict[str, Any]:
    """The whole DeepSpeed configuration, generated; written to the run folder as `ds_config.json`.

    `bucket`: gradient elements that ZeRO 2 reduces at once, at least; None leaves that to DeepSpeed.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage, "overlap_comm": False}
    if cfg.zero_stage == 3 and kind is OptimizerKind.muon:
        zero["reduce_scatter"] = False  # Muon needs whole matrices; DeepSpeed refuses it otherwise
    if bucket is not None:
        zero["reduce_bucket_size"] = bucket
    generated = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # unmanaged: the caller of backward decides when to step
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # never: metrics are ours
    }
    return {**generated, **cfg.deepspeed}


def _import_deepspeed() -> Any:
    """Import DeepSpeed and let it use the process group of the run.

    Imported here and not at the top because it takes seconds, and plans and reports need only `EngineConfig`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, alone)  # DeepSpeed asks for them even where no launcher set them
    # DeepSpeed calls collectives by names that torch has changed; a reader of the warning can do nothing about it.
    warnings.filterwarnings("ignore", r".*torch\.distributed.* is deprecated", FutureWarning)
    import deepspeed

    # Without this DeepSpeed compiles a C++ extension for all-reduce in shared memory on first use.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel("WARNING")
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _expert_parallel_engine(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], group: str, ranks: Ranks
) -> Any:
    """DeepSpeed's engine, told that the model has experts; it looks for layers of its own classes otherwise.

    With that it reduces, partitions and broadcasts parameters that carry `group` over the expert-data group, and
    divides by the world size, as ours need it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import groups

    class ExpertParallelEngine(DeepSpeedEngine):
        has_moe_layers = property(lambda self: True, lambda self, value: None)

    groups._EXPERT_PARALLEL_GROUP[group] = ranks.expert_group
    groups._EXPERT_DATA_PARALLEL_GROUP[group] = ranks.expert_data_group
    return ExpertParallelEngine(
        args=None,
        model=wrapped,
        optimizer=optimizer,
        config=config,
        config_class=DeepSpeedConfig(config),
        dist_init_required=False,
    )


def _make_optimizer(groups: list[ParameterGroup], optim: OptimConfig) -> torch.optim.Optimizer:
    """Torch's fused AdamW, or DeepSpeed's Muon with that AdamW for the groups that Muon does not treat.

    Muon is built here and not through DeepSpeed's configuration, which tags parameters by its own rule: every tensor of
    two dimensions that is not called `embed` or `lm_head`, so also norms with one row per branch, routers and our head.
    """
    adamw: dict[str, Any] = {"lr": optim.lr, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    records: list[dict[str, Any]] = [
        {"params": [p for _, p in group.parameters], "weight_decay": group.weight_decay, "name": group.name}
        | ({"moe": True} if group.experts else {})
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
