"""The report's tables: lists of headed rows of text, ready for the template."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sweeps.conclusion import signed_nats
from sweeps.findings import AllocationFit
from sweeps.forms import LABELS
from sweeps.gains import CONTROLS
from sweeps.noise import Interval
from sweeps.sweep_folder import SweepRecord, TrialRecord
from sweeps.trial import PAPER_TOKENS_PER_PARAM, PYTHON, pretrain_arguments


@dataclass
class Table:
    """A headed table of text."""

    head: list[str]
    rows: list[list[str]] = field(default_factory=list)


def _interval(interval: Interval, digits: int) -> str:
    if not -1e9 < interval.low <= interval.high < 1e9:
        return f"{interval.estimate:.{digits}f}"
    return f"{interval.estimate:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _number(value: Any, digits: int = 4) -> str:
    return "-" if value is None or value == "" else f"{float(value):.{digits}f}"


def _count(value: Any) -> str:
    if value is None or value == "":
        return "-"
    number = float(value)
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.4g}"


def _share(value: Any) -> str:
    return "-" if value is None or value == "" else f"{100 * float(value):+.3f} %"


def form_table(fit: AllocationFit | None) -> Table | None:
    """Every form's minimum."""
    if fit is None or not fit.forms:
        return None
    claimed = fit.rho_star is not None
    table = Table(["form", "rho* (90 %)", "loss there (90 %)", "gain over rho = 1 (90 %)", "misfit p", "used"])
    for form in fit.forms:
        edge = " at an edge" if form.clipped_low or form.clipped_high else ""
        table.rows.append(
            [
                f"{LABELS[form.name]} ({form.num_points} points)",
                _interval(form.rho_star, 2) + edge,
                _interval(form.loss_min, 4),
                _interval(form.gain, 4) if form.gain else "-",
                "-" if form.lack_of_fit_p is None else f"{form.lack_of_fit_p:.2f}",
                ("yes" if form.supported else "no") if claimed else "no minimum claimed",
            ]
        )
    return table


def gain_table(fit: AllocationFit | None) -> Table | None:
    """Gains with their intervals."""
    if fit is None or not fit.gains:
        return None
    table = Table(["arm", "against", "gain (positive: the arm is better)", "shown"])
    for gain in fit.gains:
        against = {"pure_moe": "pure MoE, rho = 1", "lr": f"pure MoE, both at learning rate x{gain.lr_scale:g}"}
        what = against.get(gain.kind) or CONTROLS[gain.kind]
        rows = [f"rho = {gain.arm_rho:.3g}", what, signed_nats(gain), "yes" if gain.shown else "no"]
        table.rows.append(rows)
    return table


def arm_table(sweep: SweepRecord, fit: AllocationFit | None) -> Table:
    """One row for each planned rho: shape, budget, residuals, tokens per parameter, losses by seed."""
    trials = sweep.of_kind("arm")
    seeds = sorted({trial.seed for trial in trials})
    means = {round(arm.rho, 6): arm.loss for arm in fit.arms} if fit else {}
    head = ["rho", "mean loss (90 %, paired)", *(f"seed {seed}" for seed in seeds), "rho actual", "experts", "slots"]
    head += ["parameters", "memory", "active", "FLOPs/token"]
    table = Table([*head, "parameters vs rho = 1", "FLOPs vs rho = 1", "tokens/parameter"])
    for rho in sorted({trial.rho for trial in trials}):
        here = {trial.seed: trial for trial in trials if trial.rho == rho}
        row = next(iter(here.values())).row
        actual = row.get("rho_actual")
        mean = means.get(round(rho if actual is None else float(actual), 6))
        table.rows.append(
            [
                f"{rho:g}",
                _interval(mean, 4) if mean else "-",
                *(_loss(here.get(seed)) for seed in seeds),
                _number(actual),
                *(_count(row.get(key)) for key in ("num_experts", "slots", "total_params", "memory_params")),
                *(_count(row.get(key)) for key in ("active_params", "flops_per_token")),
                _share(row.get("params_residual")),
                _share(row.get("flops_residual")),
                _number(row.get("tokens_per_param"), 3),
            ]
        )
    return table


def control_table(sweep: SweepRecord) -> Table | None:
    """Controls and learning-rate trials beside the arm with the same experts and seed."""
    trials = [*sweep.of_kind(*CONTROLS), *sweep.of_kind("lr")]
    if not trials:
        return None
    arms = {(trial.rho, trial.seed): trial for trial in sweep.of_kind("arm")}
    table = Table(["trial", "what", "seed", "experts", "parameters", "memory", "loss", "arm's loss", "control - arm"])
    for trial in trials:
        arm = arms.get((trial.rho, trial.seed))
        both = arm is not None and arm.finished and trial.finished
        difference = f"{trial.row['val_loss'] - arm.row['val_loss']:+.4f}" if both and arm is not None else "-"
        what = CONTROLS.get(trial.kind, f"the arm at learning rate x{trial.lr_scale:g}")
        counts = [_count(trial.row.get(key)) for key in ("num_experts", "total_params", "memory_params")]
        name = f"{trial.kind.replace('_', ' ')}, rho {trial.rho:g}"
        table.rows.append([name, what, str(trial.seed), *counts, _loss(trial), _loss(arm), difference])
    return table


