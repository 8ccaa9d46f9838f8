"""Decoder-only transformer: embed -> per layer: [engram] -> attention -> feed-forward or experts -> norm -> head."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.attention import Attention, AttentionConfig
from models.engram import Engram, EngramConfig
from models.feed_forward import SwiGLU
from models.hyper_connections import HyperConnection, HyperConnectionsConfig, enter, leave, read, write
from models.loss import linear_cross_entropy
from models.mla import LatentAttention, MLAConfig
from models.moe import Dispatcher, MoE, MoEConfig, MoEStats
from models.norm import RMSNorm, add_rms_norm
from models.over_encoding import OverEncoding, OverEncodingConfig
from models.precision import compute_dtype
from models.rotary import RotaryConfig
from models.router import Router
from models.softmax_attention import CausalMask, causal_mask


class ActivationCheckpointing(str, Enum):
    """What is kept for the backward pass."""

    none = "none"  # every activation
    full = "full"  # only the input of each block; the block is run again in the backward pass


@dataclass
class TransformerConfig:
    """Shape of the whole model; a part that the model lacks is None.

    Of `attention` and `mla` exactly one is set: the other would have no effect.
    """

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
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    attention: AttentionConfig | None = field(default_factory=AttentionConfig)  # grouped-query; null with `mla`
    mla: MLAConfig | None = None  # multi-head latent attention in every layer
    moe: MoEConfig | None = None
    engram: EngramConfig | None = None
    over_encoding: OverEncodingConfig | None = None  # memory at the input in the place of `engram`
    hyper_connections: HyperConnectionsConfig | None = None  # None: the plain residual, one stream

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
        if self.moe is not None and self.num_dense_layers == self.num_layers:
            raise ValueError(
                f"model.num_dense_layers={self.num_dense_layers} leaves no layer of model.num_layers={self.num_layers} "
                f"to the experts of model.moe; nearest: {self.num_layers - 1}, or model.moe=null"
            )
        if not (0 < self.init_std < math.inf and 0 < self.norm_eps < math.inf):
            raise ValueError(
                f"model.init_std={self.init_std} and model.norm_eps={self.norm_eps} must be positive and "
                "finite; usual: 0.02 and 1e-6"
            )
        if self.embedding_init_std is not None and not 0 < self.embedding_init_std < math.inf:
            raise ValueError(
                f"model.embedding_init_std={self.embedding_init_std} must be positive and finite, or null: init_std; "
                "usual: 0.02"
            )
        if self.attention is not None and self.mla is not None:
            raise ValueError(
                f"model.attention={self.attention} has no effect beside model.mla={self.mla}; set model.attention=null"
            )
        if self.attention is None and self.mla is None:
            raise ValueError("model.attention=null and model.mla=null leave layers without attention; set one of them")
        if self.moe is not None and not self.moe.router.is_learned and self.moe.num_experts > self.vocab_size:
            raise ValueError(
                f"model.moe.num_experts={self.moe.num_experts} must be at most model.vocab_size={self.vocab_size} with "
                "model.moe.router.kind=hash, which gives every token id one expert: the others would get none; "
                f"nearest: {self.vocab_size}"
            )
        if self.moe is not None and self.moe.shared_widths is not None:
            widths = self.moe.shared_widths
            if len(widths) != self.num_moe_layers:
                raise ValueError(
                    f"model.moe.shared_widths={widths} must hold one width per MoE layer, {self.num_moe_layers} "
                    f"(num_layers - num_dense_layers), not {len(widths)}"
                )
        if self.engram is not None and self.over_encoding is not None:
            raise ValueError(
                "model.engram and model.over_encoding are both set: they are compared with each other, and a budget "
                "of rows belongs to one; set one of them to null"
            )
        if self.engram is not None and max(self.engram.layers) >= self.num_layers:
            raise ValueError(
                f"model.engram.layers={self.engram.layers} must lie in 0..{self.num_layers - 1} "
                f"(model.num_layers={self.num_layers}, counted from 0); nearest: "
                f"{sorted({min(layer, self.num_layers - 1) for layer in self.engram.layers})}"
            )
        if self.engram is not None and not self.engram.multi_branch and self.hyper_connections is None:
            raise ValueError(
                "model.engram.multi_branch=False has no effect with one residual stream; set it to true, or set "
                "model.hyper_connections"
            )

    @property
    def memory(self) -> EngramConfig | OverEncodingConfig | None:
        """The part that reads memory tables."""
        return self.engram if self.engram is not None else self.over_encoding

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts: 0 without `moe`, else num_layers - num_dense_layers."""
        return 0 if self.moe is None else self.num_layers - self.num_dense_layers

    def moe_index(self, layer: int) -> int | None:
        """Position of `layer` among the MoE layers (0 = the first), or None if the layer is dense."""
        if self.moe is None or layer < self.num_dense_layers:
            return None
        return layer - self.num_dense_layers

    @property
    def num_streams(self) -> int:
        """J: residual streams, 1 for the plain residual."""
        return 1 if self.hyper_connections is None else self.hyper_connections.num_streams

    @property
    def num_engram_branches(self) -> int:
        """Gates of an Engram module per position: one for every stream, or one in all without `multi_branch`."""
        return self.num_streams if self.engram is not None and self.engram.multi_branch else 1


