"""The smallest run that has every part, for tests of the loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.router import RouterConfig
from models.transformer import TransformerConfig
from train.checkpoint import Checkpoint
from train.checkpoint_folder import newest
from train.config import Config, config_hash, to_yaml, validate
from train.data import DataConfig
from train.execution import EngineConfig, Precision
from train.loop import TrainConfig, train
from train.metrics import LogConfig
from train.optim import OptimConfig
from train.run_folder import RunFolder
from train.schedule import ScheduleConfig

VOCAB = 320


def make(data_root: Path, run_dir: Path, **changes: Any) -> Config:
    cfg = Config(
        model=TransformerConfig(
            vocab_size=VOCAB,
            seq_len=32,
            num_layers=2,
            d_model=32,
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
            moe=MoEConfig(num_experts=4, d_expert=16, num_shared_experts=1, router=RouterConfig(top_k=2)),
            engram=EngramConfig(layers=[1], num_hash_heads=2, d_memory=32, table_size=101),
        ),
        data=DataConfig(root=str(data_root), vocab_size=VOCAB, max_documents=60),
        schedule=ScheduleConfig(warmup_steps=2),
        engine=EngineConfig(precision=Precision.fp32, num_threads=1),
        train=TrainConfig(
            max_steps=8, global_batch_tokens=256, micro_batch_size=4, eval_tokens=512, checkpoint_interval=3
        ),
        optim=OptimConfig(lr=1e-2),
        log=LogConfig(interval=1, progress=False),
        run_dir=str(run_dir),
    )
    return replace(cfg, **changes)


def run(cfg: Config) -> dict[str, Any]:
    validate(cfg)
    identity = config_hash(cfg)
    with RunFolder(Path(cfg.run_dir), to_yaml(cfg), identity) as folder:
        return train(cfg, folder, identity)


def final_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    path = newest(run_dir / "checkpoints")
    assert path is not None
    found = Checkpoint(path)
    return {name: found.tensor(name) for name in found.tensors}


def without_clock(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.startswith("perf/")} for record in records]
