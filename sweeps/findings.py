"""What a sweep found, as data: the verdict, the curve, the minimum and the gains, with the sentences that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from sweeps.forms import FormFit
from sweeps.gains import Gain
from sweeps.noise import LEVEL, Interval, Noise
from sweeps.shape_test import ALPHA, ShapeTest

SCHEMA_VERSION = 1


class Verdict(str, Enum):
    """What the data support; everything but `interior_minimum` is a refusal to name a best rho."""

    interior_minimum = "interior_minimum"  # falls, then rises
    monotone_decreasing = "monotone_decreasing"  # falls as rho grows, no rise shown: more experts
    monotone_increasing = "monotone_increasing"  # rises as rho grows, no fall shown: more memory
    minimum_at_edge = "minimum_at_edge"  # falls and rises, but every fitted minimum leaves the grid
    irregular = "irregular"  # significant falls and rises, but no fall followed by a rise
    flat = "flat"  # neither fall nor rise beyond the noise
    too_few_points = "too_few_points"
    too_few_seeds = "too_few_seeds"


@dataclass(frozen=True)
class Arm:
    """Adjusted mean loss of one arm; the interval is for comparing arms, the seeds' common shift taken out."""

    rho: float
    num_seeds: int
    loss: Interval


@dataclass(frozen=True)
class AllocationFit:
    """Everything the report says about the curve.

    Attributes:
        verdict: What the data support.
        rho_star: Place of the minimum with the combined 90 % interval; None unless verdict is `interior_minimum`.
        at_edge: The combined interval runs into the smallest or the largest rho that was run.
        forms: Every form's fit, also when refused (empty where there is no noise estimate).
        arms: Adjusted means by rho, ascending.
        noise: The noise of one trial within its seed.
        shape: The test for an interior minimum; None where it cannot be made.
        gains: Over pure MoE, over the controls, at other learning rates.
        dropped: Trials left out because their loss is not finite, in words.
        conclusion: Sentences for the terminal's last lines and the top of the report.
    """

    verdict: Verdict
    rho_star: Interval | None
    at_edge: bool
    forms: tuple[FormFit, ...]
    arms: tuple[Arm, ...]
    noise: Noise
    shape: ShapeTest | None
    gains: tuple[Gain, ...]
    dropped: tuple[str, ...]
    conclusion: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dictionary; numbers that do not exist are None."""
        record = _plain(self)
        return {"schema_version": SCHEMA_VERSION, "level": LEVEL, "alpha": ALPHA, **record}


def _plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and NaN as JSON knows them; fields hidden from repr are left out."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
