"""Four curves through the same points, and what each says about the minimum.

All are a floor plus curvature on either side of the minimum x0:

    loss(rho) = floor + left  * u^2   where rho < x0
                        right * u^2   where rho > x0,    u = (exp(bend * (rho - x0)) - 1) / bend, or rho - x0 at bend 0

| form | points | sides | bend |
|---|---|---|---|
| `quadratic` | all | left = right | 0 |
| `local_quadratic` | the five around the lowest | left = right | 0 |
| `asymmetric` | all | free, >= 0 | 0 |
| `skewed` | all | left = right | free |

Given x0 and bend the rest is linear, so these two are profiled (variable projection). One parabola is biased where the
two sides differ or the grid is off-centre; the local one is less so, but has few points. Two shapes may be lopsided at
the price of one parameter, and neither can bend down again at the ends as a cubic can: two half-parabolas with one
minimum (`asymmetric`), and a smooth curve that is steep on one side and levels off on the other (`skewed`; the shape of
Morse 1929, Phys. Rev. 34, 57). On lopsided truths in simulation the interval with both held its level where that with
either one alone did not (scripts/calibrate_fit.py). For a parabola the profile interval of x0 is Fieller's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from scipy import stats

from sweeps.noise import LEVEL, Interval, Noise, NoiseSource

LOCAL_POINTS = 5  # points of the local parabola: two more than it has parameters
GRID = 401  # values of x0 on the profile; the minimum is then refined to 1/50 of a step
BENDS = np.linspace(-10.0, 10.0, 41)  # per unit of rho; 10 turns a side from steep to level within 0.1
LACK_OF_FIT_ALPHA = 0.05  # below this p-value a form does not pass through the points and is left out of the interval


class FormName(str, Enum):
    """The fitted forms, in the order of the reports."""

    quadratic = "quadratic"
    local_quadratic = "local_quadratic"
    asymmetric = "asymmetric"
    skewed = "skewed"


LABELS = {
    FormName.quadratic: "parabola through all points",
    FormName.local_quadratic: f"parabola through the {LOCAL_POINTS} points around the lowest",
    FormName.asymmetric: "two half-parabolas with one minimum",
    FormName.skewed: "smooth lopsided curve",
}


@dataclass(frozen=True)
class FormFit:
    """One fitted form.

    Attributes:
        name: Which form.
        rho_star: Place of the minimum with its profile interval, clipped to the range of rho of the sweep.
        loss_min: Loss at the minimum, nats, averaged over the sweep's seeds; the interval is for these seeds.
        gain: Loss at rho = 1 minus `loss_min`, paired (delta method); None when rho = 1 was not run.
        left: Curvature coefficient left of the minimum, nats.
        right: The same on the right.
        bend: Skewness of form `skewed`, per unit of rho; 0 in the others.
        rho_low: Smallest rho of the points that were fitted.
        rho_high: Largest.
        num_points: Arms fitted.
        rms_residual: Root mean square of the fitted arms' residuals, nats.
        lack_of_fit_p: p-value of the F test of the residuals against the seeds' noise; None without such noise.
        supported: The form has a minimum inside the grid and is not rejected by the lack-of-fit test.
        clipped_low: The interval ran into the smallest rho of the sweep.
        clipped_high: The interval ran into the largest.
        confidence: (x0 grid, P(rho* <= x0)) of the form, for the combined interval; not part of the report.
    """

    name: FormName
    rho_star: Interval
    loss_min: Interval
    gain: Interval | None
    left: float
    right: float
    bend: float
    rho_low: float
    rho_high: float
    num_points: int
    rms_residual: float
    lack_of_fit_p: float | None
    supported: bool
    clipped_low: bool
    clipped_high: bool
    confidence: tuple[np.ndarray, np.ndarray] = field(repr=False, compare=False)

    @property
    def interior(self) -> bool:
        """The minimum lies inside the sweep's range of rho."""
        grid = self.confidence[0]
        return bool(grid[0] < self.rho_star.estimate < grid[-1] and max(self.left, self.right) > 0)

    def loss(self, rho: np.ndarray) -> np.ndarray:
        """The fitted curve at rho."""
        u = _stretch(np.asarray(rho, dtype=np.float64) - self.rho_star.estimate, self.bend)
        return self.loss_min.estimate + np.where(u < 0, self.left, self.right) * u**2


def _stretch(offset: np.ndarray, bend: float | np.ndarray) -> np.ndarray:
    """Stretched offset u = (exp(bend * offset) - 1) / bend, and its limit, the offset itself, at bend 0."""
    safe = np.where(np.abs(bend) < 1e-9, 1.0, bend)
    return np.where(np.abs(bend) < 1e-9, offset, np.expm1(safe * offset) / safe)


@dataclass(frozen=True)
class _Solution:
    """The best fit at each of G places of the minimum; all (G,)."""

    rss: np.ndarray  # in units of nats^2, whitened
    left: np.ndarray
    right: np.ndarray
    bend: np.ndarray


