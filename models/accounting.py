"""Parameters, FLOPs and bytes of a model in closed form, from its configuration alone."""

from dataclasses import asdict, dataclass
from enum import Enum

from models.lazy_adam import MemoryOptimConfig
from models.ngram_hash import num_rows
from models.transformer import TransformerConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of trainable parameters.

    `total`, `active` and `inactive` follow the Engram paper (arXiv 2601.07372, 3.1): the vocabulary embedding and the
    head are left out, and the tables are counted with the model. Active are the parameters one token uses: all but the
    experts it was not sent to and the rows it did not read. total = active + inactive.
    """

    total: int
    active: int
    memory: int  # all rows of all tables
    inactive_memory: int  # rows that a token does not read
    embedding: int  # embedding and head; outside `total`
    experts: int  # all routed experts of all layers
    inactive_experts: int  # routed experts that a token is not sent to

    @property
    def inactive(self) -> int:
        """P_sparse = P_tot - P_act."""
        return self.total - self.active

    @property
    def rho(self) -> float:
        """Share of the inactive parameters that are experts (eq 7); 1.0 where no memory is inactive."""
        return self.inactive_experts / self.inactive if self.inactive_memory else 1.0

    @property
    def trained_by_engine(self) -> int:
        """Parameters of the torch module: everything but the tables, embedding and head included."""
        return self.total - self.memory + self.embedding

    def to_dict(self) -> dict[str, float]:
        """All counts by name, for records."""
        return {**asdict(self), "inactive": self.inactive, "rho": self.rho}


def _swiglu(d_model: int, width: int) -> int:
    """Weights of gate, up and down projection; a token's matmul FLOPs are twice this."""
    return 3 * d_model * width


@dataclass(frozen=True)
class _AttentionSize:
    """One attention layer."""

    weights: int  # of the projections; a token's matmul FLOPs are twice this
    norms: int
    pair: int  # coordinates of all heads that meet per pair of positions: of keys, and of values


def _attention_size(cfg: TransformerConfig) -> _AttentionSize:
    if cfg.mla is not None:
        mla = cfg.mla
        queries, values = mla.num_heads * mla.key_head_dim, mla.num_heads * mla.value_head_dim
        weights = cfg.d_model * (mla.kv_rank + mla.rope_head_dim + values)  # down, and the output
        weights += mla.kv_rank * (mla.num_heads * mla.nope_head_dim + values)
        if mla.query_rank is None:
            return _AttentionSize(weights + cfg.d_model * queries, mla.kv_rank, queries + values)
        weights += mla.query_rank * (cfg.d_model + queries)
        return _AttentionSize(weights, mla.kv_rank + mla.query_rank, queries + values)
    assert cfg.attention is not None  # TransformerConfig refuses a model without either
    attention = cfg.attention
    weights = cfg.d_model * attention.head_dim * (2 * attention.num_heads + 2 * attention.num_kv_heads)
    norms = 2 * attention.head_dim if attention.qk_norm else 0
    return _AttentionSize(weights, norms, 2 * attention.num_heads * attention.head_dim)


def _shared_widths(cfg: TransformerConfig) -> int:
    """Width of the shared experts of all MoE layers together."""
    return 0 if cfg.moe is None else sum(cfg.moe.shared_width(index) for index in range(cfg.num_moe_layers))


def _router_weights(cfg: TransformerConfig) -> int:
    """Weights of all routers; a hash has none."""
    if cfg.moe is None or not cfg.moe.router.is_learned:
        return 0
    return cfg.num_moe_layers * cfg.d_model * cfg.moe.num_experts


def _engram_module_parameters(cfg: TransformerConfig) -> int:
    """Projections, norms and taps of one Engram module."""
    engram, d_model, num_branches = cfg.engram, cfg.d_model, cfg.num_engram_branches
    if engram is None:
        return 0
    num_keys = num_branches if engram.gate else 0
    projections = (engram.d_memory + engram.use_bias) * d_model * (1 + num_keys)
    norms = 2 * num_keys * d_model  # of the hidden state and of the key
    if engram.kernel_size:
        norms += num_branches * d_model  # before the convolution
    return projections + norms + engram.kernel_size * num_branches * d_model


