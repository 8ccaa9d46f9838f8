"""The training loop: one function, read top to bottom."""

import math
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from models.accounting import count_parameters, flops_per_token
from models.transformer import Output
from train.build import Memory, build_engine, build_memory, forward
from train.checkpoint_folder import newest
from train.checkpoint_writer import WriterOptions
from train.data import Batch, TrainBatches, check_fits, validation_batches
from train.ema import WeightAverage
from train.engine import Engine
from train.evaluate import Evaluation, evaluate_sources, source_records
from train.finite import check_finite
from train.identity import to_plain
from train.metrics import Recorder, peak_flops
from train.prepare import prepare
from train.progress import Progress
from train.ranks import ALONE, Ranks
from train.run_folder import RunFolder
from train.schedule import lr_scale
from train.shards import PreparedData
from train.snapshot import open_writer, resume, save
from train.snapshot import prepare as prepare_saves
from train.start import check_model, check_tokenizer
from train.statistics import StepStatistics

if TYPE_CHECKING:
    from train.config import Config


@dataclass
class TrainConfig:
    """Length of a run, its batches, and when it validates and saves."""

    max_steps: int = 400  # optimizer steps
    global_batch_tokens: int = 4096  # tokens of one optimizer step; accumulation is derived from it
    micro_batch_size: int = 16  # sequences of one forward
    eval_interval: int = 0  # steps between validations; 0: only at the end
    eval_tokens: int = 262_144  # validation tokens, the same windows for every run
    checkpoint_interval: int = 200  # steps between checkpoints; 0: none
    keep_checkpoints: int = 1  # newest ones kept
    async_checkpoint: bool = True  # write checkpoints beside the training, from a copy in memory
    checkpoint_buffer_gib: float = 2.0  # GiB of memory for that copy, at most; training waits for what exceeds it
    final_checkpoint: bool = True  # keep one after the last step (for generation, continuing)
    ema_decay: float = 0.0  # weight average used for validation, per step; 0: off

    @property
    def writer_options(self) -> WriterOptions:
        """How checkpoints are written."""
        return WriterOptions(
            self.keep_checkpoints, self.async_checkpoint, buffer_bytes=int(self.checkpoint_buffer_gib * 2**30)
        )

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_tokens", "micro_batch_size", "eval_tokens", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)} must be >= 1; nearest: 1")
        for name in ("eval_interval", "checkpoint_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}={getattr(self, name)} must be >= 0; 0 switches it off")
        if not 0.0 <= self.checkpoint_buffer_gib < math.inf:
            raise ValueError(
                f"train.checkpoint_buffer_gib={self.checkpoint_buffer_gib} must be >= 0 and finite; usual: 2"
            )
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"train.ema_decay={self.ema_decay} must lie in [0, 1); 0 switches it off, 0.99 is usual")


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT), saved a checkpoint, and can be started again."""


def train(config: "Config", folder: RunFolder, identity: str, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Train one model as `config` says, inside `folder`; resume from its newest checkpoint if there is one.

    `config.init_from` counts only before there is one: it gives the weights of step 0, the optimizer begins anew.

    Returns:
        The result record, also written to `result.json`.

    Raises:
        ValueError: for settings that do not fit the data or the weights to start from, damaged data or checkpoints,
            a checkpoint of other data.
        NonFiniteLossError: before the step that would have spoilt the weights.
        Stopped: after a signal; everything up to the last step is saved.
    """
    started = time.time()
    cfg, max_steps = config.train, config.train.max_steps
    folder.status("starting", folder.step, max_steps)
    torch.set_num_threads(config.engine.num_threads)
    torch.manual_seed(config.seed)
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    resuming = ranks.from_main(str(newest(folder.checkpoints))) != "None"
    start = Path(config.init_from) if config.init_from is not None and not resuming else None
    if start is not None:
        check_model(start, config)  # before data are prepared, which may take long
    prepared = prepare(config.data)
    if start is not None:
        check_tokenizer(start, config, prepared)
    check_fits(prepared, config.model.vocab_size, config.model.seq_len)
    batches = TrainBatches(prepared, config.model.seq_len, cfg.global_batch_tokens // config.model.seq_len, config.seed)
    if ranks.is_main:
        for note in batches.epoch_notes(max_steps):
            print(note, flush=True)
    memory = build_memory(config, prepared, device, ranks)
    engine = build_engine(config, memory, device, ranks, start)
    folder.record("ds_config.json", engine.ds_config)
    average = WeightAverage(engine.model, memory.local_tables, cfg.ema_decay, max_steps) if cfg.ema_decay else None
    first_step, state = resume(folder, prepared, engine, memory, average)
    folder.step = first_step
    statistics = StepStatistics(config.model, peak_flops(device, config.engine.precision.value), ranks)
    stop = _stop_on_signal()
    training_start = time.perf_counter() - state.train_seconds
    settings = to_plain(config) | {"identity": identity}

    with (
        Recorder(folder.metrics, config.log, identity[:12], settings, first_step, ranks.is_main) as recorder,
        Progress(config.log.progress and ranks.is_main, folder.path.name, first_step, max_steps) as progress,
        open_writer(folder, cfg.writer_options, ranks) as writer,
    ):
        if cfg.checkpoint_interval and first_step + cfg.checkpoint_interval < max_steps:
            prepare_saves(writer, engine, memory, average)
        following = _micro_batches(batches, first_step, max_steps, cfg.micro_batch_size, device, ranks)
        for micro_batch in following[0][:1]:
            memory.prefetch(micro_batch)
        for step in range(first_step, max_steps):
            micro_batches, num_targets = following
            following = _micro_batches(batches, step + 1, max_steps, cfg.micro_batch_size, device, ranks)
            totals = torch.zeros(2, dtype=torch.float64, device=device)  # nats, and the loss with auxiliary terms
            expert_counts: torch.Tensor | None = None
            for micro_batch, next_one in zip_longest(micro_batches, [*micro_batches[1:], *following[0][:1]]):
                row_ids = memory.row_ids(micro_batch)
                rows = memory.lookup(row_ids)
                if next_one is not None:
                    memory.prefetch(next_one)
                output = engine.forward(micro_batch.token_ids, micro_batch.document_ids, rows, micro_batch.targets)
                assert output.nats is not None  # targets were given
                aux_loss = sum(output.aux_losses.values()) / len(micro_batches)
                loss = output.nats / (num_targets / ranks.world_size) + aux_loss  # of ranks the mean is taken
                totals += torch.stack([output.nats.detach(), loss.detach()])
                engine.backward(loss, row_ids, rows)
                if output.stats.expert_counts is not None:
                    counts = output.stats.expert_counts
                    expert_counts = counts if expert_counts is None else expert_counts + counts

            engine.reduce()
            nats, summed_loss = ranks.sum(totals).tolist()
            check_finite("loss", summed_loss / ranks.world_size)
            if average is not None:
                average.before_step()
            scale = lr_scale(config.schedule, step, max_steps)
            report = engine.step(scale)
            if expert_counts is not None:
                engine.model.update_expert_bias(ranks.sum(expert_counts))
            if average is not None:
                average.after_step()

            done = folder.step = step + 1
            state.train_loss = nats / num_targets
            statistics.add(num_tokens=cfg.global_batch_tokens)
            if done % config.log.interval == 0 or done == max_steps:
                recorder.record(
                    done,
                    {
                        "train/loss": state.train_loss,
                        **{f"train/{name}": float(value.detach()) for name, value in output.aux_losses.items()},
                        "train/tokens": done * cfg.global_batch_tokens,
                        "train/epoch": batches.epoch(step),
                        **{f"train/epochs_{label}": n for label, n in batches.source_epochs(done).items()},
                        "optim/lr": config.optim.lr * scale,
                        "optim/grad_norm": report.grad_norm,
                        "optim/table_grad_norm": report.table_grad_norm,
                        "optim/clip_factor": report.clip_factor,
                        **statistics.collect(output.stats, expert_counts, memory.tables),
                    },
                )
                folder.status("running", done, max_steps)
            progress.update(done, state.train_loss)
            if cfg.eval_interval and done % cfg.eval_interval == 0 and done < max_steps:
                evaluation = _evaluate(config, engine, memory, average, prepared, device, ranks)
                recorder.record(done, evaluation.metrics())
                statistics.restart_clock()
            stopping = ranks.any(stop.is_set())
            if stopping or (cfg.checkpoint_interval and done % cfg.checkpoint_interval == 0 and done < max_steps):
                state.train_seconds = time.perf_counter() - training_start
                recorder.sync()  # a checkpoint never knows more steps than the metrics
                save(writer, done, state, engine, memory, average, stopping)
                statistics.restart_clock()
            if stopping and done < max_steps:
                folder.status("stopped", done, max_steps, "stopped by a signal; start it again to go on")
                raise Stopped(f"stopped at step {done} of {max_steps}; the same command goes on from there")

        state.train_seconds = time.perf_counter() - training_start
        evaluation = _evaluate(config, engine, memory, average, prepared, device, ranks)
        recorder.record(max_steps, evaluation.metrics())
    if cfg.final_checkpoint:
        save(writer, max_steps, state, engine, memory, average, True)
    result = {
        "identity": identity,
        "val_loss": evaluation.loss,
        "val_bits_per_byte": evaluation.bits_per_byte,
        "val_tokens": evaluation.tokens,
        "train_loss": state.train_loss,
        "steps": max_steps,
        "world_size": ranks.world_size,
        "tokens": max_steps * cfg.global_batch_tokens,
        "epochs": batches.epochs_needed(max_steps),
        "sources": source_records(prepared, batches, max_steps, evaluation),
        "parameters": count_parameters(config.model).to_dict(),
        "flops_per_token": flops_per_token(config.model).to_dict(),
        "train_seconds": state.train_seconds,
        "tokens_per_second": max_steps * cfg.global_batch_tokens / state.train_seconds,
        "wall_seconds": time.time() - started,
        "mfu_convention": statistics.convention,
        "data_fingerprint": prepared.fingerprint,
        "environment": environment(config.engine.num_threads, config.engine.precision.value),
    }
    folder.record("result.json", result)
    folder.status("finished", max_steps, max_steps)
    return result


def environment(num_threads: int, precision: str) -> dict[str, Any]:
    """Versions and machine, for provenance."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "hydra-core", "tokenizers", "numpy")},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": num_threads,
        "precision": precision,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def _micro_batches(
    batches: TrainBatches, step: int, max_steps: int, size: int, device: torch.device, ranks: Ranks
) -> tuple[list[Batch], int]:
    """Cut this rank's slice of a step's global batch into micro-batches; also the predicted tokens of all of it.

    After the last step there is none.

    Dividing every micro-batch's sum of nats by that one number makes the gradient that of the global mean, however
    the batch is cut.
    """
    if step >= max_steps:
        return [], 0
    mine = ranks.share(batches.global_batch_size)
    batch = batches.batch(step, mine.start, mine.stop)
    num_targets = int(ranks.sum((batch.targets >= 0).sum().to(device)))
    parts = zip(batch.token_ids.split(size), batch.targets.split(size), batch.document_ids.split(size), strict=True)
    return [Batch(*(tensor.to(device) for tensor in part)) for part in parts], num_targets


def _stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set, so that a run ends between two steps with a checkpoint."""
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    return stop


def _evaluate(
    config: "Config",
    engine: Engine,
    memory: Memory,
    average: WeightAverage | None,
    prepared: PreparedData,
    device: torch.device,
    ranks: Ranks,
) -> Evaluation:
    """Validate with the averaged weights if there are any; ranks take turns with the batches."""
    cfg, seq_len = config.train, config.model.seq_len
    apart = memory.hasher is not None and memory.hasher.shuffled  # neighbours in a batch are then strangers

    def windows(data: PreparedData, max_tokens: int) -> Iterator[Batch]:
        batches = validation_batches(data, seq_len, cfg.micro_batch_size, max_tokens, apart)
        for batch in ranks.take_turns(batches, Batch.without_targets):
            yield Batch(batch.token_ids.to(device), batch.targets.to(device), batch.document_ids.to(device))

    if average is None:
        return evaluate_sources(lambda batch: forward(engine, memory, batch), prepared, cfg.eval_tokens, windows, ranks)

    def averaged(batch: Batch) -> Output:
        rows = memory.averaged_rows(memory.row_ids(batch), average)
        return engine.forward(batch.token_ids, batch.document_ids, rows, batch.targets)

    with average.applied():
        return evaluate_sources(averaged, prepared, cfg.eval_tokens, windows, ranks)
