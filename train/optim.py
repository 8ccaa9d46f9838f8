"""Which optimizer treats which parameter. The optimizer objects are made in `train.engine`."""

import math
from dataclasses import dataclass
from enum import Enum

from torch import nn

from train.zero import mark_expert


class OptimizerKind(str, Enum):
    """AdamW for everything, or Muon for matrices and AdamW for the rest."""

    adamw = "adamw"
    muon = "muon"


@dataclass
class OptimConfig:
    """Optimizer of the dense parameters; memory tables have `models.memory_table.MemoryOptimConfig`."""

    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = 3e-3  # base learning rate, also of the memory tables (times their own multiplier)
    muon_lr: float = 2e-2  # in spectral norm per update; scaled by the same schedule as lr
    muon_momentum: float = 0.95
    beta1: float = 0.9  # DeepSeekMoE 4.1
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only: not on embeddings' norms, vectors, or memory tables
    grad_clip: float = 1.0  # global L2 norm over parameters and tables; 0 switches clipping off

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"optim.{name}={getattr(self, name)} must be > 0 and finite; the default is a safe value"
                )
        for name in ("weight_decay", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be >= 0 and finite; nearest: 0")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must lie in [0, 1), e.g. 0.9")


@dataclass
class ParameterGroup:
    """Parameters that share an optimizer rule."""

    name: str
    parameters: list[tuple[str, nn.Parameter]]
    use_muon: bool
    weight_decay: float
    experts: bool = False  # whether other ranks hold other experts under these names


# Matrices with one row per vocabulary entry: AdamW even under Muon (Muon's author, and DeepSeek-V4's practice).
_VOCABULARY = ("embedding.weight", "head.weight")


def parameter_groups(model: nn.Module, cfg: OptimConfig, expert_group: str | None = None) -> list[ParameterGroup]:
    """Split a model's parameters into matrices, vocabulary matrices and vectors.

    `expert_group` names a fourth group of the routed experts' matrices, where they are spread over ranks; the
    parameters are then marked with it, for DeepSpeed.

    Matrices (2-D, or stacks of expert matrices) are decayed and go to Muon when it is chosen; vocabulary matrices are
    decayed and stay with AdamW; vectors (norm weights, also those with one row per branch, biases, and the taps of
    depthwise convolutions, one filter per channel) are not decayed. Routers stay with AdamW: their rows are directions
    of single experts, not one map. The projections of hyper-connections are matrices; their biases and gates are
    vectors, which DeepSeek, too, leaves to AdamW under Muon.

    Raises:
        AssertionError: if a parameter is in no group or in two.
    """
    matrices, vocabulary, vectors, experts = [], [], [], []
    for name, parameter in model.named_parameters():
        if expert_group is not None and ".experts." in name:
            mark_expert(parameter, expert_group)
            experts.append((name, parameter))
        elif parameter.ndim < 2 or "norm" in name or name.endswith("taps"):
            vectors.append((name, parameter))
        elif name in _VOCABULARY or "router" in name:
            vocabulary.append((name, parameter))
        else:
            matrices.append((name, parameter))
    groups = [
        ParameterGroup("matrices", matrices, cfg.kind is OptimizerKind.muon, cfg.weight_decay),
        ParameterGroup("vocabulary", vocabulary, False, cfg.weight_decay),
        ParameterGroup("vectors", vectors, False, 0.0),
        ParameterGroup(expert_group or "", experts, cfg.kind is OptimizerKind.muon, cfg.weight_decay, experts=True),
    ]
    counted = sum(p.numel() for group in groups for _, p in group.parameters)
    assert counted == sum(p.numel() for p in model.parameters()), "a parameter is in no group or in two"
    return [group for group in groups if group.parameters]
