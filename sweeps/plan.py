"""The plan of a sweep: every trial with its shape, budget, time and disk, before any training.

Everything that changes numbers is fixed here and written into each trial's configuration: expert counts, table sizes,
shared widths, precision, threads per process, the identity of the data. The same settings give the same plan.
"""

import copy
import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from models.accounting import ParameterRole, bytes_per_parameter, count_parameters, flops_per_token
from models.memory_table import MemoryOptimConfig
from models.moe import ExpertKernel
from models.transformer import TransformerConfig
from sweeps import allocation, controls
from sweeps.allocation import Arm
from sweeps.live import RemainingTime
from sweeps.processes import cpu_cores
from sweeps.settings import KeepCheckpoints, SweepConfig
from sweeps.trial import PAPER_TOKENS_PER_PARAM, Plan, Trial, TrialKind, trial_id
from train.config import Config, resolve, to_plain, validate
from train.data import check_fits
from train.engine import NativeKernels, Precision
from train.identity import identity_settings
from train.kernel_choice import expert_kernel_of
from train.shards import PreparedData

# Sustained training FLOP/s of one CPU thread and of one GPU, for the first estimate of a sweep only: finished trials
# of the same sweep replace it. CPU: conf/model/tiny.yaml (1.21e6 FLOPs forward, 3.6e6 trained) at 1.5e4 tokens/s in
# bf16, two trials side by side on two AMX cores; fixed costs per step weigh most at this size, so larger models are
# faster. GPU: a guess, 5 % of the 1e15 FLOP/s bf16 peak in data sheets.
FLOPS_PER_THREAD = 5.5e10
FP32_SPEED = 0.45  # of the CPU rate above, measured on the same model
FLOPS_PER_GPU = 5.0e13
FORWARD_SHARE = 1 / 3  # of a training token's FLOPs, for a token of validation
STARTUP_SECONDS = 6.0  # imports, opening the data, building the model; measured 4 to 7 s beside another trial
AVERAGE_BYTES = 4  # fp32 copy of every weight and row where train.ema_decay > 0
ROW_STEP_BYTES = 4  # int32 of each row of an average: the step it is up to date with
CHECKPOINT_FIXED_BYTES = 100_000  # tensor names, manifest, random-number state; measured 41 kB on conf/model/tiny.yaml
# Resident bytes of a training process: weight, gradient, two moments in fp32 per parameter, and the libraries.
PROCESS_BYTES_PER_PARAM = 16
PROCESS_BYTES = 1_500_000_000


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
        self._num_val_tokens = prepared.num_val_tokens if prepared is not None else None
        self._tokens_per_second = list(tokens_per_second)
        self._base = copy.deepcopy(base)
        if prepared is not None:
            check_fits(prepared, base.model.vocab_size, base.model.seq_len)
            self._base.data.fingerprint = prepared.fingerprint
        self._base.log.group = sweep.name
        self._base.train.final_checkpoint = sweep.keep_checkpoints is KeepCheckpoints.last
        self._machine = Machine.here()
        num_trials = len(sweep.rhos) * len(sweep.seeds)
        self._jobs = sweep.jobs or self._machine.jobs(num_trials, _process_bytes(self._base.model))
        if previous is not None:
            _keep_machine_choices(self._base, previous)
        if self._base.engine.num_threads == 0:
            self._base.engine.num_threads = max(1, self._machine.cores // self._jobs)
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
        config.run_dir = ""
        plain = to_plain(config)
        counts, flops = count_parameters(arm.config), flops_per_token(arm.config)
        tokens = config.train.max_steps * config.train.global_batch_tokens
        return Trial(
            trial_id=trial_id(plain),
            kind=kind,
            rho=arm.rho,
            rho_actual=arm.rho_actual,
            seed=seed,
            lr_scale=lr_scale,
            num_experts=arm.num_experts,
            slots=arm.slots,
            total_params=counts.total,
            active_params=counts.active,
            memory_params=counts.memory,
            embedding_params=counts.embedding,
            flops_per_token=flops.with_head,
            flops_per_token_no_head=flops.without_head,
            params_residual=arm.params_residual,
            flops_residual=arm.flops_residual,
            tokens=tokens,
            tokens_per_param=tokens / counts.total,
            estimated_seconds=self._seconds(flops.training, tokens),
            estimated_disk_bytes=checkpoint_bytes(arm.config, config.train.ema_decay > 0),
            num_threads=config.engine.num_threads,
            config=plain,
        )

    def _seconds(self, training_flops_per_token: float, tokens: int) -> float:
        """Planned duration: tokens over the median speed of finished trials, or over a guess from the FLOP rate.

        Tokens of validation run forward only and count a third.
        """
        work = tokens + FORWARD_SHARE * self._validation_tokens()  # in training tokens
        if self._tokens_per_second:
            return STARTUP_SECONDS + work / statistics.median(self._tokens_per_second)
        engine = self._base.engine
        rate = FLOPS_PER_GPU
        if not self._machine.gpus:
            rate = FLOPS_PER_THREAD * engine.num_threads * (FP32_SPEED if engine.precision is Precision.fp32 else 1.0)
        return STARTUP_SECONDS + work * training_flops_per_token / rate

    def _validation_tokens(self) -> int:
        """Tokens of all validations of one trial: the last one, and those at `train.eval_interval`."""
        train = self._base.train
        tokens = train.eval_tokens if self._num_val_tokens is None else min(train.eval_tokens, self._num_val_tokens)
        between = (train.max_steps - 1) // train.eval_interval if train.eval_interval else 0
        return tokens * (1 + between)

    def _identity(self) -> dict[str, Any]:
        sweep = {"matching": self._sweep.matching.value, "engram": to_plain(self._sweep.engram)}
        shared = identity_settings({**to_plain(self._base), "sweep": sweep})
        del shared["seed"]
        return shared

    def _notes(self) -> list[str]:
        """Choices made for the user, and what the user should know before spending the time."""
        engine, train = self._base.engine, self._base.train
        where = f"{self._machine.gpus} GPUs" if self._machine.gpus else f"{self._machine.cores} CPU cores"
        notes = [
            f"{self._jobs} trials at once, each {engine.num_threads} thread(s) in {engine.precision.value} ({where}); "
            "threads and precision are part of a trial's identity"
        ]
        tokens = train.max_steps * train.global_batch_tokens
        per_param = tokens / count_parameters(self._base.model).total
        notes.append(f"{per_param:.2g} tokens per parameter; the paper's regime is about {PAPER_TOKENS_PER_PARAM:.0f}")
        if self._num_train_tokens is None:
            notes.append("the data are not prepared yet: trial ids are provisional until they are")
        elif tokens > self._num_train_tokens:
            epochs = tokens / self._num_train_tokens
            notes.append(f"{epochs:.2f} epochs over {self._num_train_tokens:,} training tokens: text is read again")
        if not self._tokens_per_second:
            notes.append("times are a guess from a FLOP rate; they are corrected as soon as trials run")
        return notes


@dataclass
class Machine:
    """What this machine can carry."""

    cores: int
    gpus: int
    memory_bytes: int  # available now

    @classmethod
    def here(cls) -> "Machine":
        """This machine, as far as this process may use it."""
        return cls(cpu_cores(), torch.cuda.device_count(), psutil.virtual_memory().available)

    def jobs(self, num_trials: int, process_bytes: int) -> int:
        """Trials at once: one for each core (or GPU), as far as memory and the number of trials go; at least 1."""
        return max(1, min(self.gpus or self.cores, num_trials, self.memory_bytes // process_bytes))


def checkpoint_bytes(model: TransformerConfig, averaged: bool) -> int:
    """Bytes of one checkpoint, at most: fp32 weights, their two Adam moments, the tables' likewise, and the average.

    Muon keeps one moment and frozen tables none; their checkpoints are smaller. Gradients are not saved.
    """
    counts = count_parameters(model)
    dense = bytes_per_parameter(ParameterRole.adamw)
    size = counts.trained_by_engine * (dense.weights + dense.optimizer + AVERAGE_BYTES * averaged)
    if model.memory is not None:
        row_dim = model.memory.row_dim
        table = bytes_per_parameter(ParameterRole.memory, row_dim=row_dim)
        row_average = AVERAGE_BYTES + ROW_STEP_BYTES / row_dim
        size += counts.memory * (table.weights + table.optimizer + row_average * averaged)
    return CHECKPOINT_FIXED_BYTES + math.ceil(size)


def planned_seconds(plan: Plan) -> float:
    """Duration of a whole sweep: its trials, the longest first, on `plan.jobs` places.

    What is still pending repeats the learning-rate trials at another rho, so these count twice.
    """
    trials = [*plan.trials, *(t for t in plan.trials if plan.pending and t.kind is TrialKind.lr)]
    seconds = sorted((trial.estimated_seconds for trial in trials), reverse=True)
    return RemainingTime().of_sweep([], seconds, plan.jobs)


def _process_bytes(model: TransformerConfig) -> int:
    counts = count_parameters(model)
    return PROCESS_BYTES + PROCESS_BYTES_PER_PARAM * (counts.total + counts.embedding)


def _keep_machine_choices(base: Config, previous: Plan) -> None:
    """Where the user left threads, precision or kernels open, take those the sweep was started with."""
    engine = previous.identity["engine"]
    if base.engine.num_threads == 0:
        base.engine.num_threads = int(engine["num_threads"])
    if base.engine.precision is Precision.auto:
        base.engine.precision = Precision(engine["precision"])
    if base.engine.native_kernels is NativeKernels.auto:
        base.engine.native_kernels = NativeKernels(engine["native_kernels"])
    kernel = expert_kernel_of(previous.identity)
    if base.model.moe is not None and base.model.moe.expert_kernel is ExpertKernel.auto and kernel is not None:
        base.model.moe.expert_kernel = kernel


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
