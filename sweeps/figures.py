"""The report's interactive figures as Plotly dictionaries (`data`, `layout`); None where the metric was not recorded.

Colours are chosen to read on white and on black; every distinction is also made by marker, dash or legend text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sweeps.findings import AllocationFit
from sweeps.forms import LABELS, FormName
from sweeps.noise import Point
from sweeps.plot import CONTROL_LABELS, shifted_losses
from sweeps.sweep_folder import SweepRecord, TrialRecord

Figure = dict[str, Any]
PALETTE = ["#4e79a7", "#e15759", "#59a14f", "#b07aa1", "#f28e2b", "#76b7b2", "#9c755f", "#edc948"]
SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "star", "hexagon", "cross"]
DASHES = ["solid", "dot", "dash", "longdash", "dashdot"]
FORM_DASH = {
    FormName.quadratic: "dash",
    FormName.local_quadratic: "dot",
    FormName.asymmetric: "solid",
    FormName.skewed: "dashdot",
}
CONTROL_SYMBOLS = {
    "no_module": "square-open",
    "one_row": "triangle-up-open",
    "one_row_pure": "diamond-open",
    "shuffled": "triangle-down-open",
    "frozen": "cross-open",
    "extra_shared": "x-open",
}
GRAY = "#8a8a8a"
RHO_STOPS = (0.0, 0.35, 0.7, 1.0)
RHO_CHANNELS = ((60, 60, 225, 210), (110, 165, 150, 60), (215, 110, 40, 60))  # red, green, blue at the stops


def figure(data: list[dict[str, Any]], x_title: str, y_title: str, **layout: Any) -> Figure:
    """Traces with the common layout; colours of text and grid are set by the page for light and dark."""
    base: dict[str, Any] = {
        "xaxis": {"title": {"text": x_title}, "automargin": True},
        "yaxis": {"title": {"text": y_title}, "automargin": True},
        "margin": {"l": 60, "r": 10, "t": 30, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GRAY},
        "hovermode": "closest",
    }
    return {"data": data, "layout": {**base, **layout}}


def allocation(fit: AllocationFit, points: Sequence[Point], controls: Sequence[Point]) -> Figure:
    """Loss against rho: means with intervals, seeds, forms (hidden when no minimum is supported), controls."""
    shifted = shifted_losses(points, controls)
    data = [*_seed_traces(shifted), _raw_trace(points), _arm_trace(fit), *_form_traces(fit), *_control_traces(shifted)]
    layout: dict[str, Any] = {}
    if fit.rho_star is not None:
        star = fit.rho_star
        band = {"type": "rect", "yref": "paper", "x0": star.low, "x1": star.high, "y0": 0, "y1": 1, "layer": "below"}
        line = {"type": "line", "yref": "paper", "x0": star.estimate, "x1": star.estimate, "y0": 0, "y1": 1}
        layout["shapes"] = [
            {**band, "fillcolor": GRAY, "opacity": 0.18, "line": {"width": 0}},
            {**line, "line": {"color": GRAY, "width": 1}},
        ]
    return figure(
        data, "rho: share of the inactive parameters in experts", "validation loss (nats per token)", **layout
    )


def _seed_traces(shifted: dict[tuple[str, float, int], float]) -> list[dict[str, Any]]:
    traces = []
    for index, seed in enumerate(sorted({seed for kind, _, seed in shifted if kind == "arm"})):
        line = sorted((rho, loss) for (kind, rho, own), loss in shifted.items() if kind == "arm" and own == seed)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": f"seed {seed}, common shift removed",
                "x": [rho for rho, _ in line],
                "y": [loss for _, loss in line],
                "line": {"width": 1, "color": GRAY, "dash": DASHES[index % len(DASHES)]},
                "marker": {"size": 6, "symbol": SYMBOLS[index % len(SYMBOLS)] + "-open", "color": GRAY},
            }
        )
    return traces


def _raw_trace(points: Sequence[Point]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text",
        "name": "losses as measured",
        "visible": "legendonly",
        "x": [point.rho for point in points],
        "y": [point.loss for point in points],
        "text": [str(point.seed) for point in points],
        "textposition": "middle right",
        "marker": {"size": 6, "color": PALETTE[4]},
    }


def _arm_trace(fit: AllocationFit) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": "mean, 90 % interval (paired)",
        "x": [arm.rho for arm in fit.arms],
        "y": [arm.loss.estimate for arm in fit.arms],
        "marker": {"size": 10, "color": PALETTE[0]},
    }
    half = [arm.loss.high - arm.loss.estimate for arm in fit.arms]
    if np.isfinite(half).all():
        trace["error_y"] = {"type": "data", "array": half, "thickness": 1.5, "color": PALETTE[0]}
    return trace


def _form_traces(fit: AllocationFit) -> list[dict[str, Any]]:
    traces = []
    for index, form in enumerate(fit.forms):
        rho = np.linspace(form.rho_low, form.rho_high, 120)
        shown = fit.rho_star is not None and form.supported
        note = f"minimum {form.rho_star.estimate:.2f}" if shown else "no minimum claimed"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{LABELS[form.name]} ({note})",
                "x": np.round(rho, 5).tolist(),
                "y": np.round(form.loss(rho), 6).tolist(),
                "visible": True if shown else "legendonly",
                "line": {"width": 1.8, "dash": FORM_DASH[form.name], "color": PALETTE[1 + index]},
            }
        )
    return traces


def _control_traces(shifted: dict[tuple[str, float, int], float]) -> list[dict[str, Any]]:
    traces = []
    for kind, symbol in CONTROL_SYMBOLS.items():
        here = sorted((rho, loss, seed) for (own, rho, seed), loss in shifted.items() if own == kind)
        if here:
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": CONTROL_LABELS[kind],
                    "x": [rho for rho, _, _ in here],
                    "y": [loss for _, loss, _ in here],
                    "text": [f"seed {seed}" for _, _, seed in here],
                    "marker": {"size": 11, "symbol": symbol, "color": PALETTE[1], "line": {"width": 2}},
                }
            )
    return traces


def _rho_colour(rho: float) -> str:
    """Blue at rho = 0 (all memory) through green and orange to red at rho = 1 (all experts)."""
    red, green, blue = (np.interp(rho, RHO_STOPS, channel) for channel in RHO_CHANNELS)
    return f"rgb({red:.0f},{green:.0f},{blue:.0f})"


def _group(trial: TrialRecord) -> str:
    """The legend entry of a trial: all but its seed."""
    return trial.name.replace(f", seed {trial.seed}", "")


def _curves(sweep: SweepRecord, keys: Sequence[str], y_title: str, layered: bool = False) -> Figure | None:
    """One line per trial and metric, one legend entry for the seeds of one arm; only arms are shown at first."""
    seeds = sorted({trial.seed for trial in sweep.trials})
    data: list[dict[str, Any]] = []
    entries: set[str] = set()
    for trial in [*sweep.of_kind("arm"), *(t for t in sweep.trials if t.kind != "arm")]:
        for key in keys:
            steps, values = trial.series(key)
            if not steps:
                continue
            group = _group(trial) + (f", layer {key.rsplit('_', 1)[-1]}" if layered and key[-1].isdigit() else "")
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines" if len(steps) > 1 else "markers",
                    "name": group,
                    "legendgroup": group,
                    "showlegend": group not in entries,
                    "hovertext": trial.name,
                    "x": steps,
                    "y": [float(f"{value:.6g}") for value in values],
                    "line": {
                        "color": _rho_colour(trial.rho),
                        "dash": DASHES[seeds.index(trial.seed) % len(DASHES)],
                        "width": 1.4,
                    },
                    "visible": True if trial.kind == "arm" else "legendonly",
                }
            )
            entries.add(group)
    return figure(data, "step", y_title) if data else None


def train_loss(sweep: SweepRecord) -> Figure | None:
    """Training loss over the steps."""
    return _curves(sweep, ["train/loss"], "training loss (nats per token)")


def val_loss(sweep: SweepRecord) -> Figure | None:
    """Validation loss over the steps."""
    return _curves(sweep, ["val/loss"], "validation loss (nats per token)")


def grad_norm(sweep: SweepRecord) -> Figure | None:
    """Global gradient norm before clipping."""
    return _curves(sweep, ["optim/grad_norm"], "gradient norm before clipping")


def max_load(sweep: SweepRecord) -> Figure | None:
    """Largest over mean load of an expert, worst layer, over the steps."""
    return _curves(sweep, ["moe/max_load"], "largest / mean load of an expert, worst layer")


def layer_load(sweep: SweepRecord) -> Figure | None:
    """Largest over mean load for each MoE layer of the first seed of every arm, over the steps."""
    data = []
    for trial in _first_seed_arms(sweep):
        steps_loads = [(r["step"], _loads(r.get("moe/expert_counts"))) for r in trial.metrics if "step" in r]
        loads = [(step, load) for step, load in steps_loads if load is not None]
        for layer in range(min((len(load) for _, load in loads), default=0)):
            thinned = loads[:: max(1, len(loads) // 100)]
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": f"rho {trial.rho:g}",
                    "legendgroup": f"rho {trial.rho:g}",
                    "showlegend": layer == 0,
                    "hovertext": f"rho {trial.rho:g}, MoE layer {layer}",
                    "x": [step for step, _ in thinned],
                    "y": [round(float(load[layer].max()), 4) for _, load in thinned],
                    "line": {"dash": DASHES[layer % len(DASHES)], "width": 1.4, "color": _rho_colour(trial.rho)},
                    "visible": True if trial.rho == 1.0 else "legendonly",
                }
            )
    return figure(data, "step", "largest / mean load of an expert") if data else None


def final_load(sweep: SweepRecord) -> Figure | None:
    """Load of every expert at the last record, sorted within its layer, relative to the layer's mean."""
    data = []
    for trial in _first_seed_arms(sweep):
        load = _loads(trial.last("moe/expert_counts"))
        for layer, values in enumerate(load or []):
            data.append(
                {
                    "type": "bar",
                    "name": f"rho {trial.rho:g}",
                    "legendgroup": f"rho {trial.rho:g}",
                    "showlegend": layer == 0,
                    "hovertext": f"rho {trial.rho:g}, MoE layer {layer}",
                    "marker": {"color": _rho_colour(trial.rho), "opacity": 0.5 + 0.5 / (1 + layer)},
                    "x": list(range(1, len(values) + 1)),
                    "y": [round(float(value), 4) for value in np.sort(values)[::-1]],
                    "visible": True if trial.rho == 1.0 else "legendonly",
                }
            )
    return figure(data, "expert, by load", "load / mean load of its layer", barmode="group") if data else None