@dataclass
class Stats:
    """What the layers did with one micro-batch; nothing here carries a gradient."""

    expert_counts: Tensor | None = None  # (num_moe_layers, E) int64, tokens per routed expert
    router_entropy: Tensor | None = None  # (num_moe_layers,) fp32, nats, mean over tokens; None without scores (hash)
    dropped: Tensor | None = None  # (num_moe_layers,) fp32, part of the choices that met a full expert; None: no limit
    gate_mean: dict[int, Tensor] = field(default_factory=dict)  # Engram layer -> scalar
    gate_histogram: dict[int, Tensor] = field(default_factory=dict)  # -> (10,) gates per tenth of [0, 1]


class Output(NamedTuple):
    """Result of one forward pass: logits, or with targets the loss over them, for which logits need never be whole."""

    logits: Tensor | None  # (B, S, V), in the type of the last matmul; None with targets
    nats: Tensor | None  # scalar fp32, cross-entropy summed over the predicted targets; None without targets
    aux_losses: dict[str, Tensor]  # scalars, already times their coefficients, to be added to the loss
    stats: Stats


def make_attention(cfg: TransformerConfig) -> Attention | LatentAttention:
    """The attention of one layer."""
    if cfg.mla is not None:
        return LatentAttention(cfg.mla, cfg.rotary, cfg.d_model, cfg.seq_len, cfg.norm_eps)
    assert cfg.attention is not None  # TransformerConfig refuses a model without either
    return Attention(cfg.attention, cfg.rotary, cfg.d_model, cfg.seq_len, cfg.norm_eps)


class BlockOutput(NamedTuple):
    """Hidden state and what the parts of one block report; None for parts the block lacks."""

    hidden: Tensor  # (B, S, D), or (B, S, J, D) with hyper-connections
    moe: MoEStats | None
    gate: Tensor | None  # (B, S, J), detached; J = 1 also without `multi_branch`


class Block(nn.Module):
    """h <- h + engram(h);  h <- h + attention(norm(h));  h <- h + feed_forward(norm(h)), or experts instead.

    With hyper-connections attention and feed-forward have a connection each, h <- H_res h + H_post^T f(H_pre h), and
    the Engram update is added to every stream as it is, each with a gate of its own (arXiv 2601.07372, eq 6).

    Without `engram.multi_branch` (the paper's ablation "w/o multi branch": one fusion, of the hidden state after
    H_pre) one gate sees the attention's input c = H_pre h, and c + engram(c) takes its place. The paper does not say
    how the update reaches the stream. Here it is written with the attention's output, f(c) = u + attention(norm(c + u))
    with u = engram(c): then the order is that of one stream, and a model of equal streams is the plain one.
    """

    def __init__(self, cfg: TransformerConfig, layer: int, dispatcher: Dispatcher | None = None):
        super().__init__()
        self.engram: Engram | None = None
        if cfg.engram is not None and layer in cfg.engram.layers:
            self.engram = Engram(cfg.engram, cfg.d_model, layer, cfg.num_engram_branches)
        self.fuses_after_read = self.engram is not None and cfg.num_streams > 1 and cfg.num_engram_branches == 1
        self.attention_connection: HyperConnection | None = None
        self.feed_forward_connection: HyperConnection | None = None
        if cfg.hyper_connections is not None:
            self.attention_connection = HyperConnection(cfg.hyper_connections, cfg.d_model, 2 * layer)
            self.feed_forward_connection = HyperConnection(cfg.hyper_connections, cfg.d_model, 2 * layer + 1)
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = make_attention(cfg)
        self.feed_forward_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        moe_index = cfg.moe_index(layer)
        self.moe: MoE | None = None
        self.feed_forward: SwiGLU | None = None
        if cfg.moe is not None and moe_index is not None:
            width = cfg.moe.shared_width(moe_index)
            self.moe = MoE(cfg.moe, cfg.d_model, width, dispatcher, vocab_size=cfg.vocab_size, layer=layer)
        else:
            self.feed_forward = SwiGLU(cfg.d_model, cfg.d_ff)

    def forward(
        self, hidden: Tensor, mask: CausalMask, token_ids: Tensor, document_ids: Tensor, rows: Tensor | None
    ) -> BlockOutput:
        """Args: hidden (B, S, [J,] D), mask, token_ids, document_ids (B, S), rows (B, S, R, M) or None."""
        gate, moe_stats = None, None
        if self.engram is not None and rows is not None and not self.fuses_after_read:
            branches = hidden if hidden.dim() == 4 else hidden[:, :, None]  # (B, S, J, D)
            update, gate = self.engram(branches, rows, document_ids)
            hidden = hidden + update.reshape(hidden.shape)
        x, mappings = read(self.attention_connection, hidden)  # (B, S, D)
        if self.engram is not None and rows is not None and self.fuses_after_read:
            update, gate = self.engram(x[:, :, None], rows, document_ids)
            memory = update[:, :, 0].to(x.dtype)
            update = memory + self.attention(self.attention_norm(x + memory, compute_dtype(x)), mask)
        else:
            update = self.attention(self.attention_norm(x, compute_dtype(x)), mask)
        if self.feed_forward_connection is None:
            hidden, normed, rounded = add_rms_norm(hidden, update, self.feed_forward_norm, compute_dtype(hidden))
            mappings = None
        else:
            hidden = write(hidden, update, mappings)
            x, mappings = read(self.feed_forward_connection, hidden)  # (B, S, D)
            normed = self.feed_forward_norm(x)
            rounded = normed.to(compute_dtype(normed))
        if self.moe is not None:
            update, moe_stats = self.moe(normed, token_ids, rounded)
            hidden = write(hidden, update, mappings)
        elif self.feed_forward is not None:
            hidden = write(hidden, self.feed_forward(rounded), mappings)
        return BlockOutput(hidden, moe_stats, None if gate is None else gate.detach())


