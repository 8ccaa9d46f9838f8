"""Is there an interior minimum at all? A test that a monotone curve passes by chance in at most 2.5 % of sweeps.

A fitted curvature does not answer this: a parabola through a saturating, falling curve has an interior minimum.
An interior minimum at the m-th arm is a *fall* up to m and a *rise* from m on. Either is measured with the monotone
regression of the points on its side of m:

    rise(m) = ||isotonic fit of mean[m..R] - its average|| / sigma      fall(m): the same on mean[1..m], mirrored

`rise(m)` is a maximum over contrasts c that increase along m..R and sum to zero; for a non-increasing curve each has an
expectation <= 0 (Chebyshev's sum inequality). So among all non-increasing curves the flat one makes `rise` largest: its
null distribution, simulated for the flat curve with the sweep's own layout and degrees of freedom, holds for all of
them. The maximum over m is part of the simulation. An interior minimum is accepted where fall and rise at one and the
same m are both significant: an intersection-union test (Berger 1982, Technometrics 24, 295-300) whose size is at most
that of either part, so no correction for having two parts is due.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ALPHA = 0.025  # size of the test; half of the 5 % promised, in reserve for noise that is not normal or not equal
NUM_SIMULATIONS = 20_000  # null draws; the standard error of a p-value of 0.025 is then 0.0011
SIMULATION_SEED = 20_260_121  # fixed, so that a report rebuilt from the same results says the same


@dataclass(frozen=True)
class ShapeTest:
    """Outcome of the test for an interior minimum.

    Attributes:
        p_interior: p-value against "non-increasing or non-decreasing in rho": accepted as a U when <= `ALPHA`.
        p_fall: p-value against "non-decreasing in rho" from falls that begin at the smallest rho.
        p_rise: p-value against "non-increasing in rho" from rises that end at the largest rho.
        p_late_fall: As `p_fall`, from falls that end at the largest rho.
        p_early_rise: As `p_rise`, from rises that begin at the smallest rho.
        turning_index: Arm at which the evidence for fall-then-rise is strongest.
        df: Degrees of freedom of the noise.
    """

    p_interior: float
    p_fall: float
    p_rise: float
    p_late_fall: float
    p_early_rise: float
    turning_index: int
    df: int


def rise_statistics(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted norm of the isotonic regression of each suffix mean[m..R] about its average.

    Uses the max-min formula fit_i = max over a <= i of min over b >= i of average(a..b).

    Args:
        means: (N, R) curves.
        weights: (R,) positive.

    Returns:
        (N, R); entry m belongs to the suffix that starts at arm m; the last is 0.
    """
    num_curves, num_arms = means.shape
    total = np.concatenate([np.zeros((num_curves, 1)), np.cumsum(means * weights, axis=1)], axis=1)  # (N, R + 1)
    mass = np.concatenate([[0.0], np.cumsum(weights)])
    statistics = np.zeros_like(means)
    fit = np.full_like(means, -np.inf)
    for start in range(num_arms - 1, -1, -1):
        averages = (total[:, start + 1 :] - total[:, start : start + 1]) / (mass[start + 1 :] - mass[start])
        lower_hull = np.minimum.accumulate(averages[:, ::-1], axis=1)[:, ::-1]  # (N, R - start): min over b >= i
        fit[:, start:] = np.maximum(fit[:, start:], lower_hull)
        spread = fit[:, start:] - averages[:, -1:]
        statistics[:, start] = np.sqrt(np.sum(weights[start:] * spread**2, axis=1))
    return statistics


