"""The fit: the paper's curves, noise, forms, intervals, gains, refusals and the words for them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from sweeps.findings import Verdict
from sweeps.fit import fit_allocation
from sweeps.forms import FormName, fit_form
from sweeps.gains import control_gains, gain_over_pure
from sweeps.noise import NoiseSource, Point, estimate_noise, two_way
from sweeps.simulate import GRIDS, MONOTONE, VALLEYS, half_parabolas, interval_coverage, simulate, to_points

PAPER = json.loads((Path(__file__).parent / "golden" / "paper_curves.json").read_text())["curves"]
PILOT = {
    1.0: (4.2240, 4.2721),
    0.7: (4.1271, 4.1585),
    0.4: (4.1058, 4.1483),
    0.15: (4.1323, 4.1459),
    0.0: (4.1330, 4.1971),
}


def paper_points(budget):
    curve = PAPER[budget]
    return [Point(rho / 100, 0, loss) for rho, loss in zip(curve["rho_percent"], curve["loss"], strict=True)]


def sweep(curve, grid, num_seeds, sigma, seed=0):
    return to_points(grid, simulate(curve, grid, num_seeds, 1, np.random.default_rng(seed), sigma)[0])


def form(fit, name):
    return next(form for form in fit.forms if form.name is name)


@pytest.mark.parametrize("budget", ["2e20", "6e20"])
def test_paper_curves(budget):
    fit = fit_allocation(paper_points(budget))
    quadratic = form(fit, FormName.quadratic).rho_star.estimate
    assert quadratic == pytest.approx(PAPER[budget]["quadratic_minimum"], abs=0.005)
    vertex = np.polyfit([p.rho for p in paper_points(budget)], [p.loss for p in paper_points(budget)], 2)
    assert quadratic == pytest.approx(-vertex[1] / (2 * vertex[0]), abs=1e-4)
    assert fit.noise.source is NoiseSource.residuals
    assert fit.noise.df == 10 - 3
    assert fit.verdict is Verdict.interior_minimum
    places = [f.rho_star.estimate for f in fit.forms]
    assert {f.name for f in fit.forms} == set(FormName)
    assert max(places) - min(places) > 0.09  # the forms disagree by about 0.1 or more
    assert fit.rho_star.low <= min(places)
    assert max(places) <= fit.rho_star.high
    assert "residuals" in " ".join(fit.conclusion)


def test_two_way_equals_closed_form_when_balanced():
    losses = np.random.default_rng(0).standard_normal((6, 3))
    layout = two_way([(r, s, losses[r, s]) for r in range(6) for s in range(3)])
    noise = estimate_noise(layout)
    residuals = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    assert np.allclose(layout.means, losses.mean(axis=1))
    assert noise.df == (6 - 1) * (3 - 1)
    assert noise.sigma == pytest.approx(math.sqrt((residuals**2).sum() / 10))
    assert np.allclose(layout.unscaled_cov, np.eye(6) / 3)
    assert noise.t_quantile == pytest.approx(1.812461, abs=1e-6)  # t table, 10 degrees of freedom, two-sided 90 %


def test_two_way_with_missing_cells_recovers_an_additive_table():
    cells = [(r, s, 1.0 + 0.3 * r + 0.1 * s) for r in range(5) for s in range(3) if (r, s) not in ((0, 2), (3, 1))]
    layout = two_way(cells)
    assert layout.df == 13 - 5 - 3 + 1
    assert np.allclose(np.diff(layout.means), 0.3)
    assert layout.residual_ss == pytest.approx(0, abs=1e-20)
    assert estimate_noise(layout).missing == 2
    with pytest.raises(ValueError, match="more than one loss"):
        two_way([(0, 0, 1.0), (0, 0, 1.1)])


def test_pooled_noise_is_unbiased():
    rng = np.random.default_rng(1)
    losses = simulate(MONOTONE["linear falling"], GRIDS[6], 2, 400, rng, sigma=0.02)
    variances = [
        estimate_noise(two_way([(p.rho, p.seed, p.loss) for p in to_points(GRIDS[6], x)])).sigma ** 2 for x in losses
    ]
    assert np.mean(variances) == pytest.approx(0.02**2, rel=4 * math.sqrt(2 / 5 / 400))


def test_quadratic_interval_is_fiellers():
    """The profile interval of a parabola's vertex, against Fieller's closed form for -b / (2 c)."""
    points = sweep(half_parabolas(0.5, 0.1, 0.1), GRIDS[8], 3, 0.005)
    layout = two_way([(p.rho, p.seed, p.loss) for p in points])
    noise = estimate_noise(layout)
    rho = np.array(layout.labels)
    fit = fit_form(FormName.quadratic, rho, layout.means, layout.unscaled_cov, noise)
    basis = np.stack([np.ones_like(rho), rho, rho**2], axis=1)
    coefficients, (rss,), _, _ = np.linalg.lstsq(basis, layout.means, rcond=None)
    sigma = max(noise.sigma, math.sqrt(3 * rss / (8 - 3)))
    cov = sigma**2 / 3 * np.linalg.inv(basis.T @ basis)
    t = stats.t.ppf(0.95, noise.df)

    def excess(x0):  # the slope at x0 in standard errors, squared, minus t^2
        slope = np.array([0.0, 1.0, 2 * x0])
        return (slope @ coefficients) ** 2 - t**2 * slope @ cov @ slope

    vertex = -coefficients[1] / (2 * coefficients[2])
    low, high = optimize.brentq(excess, 0.0, vertex), optimize.brentq(excess, vertex, 1.0)
    step = 1 / 400
    assert fit.rho_star.estimate == pytest.approx(vertex, abs=1e-4)
    assert fit.rho_star.low == pytest.approx(low, abs=step)
    assert fit.rho_star.high == pytest.approx(high, abs=step)


@pytest.mark.parametrize("name", [FormName.asymmetric, FormName.skewed])
def test_lopsided_forms_recover_their_own_truth(name):
    rho = GRIDS[8]
    x0, floor = 0.37, 4.0
    if name is FormName.asymmetric:
        truth = floor + np.where(rho < x0, 0.5, 0.2) * (rho - x0) ** 2
    else:
        truth = floor + 0.3 * (np.expm1(-2.5 * (rho - x0)) / 2.5) ** 2
    points = [
        Point(r, s, loss + 1e-5 * (-1) ** (s + i))
        for i, (r, loss) in enumerate(zip(rho, truth, strict=True))
        for s in (0, 1)
    ]
    fitted = form(fit_allocation(points), name)
    assert fitted.rho_star.estimate == pytest.approx(x0, abs=0.002)
    assert fitted.loss_min.estimate == pytest.approx(floor, abs=1e-5)
    assert np.allclose(fitted.loss(rho), truth, atol=2e-5)
    assert fitted.gain.estimate == pytest.approx(truth[-1] - floor, abs=2e-5)


def test_local_window_is_the_five_arms_around_the_lowest():
    fit = fit_allocation(sweep(half_parabolas(0.4, 0.05, 0.11), GRIDS[8], 3, 0.002))
    local = form(fit, FormName.local_quadratic)
    assert local.num_points == 5
    assert (local.rho_low, local.rho_high) == (0.15, 0.6)


@pytest.mark.parametrize(
    ("name", "grid", "num_seeds", "sigma"),
    [
        ("parabola at 0.5", 7, 3, 0.015),
        ("pilot: 0.05 left, 0.11 right of 0.4", 7, 3, 0.01),
        ("cubic and exponential at 0.38", 8, 5, 0.01),
        ("steep left, slow right at 0.30", 7, 3, 0.015),
    ],
)
def test_interval_covers_the_true_minimum(name, grid, num_seeds, sigma):
    """90 % nominal. 150 fits have a standard error of 2.4 %, so a true 90 % stays above 0.83."""
    losses = simulate(VALLEYS[name], GRIDS[grid], num_seeds, 150, np.random.default_rng(2), sigma)
    found = interval_coverage(VALLEYS[name], GRIDS[grid], losses)
    assert found["coverage"] >= 0.83
    assert found["power"] > 0.5
    assert found["width"] < 0.5


def test_gain_interval_allows_for_choosing_the_best_arm():
    """On a flat truth the best arm's gain looks positive; the simultaneous interval must hold 0 in 90 % of sweeps."""
    rng = np.random.default_rng(3)
    losses = simulate(lambda rho: np.zeros_like(rho), GRIDS[6], 3, 600, rng)
    lows = []
    for x in losses:
        layout = two_way([(p.rho, p.seed, p.loss) for p in to_points(GRIDS[6], x)])
        lows.append(gain_over_pure(layout, estimate_noise(layout)).interval.low)
    assert np.mean(np.array(lows) > 0) <= 0.10 + 4 * math.sqrt(0.1 * 0.9 / 600)