class Transformer(nn.Module):
    """Token ids -> logits. Memory rows come from outside; the model owns no table.

    Args:
        cfg: the whole model.
        dispatcher: how tokens reach the experts of every layer, and which experts lie here; by default all of them.
    """

    def __init__(self, cfg: TransformerConfig, dispatcher: Dispatcher | None = None):
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.over_encoding = OverEncoding(cfg.over_encoding, cfg.d_model) if cfg.over_encoding is not None else None
        self.blocks = nn.ModuleList(Block(cfg, layer, dispatcher) for layer in range(cfg.num_layers))
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
            memory_rows: {layer: (B, S, R, M)} for exactly the layers of `cfg.memory`.
            targets: (B, S) int64, the next token, or IGNORE_INDEX where nothing is to be predicted.
        """
        self._check_inputs(token_ids, memory_rows or {})
        memory_rows = memory_rows or {}
        hidden = self.embedding(token_ids)  # (B, S, D)
        if self.over_encoding is not None:
            (rows,) = memory_rows.values()
            hidden = self.over_encoding(hidden, rows)
        hidden = enter(self.cfg.hyper_connections, hidden)  # (B, S, D), or (B, S, J, D)
        mask = causal_mask(document_ids, hidden)
        outputs: list[BlockOutput] = []
        for layer, block in enumerate(self.blocks):
            output = self._run_block(block, hidden, mask, token_ids, document_ids, memory_rows.get(layer))
            hidden = output.hidden
            outputs.append(output)
        weight = self.embedding.weight if self.head is None else self.head.weight
        hidden = leave(self.cfg.hyper_connections, hidden)
        hidden = self.norm(hidden, compute_dtype(hidden))  # (B, S, D)
        aux_losses, stats = summarize(outputs)
        if targets is None:
            return Output(F.linear(hidden, weight), None, aux_losses, stats)  # (B, S, V)
        return Output(None, linear_cross_entropy(hidden, weight, targets), aux_losses, stats)

    def update_expert_bias(self, expert_counts: Tensor) -> None:
        """Moves the routers' biases, where they have any; called once per applied step.

        Args:
            expert_counts: (num_moe_layers, E), summed over the step's micro-batches and ranks.
        """
        layers = [block.moe for block in self.blocks if isinstance(block.moe, MoE)]
        for layer, counts in zip(layers, expert_counts, strict=True):
            if isinstance(layer.router, Router):
                layer.router.update_expert_bias(counts)

    def _run_block(self, block: nn.Module, hidden: Tensor, *args: Tensor | CausalMask | None) -> BlockOutput:
        if self.cfg.activation_checkpointing is ActivationCheckpointing.full and torch.is_grad_enabled():
            # No part of a block draws random numbers, so there is no generator state to restore.
            return checkpoint(block, hidden, *args, use_reentrant=False, preserve_rng_state=False)
        return block(hidden, *args)

    def _check_inputs(self, token_ids: Tensor, memory_rows: dict[int, Tensor]) -> None:
        if token_ids.shape[1] > self.cfg.seq_len:
            raise ValueError(f"a batch of {token_ids.shape[1]} positions exceeds model.seq_len={self.cfg.seq_len}")
        memory = self.cfg.memory
        expected = set() if memory is None else set(memory.layers)
        if set(memory_rows) != expected:
            part = "over_encoding" if self.cfg.over_encoding is not None else "engram"
            raise ValueError(
                f"memory_rows holds layers {sorted(memory_rows)}, model.{part}.layers asks for {sorted(expected)}"
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
    # One kind of router serves all layers: a loss or a statistic is there in all of them or in none.
    entropies = [moe.entropy for moe in moe_outputs if moe.entropy is not None]
    dropped = [moe.dropped for moe in moe_outputs if moe.dropped is not None]
    stats.router_entropy = torch.stack(entropies) if entropies else None
    stats.dropped = torch.stack(dropped) if dropped else None
    names = moe_outputs[0].aux_losses
    return {name: torch.stack([moe.aux_losses[name] for moe in moe_outputs]).sum() for name in names}, stats
