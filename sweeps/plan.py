"""A sweep's settings, and the plan they make: every trial with its shape, budget, time and disk, before any training.

Everything that changes numbers is fixed here and written into each trial's configuration: expert counts, table sizes,
shared widths, precision, threads per process, the identity of the data. The same settings give the same plan.
"""

import copy
import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from models.accounting import count_parameters, flops_per_token
from models.engram import EngramConfig
from models.transformer import TransformerConfig
from sweeps import allocation
from sweeps.allocation import Arm, Matching
from sweeps.live import duration
from sweeps.processes import cpu_cores
from sweeps.trial import NOT_IDENTITY, Plan, Trial, TrialKind, trial_id
from train.config import Config, resolve, to_plain, validate
from train.data import check_fits
from train.engine import Precision
from train.shards import PreparedData

# Sustained training FLOP/s of one CPU thread and of one GPU, for the first estimate of a sweep only: finished trials
# of the same sweep replace it. Own measurement of the tiny model's whole step on a two-core AVX-512/AMX Xeon.
FLOPS_PER_THREAD = {Precision.fp32: 4.0e10, Precision.bf16: 6.0e10}
FLOPS_PER_GPU = 5.0e13
STARTUP_SECONDS = 15.0  # imports, opening the data, building the model
# fp32 weight and two Adam moments; weight averages add another fp32 copy.
CHECKPOINT_BYTES_PER_PARAM = 12
# Resident bytes of a training process: weight, gradient, two moments in fp32 per parameter, and the libraries.
PROCESS_BYTES_PER_PARAM = 16
PROCESS_BYTES = 1_500_000_000
PAPER_TOKENS_PER_PARAM = 10.0  # Engram, arXiv 2601.07372, section 3.1: 58.7e9 / 5.7e9 (from 6 * active * tokens)


class KeepCheckpoints(str, Enum):
    """What stays of a finished trial's checkpoints."""

    none = "none"
    last = "last"


@dataclass
class SweepConfig:
    """Which trials a sweep has. Its rho = 1 shape is the `model` group, which has experts and no Engram."""

    name: str = "default"  # folder below `root`
    root: str = "runs"  # relative to the working directory
    matching: Matching = Matching.strict
    rhos: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # paired: every arm is trained with every seed
    controls: list[TrialKind] = field(default_factory=list)  # one_row_pure (a), no_module (b), one_row (c)
    control_rho: float = 0.4  # the arm that controls (b) and (c) belong to
    lr_scales: list[float] = field(default_factory=list)  # learning-rate factors tried at rho = 1 and at the best rho
    lr_seeds: list[int] = field(default_factory=list)  # seeds of those trials; empty = all seeds
    jobs: int = 0  # trials at once; 0 = as many as cores, GPUs and memory allow
    keep_checkpoints: KeepCheckpoints = KeepCheckpoints.none
    engram: EngramConfig = field(default_factory=EngramConfig)  # the module; table_size is solved for each arm

    def __post_init__(self) -> None:
        if not self.name or any(part in self.name for part in ("/", "\\", "..")) or self.name != self.name.strip():
            raise ValueError(f"sweep.name={self.name!r} must be a plain folder name, e.g. sweep.name=my_sweep")
        for rho in [*self.rhos, self.control_rho]:
            if not 0 <= rho <= 1:
                nearest = min(max(rho, 0.0), 1.0)
                raise ValueError(f"sweep.rhos / control_rho: {rho:g} must lie in [0, 1] (share of inactive parameters that are experts); nearest: {nearest:g}")
        _refuse_duplicates("sweep.rhos", self.rhos)
        _refuse_duplicates("sweep.seeds", self.seeds)
        if 1.0 not in self.rhos:
            raise ValueError(f"sweep.rhos={self.rhos} must contain 1.0: every gain is measured against pure experts; add 1.0")
        if not self.seeds:
            raise ValueError("sweep.seeds=[] must name at least one seed, and two or more to say anything; e.g. sweep.seeds=[0,1]")
        if not set(self.lr_seeds) <= set(self.seeds):
            raise ValueError(f"sweep.lr_seeds={self.lr_seeds} must be among sweep.seeds={self.seeds}: trials are compared seed by seed")
        self._check_controls()
        if any(scale <= 0 or scale == 1 for scale in self.lr_scales):
            raise ValueError(f"sweep.lr_scales={self.lr_scales} must be positive factors other than 1, e.g. [0.5,2]")
        if self.jobs < 0:
            raise ValueError(f"sweep.jobs={self.jobs} must be >= 0; 0 chooses by cores, GPUs and memory")

    def _check_controls(self) -> None:
        allowed = (TrialKind.one_row_pure, TrialKind.no_module, TrialKind.one_row)
        _refuse_duplicates("sweep.controls", self.controls)
        for kind in self.controls:
            if kind not in allowed:
                raise ValueError(f"sweep.controls: {kind.value} is no control; use {', '.join(k.value for k in allowed)}")
        if set(self.controls) & set(allowed[1:]) and (self.control_rho not in self.rhos or self.control_rho == 1):
            nearest = min((r for r in self.rhos if r < 1), key=lambda r: abs(r - self.control_rho), default=None)
            raise ValueError(
                f"sweep.control_rho={self.control_rho:g} must be one of sweep.rhos={self.rhos} and below 1, since controls "
                f"are compared with that arm; nearest: {nearest}"
            )


