"""Decoder-only transformer: embed -> per layer: [engram] -> attention -> feed-forward or experts -> norm -> head."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, AttentionConfig, attention_bias, attention_mask
from models.engram import Engram, EngramConfig
from models.feed_forward import SwiGLU
from models.loss import linear_cross_entropy
from models.moe import MoE, MoEConfig, MoEStats
from models.norm import RMSNorm
from models.precision import compute_dtype
from models.router import Router


class ActivationCheckpointing(str, Enum):
    """What is kept for the backward pass."""

    none = "none"  # every activation
    full = "full"  # only the input of each block; the block is run again in the backward pass


@dataclass
class TransformerConfig:
    """Shape of the whole model. `moe` and `engram` are None where the model has no such part."""

    vocab_size: int = 4096
    seq_len: int = 256  # longest sequence, in tokens
    num_layers: int = 4
    d_model: int = 128
    d_ff: int = 384  # width of the dense SwiGLU layers
    num_dense_layers: int = 0  # leading layers that stay dense when `moe` is set
    norm_eps: float = 1e-6  # epsilon of the RMSNorms of the backbone
    tie_embeddings: bool = False  # one matrix for the embedding and the head
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none
    init_std: float = 0.02  # standard deviation of every weight matrix and table at the start
    embedding_init_std: float | None = None  # that of the token embedding, if another; docs/log.md says what it does
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    moe: MoEConfig | None = None
    engram: EngramConfig | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "seq_len", "num_layers", "d_model", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1; nearest: 1")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            nearest = min(max(self.num_dense_layers, 0), self.num_layers)
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} must be between 0 and "
                f"model.num_layers={self.num_layers}; nearest: {nearest}"
            )
        if self.init_std <= 0 or self.norm_eps <= 0:
            raise ValueError(
                f"model.init_std={self.init_std} and model.norm_eps={self.norm_eps} must be positive; "
                "usual: 0.02 and 1e-6"
            )
        if self.embedding_init_std is not None and self.embedding_init_std <= 0:
            raise ValueError(
                f"model.embedding_init_std={self.embedding_init_std} must be positive, or null: init_std; usual: 0.02"
            )
        if self.moe is not None and self.moe.shared_widths is not None:
            widths = self.moe.shared_widths
            if len(widths) != self.num_moe_layers:
                raise ValueError(
                    f"model.moe.shared_widths={widths} must hold one width per MoE layer, {self.num_moe_layers} "
                    f"(num_layers - num_dense_layers), not {len(widths)}"
                )
        if self.engram is not None and max(self.engram.layers) >= self.num_layers:
            raise ValueError(
                f"model.engram.layers={self.engram.layers} must lie in 0..{self.num_layers - 1} "
                f"(model.num_layers={self.num_layers}, counted from 0); nearest: "
                f"{sorted({min(layer, self.num_layers - 1) for layer in self.engram.layers})}"
            )

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts: 0 without `moe`, else num_layers - num_dense_layers."""
        return 0 if self.moe is None else self.num_layers - self.num_dense_layers

    def moe_index(self, layer: int) -> int | None:
        """Position of `layer` among the MoE layers (0 = the first), or None if the layer is dense."""
        if self.moe is None or layer < self.num_dense_layers:
            return None
        return layer - self.num_dense_layers


@dataclass
class Stats:
    """What the layers did with one micro-batch; nothing here carries a gradient."""

    expert_counts: Tensor | None = None  # (num_moe_layers, E) int64, tokens per routed expert
    router_entropy: Tensor | None = None  # (num_moe_layers,) fp32, nats, mean over tokens
    gate_mean: dict[int, Tensor] = field(default_factory=dict)  # Engram layer -> scalar
    gate_histogram: dict[int, Tensor] = field(default_factory=dict)  # -> (10,) gates per tenth of [0, 1]


@dataclass
class Output:
    """Result of one forward pass: logits, or with targets the loss over them, for which logits need never be whole."""

    logits: Tensor | None  # (B, S, V), in the type of the last matmul; None with targets
    nats: Tensor | None  # scalar fp32, cross-entropy summed over the predicted targets; None without targets
    aux_losses: dict[str, Tensor]  # scalars, already times their coefficients, to be added to the loss
    stats: Stats


class BlockOutput(NamedTuple):
    """Hidden state and what the parts of one block report; None for parts the block lacks."""

    hidden: Tensor  # (B, S, D)
    moe: MoEStats | None
    gate: Tensor | None  # (B, S, J), detached


