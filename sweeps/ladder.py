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
import yaml
from rich.console import Console
from rich.table import Table

from models.accounting import count_parameters
from sweeps.allocation import measure
from sweeps.collect import collect, val_losses
from sweeps.estimate import Machine, Pace, make_trial, process_bytes
from sweeps.forms import contrast
from sweeps.noise import Interval, estimate_noise, two_way
from sweeps.processes import FolderBusyError
from sweeps.run import EXIT_FAILED_TRIALS, EXIT_SETTINGS, EXIT_STOPPED, make_console
from sweeps.runner import Command, pretrain_command, run_trials
from sweeps.trial import Plan, Trial, TrialKind, write_plan
from train.compose import compose
from train.config import Config, resolve, validate
from train.files import atomic_write
from train.prepare import PreparedData, prepare

RESULTS_FILE = "ladder.md"
SHIPPED = Path(__file__).resolve().parents[1] / "conf" / "ladder" / "tiny.yaml"
_KEYS = {"name", "seeds", "reference", "settings", "rungs"}


@dataclass(frozen=True)
class Ladder:
    """What conf/ladder/*.yaml says."""

    name: str  # folder below runs/
    seeds: list[int]  # paired: one seed is one order of the data
    reference: str  # the rung that the others are compared with
    settings: list[str]  # of all rungs
    rungs: dict[str, list[str]]  # name -> settings of its own

    @classmethod
    def read(cls, path: Path) -> "Ladder":
        """The ladder of a file.

        Raises:
            ValueError: no such file, or one that is no ladder.
        """
        if not path.is_file():
            raise ValueError(f"--file={path}: there is no such file; shipped: {SHIPPED}")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or set(content) != _KEYS:
            raise ValueError(f"{path} must hold exactly {', '.join(sorted(_KEYS))}")
        ladder = cls(**content)
        if ladder.reference not in ladder.rungs:
            raise ValueError(f"{path}: reference={ladder.reference} must be one of the rungs {sorted(ladder.rungs)}")
        if len(set(ladder.seeds)) != len(ladder.seeds) or len(ladder.seeds) < 2:
            raise ValueError(f"{path}: seeds={ladder.seeds} must be two or more different seeds; usual: [0, 1, 2]")
        return ladder


def configs(ladder: Ladder, settings: list[str]) -> dict[str, Config]:
    """{rung: its configuration}; later settings win."""
    return {
        rung: compose(Config, "train_schema", "train", [*ladder.settings, *own, *settings])
        for rung, own in ladder.rungs.items()
    }


def make_plan(ladder: Ladder, rungs: dict[str, Config], prepared: PreparedData | None) -> Plan:
    """Every rung with every seed."""
    reference = rungs[ladder.reference]
    machine = Machine.here()
    needed = max(process_bytes(config.model) for config in rungs.values())
    jobs = machine.jobs(len(rungs) * len(ladder.seeds), needed)
    pace = Pace(machine, prepared.num_val_tokens if prepared is not None else None)
    arms = {}
    for rung, config in rungs.items():
        if config.engine.num_threads == 0:
            config.engine.num_threads = max(1, machine.cores // jobs)
        if prepared is not None:
            config.data.fingerprint = prepared.fingerprint
        config.log.group, config.train.final_checkpoint = ladder.name, False
        validate(resolve(config))
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
    write_plan(plan, folder)
    summary = run_trials(plan.trials, folder, plan.jobs, command=command, num_gpus=torch.cuda.device_count())
    collect(folder)
    text = markdown(*results(plan, folder, ladder.reference), ladder.reference, ladder.seeds)
    atomic_write(folder / RESULTS_FILE, text)
    return text, len(summary.failed)


def _show(plan: Plan, console: Console) -> None:
    table = Table("rung", "parameters", "residual", "memory", "experts", "FLOPs residual", "tokens", title=plan.name)
    for trial in (t for t in plan.trials if t.seed == plan.trials[0].seed):
        cells: list[Any] = [trial.name, trial.total_params, f"{trial.params_residual:+.2%}", trial.memory_params]
        cells += [trial.num_experts, f"{trial.flops_residual:+.2%}", trial.tokens]
        table.add_row(*(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells))
    console.print(table)
    console.print(f"{len(plan.trials)} trials, {plan.jobs} at once", highlight=False)


def main(arguments: list[str]) -> int:
    """Plan or run; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["plan", "run"])
    parser.add_argument("settings", nargs="*", metavar="setting=value")
    parser.add_argument("--file", type=Path, default=SHIPPED)
    args = parser.parse_args(arguments)
    console = make_console()
    try:
        ladder = Ladder.read(args.file)
        rungs = configs(ladder, args.settings)
        folder = Path("runs") / ladder.name
        if args.action == "plan":
            _show(make_plan(ladder, rungs, None), console)
            return 0
        plan = make_plan(ladder, rungs, prepare(rungs[ladder.reference].data))
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
