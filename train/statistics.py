"""Speed, expert load and memory health of a step, as metric records."""

import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from torch import Tensor

from models.accounting import flops_per_token
from models.memory_table import MemoryTable
from models.transformer import Stats, TransformerConfig
from train.ranks import ALONE, Ranks


class StepStatistics:
    """Collects what the loop records besides losses.

    MFU = 3 * forward FLOPs per token (matmuls, full S^2 attention, head included) * tokens/s / peak; no credit for
    recomputation.
    """

    def __init__(self, cfg: TransformerConfig, peak: tuple[float, str], ranks: Ranks = ALONE) -> None:
        self.memory_part = "over_encoding" if cfg.over_encoding is not None else "engram"
        self.flops_per_token = 3 * flops_per_token(cfg).with_head
        self.ranks = ranks
        self.peak, self.convention = peak[0] * ranks.world_size, peak[1]
        if ranks.world_size > 1:
            self.convention += f", times {ranks.world_size} ranks"
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave validation and checkpoints out of tokens/s."""
        self._start, self._tokens = time.perf_counter(), 0

    def add(self, num_tokens: int) -> None:
        """Count the tokens of one step."""
        self._tokens += num_tokens

    def collect(self, stats: Stats, expert_counts: Tensor | None, tables: Mapping[int, MemoryTable]) -> dict[str, Any]:
        """One record's worth, and restart the clock; all ranks call it together.

        Router entropy, drops and gates are those of this rank's last micro-batch.
        """
        tokens_per_second = self._tokens / max(time.perf_counter() - self._start, 1e-9)
        record: dict[str, Any] = {"perf/tokens_per_second": tokens_per_second}
        if self.peak:
            record["perf/mfu"] = self.flops_per_token * tokens_per_second / self.peak
        on_gpu = torch.cuda.is_available()
        used = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        record["perf/memory_gib"] = used / 2**30
        if expert_counts is not None:
            load = expert_counts.double() / expert_counts.double().mean(dim=1, keepdim=True)  # (layers, E)
            record["moe/max_load"] = float(load.max())
            record["moe/expert_counts"] = expert_counts.tolist()
        if stats.router_entropy is not None:
            record["moe/router_entropy"] = stats.router_entropy.tolist()
        if stats.dropped is not None:
            record["moe/dropped"] = float(stats.dropped.mean())
        for layer, table in tables.items():
            if layer in stats.gate_mean:
                record[f"engram/gate_mean_{layer}"] = float(stats.gate_mean[layer])
                record[f"engram/gate_histogram_{layer}"] = stats.gate_histogram[layer].tolist()
            rows = torch.tensor([table.rows_touched, table.rows_ever_touched], device=table.step.device)
            touched, ever_touched = self.ranks.sum(rows).tolist()
            record[f"{self.memory_part}/rows_touched_{layer}"] = touched
            record[f"{self.memory_part}/rows_ever_touched_{layer}"] = ever_touched
            record[f"{self.memory_part}/num_rows_{layer}"] = table.num_rows
        self.restart_clock()
        return record