def test_pilot_table():
    """Two seeds and five arms: the gains are seen, an interior minimum is not."""
    points = [Point(rho, seed, loss) for rho, pair in PILOT.items() for seed, loss in enumerate(pair)]
    controls = [Point(0.4, seed, loss, "one_row") for seed, loss in enumerate((4.1984, 4.2258))]
    fit = fit_allocation(points, controls)
    assert fit.verdict is Verdict.monotone_increasing
    pure, control = fit.gains
    assert (pure.kind, pure.arm_rho, pure.shown) == ("pure_moe", 0.4, True)
    assert pure.interval.estimate == pytest.approx(((4.2240 - 4.1058) + (4.2721 - 4.1483)) / 2, abs=1e-9)
    assert (control.kind, control.reference_rho, control.shown) == ("one_row", 0.4, True)
    assert control.interval.estimate == pytest.approx(((4.1984 - 4.1058) + (4.2258 - 4.1483)) / 2, abs=1e-9)
    text = "\n".join(fit.conclusion)
    assert text.startswith("No best rho is named: the loss rises")
    assert "Memory beats its control at rho = 0.4" in text
    assert text.splitlines()[-1].startswith("Unseen: ")


def test_controls_are_compared_with_their_own_arm():
    grid, shift = GRIDS[6], {0: 0.0, 1: 0.05, 2: -0.03}
    curve = half_parabolas(0.4, 0.05, 0.11)
    points = [
        Point(float(r), s, float(curve(r)) + shift[s] + 1e-4 * ((i * 7 + s * 3) % 5))
        for i, r in enumerate(grid)
        for s in shift
    ]
    controls = [Point(0.4, s, 0.03 + shift[s], "no_module") for s in shift]
    controls += [Point(1.0, s, 0.10 + shift[s], "one_row_pure") for s in shift]
    fit = fit_allocation(points, controls)
    gains = {(g.kind, g.arm_rho): g.interval.estimate for g in fit.gains}
    assert gains[("no_module", 0.4)] == pytest.approx(0.03, abs=5e-4)
    assert gains[("one_row_pure", 1.0)] == pytest.approx(-0.01, abs=5e-4)
    assert gains[("one_row_pure", 0.4)] == pytest.approx(0.10, abs=5e-4)
    assert "the module's path alone, without memory, helps" in "\n".join(fit.conclusion)


