"""The quality ladder: named models at equal FLOPs and tokens, paired seeds, differences with intervals.

    python -m sweeps.ladder plan|run [--file conf/ladder/tiny.yaml] [setting=value ...]

A rung is a list of settings, so every rung is a run that `make train` can repeat. Trials run, resume and are skipped
as those of a sweep (`sweeps/runner.py`); exit codes are those of `sweeps.run`.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.accounting import count_parameters
from sweeps.allocation import measure
from sweeps.collect import collect, val_losses
from sweeps.estimate import Machine, Pace, make_trial, process_bytes, training_tokens
from sweeps.forms import contrast
from sweeps.ladder_settings import SHIPPED, Ladder, configs
from sweeps.live import duration
from sweeps.noise import Interval, estimate_noise, two_way
from sweeps.plan import keep_machine_choices, planned_seconds
from sweeps.processes import FolderBusyError
from sweeps.run import EXIT_FAILED_TRIALS, EXIT_SETTINGS, EXIT_STOPPED, make_console
from sweeps.runner import Command, pretrain_command, run_trials
from sweeps.trial import Plan, Trial, TrialKind, started_plan, write_plan
from train.config import Config, resolve, validate
from train.files import atomic_write
from train.identity import differing_settings, identity_settings
from train.prepare import PreparedData, prepare

RESULTS_FILE = "ladder.md"


def make_plan(
    ladder: Ladder, rungs: dict[str, Config], prepared: PreparedData | None, previous: Plan | None = None
) -> Plan:
    """Every rung with every seed.

    Args:
        ladder: what is compared.
        rungs: {rung: its configuration}; what is left open in them is filled in place.
        prepared: the data, whose fingerprint becomes part of every trial; None where they are not prepared yet.
        previous: the plan its folder was started with; the machine choices (threads, precision, kernels) are kept.
    """
    reference = rungs[ladder.reference]
    machine = Machine.here()
    needed = max(process_bytes(config.model) for config in rungs.values())
    jobs = machine.jobs(len(rungs) * len(ladder.seeds), needed)
    pace = Pace(machine, prepared.num_val_tokens if prepared is not None else None)
    arms = {}
    recorded = _recorded(previous)
    for rung, config in rungs.items():
        if rung in recorded:
            keep_machine_choices(config, recorded[rung])
        elif recorded:  # a new rung is compared with the old ones; its kernel of experts depends on its own shape
            of_all = recorded.get(ladder.reference, next(iter(recorded.values())))
            keep_machine_choices(config, {"engine": of_all["engine"]})
        if config.engine.num_threads == 0:
            config.engine.num_threads = max(1, machine.cores // jobs)
        if prepared is not None:
            config.data.fingerprint = prepared.fingerprint
        config.log.group, config.train.final_checkpoint = ladder.name, False
        validate(resolve(config))
        if training_tokens(config) != training_tokens(reference):
            raise ValueError(
                f"rungs.{rung}: trains on {training_tokens(config):,} tokens, {ladder.reference} on "
                f"{training_tokens(reference):,}; a ladder compares models at equal tokens: set train.max_steps and "
                "the batch in `settings`, for all rungs"
            )
        arms[rung] = measure(reference.model, config.model, count_parameters(config.model).rho, rung)
    trials = [
        make_trial(dataclasses.replace(config, seed=seed), arms[rung], pace, TrialKind.rung, name=rung)
        for seed in ladder.seeds
        for rung, config in rungs.items()
    ]
    return Plan(
        name=ladder.name,
        fingerprint=reference.data.fingerprint,
        jobs=jobs,
        keep_checkpoints="none",
        num_params_base=count_parameters(reference.model).total,
        identity={},
        trials=trials,
        provenance=dict(prepared.provenance) if prepared is not None else {},
    )


def _recorded(plan: Plan | None) -> dict[str, dict[str, Any]]:
    """{rung: the configuration of one of its trials}."""
    return {trial.name: trial.config for trial in plan.trials} if plan is not None else {}


def refuse_other_ladder(previous: Plan | None, plan: Plan, folder: Path) -> None:
    """More rungs or seeds may join a ladder; a rung whose settings have changed is another one.

    Raises:
        ValueError: with the rungs and the settings that differ.
    """
    if previous is None:
        return
    remedy = "choose another name in the ladder's file, restore the settings, or move the folder away"
    if any(trial.kind is not TrialKind.rung for trial in previous.trials):
        raise ValueError(f"{folder} holds trials of a sweep: {remedy}")
    before, now = _recorded(previous), _recorded(plan)
    changes = [
        f"{rung}: {change}"
        for rung in now
        if rung in before
        for change in differing_settings(_shared(before[rung]), _shared(now[rung]))
        if plan.fingerprint or not change.startswith("data.fingerprint:")
    ]
    if changes:
        raise ValueError(f"{folder} holds trials of a ladder with other settings ({'; '.join(changes[:5])}): {remedy}")


def _shared(config: dict[str, Any]) -> dict[str, Any]:
    """What all seeds of a rung have in common."""
    settings = identity_settings(config)
    del settings["seed"]
    return settings


@dataclass(frozen=True)
class Rung:
    """One line of the result."""

    trial: Trial  # of the first seed
    losses: dict[int, float]  # seed -> validation loss, nats per token
    mean: float  # adjusted for seeds that are missing
    gain: Interval  # loss of the reference minus its own, paired by seed, 90 %


def results(plan: Plan, folder: Path, reference: str) -> tuple[list[Rung], float]:
    """The rungs in the order of the plan, and the noise of one trial within its seed (nats).

    Noise is pooled over all rungs in the additive model of rungs and seeds (`sweeps/noise.py`), so that every interval
    has (rungs - 1)(seeds - 1) degrees of freedom.

    Raises:
        ValueError: too few finished trials.
    """
    losses = val_losses(plan, folder)
    cells = [(trial.name, trial.seed, losses[trial.trial_id]) for trial in plan.trials if trial.trial_id in losses]
    if not cells:
        raise ValueError(f"{folder}: no trial has finished; run the ladder first")
    layout = two_way(list(cells))
    noise = estimate_noise(layout)
    if reference not in layout.labels or not layout.connected or noise.df < 1:
        raise ValueError(f"{folder}: too few trials have finished for a comparison with {reference}; run it again")
    rungs = []
    for trial in (t for t in plan.trials if t.seed == plan.trials[0].seed and t.name in layout.labels):
        weights = np.zeros(len(layout.labels))
        weights[layout.labels.index(reference)] += 1.0
        weights[layout.labels.index(trial.name)] -= 1.0
        gain = contrast(weights, layout.means, layout.unscaled_cov, noise)
        own = {seed: loss for name, seed, loss in cells if name == trial.name}
        rungs.append(Rung(trial, own, float(layout.means[layout.labels.index(trial.name)]), gain))
    return rungs, noise.sigma


def markdown(rungs: list[Rung], sigma: float, reference: str, seeds: list[int]) -> str:
    """The result as a table; kept in `ladder.md`."""
    head = ["rung", "parameters", "memory", "FLOPs", *(f"seed {seed}" for seed in seeds), f"gain over {reference}"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for rung in rungs:
        trial, gain = rung.trial, rung.gain
        cells = [
            trial.name, f"{trial.params_residual:+.1%}", f"{trial.memory_params / 1e3:.0f}k",
            f"{trial.flops_residual:+.2%}", *(f"{rung.losses[s]:.4f}" if s in rung.losses else "" for s in seeds),
            "" if trial.name == reference else f"{gain.estimate:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Gains in nats, paired by seed, with 90 % intervals; noise of one trial within its seed {sigma:.4f}.",
    ]
    return "\n".join(lines) + "\n"


def run(ladder: Ladder, plan: Plan, folder: Path, command: Command = pretrain_command) -> tuple[str, int]:
    """Run what is not finished; the result's text, also in `ladder.md`, and the number of trials that failed."""

    def claim() -> None:
        refuse_other_ladder(started_plan(folder), plan, folder)  # another runner may have begun since we looked
        write_plan(plan, folder)

    num_gpus = torch.cuda.device_count()
    summary = run_trials(plan.trials, folder, plan.jobs, command=command, num_gpus=num_gpus, on_start=claim)
    collect(folder)
    text = markdown(*results(plan, folder, ladder.reference), ladder.reference, ladder.seeds)
    atomic_write(folder / RESULTS_FILE, text)
    return text, len(summary.failed)


