"""Bytes that autograd keeps for the backward pass of one micro-batch, in closed form, from the configuration alone.

The path counted is that of a GPU: bf16 autocast over fp32 weights, a fused attention kernel that keeps its inputs, its
output and one number per query, the kernels of `models/kernels`, and plain torch for all else. The residual stream is
fp32, what matmuls read is bf16. Each stored tensor counts once, whoever keeps it. Not counted: bf16 copies of weights
(train/footprint.py counts them), tensors that live only within one operation, gradients on their way, and what the
allocator loses. With experts on several devices and an even load each device has as many rows as without.
"""

from collections import Counter

from models.attention import AttentionConfig
from models.hyper_connections import HyperConnectionsConfig
from models.mla import MLAConfig
from models.moe import ExpertKernel, MoEConfig
from models.router import RouterKind
from models.transformer import ActivationCheckpointing, TransformerConfig

BF16, FP32, INT64 = 2, 4, 8  # bytes of one number


def activation_bytes(cfg: TransformerConfig, micro_batch_size: int) -> dict[str, int]:
    """Bytes by part, for sequences of `cfg.seq_len`; with full checkpointing at the worst moment of the backward pass.

    That moment is when the largest block has been run again: beside its activations there are the inputs of all blocks
    and what lies outside of blocks.

    Args:
        cfg: `moe.expert_kernel=grouped_mm` counts that path, any other kernel `models/kernels/grouped_swiglu.py`;
            the gate counts as the kernel also where `models/kernels/gate.py` leaves wide rows to its definition.
        micro_batch_size: B, sequences of one forward pass.

    Returns:
        {part: bytes}; parts that the model lacks are left out.
    """
    parts = Counter(_outside_blocks(cfg, micro_batch_size))
    blocks = [block_activation_bytes(cfg, layer, micro_batch_size) for layer in range(cfg.num_layers)]
    if cfg.activation_checkpointing is ActivationCheckpointing.none:
        for block in blocks:
            parts.update(block)
    else:
        inputs = [_input_bytes(cfg, layer, micro_batch_size) for layer in range(cfg.num_layers)]
        # Of a block that keeps its input, the input is among its own activations.
        own = [inputs[layer] * _keeps_input(cfg, layer) for layer in range(cfg.num_layers)]
        largest = max(range(cfg.num_layers), key=lambda layer: sum(blocks[layer].values()) - own[layer])
        parts.update(blocks[largest])
        parts["block inputs"] = sum(inputs) - own[largest]
    return {part: size for part, size in parts.items() if size}


def block_activation_bytes(cfg: TransformerConfig, layer: int, micro_batch_size: int) -> Counter[str]:
    """Bytes by part of one block, the input that it keeps included, the attention mask and the memory rows not."""
    num_tokens = micro_batch_size * cfg.seq_len
    parts = Counter({"residual stream": 2 * _norm(num_tokens, cfg.d_model)})
    if cfg.mla is not None:
        parts["attention"] = _latent_attention(cfg.mla, cfg.d_model, micro_batch_size, cfg.seq_len)
    elif cfg.attention is not None:
        parts["attention"] = _attention(cfg.attention, cfg.d_model, micro_batch_size, cfg.seq_len)
    index = cfg.moe_index(layer)
    if cfg.moe is None or index is None:
        parts["feed-forward"] = _swiglu(num_tokens, cfg.d_model, cfg.d_ff)
    else:
        shared_width = cfg.moe.shared_width(index)
        parts["shared experts"] = _swiglu(num_tokens, cfg.d_model, shared_width) if shared_width else 0
        parts["router"] = _router(cfg.moe, cfg.d_model, micro_batch_size, cfg.seq_len)
        parts["routed experts"] = _routed_experts(cfg.moe, cfg.d_model, num_tokens)
    if _has_engram(cfg, layer):
        parts["engram"] = _engram(cfg, micro_batch_size)
    if cfg.hyper_connections is not None:
        parts["hyper-connections"] = 2 * _hyper_connection(cfg.hyper_connections, cfg.d_model, num_tokens)
        if layer == 0 and not _starts_with_engram(cfg, 0):
            # The streams enter as J views of the embedding; the first projection needs a copy of them all.
            parts["hyper-connections"] += num_tokens * cfg.d_model * FP32
    return parts


