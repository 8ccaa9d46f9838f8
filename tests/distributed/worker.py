"""Trains a tiny model on the ranks that torchrun starts, and writes what is to be equal at any number of them.

    torchrun --nproc_per_node 2 -m tests.distributed.worker cases.json out

For every case of the file, `out/<name>.safetensors` has, gathered from all ranks: the mean gradient of the first global
batch by parameter, the gradient of every table as a dense tensor, the global norm, tokens per expert, and the losses of
`steps` optimizer steps.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from models.memory_table import LocalTable
from models.moe import Dispatcher, is_padded
from models.ngram_hash import NgramHasher, num_rows
from models.transformer import ActivationCheckpointing, TransformerConfig
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model
from train.engine import Engine
from train.execution import EngineConfig, Precision
from train.expert_parallel import AllToAllDispatcher
from train.memory.sharded import ShardedTable
from train.optim import OptimConfig, OptimizerKind
from train.ranks import Ranks, join, part

GLOBAL_BATCH = 8  # sequences


@dataclass
class Case:
    """One way to train the same model on the same global batches."""

    name: str
    model: str = "moe_engram"  # of tests.tiny.tiny_config
    zero_stage: int = 0
    expert_parallel: int = 1
    accumulation: int = 1  # micro-batches of each rank
    optimizer: str = "adamw"
    grad_clip: float = 0.05  # far below the norm: clipping is active
    steps: int = 1
    recompute: bool = False  # full activation checkpointing
    order: int = 0  # another order of the sequences in every global batch, which only rounding should notice


class Run:
    """Model, tables and engine of one rank."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        self.case, self.ranks = case, ranks
        recompute = ActivationCheckpointing.full if case.recompute else ActivationCheckpointing.none
        cfg = tiny_config(case.model, activation_checkpointing=recompute)
        dispatcher = make_dispatcher(cfg, ranks)
        self.first_expert = 0 if dispatcher is None else dispatcher.local_experts.start
        model = tiny_model(cfg, dispatcher=dispatcher)
        self.num_experts = 0 if cfg.moe is None else cfg.moe.num_experts
        self.tables: dict[int, Any] = {}
        self.hasher = None
        if cfg.memory is not None:
            self.hasher = NgramHasher(cfg.memory, torch.arange(VOCAB_SIZE), pad_id=0)
            for layer, rows in num_rows(cfg.memory).items():
                local = None if ranks.world_size == 1 else ranks.share(rows)
                table = LocalTable(rows, cfg.memory.row_dim, cfg.init_std, 0, layer=layer, rows=local)
                self.tables[layer] = table if local is None else ShardedTable(table, rows, ranks)
        optim = OptimConfig(kind=OptimizerKind(case.optimizer), grad_clip=case.grad_clip, lr=1e-2)
        settings = EngineConfig(
            zero_stage=case.zero_stage,
            expert_parallel=case.expert_parallel,
            precision=Precision.fp32,
            num_threads=1,
        )
        self.engine = Engine(model, self.tables, optim, settings, 1, torch.device("cpu"), ranks)

    def backward(self, step: int) -> tuple[float, Tensor]:
        """Loss of the global batch of `step`, and tokens per layer and expert."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH, 24), generator=generator)
        if self.case.order:
            ids = ids[torch.randperm(GLOBAL_BATCH, generator=torch.Generator().manual_seed(self.case.order + step))]
        documents = (ids[:, :1] * 0) + (torch.arange(24) >= 10).long()
        targets = (ids * 7 + 1) % VOCAB_SIZE
        mine = part(GLOBAL_BATCH, self.ranks.rank, self.ranks.world_size)
        accumulation, nats = self.case.accumulation, torch.zeros((), dtype=torch.float64)
        counts = torch.zeros(3, max(1, self.num_experts), dtype=torch.int64)
        for index in range(accumulation):
            rows_of = part(len(mine), index, accumulation)
            piece = slice(mine.start + rows_of.start, mine.start + rows_of.stop)
            row_ids = {} if self.hasher is None else self.hasher(ids[piece], documents[piece])
            rows = {layer: self.tables[layer].lookup(row_ids[layer]) for layer in row_ids}
            output = self.engine.forward(ids[piece], documents[piece], rows, targets[piece])
            assert output.nats is not None
            aux = sum(output.aux_losses.values(), torch.zeros(())) / accumulation
            self.engine.backward(output.nats * self.ranks.world_size / targets.numel() + aux, row_ids, rows)
            nats += output.nats.detach().double()
            if output.stats.expert_counts is not None:
                counts[: len(output.stats.expert_counts)] += output.stats.expert_counts
        self.engine.reduce()
        return float(self.ranks.sum(nats)) / targets.numel(), self.ranks.sum(counts)

    def full_gradients(self) -> dict[str, Tensor]:
        """Mean gradients by parameter, whole, of all ranks' ranges; and dense gradients of the tables."""
        shapes = {
            name: list(tensor.shape) for name, tensor in tiny_model(tiny_config(self.case.model)).named_parameters()
        }
        full = {f"grad.{name}": torch.zeros(shape).flatten() for name, shape in shapes.items()}
        seen = {name: torch.zeros_like(tensor) for name, tensor in full.items()}
        for name, start, values in self.engine.gradients():
            key = f"grad.{name}"
            if ".experts." in name:
                start += self.first_expert * (full[key].numel() // self.num_experts)
            full[key][start : start + len(values)] += values
            seen[key][start : start + len(values)] += 1
        for name in full:
            self.ranks.sum(full[name])
            # Those that nothing reaches, such as the convolution's norm while its taps are zero, are owned by nobody.
            owners = self.ranks.sum(seen[name])
            assert torch.all(owners == 1) or torch.all(owners == 0), name
        for layer, table in self.tables.items():
            local = table.local if isinstance(table, ShardedTable) else table
            first = table.rows.start if isinstance(table, ShardedTable) else 0
            dense = torch.zeros(table.num_rows, local.weight.shape[1])
            nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dense.shape[1])
            rows, gradient = local._gradient.merged() or nothing
            dense[rows + first] = gradient
            full[f"table.{layer}"] = self.ranks.sum(dense)
        return full


def make_dispatcher(cfg: TransformerConfig, ranks: Ranks) -> Dispatcher | None:
    if ranks.expert_group is None or cfg.moe is None:
        return None
    return AllToAllDispatcher(cfg.moe.num_experts, is_padded(cfg.moe), ranks.expert_group)


def main(cases_file: str, out: str) -> None:
    torch.set_num_threads(1)
    joined: dict[int, Ranks] = {}
    for record in json.loads(Path(cases_file).read_text()):
        case = Case(**record)
        degree = case.expert_parallel
        if degree not in joined:
            joined[degree] = join("cpu", degree)
        run = Run(case, joined[degree])
        tensors: dict[str, Tensor] = {}
        losses = []
        for step in range(case.steps):
            loss, counts = run.backward(step)
            losses.append(loss)
            if step == 0:
                tensors = run.full_gradients()
                tensors["counts"] = counts
            report = run.engine.step(1.0)
            if step == 0:
                tensors["norm"] = torch.tensor([report.grad_norm, report.table_grad_norm, report.clip_factor])
            if run.num_experts:
                run.engine.model.update_expert_bias(counts[counts.sum(1) > 0])
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        if joined[degree].is_main:
            save_file(tensors, Path(out) / f"{case.name}.safetensors", {"case": json.dumps(asdict(case))})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
