"""The PNG: written whole, titled by the verdict, without a fitted curve where no minimum is claimed."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from sweeps import plot
from sweeps.findings import Verdict
from sweeps.fit import fit_allocation
from sweeps.noise import Point
from sweeps.simulate import GRIDS, MONOTONE, half_parabolas, simulate, to_points

VALLEY = half_parabolas(0.4, 0.05, 0.11)


@pytest.fixture
def drawn(monkeypatch):
    """The axes that were drawn, kept after saving."""
    kept = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        kept.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def sweep(curve, num_seeds=3, sigma=0.004):
    return to_points(GRIDS[7], simulate(curve, GRIDS[7], num_seeds, 1, np.random.default_rng(0), sigma)[0])


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_valley_shows_interval_forms_seeds_and_controls(tmp_path, drawn):
    points = sweep(VALLEY)
    controls = [Point(0.45, s, 0.2, "one_row") for s in range(3)] + [Point(1.0, 0, 0.2, "lr", 2.0)]
    fit = fit_allocation(points, controls)
    path = plot.allocation_png(fit, points, controls, tmp_path / "allocation.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.iterdir()] == ["allocation.png"]
    axes = drawn[0].axes[0]
    assert axes.get_title(loc="left") == plot.title_of(fit)
    assert f"rho = {fit.rho_star.estimate:.2f}" in plot.title_of(fit)
    shown = labels(drawn[0])
    assert sum(label.startswith("seed ") for label in shown) == 3
    assert plot.CONTROL_LABELS["one_row"] in shown
    assert any(label.startswith("quadratic:") for label in shown)
    assert "90 % interval of the best rho" in shown


def test_a_refusal_draws_no_curve(tmp_path, drawn):
    points = sweep(MONOTONE["linear falling"])
    fit = fit_allocation(points)
    plot.allocation_png(fit, points, [], tmp_path / "allocation.png")
    assert drawn[0].axes[0].get_title(loc="left").startswith("no interior minimum shown")
    assert not any("quadratic" in label or "interval of the best" in label for label in labels(drawn[0]))
    # three seed lines (each twice: drawn and in the legend) and the points; nothing finer than the arms
    assert max(len(line.get_xdata()) for line in drawn[0].axes[0].lines) == len(GRIDS[7])


def test_seed_shifts_are_removed_in_the_drawing():
    points = [Point(r, s, float(VALLEY(np.array(r))) + 10.0 * s) for r in GRIDS[7] for s in (0, 1)]
    shifted = plot.shifted_losses(points, [Point(0.3, 1, 12.0, "one_row")])
    assert shifted[("arm", 0.3, 0)] == pytest.approx(shifted[("arm", 0.3, 1)])
    assert shifted[("one_row", 0.3, 1)] == pytest.approx(12.0 - 5.0)


@pytest.mark.parametrize("points", [[Point(1.0, 0, 4.2)], [Point(0.5, 0, 4.2), Point(1.0, 1, 4.3)]])
def test_almost_nothing_is_still_drawn(points, tmp_path):
    fit = fit_allocation(points)
    assert plot.allocation_png(fit, points, [], tmp_path / "a.png").stat().st_size > 1000


def test_every_refusal_has_a_title():
    assert set(plot.TITLES) == set(Verdict) - {Verdict.interior_minimum}
