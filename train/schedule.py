"""Learning rate as a pure function of the step."""

import math
from dataclasses import dataclass, field
from enum import Enum


class ScheduleKind(str, Enum):
    """Shape of the decay after warm-up."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"  # warm-up, stable, decay (MiniCPM, arXiv 2404.06395)
    step_decay = "step_decay"  # multi-step (DeepSeek LLM, arXiv 2401.02954; used by DeepSeekMoE and Engram)


@dataclass
class ScheduleConfig:
    """Warm-up and decay; fractions are of `train.max_steps`."""

    kind: ScheduleKind = ScheduleKind.wsd
    warmup_steps: int = 20  # optimizer steps, linear from 0
    min_lr_ratio: float = 0.0  # last learning rate over the base one (cosine, wsd)
    decay_fraction: float = 0.3  # wsd: share of all steps spent in the final linear decay
    milestones: list[float] = field(
        default_factory=lambda: [0.8, 0.9]
    )  # step_decay: x factor at each (2401.06066, 4.1)
    factor: float = 0.316  # step_decay: sqrt(0.1), applied at each milestone

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={self.warmup_steps} must be >= 0; nearest: 0")
        for name in ("min_lr_ratio", "decay_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"schedule.{name}={value} must lie in [0, 1]; nearest: {min(max(value, 0.0), 1.0)}")
        if sorted(self.milestones) != self.milestones or any(not 0.0 < m < 1.0 for m in self.milestones):
            raise ValueError(
                f"schedule.milestones={self.milestones} must be rising fractions in (0, 1), e.g. [0.8, 0.9]"
            )


def lr_scale(cfg: ScheduleConfig, step: int, max_steps: int) -> float:
    """Factor on the base learning rate for the update number `step` (0-based) of `max_steps`.

    Warm-up: (step + 1) / warmup_steps. Then, with p the share of all steps done,
    constant: 1; cosine: m + (1 - m) (1 + cos(pi q)) / 2 with q the share of the steps after warm-up;
    wsd: 1, then linear to m over the last `decay_fraction`; step_decay: factor ** (number of milestones <= p).
    """
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = step / max_steps
    floor = cfg.min_lr_ratio
    if cfg.kind is ScheduleKind.constant:
        return 1.0
    if cfg.kind is ScheduleKind.cosine:
        done = (step - cfg.warmup_steps) / max(1, max_steps - cfg.warmup_steps)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
    if cfg.kind is ScheduleKind.wsd:
        decay_steps = cfg.decay_fraction * max_steps
        remaining = (max_steps - step) / decay_steps if decay_steps > 0 else 1.0
        return floor + (1.0 - floor) * min(1.0, remaining)
    return float(cfg.factor ** sum(progress >= milestone for milestone in cfg.milestones))