def _outside_blocks(cfg: TransformerConfig, batch: int) -> dict[str, int]:
    """What is there once: ids and last norm, the additive mask, the rows, and what the loss keeps.

    The loss has computed its gradients by then, in the type of the matmuls for the tokens and in fp32 for the head's
    weight, which is as large as the weight whatever the batch.
    """
    num_tokens = batch * cfg.seq_len
    parts = {
        "residual stream": num_tokens * INT64 + _norm(num_tokens, cfg.d_model),
        "attention": batch * cfg.seq_len**2 * BF16,
        "head": num_tokens * cfg.d_model * BF16 + cfg.vocab_size * cfg.d_model * FP32,
    }
    if cfg.memory is not None:
        parts["memory rows"] = len(cfg.memory.layers) * num_tokens * cfg.memory.d_memory * FP32
    if cfg.over_encoding is not None:
        parts["over-encoding"] = num_tokens * cfg.over_encoding.d_memory * BF16
    return parts


def _norm(num_vectors: int, width: int) -> int:
    """An RMSNorm keeps its input in fp32 and the inverse norm of each vector."""
    return num_vectors * (width + 1) * FP32


def _narrow_norm(num_vectors: int, width: int) -> int:
    """A norm of bf16 vectors: autocast makes an fp32 copy of them, and of the weight."""
    return _norm(num_vectors, width) + width * FP32


def _rotary_tables(seq_len: int, num_heads: int, width: int) -> int:
    """Cosines and sines, spread over the heads, whatever the batch."""
    return 2 * seq_len * num_heads * width * BF16


def _attention(attention: AttentionConfig, d_model: int, batch: int, seq_len: int) -> int:
    """Grouped-query attention.

    Per token the input in bf16, the output of the first projection (of which the values are a view), turned queries and
    keys, the heads' outputs, and the log-sum-exp of each query. Where a key head serves several query heads, keys and
    values are repeated for the fused kernel (`softmax_attention.serves_grouped_heads`): these are kept, and not the
    projection.
    """
    num_tokens, width = batch * seq_len, attention.head_dim
    num_heads, num_kv_heads = attention.num_heads, attention.num_kv_heads
    turned = num_heads + num_kv_heads
    projection_or_repeated = 3 * num_heads if num_heads == num_kv_heads else 2 * num_heads
    per_token = BF16 * (d_model + (projection_or_repeated + turned + num_heads) * width) + FP32 * num_heads
    size = num_tokens * per_token + _rotary_tables(seq_len, turned, width)
    if attention.qk_norm:
        size += _narrow_norm(num_tokens * attention.num_heads, width)
        size += _narrow_norm(num_tokens * attention.num_kv_heads, width)
    return size


def _latent_attention(mla: MLAConfig, d_model: int, batch: int, seq_len: int) -> int:
    """Multi-head latent attention.

    Per token the input in bf16, which both projections read; narrow vectors before and after their norms; queries and
    keys; what the values are a view of; the heads' outputs, and the log-sum-exp of each query.
    """
    num_tokens, heads = batch * seq_len, mla.num_heads
    values = heads * (mla.nope_head_dim + mla.value_head_dim)
    bf16 = d_model + 2 * heads * mla.key_head_dim + values + heads * mla.value_head_dim
    size = num_tokens * (BF16 * bf16 + FP32 * heads)
    for rank in (mla.kv_rank, mla.query_rank):
        if rank is not None:
            size += _narrow_norm(num_tokens, rank) + num_tokens * rank * BF16
    return size + _rotary_tables(seq_len, heads + 1, mla.rope_head_dim)  # the key's positions are shared by all heads


def _swiglu(num_tokens: int, d_model: int, width: int) -> int:
    """Input, gate and up side by side, and the hidden layer."""
    return num_tokens * (d_model + 3 * width) * BF16