class Block(nn.Module):
    """h <- h + engram(h);  h <- h + attention(norm(h));  h <- h + feed_forward(norm(h)), or experts instead."""

    def __init__(self, cfg: TransformerConfig, layer: int):
        super().__init__()
        has_engram = cfg.engram is not None and layer in cfg.engram.layers
        self.engram = Engram(cfg.engram, cfg.d_model, layer) if cfg.engram is not None and has_engram else None
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg.attention, cfg.d_model, cfg.seq_len, cfg.norm_eps)
        self.feed_forward_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        moe_index = cfg.moe_index(layer)
        self.moe: MoE | None = None
        self.feed_forward: SwiGLU | None = None
        if cfg.moe is not None and moe_index is not None:
            self.moe = MoE(cfg.moe, cfg.d_model, cfg.moe.shared_width(moe_index))
        else:
            self.feed_forward = SwiGLU(cfg.d_model, cfg.d_ff)

    def forward(self, hidden: Tensor, bias: Tensor, document_ids: Tensor, rows: Tensor | None) -> BlockOutput:
        """Args: hidden (B, S, D), bias (B, 1, S, S), document_ids (B, S), rows (B, S, R, M) or None."""
        gate, moe_stats = None, None
        if self.engram is not None and rows is not None:
            update, gate = self.engram(hidden[:, :, None], rows, document_ids)  # one residual branch, J = 1
            hidden = hidden + update[:, :, 0]
            gate = gate.detach()
        hidden = hidden + self.attention(self.attention_norm(hidden), bias)
        normed = self.feed_forward_norm(hidden)
        if self.moe is not None:
            update, moe_stats = self.moe(normed)
            hidden = hidden + update
        elif self.feed_forward is not None:
            hidden = hidden + self.feed_forward(normed)
        return BlockOutput(hidden, moe_stats, gate)


class Transformer(nn.Module):
    """Token ids -> logits. Memory rows come from outside; the model owns no table."""

    def __init__(self, cfg: TransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Tensor,
        document_ids: Tensor,
        memory_rows: dict[int, Tensor] | None = None,
        targets: Tensor | None = None,
    ) -> Output:
        """Logits of the next token at every position, or their cross-entropy with `targets`.

        Args:
            token_ids: (B, S) int64, S <= seq_len.
            document_ids: (B, S) int64, equal within a document; nothing reads across documents.
            memory_rows: {layer: (B, S, R, M)} for exactly the Engram layers.
            targets: (B, S) int64, the next token, or IGNORE_INDEX where nothing is to be predicted.
        """
        self._check_inputs(token_ids, memory_rows or {})
        memory_rows = memory_rows or {}
        hidden = self.embedding(token_ids)  # (B, S, D)
        bias = attention_bias(attention_mask(document_ids), compute_dtype(hidden))  # (B, 1, S, S)
        outputs: list[BlockOutput] = []
        for layer, block in enumerate(self.blocks):
            output = self._run_block(block, hidden, bias, document_ids, memory_rows.get(layer))
            hidden = output.hidden
            outputs.append(output)
        weight = self.embedding.weight if self.head is None else self.head.weight
        hidden = self.norm(hidden)
        aux_losses, stats = summarize(outputs)
        if targets is None:
            return Output(F.linear(hidden, weight), None, aux_losses, stats)  # (B, S, V)
        return Output(None, linear_cross_entropy(hidden, weight, targets), aux_losses, stats)

    def update_expert_bias(self, expert_counts: Tensor) -> None:
        """Moves the routers' biases; called once per applied step.

        Args:
            expert_counts: (num_moe_layers, E), summed over the step's micro-batches and ranks.
        """
        routers = [module for module in self.modules() if isinstance(module, Router)]
        for router, counts in zip(routers, expert_counts, strict=True):
            router.update_expert_bias(counts)

    def _run_block(self, block: nn.Module, hidden: Tensor, *args: Tensor | None) -> BlockOutput:
        if self.cfg.activation_checkpointing is ActivationCheckpointing.full and torch.is_grad_enabled():
            # No part of a block draws random numbers, so there is no generator state to restore.
            return checkpoint(block, hidden, *args, use_reentrant=False, preserve_rng_state=False)
        return block(hidden, *args)

    def _check_inputs(self, token_ids: Tensor, memory_rows: dict[int, Tensor]) -> None:
        if token_ids.shape[1] > self.cfg.seq_len:
            raise ValueError(f"a batch of {token_ids.shape[1]} positions exceeds model.seq_len={self.cfg.seq_len}")
        expected = set() if self.cfg.engram is None else set(self.cfg.engram.layers)
        if set(memory_rows) != expected:
            raise ValueError(
                f"memory_rows holds layers {sorted(memory_rows)}, model.engram.layers asks for {sorted(expected)}"
            )


@torch.no_grad()
def gate_histogram(gate: Tensor) -> Tensor:
    """Number of gates in each tenth of [0, 1]: (10,) fp32."""
    return torch.histc(gate.float(), bins=10, min=0.0, max=1.0)


def summarize(outputs: list[BlockOutput]) -> tuple[dict[str, Tensor], Stats]:
    """Auxiliary losses summed over layers, statistics stacked over layers."""
    moe_outputs = [output.moe for output in outputs if output.moe is not None]
    gates = {layer: output.gate for layer, output in enumerate(outputs) if output.gate is not None}
    stats = Stats(
        gate_mean={layer: gate.float().mean() for layer, gate in gates.items()},
        gate_histogram={layer: gate_histogram(gate) for layer, gate in gates.items()},
    )
    if not moe_outputs:
        return {}, stats
    stats.expert_counts = torch.stack([moe.counts for moe in moe_outputs])
    stats.router_entropy = torch.stack([moe.entropy for moe in moe_outputs])
    return {"sequence_balance": torch.stack([moe.balance_loss for moe in moe_outputs]).sum()}, stats
