"""Hugging Face's DeepSeek-V3 and Dots1 beside our model: their configuration, and their tensors by our names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Dots1Config, Dots1ForCausalLM
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from models.attention import AttentionConfig
from models.mla import MLAConfig
from models.rotary import RotaryConfig, pair_halves
from models.transformer import TransformerConfig


def rope_parameters(rotary: RotaryConfig) -> dict[str, str | float | int]:
    """Theta and YaRN in transformers' words."""
    if rotary.yarn is None:
        return {"rope_type": "default", "rope_theta": rotary.theta}
    yarn = rotary.yarn
    return {
        "rope_type": "yarn",
        "rope_theta": rotary.theta,
        "factor": float(yarn.scale),
        "beta_slow": yarn.alpha,
        "beta_fast": yarn.beta,
        "original_max_position_embeddings": yarn.original_seq_len,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def latent_settings(mla: MLAConfig) -> dict[str, int | None]:
    """The shape of a layer of latent attention in transformers' words."""
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "kv_lora_rank": mla.kv_rank,
        "q_lora_rank": mla.query_rank,
        "qk_nope_head_dim": mla.nope_head_dim,
        "qk_rope_head_dim": mla.rope_head_dim,
        "v_head_dim": mla.value_head_dim,
    }


def their_model(cfg: TransformerConfig) -> nn.Module:
    """The model of transformers with the shape of `cfg`: DeepSeek-V3 with `cfg.mla`, else Dots1; plain kernels."""
    settings = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.num_layers,
        "first_k_dense_replace": cfg.num_layers if cfg.moe is None else cfg.num_dense_layers,
        "max_position_embeddings": cfg.seq_len if cfg.rotary.yarn is None else 4096,
        "rope_parameters": rope_parameters(cfg.rotary),
        "rms_norm_eps": cfg.norm_eps,
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    if cfg.moe is not None:
        settings |= {
            "moe_intermediate_size": cfg.moe.d_expert,
            "n_routed_experts": cfg.moe.num_experts,
            "n_shared_experts": cfg.moe.num_shared_experts,
            "num_experts_per_tok": cfg.moe.router.top_k,
            "n_group": cfg.moe.router.num_groups,
            "topk_group": cfg.moe.router.top_groups,
            "routed_scaling_factor": cfg.moe.router.route_scale,
            "norm_topk_prob": cfg.moe.router.normalize,
        }
    if cfg.mla is not None:
        return DeepseekV3ForCausalLM(DeepseekV3Config(**settings, **latent_settings(cfg.mla), rope_interleave=True))
    assert cfg.attention is not None and cfg.attention.qk_norm, "Dots1 has norms of queries and keys"
    settings |= {"num_attention_heads": cfg.attention.num_heads, "num_key_value_heads": cfg.attention.num_kv_heads}
    return Dots1ForCausalLM(Dots1Config(**settings, head_dim=cfg.attention.head_dim))


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Random values in everything, norms and the routers' biases included."""
    for name, tensor in module.named_parameters():
        tensor.normal_(1.0, 0.2) if "norm" in name else tensor.normal_(0, tensor.shape[-1] ** -0.5)
    for name, tensor in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of all parameters that have one, by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def our_latent_attention(theirs: dict[str, Tensor], mla: MLAConfig, neighbours: bool = True) -> dict[str, Tensor]:
    """Weights, or gradients, of DeepSeek-V3's attention by our names; rotary rows in our order if theirs are pairs."""

    def turned(rows: Tensor) -> Tensor:
        return pair_halves(rows) if neighbours else rows

    state = {
        "kv_norm.weight": theirs["kv_a_layernorm.weight"],
        "kv_up.weight": theirs["kv_b_proj.weight"],
        "output.weight": theirs["o_proj.weight"],
    }
    latent, rope = theirs["kv_a_proj_with_mqa.weight"].split((mla.kv_rank, mla.rope_head_dim))
    state["kv_down.weight"] = torch.cat((latent, turned(rope)))
    query = theirs["q_proj.weight" if mla.query_rank is None else "q_b_proj.weight"]
    heads = query.unflatten(0, (mla.num_heads, mla.key_head_dim))
    nope, rope = heads.split((mla.nope_head_dim, mla.rope_head_dim), dim=1)
    state["query.weight"] = torch.cat((nope, turned(rope)), dim=1).flatten(0, 1)
    if mla.query_rank is not None:
        state["query_down.weight"] = theirs["q_a_proj.weight"]
        state["query_norm.weight"] = theirs["q_a_layernorm.weight"]
    return state


def our_grouped_attention(theirs: dict[str, Tensor], cfg: AttentionConfig) -> dict[str, Tensor]:
    """Weights, or gradients, of Dots1's attention by our names."""
    state = {
        "qkv.weight": torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
        "output.weight": theirs["o_proj.weight"],
    }
    if cfg.qk_norm:
        state |= {"query_norm.weight": theirs["q_norm.weight"], "key_norm.weight": theirs["k_norm.weight"]}
    return state


def our_tensors(theirs: dict[str, Tensor], cfg: TransformerConfig) -> dict[str, Tensor]:
    """Weights, or gradients, of `their_model` by our names; every one of theirs is used once."""
    left = dict(theirs)

    def take(name: str, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        return change(left.pop(name))

    def swiglu(to: str, prefix: str) -> dict[str, Tensor]:
        gate_up = torch.cat((take(f"{prefix}.gate_proj.weight"), take(f"{prefix}.up_proj.weight")))
        return {f"{to}.gate_up.weight": gate_up, f"{to}.down.weight": take(f"{prefix}.down_proj.weight")}

    state = {
        "embedding.weight": take("model.embed_tokens.weight"),
        "norm.weight": take("model.norm.weight"),
        "head.weight": take("lm_head.weight"),
    }
    for layer in range(cfg.num_layers):
        prefix, to = f"model.layers.{layer}", f"blocks.{layer}"
        state[f"{to}.attention_norm.weight"] = take(f"{prefix}.input_layernorm.weight")
        state[f"{to}.feed_forward_norm.weight"] = take(f"{prefix}.post_attention_layernorm.weight")
        names = [name for name in left if name.startswith(f"{prefix}.self_attn.")]
        layer_theirs = {name.removeprefix(f"{prefix}.self_attn."): take(name) for name in names}
        if cfg.mla is not None:
            attention = our_latent_attention(layer_theirs, cfg.mla)
        else:
            assert cfg.attention is not None
            attention = our_grouped_attention(layer_theirs, cfg.attention)
        state |= {f"{to}.attention.{key}": value for key, value in attention.items()}
        if cfg.moe_index(layer) is None:
            state |= swiglu(f"{to}.feed_forward", f"{prefix}.mlp")
            continue
        state |= swiglu(f"{to}.moe.shared_expert", f"{prefix}.mlp.shared_experts")
        state[f"{to}.moe.router.weight"] = take(f"{prefix}.mlp.gate.weight")
        if f"{prefix}.mlp.gate.e_score_correction_bias" in left:  # no gradient
            state[f"{to}.moe.router.expert_bias"] = take(f"{prefix}.mlp.gate.e_score_correction_bias")
        for ours, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            state[f"{to}.moe.experts.{ours}"] = take(f"{prefix}.mlp.experts.{name}", lambda t: t.transpose(1, 2))
    assert not left
    return state