def _router(moe: MoEConfig, d_model: int, batch: int, seq_len: int) -> int:
    """Input and scores in fp32, the chosen ids, and what gate values and balance loss divide by."""
    router, num_tokens = moe.router, batch * seq_len
    if not router.is_learned:
        return 0
    size = num_tokens * (FP32 * (d_model + moe.num_experts) + INT64 * router.top_k)
    quotient = num_tokens * FP32 * (router.top_k + 1)  # the chosen scores and their sum
    fractions = moe.num_experts * FP32  # of choices that are each expert; the softmax router takes them over the batch
    if router.kind is RouterKind.softmax:
        return size + fractions
    if router.kind is RouterKind.sigmoid:
        size += quotient * router.normalize
        # Scores are made shares by their sum.
        return size + (num_tokens * FP32 + batch * fractions) * (router.sequence_balance_coef > 0)
    size += quotient * (router.kind is RouterKind.gshard)
    return size + num_tokens * router.top_k + batch * fractions  # one byte says whether an expert was full


def _routed_experts(moe: MoEConfig, d_model: int, num_tokens: int) -> int:
    """Rows in bf16, their gate values, their gate and up side by side, and two int64 per row of places.

    `grouped_mm` keeps the hidden layer and the output before the gate value too.
    """
    num_rows = num_tokens * moe.router.top_k
    per_row = BF16 * (d_model + 1 + 2 * moe.d_expert) + 2 * INT64
    if moe.expert_kernel is ExpertKernel.grouped_mm:
        return num_rows * (per_row + BF16 * (moe.d_expert + d_model)) + moe.num_experts * 4  # ends, int32
    return num_rows * per_row + (moe.num_experts + 1) * INT64


def _has_engram(cfg: TransformerConfig, layer: int) -> bool:
    return cfg.engram is not None and layer in cfg.engram.layers


def _starts_with_engram(cfg: TransformerConfig, layer: int) -> bool:
    """Whether the block's first act is to add to its input; with `multi_branch` off and several streams it is not."""
    return _has_engram(cfg, layer) and cfg.num_engram_branches == cfg.num_streams


def _engram(cfg: TransformerConfig, batch: int) -> int:
    """The rows in bf16; for the gate the hidden state, value and keys, three numbers per branch; the convolution.

    The convolution keeps its values, their norms, their normed form without and with weight, and the sum before silu in
    fp32, and for every tap the document boundaries.
    """
    engram, seq_len = cfg.engram, cfg.seq_len
    assert engram is not None  # the caller has looked
    branches, num_tokens = cfg.num_engram_branches, batch * seq_len
    size = num_tokens * engram.d_memory * BF16
    wide = num_tokens * branches * cfg.d_model  # numbers of one tensor over all branches
    if engram.gate:
        size += wide * (FP32 + BF16) + num_tokens * (cfg.d_model * BF16 + 3 * branches * FP32)
    if engram.kernel_size:
        distances = [back * engram.max_ngram_size for back in range(1, engram.kernel_size)]
        masks = batch * sum(max(seq_len - distance, 0) for distance in distances)  # bool
        size += 4 * wide * FP32 + num_tokens * branches * FP32 + masks
    return size


def _hyper_connection(connections: HyperConnectionsConfig, d_model: int, num_tokens: int) -> int:
    """One connection, all in fp32.

    The streams and one inverse norm; the logits before and after the norm; H_pre; H_post before and after its factor;
    for H_res its logits, the doubly stochastic matrix in two layouts, and J sums per half step; the update.
    """
    streams, half_steps = connections.num_streams, 2 * (connections.sinkhorn_iterations - 1)
    mappings = 2 * connections.num_mappings + 3 * streams + 3 * streams**2 + half_steps * streams
    per_token = streams * d_model + 1 + mappings + d_model
    return FP32 * (num_tokens * per_token + connections.num_mappings)


def _input_bytes(cfg: TransformerConfig, layer: int, batch: int) -> int:
    """The residual stream before a block; before the first all streams are one."""
    streams = cfg.num_streams if layer else 1
    return batch * cfg.seq_len * streams * cfg.d_model * FP32


def _keeps_input(cfg: TransformerConfig, layer: int) -> bool:
    """Whether the input itself is among what autograd keeps of the block.

    An Engram module keeps what its gate sees, of streams that are still one a copy, and without gate only the sum.
    """
    if not _starts_with_engram(cfg, layer):
        return True
    assert cfg.engram is not None
    return cfg.engram.gate and (layer > 0 or cfg.num_streams == 1)
