"""Plan, run or report a sweep: `python -m sweeps.run sweep=default action=plan|run|report [setting=value ...]`.

The settings are those of a single run (they describe the rho = 1 base and the training that all trials share) and the
`sweep` group. Exit codes: 0 done, 1 trials failed (the report is still made), 2 wrong settings or data, 130 stopped.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from sweeps.collect import collect, speeds, val_losses
from sweeps.live import duration
from sweeps.plan import Planner, planned_seconds
from sweeps.plan_table import plan_table
from sweeps.processes import FolderBusyError
from sweeps.report import build_report, read_conclusion
from sweeps.runner import Command, Summary, peak_disk_bytes, pretrain_command, run_trials
from sweeps.settings import SweepConfig, folder_of, refuse_decided
from sweeps.trial import PYTHON, Plan, read_plan, started_plan, write_plan
from train.compose import compose
from train.config import Config
from train.identity import differing_settings
from train.prepare import PreparedData, open_prepared, prepare
from train.shards import NotPreparedError

EXIT_FAILED_TRIALS, EXIT_SETTINGS, EXIT_STOPPED = 1, 2, 130  # 130: ended by Ctrl-C, the shells' convention

# Settings of a single run that a sweep decides for every trial.
_OF_A_RUN = {"seed": "use sweep.seeds=[0,1]", "run_dir": "use sweep.root=<folder> and sweep.name=<name>"}

LOG_WIDTH = 160  # columns where the output is a file: the plan's table fits


class Action(str, Enum):
    """What to do with the sweep."""

    plan = "plan"  # print every trial; nothing is trained
    run = "run"  # prepare data, run what is not finished, report
    report = "report"  # collect and report what is there


@dataclass
class SweepRoot(Config):
    """A run's settings, shared by all trials, and the sweep's own."""

    sweep: SweepConfig = field(default_factory=SweepConfig)
    action: Action = Action.plan


def main(arguments: list[str]) -> int:
    """Compose, check, act; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    overrides = parser.parse_args(arguments).overrides
    try:
        return act(compose_sweep(overrides))
    except (ValueError, OSError, FolderBusyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SETTINGS
    except KeyboardInterrupt:
        print("stopped before any trial was started", file=sys.stderr)
        return EXIT_STOPPED


def compose_sweep(overrides: list[str]) -> SweepRoot:
    """The sweep that `conf/sweep.yaml` and the command line describe.

    Raises:
        ValueError: one line with the setting, its value, and the name that was perhaps meant.
    """
    refuse_decided(overrides, "a sweep", _OF_A_RUN)
    return compose(SweepRoot, "sweep_schema", "sweep", overrides)


def act(root: SweepRoot, command: Command = pretrain_command) -> int:
    """Do what `root.action` says; returns the exit code."""
    folder = folder_of(root.sweep)
    console = make_console()
    if root.action is Action.report:
        read_plan(folder)
        _report(folder, console)
        return 0
    if root.action is Action.plan:
        _show(make_plan(root, _prepared_or_none(root), folder)[1], folder, console)
        return 0
    make_plan(root, None, folder)  # wrong settings are found before the data are prepared, which takes minutes
    planner, plan = make_plan(root, prepare(root.data), folder)
    plan.command = [PYTHON, "-m", "sweeps.run", *sys.argv[1:]]
    _show(plan, folder, console)
    try:
        summary = _run(planner, plan, folder, command)
    except KeyboardInterrupt:
        collect(folder)
        console.print(f"\nstopped; nothing is lost. The same command goes on where this stopped ({folder}).")
        return EXIT_STOPPED
    if not summary.finished:
        collect(folder)
        console.print(f"all {len(summary.failed)} trials failed; their logs: {folder}/trials/*/log.txt")
        return EXIT_FAILED_TRIALS
    _report(folder, console)
    if summary.failed:
        print(f"{len(summary.failed)} trials failed; the same command tries them again", file=sys.stderr)
        return EXIT_FAILED_TRIALS
    return 0


def make_console() -> Console:
    """Where plans and results are shown: the terminal's width, or one that every table fits where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_WIDTH)


def make_plan(root: SweepRoot, prepared: PreparedData | None, folder: Path) -> tuple[Planner, Plan]:
    """The plan of a sweep, as far as it is known now, and the planner that can lengthen it.

    Raises:
        ValueError: settings without a plan; or the folder already holds trials of a sweep with other shared settings.
    """
    previous = started_plan(folder)
    planner = Planner(
        base=Config(**{f.name: getattr(root, f.name) for f in dataclasses.fields(Config)}),
        sweep=root.sweep,
        prepared=prepared,
        previous=previous,
        tokens_per_second=speeds(previous, folder) if previous is not None else (),
    )
    plan = planner.first_stage()
    if previous is not None:
        _refuse_other_sweep(previous, plan, folder)
        plan = planner.second_stage(plan, val_losses(plan, folder))
    return planner, plan


def _refuse_other_sweep(previous: Plan, plan: Plan, folder: Path) -> None:
    """More arms, seeds or controls may join a sweep; a change of what all trials share makes it another one."""
    changes = differing_settings(previous.identity, plan.identity)
    if not plan.fingerprint:
        changes = [change for change in changes if not change.startswith("data.fingerprint:")]
    if changes:
        raise ValueError(
            f"{folder} holds trials of a sweep with other settings ({'; '.join(changes[:5])}): choose another "
            "sweep.name, restore the settings, or move the folder away"
        )


def _run(planner: Planner, plan: Plan, folder: Path, command: Command) -> Summary:
    """Run all stages; a stage begins when the trials it depends on have finished."""
    while True:
        summary = run_trials(
            plan.trials,
            folder,
            plan.jobs,
            plan.keep_checkpoints,
            command,
            num_gpus=torch.cuda.device_count(),
            on_end=lambda: collect(folder),
            on_start=partial(write_plan, plan, folder),
        )
        longer = planner.second_stage(plan, val_losses(plan, folder))
        if len(longer.trials) == len(plan.trials):
            return summary
        plan = longer


def _prepared_or_none(root: SweepRoot) -> PreparedData | None:
    """The prepared data, or None where nothing is prepared yet; damaged data and other fingerprints are errors."""
    try:
        return open_prepared(root.data)
    except NotPreparedError:
        return None


def _show(plan: Plan, folder: Path, console: Console) -> None:
    console.print(plan_table(plan))
    seconds = planned_seconds(plan)
    disk = peak_disk_bytes(plan.trials, plan.jobs, plan.keep_checkpoints)
    total = f"about {duration(seconds)} in all; up to {disk / 1e6:,.0f} MB on disk in {folder}"
    for line in [*plan.pending, *plan.notes, total]:
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)


def _report(folder: Path, console: Console) -> None:
    """Collect, build the report; the last lines are the conclusion in words and the report's path."""
    collect(folder)
    path = build_report(folder)
    for line in (read_conclusion(folder), f"report: {path}"):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
