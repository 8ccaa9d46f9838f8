"""The rule by which a step changes the rows it drew: Adam, kept per row."""

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class StepCount(str, Enum):
    """Which step enters the bias correction of a row's moments."""

    per_row = "per_row"  # the number of updates this row has had
    global_step = "global_step"  # the number of updates the table has had


class SecondMoment(str, Enum):
    """How finely the second moment is kept; see `lazy_adam`."""

    element = "element"  # one number per element, as in Adam
    row = "row"  # one number per row; with beta1=0 no first moment is kept either


@dataclass
class MemoryOptimConfig:
    """Adam on the touched rows; no weight decay (paper 4.1)."""

    lr_multiplier: float = 5.0  # times the backbone's learning rate (paper 4.1)
    beta1: float = 0.9  # decay of the first moment per update
    beta2: float = 0.95  # decay of the second moment per update
    eps: float = 1e-8  # added to the root of the second moment
    step_count: StepCount = StepCount.per_row
    second_moment: SecondMoment = SecondMoment.element
    frozen: bool = False  # rows keep their random start values (control): no gradient, no moments, no step counts

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"memory.{name}={getattr(self, name)} must be in [0, 1); usual: 0.9 and 0.95")
        if not 0 < self.eps < math.inf:
            raise ValueError(f"memory.eps={self.eps} must be positive and finite; usual: 1e-8")
        if not 0 <= self.lr_multiplier < math.inf:
            raise ValueError(f"memory.lr_multiplier={self.lr_multiplier} must not be negative, and finite; usual: 5.0")
        if self.frozen:
            for name in ("lr_multiplier", "beta1", "beta2", "eps", "step_count", "second_moment"):
                default = getattr(MemoryOptimConfig, name)
                if getattr(self, name) != default:
                    raise ValueError(
                        f"memory.{name}={getattr(self, name)} has no effect with memory.frozen=true: frozen rows are "
                        f"never updated; nearest: {default}"
                    )

    def state_widths(self, row_dim: int) -> dict[str, int]:
        """{moment: numbers kept per row of width M}: fp32 beside the row's int32 step count."""
        if self.second_moment is SecondMoment.element:
            return {"exp_avg": row_dim, "exp_avg_sq": row_dim}
        return {"exp_avg": row_dim if self.beta1 > 0 else 0, "exp_avg_sq": 1}


def lazy_adam(
    optim: MemoryOptimConfig, lr: float, grad: Tensor, count: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One update of drawn rows.

    For a drawn row with summed, clipped gradient g, and t its step count (see `StepCount`),

        m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2,
        w <- w - lr * lr_multiplier * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps).

    With `SecondMoment.row` v is one number per row and takes the mean of g^2 over the row's M elements, the
    "partial row-wise Adam" of FBGEMM's embedding tables. Where beta1 is 0 besides, m is g and is not kept.

    Args:
        optim: hyper-parameters.
        lr: learning rate, before `lr_multiplier`.
        grad: (u, M) fp32.
        count: (u, 1) or (1, 1) fp64, t.
        exp_avg: (u, M), or (u, 0) where it is not kept; changed in place.
        exp_avg_sq: (u, M) or (u, 1); changed in place.

    Returns:
        (u, M) what is to be subtracted from the rows, and the two new moments.
    """
    if optim.second_moment is SecondMoment.element:
        exp_avg_sq.mul_(optim.beta2).addcmul_(grad, grad, value=1 - optim.beta2)
    else:
        exp_avg_sq.mul_(optim.beta2).add_(grad.square().mean(1, keepdim=True), alpha=1 - optim.beta2)
    first = exp_avg.lerp_(grad, 1 - optim.beta1) if exp_avg.shape == grad.shape else grad
    step_size = (lr * optim.lr_multiplier / (1 - optim.beta1**count)).to(grad.dtype)
    correction = (1 - optim.beta2**count).sqrt().to(grad.dtype)
    return step_size * first / (exp_avg_sq.sqrt().div_(correction).add_(optim.eps)), exp_avg, exp_avg_sq


def bias_count(optim: MemoryOptimConfig, step: Tensor, global_step: int) -> Tensor:
    """T of the bias correction, fp64: (u, 1) from the rows' counts (u,), or (1, 1) from the table's."""
    if optim.step_count is StepCount.per_row:
        return step.double()[:, None]
    return torch.full((1, 1), float(global_step), dtype=torch.float64, device=step.device)