@pytest.mark.parametrize(("other_loss", "phrase"), [(0.2, "FLIPS at learning rate x2"), (0.0, "stays the same")])
def test_learning_rate_flip_is_said(other_loss, phrase):
    points = sweep(half_parabolas(0.4, 0.05, 0.11), GRIDS[6], 3, 0.002)
    lr = [Point(1.0, s, 0.1, "lr", 2.0) for s in range(3)] + [Point(0.4, s, other_loss, "lr", 2.0) for s in range(3)]
    assert phrase in "\n".join(fit_allocation(points, lr).conclusion)


def test_learning_rates_leave_the_controls_alone():
    """Trials at other learning rates differ between seeds for reasons of their own; each gain has its own noise."""
    rng = np.random.default_rng(0)
    points = sweep(half_parabolas(0.4, 0.05, 0.11), GRIDS[6], 3, 0.002)
    controls = [Point(0.4, s, 0.03 + 0.002 * float(rng.standard_normal()), "one_row") for s in range(3)]
    lr = [
        Point(rho, s, 0.1 + 0.2 * float(rng.standard_normal()), "lr", scale)
        for rho in (0.4, 1.0)
        for scale in (0.5, 2.0)
        for s in range(3)
    ]
    alone, together = control_gains(points, controls, 0.4), control_gains(points, [*controls, *lr], 0.4)
    assert [gain.kind for gain in together] == ["one_row", "lr", "lr"]
    assert together[:1] == alone
    # six cells of two arms: (6 - 1)(3 - 1) degrees of freedom, whatever other arms and controls there are
    assert [gain.df for gain in together[1:]] == [10, 10]
    assert together[1:] == control_gains([p for p in points if p.rho in (0.4, 1.0)], lr, 0.4)