def fall_statistics(means: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mirror of `rise_statistics`: entry m of (N, R) belongs to the falling prefix mean[1..m]; the first is 0."""
    return rise_statistics(means[:, ::-1], weights[::-1])[:, ::-1]


@dataclass(frozen=True)
class _Null:
    """Null distribution of one statistic: every arm's own, and that of the smallest p-value over the arms."""

    sorted_statistics: np.ndarray  # (num simulations, R), each column ascending
    sorted_min_p: np.ndarray  # (num simulations,)

    def adjusted_p(self, statistics: np.ndarray) -> np.ndarray:
        """(N, R) p-values, adjusted for the choice of the arm."""
        size = len(self.sorted_min_p)
        p = np.stack(
            [
                (1 + size - np.searchsorted(self.sorted_statistics[:, m], statistics[:, m], side="left")) / (size + 1)
                for m in range(statistics.shape[1])
            ],
            axis=1,
        )
        return (1 + np.searchsorted(self.sorted_min_p, p, side="right")) / (size + 1)


def _null(statistics: np.ndarray) -> _Null:
    """Null distribution from simulated (num simulations, R) statistics of the flat curve."""
    size = len(statistics)
    ordered = np.sort(statistics, axis=0)
    ranks = np.empty_like(statistics)
    for m in range(statistics.shape[1]):
        ranks[:, m] = (1 + size - np.searchsorted(ordered[:, m], statistics[:, m], side="left")) / (size + 1)
    return _Null(ordered, np.sort(ranks.min(axis=1)))


class ShapeNull:
    """The test's null distribution for one layout (which cells exist, how the noise is estimated).

    Args:
        estimator: (R, n) means = estimator @ losses.
        residual_maker: (n, n) residuals = residual_maker @ losses.
        weights: (R,) losses per arm.
        df: Degrees of freedom of the residuals.
    """

    def __init__(self, estimator: np.ndarray, residual_maker: np.ndarray, weights: np.ndarray, df: int):
        self.weights, self.df = weights, df
        noise = np.random.default_rng(SIMULATION_SEED).standard_normal((NUM_SIMULATIONS, estimator.shape[1]))
        sigma = np.sqrt(np.sum((noise @ residual_maker) ** 2, axis=1) / df)[:, None]
        means = noise @ estimator.T  # (num simulations, R)
        self.rise = _null(rise_statistics(means, weights) / sigma)
        self.fall = _null(fall_statistics(means, weights) / sigma)

    def p_values(self, means: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Adjusted p-values of fall and rise, each (N, R), for curves `means` (N, R) with noise `sigma` (N,)."""
        scale = np.maximum(sigma, np.finfo(np.float64).tiny)[:, None]
        fall = self.fall.adjusted_p(fall_statistics(means, self.weights) / scale)
        rise = self.rise.adjusted_p(rise_statistics(means, self.weights) / scale)
        return fall, rise

    def test(self, means: np.ndarray, sigma: np.ndarray) -> list[ShapeTest]:
        """Test N curves at once: `means` (N, R) in order of rho, `sigma` (N,)."""
        fall, rise = self.p_values(means, sigma)
        # normal noise is symmetric: the curve upside down has the same null, and its falls are rises
        early_rise, late_fall = self.p_values(-means, sigma)
        both = np.maximum(fall, rise)[:, 1:-1]  # the turning point has arms on either side
        at = both.argmin(axis=1)
        smallest = [p.min(axis=1) for p in (fall, rise, late_fall, early_rise)]
        return [
            ShapeTest(
                p_interior=float(both[i, at[i]]),
                p_fall=float(smallest[0][i]),
                p_rise=float(smallest[1][i]),
                p_late_fall=float(smallest[2][i]),
                p_early_rise=float(smallest[3][i]),
                turning_index=int(at[i]) + 1,
                df=self.df,
            )
            for i in range(len(means))
        ]


@lru_cache(maxsize=64)
def _cached_null(arms: int, cells: int, df: int, estimator: bytes, residuals: bytes, weights: bytes) -> ShapeNull:
    return ShapeNull(
        np.frombuffer(estimator).reshape(arms, cells),
        np.frombuffer(residuals).reshape(cells, cells),
        np.frombuffer(weights),
        df,
    )


def shape_null(estimator: np.ndarray, residual_maker: np.ndarray, weights: np.ndarray, df: int) -> ShapeNull:
    """The (cached) `ShapeNull` of a layout."""
    arrays = (np.round(array, 12).astype(np.float64) for array in (estimator, residual_maker, weights))
    return _cached_null(*estimator.shape, df, *(array.tobytes() for array in arrays))