def _loss(trial: TrialRecord | None) -> str:
    if trial is None:
        return "-"
    return _number(trial.row["val_loss"]) if trial.finished else str(trial.row.get("status") or "-")


def paper_note(arms: Sequence[TrialRecord]) -> str:
    """Tokens per parameter beside the paper's."""
    values = [float(t.row["tokens_per_param"]) for t in arms if t.row.get("tokens_per_param") is not None]
    paper = f"the paper's sweep is at about {PAPER_TOKENS_PER_PARAM:.0f} (58.7B tokens for 5.7B parameters)"
    if not values:
        return f"Tokens per parameter were not recorded; {paper}."
    low, high = min(values), max(values)
    here = f"{low:.2g}" if high - low < 0.01 * high else f"{low:.2g} to {high:.2g}"
    ratio = PAPER_TOKENS_PER_PARAM / high
    return (
        f"This sweep trains on {here} tokens per parameter; {paper}, {ratio:.0f} times as many."
        if ratio >= 1.5
        else (f"This sweep trains on {here} tokens per parameter; {paper}.")
    )


def failure_list(sweep: SweepRecord) -> list[dict[str, str]]:
    """Failed trials with their last log lines; unfinished ones with their state."""
    failures = []
    for trial in sweep.trials:
        state = str(trial.row.get("status") or "unknown")
        if state == "finished":
            continue
        step = trial.status.get("step")
        reached = f"step {step} of {trial.status.get('max_steps', '?')}" if step is not None else "no step recorded"
        message = str(trial.status.get("message") or "")
        failures.append(
            {
                "name": trial.name,
                "trial_id": str(trial.row["trial_id"]),
                "state": state,
                "detail": f"{reached}. {message}".strip(),
                "log": trial.log_tail,
            }
        )
    return failures


def provenance(sweep: SweepRecord) -> Table:
    """Where the numbers come from: data, versions, machine, threads, precision; several values where trials differ."""
    found: dict[str, list[str]] = {}

    def add(name: str, value: Any) -> None:
        if value not in (None, "", [], {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            if text not in found.setdefault(name, []):
                found[name].append(text)

    add("corpus fingerprint", sweep.plan.get("fingerprint"))
    for name, value in _flat(sweep.plan.get("provenance")):
        add(f"corpus: {name}", value)
    for trial in sweep.trials:
        result = trial.result
        add("corpus fingerprint", result.get("data_fingerprint") or result.get("fingerprint"))
        for source in ("environment", "versions"):
            for name, value in _flat(result.get(source)):
                add(name, value)
        for name in ("epochs", "val_tokens", "mfu_convention"):
            value = result.get(name)
            add(name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else value)
    data = (sweep.plan.get("identity") or {}).get("data") if isinstance(sweep.plan.get("identity"), dict) else None
    for name, value in _flat(data):
        add(f"data.{name}", value)
    add("trials at once", sweep.plan.get("jobs"))
    rows = [
        [name, values[0] if len(values) == 1 else "differs: " + " | ".join(values)] for name, values in found.items()
    ]
    return Table(["what", "value"], rows)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as dotted names."""
    if not isinstance(value, dict):
        return []
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else [(f"{prefix}{key}", item)]
    return pairs


def reproduce(sweep: SweepRecord) -> dict[str, str]:
    """Commands: the sweep, this report, one trial."""
    folder = str(sweep.path)
    command = sweep.plan.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    trial = next((str(t.row["trial_id"]) for t in sweep.trials), "TRIAL_ID")
    words = [PYTHON, *pretrain_arguments(str(sweep.path / "trials" / trial)), "run_dir=runs/again"]
    return {
        "sweep": str(command or _sweep_command(sweep)),
        "report": f"{PYTHON} -m sweeps.report {shlex.quote(folder)}",
        "trial": shlex.join(words),
    }


def _sweep_command(sweep: SweepRecord) -> str:
    """The sweep's command with every shared setting spelled out, from the plan's records alone."""
    identity = sweep.plan.get("identity") if isinstance(sweep.plan.get("identity"), dict) else {}
    assert isinstance(identity, dict)
    trials = sweep.trials
    controls = list(dict.fromkeys(t.kind for t in trials if t.kind not in ("arm", "lr")))
    settings = [
        ("sweep.name", sweep.plan.get("name") or sweep.path.resolve().name),
        ("sweep.rhos", list(dict.fromkeys(t.rho for t in trials if t.kind == "arm"))),
        ("sweep.seeds", list(dict.fromkeys(t.seed for t in trials if t.kind == "arm"))),
        ("sweep.controls", controls),
        ("sweep.lr_scales", list(dict.fromkeys(t.lr_scale for t in trials if t.kind == "lr"))),
    ]
    chosen = next((t.rho for t in trials if t.kind in CONTROLS and t.kind != "one_row_pure"), None)
    settings += [("sweep.control_rho", chosen)] if chosen is not None else []
    settings += [pair for pair in _flat(identity) if pair[0] != "data.fingerprint"]
    words = [PYTHON, "-m", "sweeps.run", "action=run", *(f"{name}={_setting(value)}" for name, value in settings)]
    return " ".join(shlex.quote(word) for word in words)


def _setting(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(_setting(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_setting(item)}" for key, item in value.items()) + "}"
    text = str(value)
    return f"'{text}'" if isinstance(value, str) and (not text or any(c in text for c in " ,=:{}[]()")) else text
