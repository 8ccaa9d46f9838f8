"""What an arm gains over another trial of the same seed: over pure MoE, over the controls, at other learning rates.

Positive numbers are in favour of the arm that is named first. Differences are paired by seed through the two-way model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sweeps.forms import contrast
from sweeps.noise import Interval, Noise, Point, TwoWay, estimate_noise, two_way

CONTROLS = {
    "no_module": "the same experts without the module",
    "one_row": "the same experts with a one-row module (the module's path, no memory)",
    "one_row_pure": "the rho = 1 experts with a one-row module",
    "shuffled": "the same arm with its neighbours' rows (equal traffic, no n-gram information)",
    "frozen": "the same arm with random tables that are not trained",
    "extra_shared": "the same experts with wider shared experts in place of the module",
}
SIMULATIONS = 20_000  # draws for the quantile that allows for choosing the best arm
SIMULATION_SEED = 20_260_122


@dataclass(frozen=True)
class Gain:
    """loss(reference) - loss(arm), nats per token, paired by seed.

    Attributes:
        kind: `pure_moe`, a control's kind, or `lr`.
        arm_rho: The arm in favour of which a positive gain speaks.
        reference_rho: rho of the trial it is compared with.
        interval: The gain at 90 %.
        df: Degrees of freedom of the noise behind the interval.
        lr_scale: Factor on the learning rate of both; 1 unless kind is `lr`.
        simultaneous: The interval allows for `arm_rho` having been chosen as the best of the arms.
    """

    kind: str
    arm_rho: float
    reference_rho: float
    interval: Interval
    df: int
    lr_scale: float = 1.0
    simultaneous: bool = False

    @property
    def shown(self) -> bool:
        """The whole interval is in favour of the arm."""
        return self.interval.low > 0


def gain_over_pure(layout: TwoWay, noise: Noise) -> Gain | None:
    """The best arm against rho = 1; None where rho = 1 was not run or nothing else was.

    The best arm is chosen after looking, so its interval uses the 90 % quantile of the *largest* |t| over all arms
    (Dunnett 1955, JASA 50, 1096-1121; simulated) instead of one comparison's.
    """
    rho = np.array(layout.labels, dtype=np.float64)
    if rho[-1] != 1.0 or len(rho) < 2 or noise.df < 1:
        return None
    cov = layout.unscaled_cov
    rows = np.concatenate([-np.eye(len(rho) - 1), np.ones((len(rho) - 1, 1))], axis=1)  # (R - 1, R): rho = 1 minus arm
    gains = rows @ layout.means
    spread = rows @ cov @ rows.T
    scale = np.sqrt(np.diag(spread))
    rng = np.random.default_rng(SIMULATION_SEED)
    factor = np.linalg.cholesky(spread / np.outer(scale, scale) + 1e-12 * np.eye(len(rows)))
    z = rng.standard_normal((SIMULATIONS, len(rows))) @ factor.T
    t = np.abs(z).max(axis=1) / np.sqrt(rng.chisquare(noise.df, SIMULATIONS) / noise.df)
    best = int(gains.argmax())
    half = float(np.quantile(t, 0.9)) * noise.sigma * float(scale[best])
    interval = Interval(float(gains[best]), float(gains[best]) - half, float(gains[best]) + half)
    return Gain("pure_moe", float(rho[best]), 1.0, interval, noise.df, simultaneous=True)


def control_gains(points: Sequence[Point], controls: Sequence[Point], best_rho: float | None) -> list[Gain]:
    """Gains over each control and the gains over pure MoE at other learning rates.

    A control is compared with the arm that has the same experts, `one_row_pure` moreover with the best arm. The noise
    of these gains is pooled over arms and controls. Trials at other learning rates have a noise of their own, for a
    seed shifts the loss by another amount at another learning rate: they are pooled with the arms they repeat, and
    leave the controls' intervals as they are.
    """
    others = [point for point in controls if point.kind in CONTROLS]
    rates = [point for point in controls if point.kind == "lr"]
    repeated = {point.rho for point in rates}
    return [
        *_control_gains(points, others, best_rho),
        *_learning_rate_gains([point for point in points if point.rho in repeated], rates),
    ]


def _layout(points: Sequence[Point]) -> tuple[TwoWay, Noise] | None:
    """The two-way model of these trials and their pooled noise; None where the seeds do not show any."""
    layout = two_way([((p.kind, p.rho, p.lr_scale), p.seed, p.loss) for p in points])
    noise = estimate_noise(layout) if len(layout.seeds) > 1 else None
    return (layout, noise) if noise is not None and noise.df > 0 and layout.connected else None


def _control_gains(points: Sequence[Point], controls: Sequence[Point], best_rho: float | None) -> list[Gain]:
    """Gains of arms over the controls."""
    fitted = _layout([*points, *controls]) if controls else None
    if fitted is None:
        return []
    layout, noise = fitted
    arms = {("arm", point.rho, 1.0) for point in points}
    gains = []
    for label in layout.labels:
        kind, rho, _ = label
        if kind not in CONTROLS:
            continue
        for arm_rho in sorted({rho, best_rho if kind == "one_row_pure" else rho} - {None}):
            if ("arm", arm_rho, 1.0) in arms:
                gains.append(_gain(kind, ("arm", arm_rho, 1.0), label, layout, noise))
    return gains


def _learning_rate_gains(arms: Sequence[Point], rates: Sequence[Point]) -> list[Gain]:
    """Gain over rho = 1 with both at the same other learning rate."""
    fitted = _layout([*arms, *rates]) if rates else None
    if fitted is None:
        return []
    layout, noise = fitted
    lr_labels = [label for label in layout.labels if label[0] == "lr"]
    gains = []
    for label in lr_labels:
        _, rho, scale = label
        reference = ("lr", 1.0, scale)
        if rho != 1.0 and reference in lr_labels:
            gains.append(_gain("lr", label, reference, layout, noise))
    return gains


def _gain(kind: str, arm: tuple, reference: tuple, layout: TwoWay, noise: Noise) -> Gain:
    weights = np.zeros(len(layout.labels))
    weights[layout.labels.index(reference)] += 1.0
    weights[layout.labels.index(arm)] -= 1.0
    interval = contrast(weights, layout.means, layout.unscaled_cov, noise)
    return Gain(kind, arm[1], reference[1], interval, noise.df, lr_scale=arm[2])
