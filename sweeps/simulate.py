"""Simulated sweeps with a known answer, to calibrate the fit: monotone, flat and U-shaped truths plus paired noise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sweeps.fit import fit_allocation, layout_null
from sweeps.noise import Point, estimate_noise, two_way
from sweeps.shape_test import ALPHA

Curve = Callable[[np.ndarray], np.ndarray]

GRIDS = {  # rho values of a sweep, by their number; closer where the minimum is expected
    6: np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    7: np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0]),
    8: np.array([0.0, 0.15, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]),
}
AMPLITUDE = 0.1  # nats between the ends of a monotone truth: the size of the effect in the first tiny sweeps
SEED_SD = 0.04  # nats; unpaired seeds differed by 0.03 to 0.06 there
NOISE_SD = 0.015  # nats; paired differences by 0.01 to 0.02

MONOTONE: dict[str, Curve] = {
    "linear falling": lambda rho: AMPLITUDE * (1 - rho),
    "linear rising": lambda rho: AMPLITUDE * rho,
    "falls, then saturates": lambda rho: AMPLITUDE * np.exp(-rho / 0.15),
    "level, then falls": lambda rho: -AMPLITUDE * np.exp((rho - 1) / 0.15),
    "rises, then saturates": lambda rho: -AMPLITUDE * np.exp(-rho / 0.15),
    "level, then rises": lambda rho: AMPLITUDE * np.exp((rho - 1) / 0.15),
    "step down after the first": lambda rho: AMPLITUDE * (rho < 0.1),
    "step down in the middle": lambda rho: AMPLITUDE * (rho < 0.5),
    "step up in the middle": lambda rho: AMPLITUDE * (rho > 0.5),
    "step up before the last": lambda rho: AMPLITUDE * (rho > 0.9),
}
FLAT: dict[str, Curve] = {"flat": lambda rho: np.zeros_like(rho)}


def half_parabolas(rho_star: float, left: float, right: float) -> Curve:
    """Rises by `left` nats from rho_star to rho = 0 and by `right` to rho = 1."""

    def curve(rho: np.ndarray) -> np.ndarray:
        below, above = (rho_star - rho) / rho_star, (rho - rho_star) / (1 - rho_star)
        return np.where(rho < rho_star, left * below**2, right * above**2)

    return curve


VALLEYS: dict[str, Curve] = {
    "parabola at 0.5": half_parabolas(0.5, 0.1, 0.1),
    "pilot: 0.03 left, 0.11 right of 0.4": half_parabolas(0.4, 0.03, 0.11),
    "pilot: 0.05 left, 0.11 right of 0.4": half_parabolas(0.4, 0.05, 0.11),
    "cubic and exponential at 0.38": lambda rho: 0.05 * np.exp(-4 * rho) + 0.1 * rho**3,
    "steep left, slow right at 0.30": lambda rho: 0.09 * np.exp(-rho / 0.12) + 0.06 * rho**1.2 + 0.03 * rho**4,
    "* kink at 0.45": lambda rho: 0.15 * np.abs(rho - 0.45),
    "* level bottom at 0.55": lambda rho: 1.5 * (rho - 0.55) ** 4,
    "* 1 / rho and a line at 0.35": lambda rho: 0.016 / (rho + 0.1) + 0.079 * rho,
    "slow left, steep right at 0.63": lambda rho: 0.045 * (1 - rho) ** 2 + 0.1 * rho**8,
}


def minimum_of(curve: Curve) -> float:
    """Place of the lowest point of a curve on [0, 1], to 1e-5."""
    rho = np.linspace(0.0, 1.0, 100_001)
    return float(rho[int(curve(rho).argmin())])


def simulate(
    curve: Curve,
    rho: np.ndarray,
    num_seeds: int,
    num_curves: int,
    rng: np.random.Generator,
    sigma: float = NOISE_SD,
    seed_sd: float = SEED_SD,
) -> np.ndarray:
    """(N, R, S) losses: curve(rho) + a shift common to a seed + normal noise."""
    shape = (num_curves, len(rho), num_seeds)
    shifts = seed_sd * rng.standard_normal((num_curves, 1, num_seeds))
    return curve(rho)[None, :, None] + shifts + sigma * rng.standard_normal(shape)


def to_points(rho: np.ndarray, losses: np.ndarray) -> list[Point]:
    """One simulated sweep (R, S) as points."""
    return [Point(float(r), s, float(losses[i, s])) for i, r in enumerate(rho) for s in range(losses.shape[1])]


def accepted_as_interior(rho: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """(N,) whether the shape test of `fit_allocation` accepts an interior minimum, for (N, R, S) losses at once."""
    num_arms, num_seeds = losses.shape[1:]
    layout = two_way([(point.rho, point.seed, point.loss) for point in to_points(rho, losses[0])])
    noise = estimate_noise(layout)
    means = losses.mean(axis=2)  # (N, R)
    residuals = losses - means[:, :, None] - losses.mean(axis=1)[:, None, :] + losses.mean(axis=(1, 2))[:, None, None]
    sigma = np.sqrt(np.sum(residuals**2, axis=(1, 2)) / ((num_arms - 1) * (num_seeds - 1)))
    return np.array([test.p_interior <= ALPHA for test in layout_null(layout, noise).test(means, sigma)])


def interval_coverage(curve: Curve, rho: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """Share of the (N, R, S) sweeps that are accepted, and how often their 90 % interval holds the true minimum.

    Returns:
        `power`, `coverage` (among the accepted; NaN if none), `width` (median, in rho).
    """
    truth = minimum_of(curve)
    stars = [fit_allocation(to_points(rho, sweep)).rho_star for sweep in losses]
    accepted = [star for star in stars if star is not None]
    covered = [star.low <= truth <= star.high for star in accepted]
    return {
        "power": len(accepted) / len(stars),
        "coverage": float(np.mean(covered)) if covered else float("nan"),
        "width": float(np.median([star.high - star.low for star in accepted])) if accepted else float("nan"),
    }