@dataclass(frozen=True)
class _Profile:
    """Points and the regression on them at any place of the minimum."""

    name: FormName
    rho: np.ndarray  # (R,)
    means: np.ndarray  # (R,)
    whitener: np.ndarray  # (R, R); whitener @ cov @ whitener.T = identity

    @property
    def num_parameters(self) -> int:
        """Fitted parameters: floor, x0, one curvature, and one more in the lopsided forms."""
        return 4 if self.name in (FormName.asymmetric, FormName.skewed) else 3

    def solve(self, x0: np.ndarray) -> _Solution:
        """Least squares at each x0 (G,), curvatures kept >= 0, the best bend chosen."""
        offset = self.rho[:, None] - x0[None, :]  # (R, G)
        none = np.zeros_like(x0)
        if self.name is FormName.asymmetric:
            y, left = self._centred(np.minimum(offset, 0.0) ** 2)
            _, right = self._centred(np.maximum(offset, 0.0) ** 2)
            gain, on_left, on_right = _two_columns(left, right, y)
            return _Solution(y @ y - gain, on_left, on_right, none)
        bends = BENDS if self.name is FormName.skewed else np.zeros(1)
        u = _stretch(offset[:, :, None], bends)  # (R, G, number of bends)
        y, columns = self._centred(u.reshape(len(self.rho), -1) ** 2)
        gain, curvature = (array.reshape(len(x0), -1) for array in _one_column(columns, y))
        best = gain.argmax(axis=1)
        every = np.arange(len(x0))
        chosen = curvature[every, best]
        return _Solution(y @ y - gain[every, best], chosen, chosen, bends[best])

    def _centred(self, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The losses (R,) and `columns` (R, G), whitened, with the floor projected out."""
        constant = self.whitener.sum(axis=1)
        unit = constant / np.linalg.norm(constant)
        y, x = self.whitener @ self.means, self.whitener @ columns
        return y - unit * (unit @ y), x - np.outer(unit, unit @ x)

    def floor_weights(self, x0: float, at: _Solution, index: int) -> np.ndarray:
        """(R,) weights w with floor = w . means."""
        u = _stretch(self.rho - x0, float(at.bend[index]))
        sides = [u**2] if self.name is not FormName.asymmetric else [np.minimum(u, 0.0) ** 2, np.maximum(u, 0.0) ** 2]
        used = [side for side, size in zip(sides, (at.left[index], at.right[index]), strict=False) if size > 0]
        basis = self.whitener @ np.stack([np.ones_like(u), *used], axis=1)
        return np.linalg.pinv(basis)[0] @ self.whitener


def _one_column(column: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Explained sum of squares and coefficient of y on one column, coefficient >= 0; column (R, G)."""
    size = np.sum(column**2, axis=0)
    safe = np.where(size > 1e-14, size, 1.0)
    coefficient = np.where(size > 1e-14, np.maximum(y @ column, 0.0) / safe, 0.0)
    return coefficient**2 * size, coefficient


def _two_columns(left: np.ndarray, right: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Explained sum of squares and the two non-negative coefficients of y on two columns, each (R, G)."""
    ll, rr, lr = np.sum(left**2, axis=0), np.sum(right**2, axis=0), np.sum(left * right, axis=0)
    yl, yr = y @ left, y @ right
    determinant = ll * rr - lr**2
    regular = determinant > 1e-10 * np.maximum(ll * rr, 1e-30)
    safe = np.where(regular, determinant, 1.0)
    both_l, both_r = (rr * yl - lr * yr) / safe, (ll * yr - lr * yl) / safe
    inside = regular & (both_l >= 0) & (both_r >= 0)
    gain_l, only_l = _one_column(left, y)
    gain_r, only_r = _one_column(right, y)
    left_wins = gain_l >= gain_r
    gain = np.where(inside, both_l * yl + both_r * yr, np.maximum(gain_l, gain_r))
    coefficient_l = np.where(inside, both_l, np.where(left_wins, only_l, 0.0))
    coefficient_r = np.where(inside, both_r, np.where(left_wins, 0.0, only_r))
    return gain, coefficient_l, coefficient_r


def fit_form(name: FormName, rho: np.ndarray, means: np.ndarray, cov: np.ndarray, noise: Noise) -> FormFit:
    """Fit one form by generalised least squares.

    The interval of rho* is the profile's: all x0 with (rss(x0) - rss_min) / sigma^2 <= t^2. Where the form misses the
    points by more than the seeds' noise explains, sigma is raised to the misfit, sqrt(rss_min / df).

    Args:
        name: Which form.
        rho: (R,) ascending.
        means: (R,) adjusted arm means, nats.
        cov: (R, R); noise.sigma^2 * cov is the covariance of `means`.
        noise: With at least one degree of freedom.
    """
    chosen = _local_window(means) if name is FormName.local_quadratic else np.arange(len(rho))
    whitener = np.linalg.inv(np.linalg.cholesky(cov[np.ix_(chosen, chosen)]))
    profile = _Profile(name, rho[chosen], means[chosen], whitener)
    grid = np.linspace(rho[0], rho[-1], GRID)
    coarse = profile.solve(grid)
    x0, solution, best = _refine(profile, grid, coarse.rss)
    rss = max(float(solution.rss[best]), 0.0)
    df = len(chosen) - profile.num_parameters
    sigma = _misfit_sigma(rss, df, noise)
    distribution = _confidence(grid, coarse.rss, x0, rss, sigma, noise.df)
    if name is FormName.local_quadratic:  # it says nothing beyond its own points
        distribution = np.where(grid < rho[chosen[0]], 0.0, np.where(grid >= rho[chosen[-1]], 1.0, distribution))
    low, high = quantiles(grid, distribution)
    at_minimum, at_one = np.zeros_like(means), np.zeros_like(means)
    at_minimum[chosen] = profile.floor_weights(x0, solution, best)
    at_one[-1] = 1.0
    lack_of_fit_p = _lack_of_fit(rss, df, noise)
    fit = FormFit(
        name=name,
        rho_star=Interval(x0, min(low, x0), max(high, x0)),
        # the place x0 drops out to first order, for the slope is zero there
        loss_min=contrast(at_minimum, means, cov, noise),
        gain=contrast(at_one - at_minimum, means, cov, noise) if rho[-1] == 1.0 else None,
        left=float(solution.left[best]),
        right=float(solution.right[best]),
        bend=float(solution.bend[best]),
        rho_low=float(rho[chosen[0]]),
        rho_high=float(rho[chosen[-1]]),
        num_points=len(chosen),
        rms_residual=math.nan,
        lack_of_fit_p=lack_of_fit_p,
        supported=False,
        clipped_low=bool(low <= rho[0]),
        clipped_high=bool(high >= rho[-1]),
        confidence=(grid, distribution),
    )
    residuals = means[chosen] - fit.loss(rho[chosen])
    passes = lack_of_fit_p is None or lack_of_fit_p > LACK_OF_FIT_ALPHA
    return replace(fit, rms_residual=float(np.sqrt(np.mean(residuals**2))), supported=fit.interior and passes)


def _refine(profile: _Profile, grid: np.ndarray, rss: np.ndarray) -> tuple[float, _Solution, int]:
    """The best x0 on a grid 50 times as fine around the best of `grid`, the solutions there, and its index."""
    offsets = (grid[1] - grid[0]) * np.linspace(-1, 1, 101)
    fine = np.clip(grid[int(rss.argmin())] + offsets, grid[0], grid[-1])
    solution = profile.solve(fine)
    best = int(solution.rss.argmin())
    return float(fine[best]), solution, best


def _local_window(means: np.ndarray) -> np.ndarray:
    """Indices of the `LOCAL_POINTS` arms around the lowest, shifted inwards at the ends of the grid."""
    start = min(max(int(means.argmin()) - LOCAL_POINTS // 2, 0), max(len(means) - LOCAL_POINTS, 0))
    return np.arange(start, min(start + LOCAL_POINTS, len(means)))


def _misfit_sigma(rss: float, df: int, noise: Noise) -> float:
    """The noise, or the misfit where that is larger."""
    if noise.source is not NoiseSource.seeds or df < 1:
        return noise.sigma
    return max(noise.sigma, math.sqrt(rss / df))


def _confidence(grid: np.ndarray, rss: np.ndarray, x0: float, rss_min: float, sigma: float, df: int) -> np.ndarray:
    """P(rho* <= grid): the signed root of the profile, taken as t-distributed with the noise's df."""
    root = np.sqrt(np.maximum(rss - rss_min, 0.0)) / max(sigma, np.finfo(np.float64).tiny)
    return np.maximum.accumulate(stats.t.cdf(np.where(grid < x0, -root, root), df))


def quantiles(grid: np.ndarray, distribution: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The central interval of a distribution on the grid; what lies beyond the grid is put on its ends."""
    tail = (1 - level) / 2
    inside = np.flatnonzero((distribution >= tail) & (distribution <= 1 - tail))
    if len(inside) == 0:
        jump = int(np.searchsorted(distribution, 0.5))
        return float(grid[max(jump - 1, 0)]), float(grid[min(jump, len(grid) - 1)])
    return float(grid[inside[0]]), float(grid[inside[-1]])


def contrast(weights: np.ndarray, means: np.ndarray, cov: np.ndarray, noise: Noise) -> Interval:
    """Weighted sum of the means with its t interval."""
    estimate = float(weights @ means)
    half = noise.t_quantile * noise.sigma * math.sqrt(max(float(weights @ cov @ weights), 0.0))
    return Interval(estimate, estimate - half, estimate + half)


def _lack_of_fit(rss: float, df: int, noise: Noise) -> float | None:
    """p-value of F = (rss / df) / sigma^2; None where the noise itself comes from a form's residuals."""
    if noise.source is not NoiseSource.seeds or df < 1:
        return None
    return float(stats.f.sf(rss / df / max(noise.sigma, np.finfo(np.float64).tiny) ** 2, df, noise.df))