@pytest.mark.parametrize(
    ("curve", "verdict", "words"),
    [
        (MONOTONE["linear falling"], Verdict.monotone_decreasing, "may be 1 itself"),
        (MONOTONE["linear rising"], Verdict.monotone_increasing, "may be 0 itself"),
        (lambda rho: np.zeros_like(rho), Verdict.flat, "no more than the noise"),
        (lambda rho: 0.1 * np.sin(4 * np.pi * rho), Verdict.interior_minimum, "lowest at rho"),
    ],
)
def test_verdicts(curve, verdict, words):
    fit = fit_allocation(sweep(curve, GRIDS[8], 3, 0.004, seed=4))
    assert fit.verdict is verdict
    assert words in fit.conclusion[0]
    assert (fit.rho_star is None) == (verdict is not Verdict.interior_minimum)


def test_too_little_is_refused():
    valley = half_parabolas(0.4, 0.05, 0.11)
    few = fit_allocation(sweep(valley, np.array([0.0, 0.4, 0.7, 1.0]), 3, 0.001))
    assert few.verdict is Verdict.too_few_points
    one_seed = fit_allocation(sweep(valley, GRIDS[6][:5], 1, 0.001))
    assert one_seed.verdict is Verdict.too_few_seeds
    unshared = fit_allocation([Point(r, i, float(valley(r))) for i, r in enumerate(GRIDS[6])])
    assert unshared.verdict is Verdict.too_few_seeds
    single = fit_allocation([Point(1.0, 0, 4.2)])
    assert single.verdict is Verdict.too_few_points
    for fit in (few, one_seed, unshared, single):
        assert fit.rho_star is None
        assert fit.conclusion[0].startswith("No best rho is named")
        json.dumps(fit.to_dict(), allow_nan=False)


def test_missing_cells_and_failed_losses():
    points = sweep(half_parabolas(0.5, 0.1, 0.1), GRIDS[8], 3, 0.004)
    points[4] = Point(points[4].rho, points[4].seed, math.nan)
    fit = fit_allocation(points)
    assert fit.noise.missing == 1
    assert fit.noise.df == 23 - 8 - 3 + 1
    assert len(fit.dropped) == 1
    assert fit.verdict is Verdict.interior_minimum
    assert fit.rho_star.low < 0.5 < fit.rho_star.high


def test_bad_points_are_refused_by_name():
    with pytest.raises(ValueError, match=r"rho=1\.5"):
        fit_allocation([Point(1.5, 0, 4.0)])
    with pytest.raises(ValueError, match="no arm has a finite loss"):
        fit_allocation([Point(0.5, 0, math.inf)])


def test_to_dict_is_json_and_repeatable():
    points = sweep(half_parabolas(0.4, 0.05, 0.11), GRIDS[7], 3, 0.004)
    first, second = (json.dumps(fit_allocation(p).to_dict(), allow_nan=False) for p in (points, points[::-1]))
    assert first == second
    record = json.loads(first)
    assert record["verdict"] == "interior_minimum"
    assert [form["name"] for form in record["forms"]] == [name.value for name in FormName]
    assert "confidence" not in record["forms"][0]


def test_shifting_losses_or_seeds_changes_nothing_but_the_level():
    points = sweep(half_parabolas(0.4, 0.05, 0.11), GRIDS[7], 3, 0.004)
    moved = [Point(p.rho, p.seed, p.loss + 2.0 + 0.3 * p.seed) for p in points]
    one, two = fit_allocation(points), fit_allocation(moved)
    assert two.rho_star.estimate == pytest.approx(one.rho_star.estimate, abs=1e-9)
    assert two.noise.sigma == pytest.approx(one.noise.sigma, rel=1e-9)
    assert two.gains[0].interval.low == pytest.approx(one.gains[0].interval.low, abs=1e-9)
