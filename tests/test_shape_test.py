"""The test for an interior minimum: false acceptances on monotone and flat truths, power, and its building blocks."""

import itertools

import numpy as np
import pytest

from sweeps.findings import Verdict
from sweeps.fit import fit_allocation
from sweeps.shape_test import ALPHA, ShapeNull, fall_statistics, rise_statistics
from sweeps.simulate import (
    FLAT,
    GRIDS,
    MONOTONE,
    VALLEYS,
    accepted_as_interior,
    half_parabolas,
    simulate,
    to_points,
)

NUM_CURVES = 500  # for each truth, number of seeds and number of rho
PROMISED = 0.05  # share of monotone or flat sweeps that may be accepted


def isotonic_by_pooling(values, weights):
    """Pool adjacent violators, the textbook way."""
    blocks = []
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            v, w, n = blocks.pop()
            u, x, m = blocks.pop()
            blocks.append([(u * x + v * w) / (x + w), x + w, n + m])
    return np.array([value for value, _, n in blocks for _ in range(n)])


def test_rise_statistics_equal_pool_adjacent_violators():
    rng = np.random.default_rng(0)
    for num_arms in (2, 5, 8):
        means, weights = rng.standard_normal((20, num_arms)), rng.integers(1, 4, num_arms).astype(float)
        got = rise_statistics(means, weights)
        for curve, statistics in zip(means, got, strict=True):
            for start in range(num_arms):
                suffix, w = curve[start:], weights[start:]
                fit = isotonic_by_pooling(suffix, w)
                want = np.sqrt(np.sum(w * (fit - np.average(suffix, weights=w)) ** 2))
                assert statistics[start] == pytest.approx(want, abs=1e-12)


def test_fall_is_the_mirror_of_rise():
    means = np.random.default_rng(1).standard_normal((5, 6))
    weights = np.arange(1.0, 7.0)
    mirrored = rise_statistics(means[:, ::-1], weights[::-1])[:, ::-1]
    assert np.array_equal(fall_statistics(means, weights), mirrored)
    falling = np.linspace(1, 0, 6)[None]
    assert rise_statistics(falling, weights).max() == pytest.approx(0, abs=1e-12)
    assert fall_statistics(falling, weights).max() > 1