def _connection_projections(cfg: TransformerConfig) -> int:
    """Weights of the projections phi of all hyper-connections, two per layer; 0 with the plain residual."""
    connections = cfg.hyper_connections
    return 0 if connections is None else 2 * cfg.num_layers * connections.num_mappings * cfg.num_streams * cfg.d_model


def count_parameters(cfg: TransformerConfig) -> ParameterCounts:
    """Closed-form parameter counts; equal to the module's and the tables' numel exactly."""
    attention = _attention_size(cfg)
    backbone = cfg.num_layers * (attention.weights + attention.norms + 2 * cfg.d_model) + cfg.d_model
    backbone += (cfg.num_layers - cfg.num_moe_layers) * _swiglu(cfg.d_model, cfg.d_ff)
    if cfg.hyper_connections is not None:  # projections, and of each connection the biases and three gates
        backbone += _connection_projections(cfg) + 2 * cfg.num_layers * (cfg.hyper_connections.num_mappings + 3)
    experts = inactive_experts = 0
    if cfg.moe is not None:
        backbone += _router_weights(cfg)
        backbone += _swiglu(cfg.d_model, _shared_widths(cfg))
        one_expert = cfg.num_moe_layers * _swiglu(cfg.d_model, cfg.moe.d_expert)  # over all layers
        experts = cfg.moe.num_experts * one_expert
        inactive_experts = (cfg.moe.num_experts - cfg.moe.router.top_k) * one_expert
    memory = read_rows = 0
    if cfg.engram is not None:
        backbone += len(cfg.engram.layers) * _engram_module_parameters(cfg)
    if cfg.over_encoding is not None:
        backbone += cfg.over_encoding.d_memory * cfg.d_model
    if cfg.memory is not None:
        memory = sum(num_rows(cfg.memory).values()) * cfg.memory.row_dim
        read_rows = len(cfg.memory.layers) * cfg.memory.d_memory
    total = backbone + experts + memory
    return ParameterCounts(
        total=total,
        active=total - inactive_experts - (memory - read_rows),
        memory=memory,
        inactive_memory=memory - read_rows,
        embedding=cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2),
        experts=experts,
        inactive_experts=inactive_experts,
    )


@dataclass(frozen=True)
class FlopCounts:
    """Matmul FLOPs of one token's forward pass, 2 per multiply-add, by part.

    Norms, activations, rotations, softmax, hashing and row look-ups are left out, as in torch's FlopCounterMode.
    Attention counts all S^2 pairs, also those that the causal mask removes. Training costs three forward passes.
    """

    attention_projections: int
    attention_scores: int  # q k^T and probabilities times v
    feed_forward: int  # dense layers
    router: int
    routed_experts: int  # the K chosen ones, full or not
    shared_experts: int
    engram: int  # projections and short convolution
    over_encoding: int  # projection of the rows at the input
    hyper_connections: int  # projections of the mappings, reading and mixing of the streams
    head: int

    @property
    def with_head(self) -> int:
        """One token's forward pass with the head."""
        return self.without_head + self.head

    @property
    def without_head(self) -> int:
        """One token's forward pass up to the last norm."""
        return (
            self.attention_projections
            + self.attention_scores
            + self.feed_forward
            + self.router
            + self.routed_experts
            + self.shared_experts
            + self.engram
            + self.over_encoding
            + self.hyper_connections
        )

    @property
    def training(self) -> int:
        """Forward and backward pass with the head, without recomputation."""
        return 3 * self.with_head

    def to_dict(self) -> dict[str, int]:
        """All parts and sums by name, for records."""
        return {**asdict(self), "with_head": self.with_head, "without_head": self.without_head}