def gate_mean(sweep: SweepRecord) -> Figure | None:
    """Mean gate of the memory over the steps."""
    return _engram_curves(sweep, "engram/gate_mean", "mean gate")


def rows_touched(sweep: SweepRecord) -> Figure | None:
    """Table rows changed so far (or by a step, where only that was recorded)."""
    found = _engram_curves(sweep, "engram/rows_ever_touched", "table rows changed at least once")
    return found or _engram_curves(sweep, "engram/rows_touched", "table rows changed by a step")


def _engram_curves(sweep: SweepRecord, prefix: str, y_title: str) -> Figure | None:
    keys = sorted({key for trial in sweep.trials for key in trial.keys(prefix)})
    return _curves(sweep, keys, y_title, layered=True)


def gate_histogram(sweep: SweepRecord) -> Figure | None:
    """Share of gates in equal bins of [0, 1] at the last record, first seed of every arm with a memory."""
    data = []
    for trial in _first_seed_arms(sweep):
        for key in trial.keys("engram/gate_histogram"):
            counts = trial.last(key)
            if not _is_numbers(counts) or sum(counts) <= 0:
                continue
            bins, layer = len(counts), key.removeprefix("engram/gate_histogram").strip("_")
            data.append(
                {
                    "type": "bar",
                    "name": f"rho {trial.rho:g}" + (f", layer {layer}" if layer else ""),
                    "x": [round((i + 0.5) / bins, 4) for i in range(bins)],
                    "y": [round(count / sum(counts), 5) for count in counts],
                    "marker": {"color": _rho_colour(trial.rho)},
                }
            )
    return figure(data, "gate", "share of gates", barmode="group") if data else None


def _first_seed_arms(sweep: SweepRecord) -> list[TrialRecord]:
    first: dict[float, TrialRecord] = {}
    for trial in sweep.of_kind("arm"):
        first.setdefault(trial.rho, trial)
    return list(first.values())


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def _loads(counts: Any) -> list[np.ndarray] | None:
    """Loads over their layer's mean from `moe/expert_counts` (layers, E); None where unusable."""
    if _is_numbers(counts):
        counts = [counts]
    if not isinstance(counts, list) or not counts or not all(_is_numbers(layer) for layer in counts):
        return None
    layers = [np.asarray(layer, dtype=np.float64) for layer in counts]
    return [layer / layer.mean() if layer.mean() > 0 else layer for layer in layers]
