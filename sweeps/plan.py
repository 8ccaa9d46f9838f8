"""The plan of a sweep: every trial with its shape, budget, time and disk, before any training.

Everything that changes numbers is fixed here and written into each trial's configuration: expert counts, table sizes,
shared widths, precision, threads per process, the identity of the data. The same settings give the same plan.
"""

import copy
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from models.accounting import count_parameters
from models.memory_table import MemoryOptimConfig
from models.moe import ExpertKernel
from sweeps import allocation, controls
from sweeps.allocation import Arm
from sweeps.estimate import Machine, Pace, make_trial, process_bytes, training_tokens
from sweeps.live import RemainingTime
from sweeps.settings import KeepCheckpoints, SweepConfig
from sweeps.trial import PAPER_TOKENS_PER_PARAM, Plan, Trial, TrialKind
from train.config import Config, resolve, to_plain, validate
from train.data import check_fits
from train.execution import NativeKernels, Precision
from train.identity import identity_settings
from train.kernel_choice import expert_kernel_of
from train.shards import PreparedData


class Planner:
    """Makes the trials of one sweep.

    Args:
        base: what all trials share; `model` is the rho = 1 shape. Not changed.
        sweep: which trials.
        prepared: the data, whose fingerprint becomes part of every trial; None where they are not prepared yet.
        previous: the plan this folder was started with; its machine choices (threads, precision) are kept, so that a
            sweep goes on bit for bit with other `jobs` or on another machine.
        tokens_per_second: speeds of finished trials of this sweep.
    """

    def __init__(
        self,
        base: Config,
        sweep: SweepConfig,
        prepared: PreparedData | None = None,
        previous: Plan | None = None,
        tokens_per_second: Sequence[float] = (),
    ) -> None:
        self._sweep = sweep
        self._provenance = dict(prepared.provenance) if prepared is not None else {}
        self._num_train_tokens = prepared.num_train_tokens if prepared is not None else None
        self._base = copy.deepcopy(base)
        if prepared is not None:
            check_fits(prepared, base.model.vocab_size, base.model.seq_len)
            self._base.data.fingerprint = prepared.fingerprint
        self._base.log.group = sweep.name
        self._base.train.final_checkpoint = sweep.keep_checkpoints is KeepCheckpoints.last
        machine = Machine.here()
        self._pace = Pace(machine, prepared.num_val_tokens if prepared is not None else None, tokens_per_second)
        num_trials = len(sweep.rhos) * len(sweep.seeds)
        self._jobs = sweep.jobs or machine.jobs(num_trials, process_bytes(self._base.model))
        if previous is not None:
            keep_machine_choices(self._base, previous.identity)
        if self._base.engine.num_threads == 0:
            self._base.engine.num_threads = max(1, machine.cores // self._jobs)
        resolve(self._base)
        validate(self._base)

    def first_stage(self) -> Plan:
        """All trials that can be planned before any has run.

        Raises:
            allocation.AllocationError: an arm has no solution; the message names the nearest feasible rho.
            ValueError: two values of rho lead to the same arm, two controls to the same trial, or settings of a trial
                do not fit each other.
        """
        sweep, base_model = self._sweep, self._base.model
        arms = {rho: allocation.solve(base_model, rho, sweep.matching, sweep.engram) for rho in sweep.rhos}
        _refuse_equal_arms(arms)
        solved = [(kind, self._solve_control(kind)) for kind in sweep.controls]
        trials = []
        for seed in sweep.seeds:
            trials += [self._trial(TrialKind.arm, arm, seed) for arm in arms.values()]
            trials += [self._trial(kind, arm, seed) for kind, arm in solved]
        _refuse_equal_trials(trials)
        trials += self._lr_trials(arms[1.0])
        return Plan(
            name=sweep.name,
            fingerprint=self._base.data.fingerprint,
            jobs=self._jobs,
            keep_checkpoints=sweep.keep_checkpoints.value,
            num_params_base=count_parameters(base_model).total,
            identity=self._identity(),
            trials=trials,
            pending=self._pending(),
            notes=self._notes(),
            provenance=self._provenance,
        )

    def second_stage(self, plan: Plan, val_losses: dict[str, float]) -> Plan:
        """The plan with the learning-rate trials at the best rho below 1, which only finished arms can name.

        The best rho is the one with the lowest mean validation loss over all seeds. The same losses give the same
        trials, in the order of `lr_scales` and seeds.

        Args:
            plan: of the first stage.
            val_losses: {trial id: validation loss} of finished trials.

        Returns:
            The longer plan; the same one where nothing is pending or an arm has not finished.
        """
        arms = [t for t in plan.trials if t.kind is TrialKind.arm and t.rho < 1]
        if not plan.pending or any(trial.trial_id not in val_losses for trial in arms):
            return plan
        by_rho: dict[float, list[float]] = {}
        for trial in arms:
            by_rho.setdefault(trial.rho, []).append(val_losses[trial.trial_id])
        best = min(by_rho, key=lambda rho: (statistics.fmean(by_rho[rho]), rho))
        arm = allocation.solve(self._base.model, best, self._sweep.matching, self._sweep.engram)
        return dataclasses.replace(plan, trials=[*plan.trials, *self._lr_trials(arm)], pending=[])

    def _solve_control(self, kind: TrialKind) -> Arm:
        base, sweep = self._base.model, self._sweep
        if kind is TrialKind.one_row_pure:
            return controls.one_row_pure(base, sweep.matching, sweep.engram)
        solve = {
            TrialKind.no_module: controls.no_module,
            TrialKind.one_row: controls.one_row,
            TrialKind.shuffled: controls.shuffled,
            TrialKind.frozen: controls.frozen,
            TrialKind.extra_shared: controls.extra_shared,
        }[kind]
        return solve(base, sweep.control_rho, sweep.matching, sweep.engram)

    def _lr_trials(self, arm: Arm) -> list[Trial]:
        seeds = self._sweep.lr_seeds or self._sweep.seeds
        return [self._trial(TrialKind.lr, arm, seed, scale) for seed in seeds for scale in self._sweep.lr_scales]

    def _pending(self) -> list[str]:
        if not self._sweep.lr_scales or all(rho == 1 for rho in self._sweep.rhos):
            return []
        seeds = self._sweep.lr_seeds or self._sweep.seeds
        scales = ", ".join(f"x{scale:g}" for scale in self._sweep.lr_scales)
        count = len(seeds) * len(self._sweep.lr_scales)
        return [f"{count} trials at the best rho below 1 at lr {scales}: planned when the arms have finished"]

    def _trial(self, kind: TrialKind, arm: Arm, seed: int, lr_scale: float = 1.0) -> Trial:
        """One trial: the base configuration with the arm's model, the seed and the learning rates."""
        config = copy.deepcopy(self._base)
        config.model, config.seed = copy.deepcopy(arm.config), seed
        if kind is TrialKind.frozen:
            config.memory = MemoryOptimConfig(frozen=True)
        config.optim.lr *= lr_scale
        config.optim.muon_lr *= lr_scale
        validate(config)
        return make_trial(config, arm, self._pace, kind, lr_scale)

    def _identity(self) -> dict[str, Any]:
        sweep = {"matching": self._sweep.matching.value, "engram": to_plain(self._sweep.engram)}
        shared = identity_settings({**to_plain(self._base), "sweep": sweep})
        del shared["seed"]
        return shared

    def _notes(self) -> list[str]:
        """Choices made for the user, and what the user should know before spending the time."""
        engine = self._base.engine
        machine = self._pace.machine
        where = f"{machine.gpus} GPUs" if machine.gpus else f"{machine.cores} CPU cores"
        notes = [
            f"{self._jobs} trials at once, each {engine.num_threads} thread(s) in {engine.precision.value} ({where}); "
            "threads and precision are part of a trial's identity"
        ]
        tokens = training_tokens(self._base)
        per_param = tokens / count_parameters(self._base.model).total
        notes.append(f"{per_param:.2g} tokens per parameter; the paper's regime is about {PAPER_TOKENS_PER_PARAM:.0f}")
        if self._num_train_tokens is None:
            notes.append("the data are not prepared yet: trial ids are provisional until they are")
        elif tokens > self._num_train_tokens:
            epochs = tokens / self._num_train_tokens
            notes.append(f"{epochs:.2f} epochs over {self._num_train_tokens:,} training tokens: text is read again")
        if not self._pace.tokens_per_second:
            notes.append("times are a guess from a FLOP rate; they are corrected as soon as trials run")
        return notes


def planned_seconds(plan: Plan) -> float:
    """Duration of a whole sweep: its trials, the longest first, on `plan.jobs` places.

    What is still pending repeats the learning-rate trials at another rho, so these count twice.
    """
    trials = [*plan.trials, *(t for t in plan.trials if plan.pending and t.kind is TrialKind.lr)]
    seconds = sorted((trial.estimated_seconds for trial in trials), reverse=True)
    return RemainingTime().of_sweep([], seconds, plan.jobs)


def keep_machine_choices(config: Config, recorded: dict[str, Any]) -> None:
    """Where the user left threads, precision or kernels open, take those of the recorded configuration, in place."""
    engine = recorded["engine"]
    if config.engine.num_threads == 0:
        config.engine.num_threads = int(engine["num_threads"])
    if config.engine.precision is Precision.auto:
        config.engine.precision = Precision(engine["precision"])
    if config.engine.native_kernels is NativeKernels.auto:
        config.engine.native_kernels = NativeKernels(engine["native_kernels"])
    kernel = expert_kernel_of(recorded)
    if config.model.moe is not None and config.model.moe.expert_kernel is ExpertKernel.auto and kernel is not None:
        config.model.moe.expert_kernel = kernel


def _refuse_equal_arms(arms: dict[float, Arm]) -> None:
    seen: dict[int, float] = {}
    for rho, arm in arms.items():
        if arm.num_experts in seen:
            raise ValueError(
                f"sweep.rhos: {seen[arm.num_experts]:g} and {rho:g} both round to {arm.num_experts} experts per layer "
                "and would be the same trial; drop one, or use a base with more experts"
            )
        seen[arm.num_experts] = rho


def _refuse_equal_trials(trials: list[Trial]) -> None:
    seen: dict[str, TrialKind] = {}
    for trial in trials:
        if trial.trial_id in seen:
            raise ValueError(
                f"sweep.controls: {seen[trial.trial_id].value} and {trial.kind.value} are the same trial with these "
                "settings; drop one of them"
            )
        seen[trial.trial_id] = trial.kind
