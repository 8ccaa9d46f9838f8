"""Bytes that one device holds during training, from shapes alone: no weight is allocated."""

import math
from dataclasses import dataclass

import torch

from models.accounting import ParameterRole, bytes_per_parameter
from models.activations import BF16, activation_bytes
from models.lazy_adam import MemoryOptimConfig
from models.moe import ExpertKernel
from models.ngram_hash import num_rows
from models.transformer import ActivationCheckpointing, Transformer, TransformerConfig
from train.memory.place import Place, RowType, TableConfig
from train.optim import OptimConfig, parameter_groups


@dataclass(frozen=True)
class Layout:
    """How a run is spread over devices.

    Dense parameters are on every rank, as far as ZeRO does not divide them. The routed experts of a layer are divided
    between `expert_parallel_size` ranks, the rows of every table between `table_shards` ranks.
    """

    world_size: int = 1  # ranks
    zero_stage: int = 0  # 1 divides optimizer states between ranks, 2 gradients too, 3 weights too
    expert_parallel_size: int = 1  # ranks that hold one copy of the routed experts together
    table_shards: int = 1  # ranks that hold one copy of the rows together
    bf16_weights: bool = False  # weights in bf16 beside an fp32 master copy

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size={self.world_size} must be at least 1; nearest: 1")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ValueError(
                f"zero_stage={self.zero_stage} must be 0, 1, 2 or 3; nearest: {min(max(self.zero_stage, 0), 3)}"
            )
        for name in ("expert_parallel_size", "table_shards"):
            value = getattr(self, name)
            if value < 1 or self.world_size % value:
                divisors = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
                nearest = min(divisors, key=lambda n: abs(n - value))
                raise ValueError(f"{name}={value} must divide world_size={self.world_size}; nearest: {nearest}")


@dataclass(frozen=True)
class Footprint:
    """Bytes of the fullest device, without activations."""

    weights: float
    gradients: float
    optimizer: float

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(
            self.weights + other.weights, self.gradients + other.gradients, self.optimizer + other.optimizer
        )

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


def meta_model(cfg: TransformerConfig) -> Transformer:
    """The module without memory: every tensor on torch's meta device."""
    with torch.device("meta"):
        return Transformer(cfg)


def footprints(
    cfg: TransformerConfig,
    optim: OptimConfig,
    layout: Layout,
    memory: MemoryOptimConfig | None = None,
    table: TableConfig | None = None,
) -> dict[str, Footprint]:
    """Bytes per device of the parts of a model: `dense`, `experts` (routed) and `memory` (rows).

    Rows that lie elsewhere take no memory of the device; `rows_elsewhere` counts them.

    With Z ranks that hold copies of a parameter, ZeRO leaves 1 / Z of its optimizer state (stage >= 1), gradient
    (>= 2) and weight (3) on each (Rajbhandari et al. 2020, arXiv 1910.02054, 3). Experts have copies on
    world_size / expert_parallel_size ranks, and the fullest rank holds ceil(E / expert_parallel_size) of E.
    """
    dense, experts, rows = Footprint(0, 0, 0), Footprint(0, 0, 0), Footprint(0, 0, 0)
    if table is None or table.place is Place.device:
        rows = _memory(cfg, layout, memory, bf16_rows=False)
    num_experts = cfg.moe.num_experts if cfg.moe is not None else 1
    local = math.ceil(num_experts / layout.expert_parallel_size) / num_experts
    for group in parameter_groups(meta_model(cfg), optim):
        role = ParameterRole.muon if group.use_muon else ParameterRole.adamw
        for name, parameter in group.parameters:
            if ".experts." in name:
                copies = layout.world_size // layout.expert_parallel_size
                experts += _divided(parameter.numel() * local, role, copies, layout)
            else:
                dense += _divided(parameter.numel(), role, layout.world_size, layout)
    return {"dense": dense, "experts": experts, "memory": rows}