def plan_folder(ladder: Ladder, rungs: dict[str, Config], prepared: PreparedData | None, folder: Path) -> Plan:
    """The plan of a ladder whose trials lie, or will lie, in `folder`.

    Raises:
        ValueError: settings that do not fit each other; or the folder holds trials of another ladder, or of a sweep.
    """
    previous = started_plan(folder)
    plan = make_plan(ladder, rungs, prepared, previous)
    refuse_other_ladder(previous, plan, folder)
    return plan


def _show(plan: Plan, console: Console) -> None:
    table = Table(
        "rung", "parameters", "residual", "memory", "experts", "FLOPs residual", "tokens", "time", title=plan.name
    )
    for trial in (t for t in plan.trials if t.seed == plan.trials[0].seed):
        cells: list[Any] = [trial.name, trial.total_params, f"{trial.params_residual:+.2%}", trial.memory_params]
        cells += [trial.num_experts, f"{trial.flops_residual:+.2%}", trial.tokens, duration(trial.estimated_seconds)]
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells))
    console.print(table)
    total = duration(planned_seconds(plan))
    console.print(f"{len(plan.trials)} trials, {plan.jobs} at once, about {total}", highlight=False)


def main(arguments: list[str]) -> int:
    """Plan or run; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["plan", "run"])
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--file", type=Path, default=SHIPPED)
    args = parser.parse_intermixed_args(arguments)
    console = make_console()
    try:
        ladder = Ladder.read(args.file)
        rungs = configs(ladder, args.settings)
        folder = Path("runs") / ladder.name
        plan = plan_folder(ladder, rungs, None, folder)  # wrong settings are found before the data are prepared
        if args.action == "plan":
            _show(plan, console)
            return 0
        plan = plan_folder(ladder, rungs, prepare(rungs[ladder.reference].data), folder)
        _show(plan, console)
        text, num_failed = run(ladder, plan, folder)
    except (ValueError, OSError, FolderBusyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except KeyboardInterrupt:
        print("stopped; nothing is lost. The same command goes on where this stopped.", file=sys.stderr)
        return EXIT_STOPPED
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return EXIT_FAILED_TRIALS if num_failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