def _refuse_duplicates(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        unique = [getattr(value, "value", value) for value in dict.fromkeys(values)]
        raise ValueError(f"{name} names a value twice; each may occur once: {unique}")


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
        self._num_train_tokens = prepared.num_train_tokens if prepared is not None else None
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
            ValueError: two values of rho lead to the same arm.
        """
        sweep, base_model = self._sweep, self._base.model
        arms = {rho: allocation.solve(base_model, rho, sweep.matching, sweep.engram) for rho in sweep.rhos}
        _refuse_equal_arms(arms)
        controls = [(kind, self._solve_control(kind)) for kind in sweep.controls]
        trials = []
        for seed in sweep.seeds:
            trials += [self._trial(TrialKind.arm, arm, seed) for arm in arms.values()]
            trials += [self._trial(kind, arm, seed) for kind, arm in controls]
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
            return allocation.one_row_pure(base, sweep.matching, sweep.engram)
        solve = allocation.no_module if kind is TrialKind.no_module else allocation.one_row
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
        return [f"{count} trials at the best rho below 1 with learning rate {scales}, planned when the arms have finished"]

    def _trial(self, kind: TrialKind, arm: Arm, seed: int, lr_scale: float = 1.0) -> Trial:
        """One trial: the base configuration with the arm's model, the seed and the learning rates."""
        config = copy.deepcopy(self._base)
        config.model, config.seed = copy.deepcopy(arm.config), seed
        config.optim.lr *= lr_scale
        config.optim.muon_lr *= lr_scale
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
            estimated_disk_bytes=CHECKPOINT_BYTES_PER_PARAM * (counts.total + counts.embedding),
            num_threads=config.engine.num_threads,
            config=plain,
        )

    def _seconds(self, training_flops_per_token: float, tokens: int) -> float:
        """Planned duration: tokens over the median speed of finished trials, or over a guess from the FLOP rate."""
        if self._tokens_per_second:
            return STARTUP_SECONDS + tokens / statistics.median(self._tokens_per_second)
        engine = self._base.engine
        rate = FLOPS_PER_GPU if self._machine.gpus else FLOPS_PER_THREAD[engine.precision] * engine.num_threads
        return STARTUP_SECONDS + tokens * training_flops_per_token / rate

    def _identity(self) -> dict[str, Any]:
        shared = {key: value for key, value in to_plain(self._base).items() if key not in (*NOT_IDENTITY, "seed")}
        sweep = {"matching": self._sweep.matching.value, "engram": to_plain(self._sweep.engram)}
        return {**shared, "sweep": sweep}

    def _notes(self) -> list[str]:
        """Choices made for the user, and what the user should know before spending the time."""
        engine, train = self._base.engine, self._base.train
        where = f"{self._machine.gpus} GPUs" if self._machine.gpus else f"{self._machine.cores} CPU cores"
        notes = [
            f"{self._jobs} trials at once with {engine.num_threads} thread(s) each in {engine.precision.value} ({where}); "
            "threads and precision are part of each trial's identity"
        ]
        tokens = train.max_steps * train.global_batch_tokens
        per_param = tokens / count_parameters(self._base.model).total
        notes.append(f"{per_param:.2g} tokens per parameter; the paper's regime is about {PAPER_TOKENS_PER_PARAM:g}")
        if self._num_train_tokens is None:
            notes.append("the data are not prepared yet: trial ids are provisional until they are")
        elif tokens > self._num_train_tokens:
            notes.append(f"{tokens / self._num_train_tokens:.2f} epochs over {self._num_train_tokens:,} training tokens: text is read more than once")
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


