"""From losses at a few rho to an answer: where the minimum is, how sure that is, and when nothing can be said.

`fit_allocation` first asks whether there is an interior minimum at all (`sweeps.shape_test`); only then it reports its
place, from several forms (`sweeps.forms`) and with one interval that covers their disagreement as well as the noise:
every supported form gives a distribution of rho* (its profile, t-distributed); the combined 90 % interval runs from the
5 % to the 95 % point of their equally weighted mixture. Where no form through all points is supported, it is widened to
the arms next to those that may be the lowest, which needs no form at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import stats

from sweeps.conclusion import conclude
from sweeps.findings import AllocationFit, Arm, Verdict
from sweeps.forms import FormFit, FormName, fit_form, quantiles
from sweeps.gains import control_gains, gain_over_pure
from sweeps.noise import (
    RESIDUAL_FIT_PARAMETERS,
    Interval,
    Noise,
    NoiseSource,
    Point,
    TwoWay,
    estimate_noise,
    polynomial_residual_maker,
    two_way,
)
from sweeps.shape_test import ALPHA, ShapeNull, ShapeTest, shape_null

MIN_RHO = 5  # arms: a floor, a place, two sides and one to spare
MIN_DF = 3  # degrees of freedom of the noise; at 2 a t interval is half as wide again as at 3


def fit_allocation(points: Sequence[Point], controls: Sequence[Point] = ()) -> AllocationFit:
    """Fit loss (nats) against rho, the share of the inactive parameters in experts.

    Args:
        points: The arms, kind `arm`. Several seeds per rho, paired, or a single loss per rho.
        controls: Trials of the other kinds.

    Raises:
        ValueError: No usable arm, rho outside [0, 1], or two losses for one (rho, seed).
    """
    for point in (*points, *controls):
        if not 0.0 <= point.rho <= 1.0:
            raise ValueError(f"rho={point.rho}: rho is a share and must lie in [0, 1]; correct the plan or results.csv")
    dropped = tuple(_describe(point) for point in (*points, *controls) if not math.isfinite(point.loss))
    points = [point for point in points if math.isfinite(point.loss)]
    controls = [point for point in controls if math.isfinite(point.loss)]
    if not points:
        raise ValueError(
            "points=[]: no arm has a finite loss yet; let the sweep finish at least some trials, then refit"
        )
    layout = two_way([(point.rho, point.seed, point.loss) for point in points])
    noise = estimate_noise(layout)
    refusal = _refuse_early(layout, noise)
    shape = None if refusal else shape_test_of(layout, noise)
    forms: tuple[FormFit, ...] = ()
    if not refusal:
        rho = np.array(layout.labels, dtype=np.float64)
        forms = tuple(fit_form(name, rho, layout.means, layout.unscaled_cov, noise) for name in FormName)
    verdict = refusal or _verdict(shape, forms)  # type: ignore[arg-type]
    rho_star, at_edge = (None, False)
    if verdict is Verdict.interior_minimum:
        rho_star, at_edge = _combine(forms, layout, noise)
    pure = gain_over_pure(layout, noise) if layout.connected else None
    gains = ([pure] if pure else []) + control_gains(points, controls, pure.arm_rho if pure else None)
    arms = _arms(layout, noise)
    fit = AllocationFit(verdict, rho_star, at_edge, forms, arms, noise, shape, tuple(gains), dropped)
    return replace(fit, conclusion=conclude(fit))


def _describe(point: Point) -> str:
    return f"{point.kind} at rho = {point.rho:g}, seed {point.seed}: loss {point.loss}"


def _refuse_early(layout: TwoWay, noise: Noise) -> Verdict | None:
    """Too little for any test."""
    if len(layout.labels) < MIN_RHO:
        return Verdict.too_few_points
    if not layout.connected or noise.df < MIN_DF:
        return Verdict.too_few_seeds
    return None


def layout_null(layout: TwoWay, noise: Noise) -> ShapeNull:
    """Null distribution of the shape test for this layout: pooled noise, or that of the parabola's residuals."""
    if noise.source is NoiseSource.seeds:
        residual_maker = layout.residual_maker
    else:
        rho = np.array(layout.labels, dtype=np.float64)
        residual_maker = polynomial_residual_maker(rho, RESIDUAL_FIT_PARAMETERS) @ layout.estimator
    return shape_null(layout.estimator, residual_maker, layout.counts, noise.df)


def shape_test_of(layout: TwoWay, noise: Noise) -> ShapeTest:
    """The test for an interior minimum on one layout."""
    return layout_null(layout, noise).test(layout.means[None], np.array([noise.sigma]))[0]


def _verdict(shape: ShapeTest, forms: Sequence[FormFit]) -> Verdict:
    """Which shape the test supports."""
    if shape.p_interior <= ALPHA:
        return Verdict.interior_minimum if any(form.interior for form in forms) else Verdict.minimum_at_edge
    falls = min(shape.p_fall, shape.p_late_fall) <= ALPHA
    rises = min(shape.p_rise, shape.p_early_rise) <= ALPHA
    if falls and rises:
        return Verdict.irregular
    if falls:
        return Verdict.monotone_decreasing
    return Verdict.monotone_increasing if rises else Verdict.flat


def _combine(forms: Sequence[FormFit], layout: TwoWay, noise: Noise) -> tuple[Interval, bool]:
    """Median and central 90 % of the mixture of the forms' distributions, and whether it meets an end of the grid."""
    used = [form for form in forms if form.supported] or list(forms)
    grid = used[0].confidence[0]
    mixture = np.mean([form.confidence[1] for form in used], axis=0)
    low, high = quantiles(grid, mixture)
    estimate = float(grid[int(np.searchsorted(mixture, 0.5))])
    if not any(form.supported for form in forms if form.name is not FormName.local_quadratic):
        bracket = _bracket(layout, noise)
        low, high = min(low, bracket[0]), max(high, bracket[1])
    return Interval(estimate, min(low, estimate), max(high, estimate)), bool(low <= grid[0] or high >= grid[-1])


def _bracket(layout: TwoWay, noise: Noise) -> tuple[float, float]:
    """From the arm left of the leftmost candidate for the lowest to the arm right of the rightmost.

    Of a curve that falls and then rises the minimum lies between the neighbours of its lowest arm. A candidate is an
    arm that is not above the lowest observed one by more than a one-sided t interval at 95 %, shared out over the
    R - 1 others (Bonferroni).
    """
    lowest = int(layout.means.argmin())
    difference = layout.means - layout.means[lowest]
    cov = layout.unscaled_cov
    variance = np.diag(cov) + cov[lowest, lowest] - 2 * cov[lowest]
    quantile = float(stats.t.ppf(1 - 0.05 / max(len(layout.means) - 1, 1), noise.df))
    candidates = np.flatnonzero(difference <= quantile * noise.sigma * np.sqrt(np.maximum(variance, 0.0)))
    left, right = max(int(candidates[0]) - 1, 0), min(int(candidates[-1]) + 1, len(layout.labels) - 1)
    return float(layout.labels[left]), float(layout.labels[right])


def _arms(layout: TwoWay, noise: Noise) -> tuple[Arm, ...]:
    half = noise.t_quantile * noise.sigma * np.sqrt(np.diag(layout.unscaled_cov))
    return tuple(
        Arm(float(rho), int(count), Interval(float(mean), float(mean - width), float(mean + width)))
        for rho, count, mean, width in zip(layout.labels, layout.counts, layout.means, half, strict=True)
    )
