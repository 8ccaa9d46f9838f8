"""A sweep's folder -> report.html, allocation.png and fit.json: `python -m sweeps.report runs/default`.

The page is one file and asks nothing of the network: Plotly is embedded once, and a content policy forbids requests.
Only the folder is read, so a report can be rebuilt at any time, also while the sweep runs. The command first makes
results.csv anew from the trials' folders; where there is no plan, it takes results.csv as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sweeps import figures
from sweeps.collect import collect
from sweeps.findings import AllocationFit
from sweeps.fit import fit_allocation
from sweeps.plot import allocation_png, title_of
from sweeps.sweep_folder import SweepRecord, read_sweep
from sweeps.tables import (
    arm_table,
    control_table,
    failure_list,
    form_table,
    gain_table,
    paper_note,
    provenance,
    reproduce,
)
from sweeps.trial import PLAN_FILE
from train.files import atomic_write

TEMPLATES = Path(__file__).parent / "templates"
NOTHING_FINISHED = "No arm has finished yet, so there is nothing to conclude. The same command goes on with the sweep."


def build_report(sweep_dir: Path) -> Path:
    """Fit what has finished and write report.html, allocation.png and fit.json into the sweep's folder.

    Returns:
        The path of report.html. The conclusion in words is `read_conclusion(sweep_dir)`.

    Raises:
        FileNotFoundError: No results.csv in the folder.
        ValueError: results.csv is damaged.
    """
    sweep_dir = Path(sweep_dir)
    sweep = read_sweep(sweep_dir)
    points, controls = sweep.points()
    fit = fit_allocation(points, controls) if points else None
    record = fit.to_dict() if fit else {"schema_version": 1, "verdict": None, "conclusion": [NOTHING_FINISHED]}
    atomic_write(sweep_dir / "fit.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    curve = None
    if fit is not None:
        allocation_png(fit, points, controls, sweep_dir / "allocation.png")
        curve = figures.allocation(fit, points, controls)
    path = sweep_dir / "report.html"
    atomic_write(path, render(sweep, fit, curve))
    return path


def read_conclusion(sweep_dir: Path) -> str:
    """The conclusion that `build_report` wrote to fit.json, one sentence a line."""
    record = json.loads((Path(sweep_dir) / "fit.json").read_text(encoding="utf-8"))
    return "\n".join(record["conclusion"])


def render(sweep: SweepRecord, fit: AllocationFit | None, curve: figures.Figure | None) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    unseen = [line for line in fit.conclusion if line.startswith("Unseen: ")] if fit else []
    conclusion = [line for line in fit.conclusion if line not in unseen] if fit else [NOTHING_FINISHED]
    arms = sweep.of_kind("arm")
    return environment.get_template("report.html.j2").render(
        name=str(sweep.plan.get("name") or sweep.path.resolve().name),
        headline=title_of(fit) if fit else "nothing has finished",
        conclusion=conclusion,
        unseen=[part for line in unseen for part in line.removeprefix("Unseen: ").rstrip(".").split("; ")],
        notes=_strings(sweep.plan.get("notes")) + _strings(sweep.plan.get("pending")),
        dropped=fit.dropped if fit else (),
        num_finished=sum(trial.finished for trial in sweep.trials),
        num_trials=len(sweep.trials),
        curve=curve,
        forms=form_table(fit),
        gains=gain_table(fit),
        arms=arm_table(sweep, fit),
        controls=control_table(sweep),
        paper_note=paper_note(arms),
        sections=_sections(sweep),
        failures=failure_list(sweep),
        provenance=provenance(sweep),
        reproduce=reproduce(sweep),
        script_json=_script_json,
        plotly_js=Markup(get_plotlyjs()),
    )


SECTIONS = (
    (
        "Training curves",
        (
            ("Validation loss", figures.val_loss, "val/loss"),
            ("Training loss", figures.train_loss, "train/loss"),
            ("Gradient norm", figures.grad_norm, "optim/grad_norm"),
        ),
    ),
    (
        "Expert load",
        (
            ("Largest over mean load", figures.max_load, "moe/max_load"),
            ("The same by layer, first seed", figures.layer_load, "moe/expert_counts"),
            ("Final load of every expert, first seed", figures.final_load, "moe/expert_counts"),
        ),
    ),
    (
        "Memory health",
        (
            ("Mean gate", figures.gate_mean, "engram/gate_mean"),
            ("Gates at the end, first seed", figures.gate_histogram, "engram/gate_histogram"),
            ("Table rows in use", figures.rows_touched, "engram/rows_touched"),
        ),
    ),
)


def _sections(sweep: SweepRecord) -> list[dict[str, Any]]:
    """Sections of metric panels; a panel without its metric has figure None."""
    return [
        {
            "title": title,
            "panels": [{"title": name, "figure": draw(sweep), "metric": metric} for name, draw, metric in panels],
        }
        for title, panels in SECTIONS
    ]


def _script_json(value: Any) -> Markup:
    """JSON that may stand inside a script element: `<`, `>` and `&` are escaped."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    escaped = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(escaped)


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild one report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.report", description="Rebuild a sweep's report.")
    parser.add_argument("sweep_dir", type=Path, help="the sweep's folder, for example runs/default")
    args = parser.parse_args(arguments)
    try:
        if (args.sweep_dir / PLAN_FILE).is_file():
            collect(args.sweep_dir)
        path = build_report(args.sweep_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(read_conclusion(args.sweep_dir))
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