def _process_bytes(model: TransformerConfig) -> int:
    counts = count_parameters(model)
    return PROCESS_BYTES + PROCESS_BYTES_PER_PARAM * (counts.total + counts.embedding)


def _keep_machine_choices(base: Config, previous: Plan) -> None:
    """Where the user left threads or precision open, take those the sweep was started with."""
    engine = previous.identity["engine"]
    if base.engine.num_threads == 0:
        base.engine.num_threads = int(engine["num_threads"])
    if base.engine.precision is Precision.auto:
        base.engine.precision = Precision(engine["precision"])


def _refuse_equal_arms(arms: dict[float, Arm]) -> None:
    seen: dict[int, float] = {}
    for rho, arm in arms.items():
        if arm.num_experts in seen:
            raise ValueError(
                f"sweep.rhos: {seen[arm.num_experts]:g} and {rho:g} both round to {arm.num_experts} experts per layer and "
                "would be the same trial; drop one, or use a base with more experts"
            )
        seen[arm.num_experts] = rho


def sweep_folder(sweep: SweepConfig) -> Path:
    """Folder of a sweep."""
    return Path(sweep.root) / sweep.name


def plan_table(plan: Plan) -> Table:
    """The plan for the screen: one line for each trial shape, its seeds together."""
    table = Table(title=f"sweep {plan.name}: {len(plan.trials)} trials", title_justify="left")
    columns = ("kind", "rho", "actual", "experts", "slots", "params", "memory", "params res.", "FLOPs/token", "FLOPs res.")
    for column in (*columns, "tokens", "tok/param", "lr", "seeds", "time each", "disk"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for same in _by_shape(plan.trials):
        trial = same[0]
        table.add_row(
            trial.kind.value,
            f"{trial.rho:g}",
            f"{trial.rho_actual:.4f}",
            str(trial.num_experts),
            f"{trial.slots:,}",
            short(trial.total_params),
            short(trial.memory_params),
            f"{trial.params_residual:+.3%}",
            short(trial.flops_per_token),
            f"{trial.flops_residual:+.3%}",
            short(trial.tokens),
            f"{trial.tokens_per_param:.3g}",
            f"x{trial.lr_scale:g}",
            ",".join(str(t.seed) for t in same),
            duration(trial.estimated_seconds),
            f"{trial.estimated_disk_bytes / 1e6:.0f} MB",
        )
    return table


def _by_shape(trials: Iterable[Trial]) -> list[list[Trial]]:
    groups: dict[tuple[str, float, float], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.kind.value, trial.rho, trial.lr_scale), []).append(trial)
    return list(groups.values())


def short(number: float) -> str:
    """1234567 as `1.23M`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.3g}"
