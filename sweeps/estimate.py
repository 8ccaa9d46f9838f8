"""What a trial is and costs before it runs: parameters, FLOPs, tokens, seconds, disk; and what this machine carries."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from models.accounting import ParameterRole, bytes_per_parameter, count_parameters, flops_per_token
from models.transformer import TransformerConfig
from sweeps.allocation import Arm
from sweeps.processes import cpu_cores
from sweeps.trial import Trial, TrialKind, trial_id
from train.config import Config, to_plain
from train.execution import Precision

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
# Resident bytes of a training process: weight, gradient, two moments in fp32 per parameter, the copy of weight and
# moments that a checkpoint is written from, and the libraries.
PROCESS_BYTES_PER_PARAM = 28
PROCESS_BYTES = 1_500_000_000


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


@dataclass
class Pace:
    """How fast the trials of one plan are expected to run."""

    machine: Machine
    num_val_tokens: int | None = None  # that the prepared data hold; None where they are not prepared yet
    tokens_per_second: Sequence[float] = ()  # of finished trials

    def seconds(self, config: Config) -> float:
        """Planned duration: tokens over the median speed of finished trials, or over a guess from the FLOP rate.

        Tokens of validation run forward only and count a third.
        """
        work = training_tokens(config) + FORWARD_SHARE * self._validation_tokens(config)  # in training tokens
        if self.tokens_per_second:
            return STARTUP_SECONDS + work / statistics.median(self.tokens_per_second)
        rate = FLOPS_PER_GPU
        if not self.machine.gpus:
            is_fp32 = config.engine.precision is Precision.fp32
            rate = FLOPS_PER_THREAD * config.engine.num_threads * (FP32_SPEED if is_fp32 else 1.0)
        return STARTUP_SECONDS + work * flops_per_token(config.model).training / rate

    def _validation_tokens(self, config: Config) -> int:
        """Tokens of all validations of one trial: the last one, and those at `train.eval_interval`."""
        train = config.train
        tokens = train.eval_tokens if self.num_val_tokens is None else min(train.eval_tokens, self.num_val_tokens)
        between = (train.max_steps - 1) // train.eval_interval if train.eval_interval else 0
        return tokens * (1 + between)


def make_trial(config: Config, arm: Arm, pace: Pace, kind: TrialKind, lr_scale: float = 1.0, name: str = "") -> Trial:
    """The trial that a resolved and validated configuration describes, with its costs.

    Args:
        config: of the run; not changed. Its `run_dir` is not the trial's: the runner gives it one.
        arm: `config.model`, measured against the model that it is compared with.
        pace: for the estimate of its duration.
        kind: what the trial is for.
        lr_scale: factor on the learning rates of the base configuration; `config` has it already.
        name: of a ladder's rung.
    """
    plain = {**to_plain(config), "run_dir": ""}
    counts, flops = count_parameters(config.model), flops_per_token(config.model)
    tokens = training_tokens(config)
    return Trial(
        trial_id=trial_id(plain),
        kind=kind,
        rho=arm.rho,
        rho_actual=arm.rho_actual,
        seed=config.seed,
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
        estimated_seconds=pace.seconds(config),
        estimated_disk_bytes=checkpoint_bytes(config.model, config.train.ema_decay > 0),
        num_threads=config.engine.num_threads,
        config=plain,
        name=name,
    )


def training_tokens(config: Config) -> int:
    """Tokens that a whole run trains on."""
    return config.train.max_steps * config.train.global_batch_tokens


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


def process_bytes(model: TransformerConfig) -> int:
    """Bytes of memory that the process of a trial is expected to take."""
    counts = count_parameters(model)
    return PROCESS_BYTES + PROCESS_BYTES_PER_PARAM * (counts.total + counts.embedding)
