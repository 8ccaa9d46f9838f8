"""The figure: loss against rho with intervals, seeds, fitted forms and controls, readable in black and white."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sweeps.findings import AllocationFit, Verdict
from sweeps.forms import FormName
from sweeps.noise import Point, two_way
from train.files import atomic_write

TITLES = {
    Verdict.monotone_decreasing: "no interior minimum shown: the loss falls with rho",
    Verdict.monotone_increasing: "no interior minimum shown: the loss rises with rho",
    Verdict.minimum_at_edge: "no interior minimum shown: it lies at the edge of the grid",
    Verdict.irregular: "no interior minimum shown: falls and rises in no order",
    Verdict.flat: "no interior minimum shown: flat within the noise",
    Verdict.too_few_points: "too few values of rho for a verdict",
    Verdict.too_few_seeds: "too few paired seeds for a verdict",
}
CONTROL_MARKERS = {
    "no_module": "s",
    "one_row": "^",
    "one_row_pure": "D",
    "shuffled": "p",
    "frozen": "h",
    "extra_shared": "8",
}
CONTROL_LABELS = {
    "no_module": "control: same experts, no module",
    "one_row": "control: same experts, one-row module",
    "one_row_pure": "control: rho = 1 experts, one-row module",
    "shuffled": "control: same arm, neighbours' rows",
    "frozen": "control: same arm, untrained tables",
    "extra_shared": "control: same experts, wider shared expert",
}
FORM_STYLES = {
    FormName.quadratic: ("--", "0.45"),
    FormName.local_quadratic: (":", "0.3"),
    FormName.asymmetric: ("-", "0.55"),
    FormName.skewed: ("-.", "0.3"),
}
SEED_MARKERS = "o<>v*PXd"
RHO_LABEL = r"$\rho$: share of the inactive parameters in experts (1 = pure MoE; the rest is Engram memory)"


def title_of(fit: AllocationFit) -> str:
    """The verdict in one line."""
    if fit.rho_star is None:
        return TITLES[fit.verdict]
    star = fit.rho_star
    return f"lowest loss at rho = {star.estimate:.2f}, 90 % interval {star.low:.2f} to {star.high:.2f}"


def shifted_losses(points: Sequence[Point], controls: Sequence[Point]) -> dict[tuple[str, float, int], float]:
    """{(kind, rho, seed): loss - seed effect}: every trial with its seed's common shift taken out.

    The shifts are those of the arms; controls and learning-rate trials (left out) do not move them.
    """
    layout = two_way([(point.rho, point.seed, point.loss) for point in points])
    shift = dict(zip(layout.seeds, layout.seed_effects, strict=True))
    return {(p.kind, p.rho, p.seed): p.loss - shift.get(p.seed, 0.0) for p in (*points, *controls) if p.kind != "lr"}


def allocation_png(fit: AllocationFit, points: Sequence[Point], controls: Sequence[Point], path: Path) -> Path:
    """Draw the curve and write it atomically.

    Args:
        fit: What `fit_allocation` found; when it refuses, no fitted curve is drawn.
        points: The arms.
        controls: The other trials; kind `lr` is not drawn.
        path: The PNG to write.
    """
    finite = [point for point in points if np.isfinite(point.loss)]
    shifted = shifted_losses(finite, [point for point in controls if np.isfinite(point.loss)])
    figure = Figure(figsize=(8.5, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_minimum(axes, fit)
    _draw_seeds(axes, shifted)
    _draw_arms(axes, fit)
    _draw_controls(axes, shifted)
    axes.set_title(title_of(fit), fontsize=12, loc="left")
    axes.set_xlabel(RHO_LABEL)
    axes.set_ylabel("validation loss (nats per token),\nseeds' common shift removed")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return path


def _draw_minimum(axes: Axes, fit: AllocationFit) -> None:
    """The interval of rho* and the forms behind it; nothing when refused."""
    if fit.rho_star is None:
        return
    axes.axvspan(fit.rho_star.low, fit.rho_star.high, color="0.9", zorder=0, label="90 % interval of the best rho")
    axes.axvline(fit.rho_star.estimate, color="0.2", linewidth=0.8, zorder=1)
    for form in fit.forms:
        style, shade = FORM_STYLES[form.name]
        rho = np.linspace(form.rho_low, form.rho_high, 200)
        label = f"{form.name.value.replace('_', ' ')}: {form.rho_star.estimate:.2f}"
        axes.plot(
            rho, form.loss(rho), style, color=shade, linewidth=1.2, zorder=2, label=label + _unused(form.supported)
        )


def _unused(supported: bool) -> str:
    return "" if supported else " (not supported)"


def _draw_seeds(axes: Axes, shifted: dict[tuple[str, float, int], float]) -> None:
    """One light line and marker per seed."""
    seeds = sorted({seed for kind, _, seed in shifted if kind == "arm"})
    for index, seed in enumerate(seeds):
        line = sorted((rho, loss) for (kind, rho, own), loss in shifted.items() if kind == "arm" and own == seed)
        marker = SEED_MARKERS[index % len(SEED_MARKERS)]
        rho, loss = zip(*line, strict=True)
        axes.plot(rho, loss, marker=marker, markersize=4, markerfacecolor="white", color="0.7", linewidth=0.7, zorder=3)
        axes.plot([], [], marker=marker, markersize=4, markerfacecolor="white", color="0.7", label=f"seed {seed}")


def _draw_arms(axes: Axes, fit: AllocationFit) -> None:
    rho = [arm.rho for arm in fit.arms]
    loss = np.array([arm.loss.estimate for arm in fit.arms])
    error = np.array([[arm.loss.estimate - arm.loss.low, arm.loss.high - arm.loss.estimate] for arm in fit.arms]).T
    bars = error if np.isfinite(error).all() else None
    label = "mean, 90 % interval (paired)" if bars is not None else "mean (no noise estimate)"
    axes.errorbar(rho, loss, yerr=bars, fmt="o", color="black", markersize=6, capsize=3, zorder=5, label=label)


def _draw_controls(axes: Axes, shifted: dict[tuple[str, float, int], float]) -> None:
    for kind, marker in CONTROL_MARKERS.items():
        here = sorted((rho, loss) for (own, rho, _), loss in shifted.items() if own == kind)
        if here:
            rho, loss = zip(*here, strict=True)
            axes.scatter(
                rho,
                loss,
                marker=marker,
                s=42,
                facecolor="white",
                edgecolor="black",
                zorder=6,
                label=CONTROL_LABELS[kind],
            )
