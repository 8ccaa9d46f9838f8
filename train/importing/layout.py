"""Which tensor of a checkpoint fills which part of which tensor of our model."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from models.rotary import pair_halves
from models.transformer import TransformerConfig

Region = tuple[int | slice, ...]  # an index into a tensor of ours
AS_IT_IS = "as it is"
WHOLE: Region = (slice(None),)


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint, and the part of ours that it fills; every tensor fills one part."""

    source: str
    shape: tuple[int, ...]  # of the source
    target: str  # name in our model's state
    region: Region = WHOLE  # of the target
    change: str = AS_IT_IS
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor  # to the shape of the region


@dataclass(frozen=True)
class Ignored:
    """A tensor of the checkpoint that our model has no place for."""

    source: str
    why: str
    parameters: int


def huggingface_parts(cfg: TransformerConfig, interleaved: bool, names: Iterable[str]) -> list[Part]:
    """Where every tensor of a DeepSeek-V3 or Dots1 checkpoint goes.

    Ours joins what theirs holds apart: queries, keys and values of grouped-query attention by rows, gate and up
    projection by rows; and stacks the experts with inputs first, (E, D, 2F) and (E, F, D).

    Args:
        cfg: the shape, of `configuration.transformer_config`.
        interleaved: rotary pairs are neighbours and go to halves (`models.rotary.pair_halves`).
        names: of the checkpoint's tensors: they tell whether its experts lie apart, as on the hub, or stacked.
    """
    names = set(names)
    vocabulary = (cfg.vocab_size, cfg.d_model)
    parts = [
        Part("model.embed_tokens.weight", vocabulary, "embedding.weight"),
        Part("model.norm.weight", (cfg.d_model,), "norm.weight"),
    ]
    if not cfg.tie_embeddings:
        parts.append(Part("lm_head.weight", vocabulary, "head.weight"))
    for layer in range(cfg.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
        for source, target in norms.items():
            parts.append(Part(f"{theirs}.{source}.weight", (cfg.d_model,), f"{ours}.{target}.weight"))
        if cfg.mla is not None:
            parts += _latent(cfg, f"{theirs}.self_attn", f"{ours}.attention", interleaved)
        else:
            parts += _grouped_query(cfg, f"{theirs}.self_attn", f"{ours}.attention")
        moe_index = cfg.moe_index(layer)
        if cfg.moe is None or moe_index is None:
            parts += _swiglu(cfg.d_model, cfg.d_ff, f"{theirs}.mlp", f"{ours}.feed_forward")
            continue
        num_experts = cfg.moe.num_experts
        router = f"{ours}.moe.router"
        parts.append(Part(f"{theirs}.mlp.gate.weight", (num_experts, cfg.d_model), f"{router}.weight"))
        bias = f"{theirs}.mlp.gate.e_score_correction_bias"
        parts.append(Part(bias, (num_experts,), f"{router}.expert_bias"))
        if width := cfg.moe.shared_width(moe_index):
            parts += _swiglu(cfg.d_model, width, f"{theirs}.mlp.shared_experts", f"{ours}.moe.shared_expert")
        stacked = f"{theirs}.mlp.experts.gate_up_proj" in names
        parts += _experts(cfg, f"{theirs}.mlp.experts", f"{ours}.moe.experts", stacked)
    return parts


def huggingface_ignored(cfg: TransformerConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Ignored]:
    """Tensors that a checkpoint of these architectures may hold beside the model that we build.

    Args:
        cfg: the shape.
        shapes: {name: shape} of the checkpoint's tensors.
    """
    ignored = []
    for name, shape in sorted(shapes.items()):
        why = None
        _, _, rest = name.partition("model.layers.")
        layer, _, inner = rest.partition(".")
        if layer.isdigit() and int(layer) >= cfg.num_layers:
            why = "multi-token prediction, beyond num_hidden_layers: our model has none"
        elif inner == "self_attn.rotary_emb.inv_freq":
            why = "rotary frequencies are computed from the configuration"
        elif name == "lm_head.weight" and cfg.tie_embeddings:
            why = "tie_word_embeddings: the embedding is the head"
        if why is not None:
            ignored.append(Ignored(name, why, math.prod(shape)))
    return ignored


def _latent(cfg: TransformerConfig, theirs: str, ours: str, interleaved: bool) -> list[Part]:
    mla, width = cfg.mla, cfg.d_model
    assert mla is not None
    rope, change = mla.rope_head_dim, "rotary pairs from neighbours to halves" if interleaved else AS_IT_IS

    def last_rows_paired(rows: Tensor) -> Tensor:
        """Rows (..., C, D) with the last `rope` of every C reordered."""
        rows = rows.clone()
        rows[..., -rope:, :] = pair_halves(rows[..., -rope:, :])
        return rows

    def per_head(rows: Tensor) -> Tensor:
        return last_rows_paired(rows.unflatten(0, (mla.num_heads, mla.key_head_dim))).flatten(0, 1)

    def part(source: str, shape: tuple[int, ...], target: str) -> Part:
        return Part(f"{theirs}.{source}.weight", shape, f"{ours}.{target}.weight")

    def turned(source: str, shape: tuple[int, ...], target: str, convert: Callable[[Tensor], Tensor]) -> Part:
        if not interleaved:
            return part(source, shape, target)
        name = f"{theirs}.{source}.weight"
        return Part(name, shape, f"{ours}.{target}.weight", change=change, convert=convert)

    queries = mla.num_heads * mla.key_head_dim
    parts = [
        turned("kv_a_proj_with_mqa", (mla.kv_rank + rope, width), "kv_down", last_rows_paired),
        part("kv_a_layernorm", (mla.kv_rank,), "kv_norm"),
        part("kv_b_proj", (mla.num_heads * (mla.nope_head_dim + mla.value_head_dim), mla.kv_rank), "kv_up"),
        part("o_proj", (width, mla.num_heads * mla.value_head_dim), "output"),
    ]
    if mla.query_rank is None:
        return [*parts, turned("q_proj", (queries, width), "query", per_head)]
    return [
        *parts,
        part("q_a_proj", (mla.query_rank, width), "query_down"),
        part("q_a_layernorm", (mla.query_rank,), "query_norm"),
        turned("q_b_proj", (queries, mla.query_rank), "query", per_head),
    ]


def _grouped_query(cfg: TransformerConfig, theirs: str, ours: str) -> list[Part]:
    attention = cfg.attention
    assert attention is not None
    parts, start = [], 0
    for letter, num_heads in (("q", attention.num_heads), ("k", attention.num_kv_heads), ("v", attention.num_kv_heads)):
        stop = start + num_heads * attention.head_dim
        shape, region = (stop - start, cfg.d_model), (slice(start, stop),)
        parts.append(
            Part(f"{theirs}.{letter}_proj.weight", shape, f"{ours}.qkv.weight", region, "queries, keys, values joined")
        )
        start = stop
    shape = (cfg.d_model, attention.num_heads * attention.head_dim)
    parts.append(Part(f"{theirs}.o_proj.weight", shape, f"{ours}.output.weight"))
    for source, target in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
        parts.append(Part(f"{theirs}.{source}.weight", (attention.head_dim,), f"{ours}.{target}.weight"))
    return parts


def _swiglu(d_model: int, width: int, theirs: str, ours: str) -> list[Part]:
    change, target = "gate and up projection joined", f"{ours}.gate_up.weight"
    return [
        Part(f"{theirs}.gate_proj.weight", (width, d_model), target, (slice(0, width),), change),
        Part(f"{theirs}.up_proj.weight", (width, d_model), target, (slice(width, 2 * width),), change),
        Part(f"{theirs}.down_proj.weight", (d_model, width), f"{ours}.down.weight"),
    ]


def _experts(cfg: TransformerConfig, theirs: str, ours: str, stacked: bool) -> list[Part]:
    assert cfg.moe is not None
    count, width, d_model = cfg.moe.num_experts, cfg.moe.d_expert, cfg.d_model
    gate_up, down = f"{ours}.gate_up", f"{ours}.down"  # (E, D, 2F), (E, F, D)

    def swapped(tensor: Tensor) -> Tensor:
        return tensor.transpose(-1, -2)

    if stacked:
        change = "inputs and outputs swapped"
        return [
            Part(f"{theirs}.gate_up_proj", (count, 2 * width, d_model), gate_up, WHOLE, change, swapped),
            Part(f"{theirs}.down_proj", (count, d_model, width), down, WHOLE, change, swapped),
        ]
    parts, change = [], "experts stacked, inputs and outputs swapped"
    for expert in range(count):
        for name, region in (("gate_proj", slice(0, width)), ("up_proj", slice(width, 2 * width))):
            source, place = f"{theirs}.{expert}.{name}.weight", (expert, slice(None), region)
            parts.append(Part(source, (width, d_model), gate_up, place, change, swapped))
        source = f"{theirs}.{expert}.down_proj.weight"
        parts.append(Part(source, (d_model, width), down, (expert,), change, swapped))
    return parts