def flops_per_token(cfg: TransformerConfig) -> FlopCounts:
    """Closed-form FLOPs of one token in a sequence of `cfg.seq_len`."""
    attention, d_model = _attention_size(cfg), cfg.d_model
    router = routed = engram_flops = over_encoding_flops = stream_flops = 0
    if cfg.moe is not None:
        router = 2 * _router_weights(cfg)
        routed = 2 * cfg.num_moe_layers * cfg.moe.router.top_k * _swiglu(d_model, cfg.moe.d_expert)
    if cfg.engram is not None:
        branches = cfg.num_engram_branches
        projections = 2 * cfg.engram.d_memory * d_model * (1 + branches * cfg.engram.gate)  # value, and the gates' keys
        engram_flops = len(cfg.engram.layers) * (projections + 2 * cfg.engram.kernel_size * branches * d_model)
    if cfg.over_encoding is not None:
        over_encoding_flops = 2 * cfg.over_encoding.d_memory * d_model
    if cfg.hyper_connections is not None:
        per_connection = 2 * (cfg.num_streams + cfg.num_streams**2) * d_model  # H_pre x and H_res x
        stream_flops = 2 * _connection_projections(cfg) + 2 * cfg.num_layers * per_connection
    return FlopCounts(
        attention_projections=2 * cfg.num_layers * attention.weights,
        attention_scores=2 * cfg.num_layers * cfg.seq_len * attention.pair,
        feed_forward=2 * (cfg.num_layers - cfg.num_moe_layers) * _swiglu(d_model, cfg.d_ff),
        router=router,
        routed_experts=routed,
        shared_experts=2 * _swiglu(d_model, _shared_widths(cfg)),
        engram=engram_flops,
        over_encoding=over_encoding_flops,
        hyper_connections=stream_flops,
        head=2 * d_model * cfg.vocab_size,
    )


class ParameterRole(str, Enum):
    """Which optimizer holds a parameter's state."""

    adamw = "adamw"  # embeddings, head, norms; every parameter where AdamW is the only optimizer
    muon = "muon"  # weight matrices under Muon
    memory = "memory"  # rows of the tables


@dataclass(frozen=True)
class BytesPerParameter:
    """Bytes held between steps (weights, optimizer) and during one (gradients) for one parameter."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.gradients + self.optimizer


# fp32 weights and gradients: 4 bytes each. bf16: a 2-byte copy computes, gradients are 2 bytes, and the 4-byte master
# weight counts as optimizer state (Rajbhandari et al. 2020, arXiv 1910.02054, 3.1). AdamW keeps two fp32 moments,
# Muon one fp32 momentum.
_MOMENTS = {ParameterRole.adamw: 2, ParameterRole.muon: 1}


def bytes_per_parameter(
    role: ParameterRole,
    bf16_weights: bool = False,
    row_dim: int = 1,
    optim: MemoryOptimConfig | None = None,
    bf16_rows: bool = False,
) -> BytesPerParameter:
    """Bytes of one parameter on one process, nothing sharded.

    Args:
        role: optimizer that holds it.
        bf16_weights: weights stored in bf16 beside an fp32 master copy; False for fp32 weights, also where autocast
            computes in bf16. It says nothing of tables.
        row_dim: M, width of a table row; each row has one int32 step count.
        optim: which moments a table keeps; by default those of Adam.
        bf16_rows: rows of tables stored in bf16, with no master copy: they are rounded stochastically.

    Returns:
        The table below, in bytes; a table's gradient exists only for the rows drawn in a step and is not counted.

        | role   | weights | weights bf16 | gradients | bf16 | optimizer | bf16 |
        |--------|---------|--------------|-----------|------|-----------|------|
        | adamw  | 4       | 2            | 4         | 2    | 8         | 12   |
        | muon   | 4       | 2            | 4         | 2    | 4         | 8    |
        | memory | 4       | 4            | 0         | 0    | 8 + 4 / M | same |

        Of memory, with rows in fp32 (4 bytes of weights) or bf16 (2), the optimizer's bytes are 8 + 4 / M with two
        moments per element, 4 + 8 / M with one second moment per row, 8 / M if beta1 is 0 besides.
    """
    if role is ParameterRole.memory:
        numbers = sum((optim or MemoryOptimConfig()).state_widths(row_dim).values()) + 1  # per row, 4 bytes each
        frozen = optim is not None and optim.frozen
        return BytesPerParameter(2 if bf16_rows else 4, 0, 4 * (1 if frozen else numbers) / row_dim)
    moments = 4 * _MOMENTS[role]
    if bf16_weights:
        return BytesPerParameter(weights=2, gradients=2, optimizer=4 + moments)
    return BytesPerParameter(weights=4, gradients=4, optimizer=moments)