def _divided(numel: float, role: ParameterRole, copies: int, layout: Layout) -> Footprint:
    each = bytes_per_parameter(role, layout.bf16_weights)
    share = [numel / copies if layout.zero_stage >= stage else numel for stage in (3, 2, 1)]
    return Footprint(share[0] * each.weights, share[1] * each.gradients, share[2] * each.optimizer)


def rows_elsewhere(
    cfg: TransformerConfig, layout: Layout, memory: MemoryOptimConfig, table: TableConfig
) -> dict[str, Footprint]:
    """Bytes that the rows of the fullest rank take of its machine's RAM, and of its disk.

    A file's cache holds whole rows, up to `cache_mib` for each table, and 4 bytes for every row of the file.
    """
    if cfg.memory is None or table.place is Place.device:
        return {}
    held = _memory(cfg, layout, memory, table.dtype is RowType.bf16)
    if table.place is Place.host:
        return {"rows in RAM": held}
    found = Footprint(0, 0, 0)
    for rows in num_rows(cfg.memory).values():
        local = math.ceil(rows / layout.table_shards)
        each = _rows(cfg.memory.row_dim, local, memory, table.dtype is RowType.bf16)
        share = min(1.0, table.cache_mib * 2**20 / each.total)
        found += Footprint(each.weights * share, 0, each.optimizer * share + 4 * local)
    return {"rows in a file": held, "its cache in RAM": found}


def _memory(cfg: TransformerConfig, layout: Layout, optim: MemoryOptimConfig | None, bf16_rows: bool) -> Footprint:
    """Rows with their moments and step counts; their gradient exists only for the rows of a step."""
    if cfg.memory is None:
        return Footprint(0, 0, 0)
    rows = sum(math.ceil(rows / layout.table_shards) for rows in num_rows(cfg.memory).values())
    return _rows(cfg.memory.row_dim, rows, optim, bf16_rows)


def _rows(row_dim: int, rows: int, optim: MemoryOptimConfig | None, bf16_rows: bool) -> Footprint:
    each = bytes_per_parameter(ParameterRole.memory, row_dim=row_dim, optim=optim, bf16_rows=bf16_rows)
    return Footprint(rows * row_dim * each.weights, 0, rows * row_dim * each.optimizer)


def activations(cfg: TransformerConfig, layout: Layout, micro_batch_size: int) -> dict[str, int]:
    """Bytes per device that autograd keeps for the backward pass of one micro-batch, by part.

    `activation_bytes`, and `weight copies`: what autocast makes of fp32 weight matrices; of routed experts only
    grouped_mm's are kept. Where blocks are run again, those of the block with the largest are there at once. Even load
    of the experts: a device then has B S K rows however they are divided.

    Raises:
        ValueError: no sequence.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1; nearest: 1")
    parts = activation_bytes(cfg, micro_batch_size)
    copies = {} if layout.bf16_weights else _weight_copies(cfg, layout)
    if cfg.activation_checkpointing is ActivationCheckpointing.full:
        size = copies.pop("", 0) + max(copies.values(), default=0)
    else:
        size = sum(copies.values())
    return {**parts, "weight copies": size} if size else parts


def _weight_copies(cfg: TransformerConfig, layout: Layout) -> dict[str, int]:
    """Bytes of the bf16 copies by block; "" outside of blocks.

    Routers and the projections of hyper-connections compute in fp32, and the head's copy ends with the loss.
    """
    copies: dict[str, int] = {}
    for name, parameter in meta_model(cfg).named_parameters():
        block = name.split(".")[1] if name.startswith("blocks.") else ""
        is_linear = parameter.dim() == 2 and name.endswith(".weight") and not name.endswith("router.weight")
        if is_linear and name not in ("embedding.weight", "head.weight"):
            copies[block] = copies.get(block, 0) + parameter.numel() * BF16
        elif ".experts." in name and cfg.moe is not None and cfg.moe.expert_kernel is ExpertKernel.grouped_mm:
            local = math.ceil(len(parameter) / layout.expert_parallel_size)
            copies[block] = copies.get(block, 0) + local * parameter[0].numel() * BF16
    return copies