def test_adding_a_falling_truth_never_raises_the_rise():
    """The reason why the flat curve's null holds for every non-increasing one."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((200, 7))
    falling = -np.cumsum(rng.exponential(size=(200, 7)), axis=1)
    weights = np.ones(7)
    assert np.all(rise_statistics(noise + falling, weights) <= rise_statistics(noise, weights) + 1e-12)


def test_p_values_of_the_flat_curve_are_uniform():
    """Balanced layout, independent of the simulation inside: P(p <= a) = a within four standard errors."""
    num_arms, num_seeds, df = 6, 3, 10
    centre = np.eye(num_arms * num_seeds).reshape(num_arms, num_seeds, num_arms, num_seeds)
    residuals = centre - centre.mean(0, keepdims=True) - centre.mean(1, keepdims=True) + centre.mean((0, 1))
    maker = residuals.reshape(num_arms * num_seeds, -1)
    estimator = np.kron(np.eye(num_arms), np.full((1, num_seeds), 1 / num_seeds))
    null = ShapeNull(estimator, maker, np.full(num_arms, float(num_seeds)), df)
    noise = np.random.default_rng(3).standard_normal((4000, num_arms * num_seeds))
    sigma = np.sqrt(np.sum((noise @ maker) ** 2, axis=1) / df)
    p_rise = np.array([test.p_rise for test in null.test(noise @ estimator.T, sigma)])
    for level in (0.01, 0.025, 0.05, 0.2):
        # two independent errors: these 4000 draws and the null's 20000
        error = np.sqrt(level * (1 - level) * (1 / 4000 + 1 / 20000))
        assert abs((p_rise <= level).mean() - level) < 4 * error


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("name", [*MONOTONE, *FLAT])
def test_monotone_and_flat_truths_are_not_taken_for_a_valley(name, num_seeds):
    curve = {**MONOTONE, **FLAT}[name]
    rng = np.random.default_rng(100 * num_seeds + [*MONOTONE, *FLAT].index(name))
    for grid in GRIDS.values():
        accepted = accepted_as_interior(grid, simulate(curve, grid, num_seeds, NUM_CURVES, rng))
        assert accepted.mean() <= PROMISED, f"{name}, {len(grid)} rho: {accepted.sum()} of {NUM_CURVES}"


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("sigma", [0.002, 0.05])
def test_small_and_large_noise_keep_the_promise(num_seeds, sigma):
    """The hardest truths: one step, then level, so that nearly the whole size of one test is used."""
    rng = np.random.default_rng(7)
    for name in ("step down after the first", "step up before the last"):
        losses = simulate(MONOTONE[name], GRIDS[7], num_seeds, 1000, rng, sigma)
        assert accepted_as_interior(GRIDS[7], losses).mean() <= PROMISED


def test_a_parabola_through_a_saturating_curve_has_a_minimum_that_is_not_accepted():
    grid = GRIDS[8]
    curve = MONOTONE["falls, then saturates"]
    assert grid[0] < -np.polyfit(grid, curve(grid), 2)[1] / 2 / np.polyfit(grid, curve(grid), 2)[0] < grid[-1]
    losses = simulate(curve, grid, 3, 1, np.random.default_rng(0), sigma=0.001)[0]
    fit = fit_allocation(to_points(grid, losses))
    assert fit.verdict is Verdict.monotone_decreasing
    assert fit.rho_star is None


def test_power_on_realistic_valleys():
    """Amplitudes of a first tiny sweep and of the paper; floors well below what scripts/calibrate_fit.py measures."""
    rng = np.random.default_rng(11)
    paper_grid = np.array([0.40, 0.51, 0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 1.0])
    paper = half_parabolas(0.77, 0.0139 * (0.77 / 0.37) ** 2, 0.0139)
    cases = [
        (VALLEYS["pilot: 0.05 left, 0.11 right of 0.4"], GRIDS[6], 2, 0.01, 0.60),
        (VALLEYS["pilot: 0.05 left, 0.11 right of 0.4"], GRIDS[7], 3, 0.01, 0.90),
        (VALLEYS["pilot: 0.03 left, 0.11 right of 0.4"], GRIDS[8], 5, 0.01, 0.90),
        (paper, paper_grid, 2, 0.001, 0.98),
        (paper, paper_grid, 2, 0.002, 0.90),
    ]
    for curve, grid, num_seeds, sigma, floor in cases:
        power = accepted_as_interior(grid, simulate(curve, grid, num_seeds, 300, rng, sigma)).mean()
        assert power >= floor


def test_hills_are_not_valleys():
    """A rise followed by a fall is not monotone, and no valley either, however small the noise."""
    for grid, num_seeds in itertools.product(GRIDS.values(), (2, 5)):
        hill = simulate(lambda rho: -4 * 0.1 * (rho - 0.5) ** 2, grid, num_seeds, 100, np.random.default_rng(5), 0.002)
        assert not accepted_as_interior(grid, hill).any()
        assert fit_allocation(to_points(grid, hill[0])).verdict is Verdict.irregular


def test_batch_and_single_fit_agree():
    rng = np.random.default_rng(13)
    for curve in (VALLEYS["pilot: 0.03 left, 0.11 right of 0.4"], MONOTONE["step up in the middle"]):
        losses = simulate(curve, GRIDS[6], 2, 100, rng)
        single = [fit_allocation(to_points(GRIDS[6], sweep)) for sweep in losses]
        accepted = [fit.verdict in (Verdict.interior_minimum, Verdict.minimum_at_edge) for fit in single]
        assert accepted_as_interior(GRIDS[6], losses).tolist() == accepted
        assert all((fit.shape.p_interior <= ALPHA) == yes for fit, yes in zip(single, accepted, strict=True))


@pytest.mark.parametrize("name", ["falls, then saturates", "level, then rises", "flat"])
def test_one_loss_per_rho_keeps_the_promise_too(name):
    """Without seeds the noise comes from the parabola's residuals."""
    grid = np.linspace(0.0, 1.0, 10)
    losses = simulate({**MONOTONE, **FLAT}[name], grid, 1, 300, np.random.default_rng(17))
    verdicts = [fit_allocation(to_points(grid, sweep)).verdict for sweep in losses]
    assert verdicts.count(Verdict.interior_minimum) <= PROMISED * len(losses)
