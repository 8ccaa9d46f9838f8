"""What a user says about a sweep: which arms, seeds and controls, matched how, and how many at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from models.engram import EngramConfig
from sweeps.allocation import Matching
from sweeps.trial import CONTROL_KINDS, TrialKind


class KeepCheckpoints(str, Enum):
    """What stays of a finished trial's checkpoints."""

    none = "none"
    last = "last"


@dataclass
class SweepConfig:
    """Which trials a sweep has. Its rho = 1 shape is the `model` group, which has experts and no Engram."""

    name: str = "default"  # folder below `root`
    root: str = "runs"  # relative to the working directory
    matching: Matching = Matching.strict
    rhos: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # paired: every arm is trained with every seed
    controls: list[TrialKind] = field(default_factory=list)  # one_row_pure, no_module, one_row, ...: see TrialKind
    control_rho: float = 0.4  # the arm that all controls but one_row_pure belong to
    lr_scales: list[float] = field(default_factory=list)  # learning-rate factors tried at rho = 1 and at the best rho
    lr_seeds: list[int] = field(default_factory=list)  # seeds of those trials; empty = all seeds
    jobs: int = 0  # trials at once; 0 = as many as cores, GPUs and memory allow
    keep_checkpoints: KeepCheckpoints = KeepCheckpoints.none
    engram: EngramConfig = field(default_factory=EngramConfig)  # the module; table_size is solved for each arm

    def __post_init__(self) -> None:
        check_folder_name("sweep.name", self.name)
        for rho in [*self.rhos, self.control_rho]:
            if not 0 <= rho <= 1:
                nearest = min(max(rho, 0.0), 1.0)
                raise ValueError(
                    f"sweep.rhos or sweep.control_rho: {rho:g} must lie in [0, 1]: it is the share of inactive "
                    f"parameters that are experts; nearest: {nearest:g}"
                )
        _refuse_duplicates("sweep.rhos", self.rhos)
        _refuse_duplicates("sweep.seeds", self.seeds)
        if 1.0 not in self.rhos:
            raise ValueError(
                f"sweep.rhos={self.rhos} must contain 1.0: gains are measured against pure experts; add 1.0"
            )
        if not self.seeds:
            raise ValueError(
                "sweep.seeds=[] must name at least one seed, two or more to say anything: sweep.seeds=[0,1]"
            )
        if not set(self.lr_seeds) <= set(self.seeds):
            raise ValueError(
                f"sweep.lr_seeds={self.lr_seeds} must be among sweep.seeds={self.seeds}: they are compared seed by seed"
            )
        self._check_controls()
        if any(scale <= 0 or scale == 1 for scale in self.lr_scales):
            raise ValueError(f"sweep.lr_scales={self.lr_scales} must be positive factors other than 1, e.g. [0.5,2]")
        if self.jobs < 0:
            raise ValueError(f"sweep.jobs={self.jobs} must be >= 0; 0 chooses by cores, GPUs and memory")

    def _check_controls(self) -> None:
        _refuse_duplicates("sweep.controls", self.controls)
        for kind in self.controls:
            if kind not in CONTROL_KINDS:
                names = ", ".join(control.value for control in CONTROL_KINDS)
                raise ValueError(f"sweep.controls: {kind.value} is no control; use {names}")
        of_an_arm = set(self.controls) - {TrialKind.one_row_pure}
        if of_an_arm and (self.control_rho not in self.rhos or self.control_rho == 1):
            nearest = min((r for r in self.rhos if r < 1), key=lambda r: abs(r - self.control_rho), default=None)
            raise ValueError(
                f"sweep.control_rho={self.control_rho:g} must be one of sweep.rhos={self.rhos} and below 1: "
                f"controls are compared with that arm; nearest: {nearest}"
            )


def _refuse_duplicates(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        unique = [getattr(value, "value", value) for value in dict.fromkeys(values)]
        raise ValueError(f"{name} names a value twice; each may occur once: {unique}")


def check_folder_name(setting: str, name: object) -> None:
    """Raises ValueError where `name` is no folder's name."""
    plain = isinstance(name, str) and name == name.strip() and not any(part in name for part in ("/", "\\", ".."))
    if not name or not plain:
        raise ValueError(f"{setting}={name!r} must be a plain folder name, e.g. my_sweep")


def refuse_decided(words: Sequence[str], whose: str, instead: dict[str, str]) -> None:
    """Raises ValueError for a word of a command line that sets what `whose` decides for each of its trials."""
    for word in words:
        name = word.lstrip("+").partition("=")[0]
        if "=" in word and name in instead:
            raise ValueError(f"{word}: {whose} sets {name} of its trials itself; {instead[name]}")


def folder_of(sweep: SweepConfig) -> Path:
    """Folder of a sweep."""
    return Path(sweep.root) / sweep.name
