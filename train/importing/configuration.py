"""From the `config.json` of a Hugging Face checkpoint to the shape of our model, or one line on what we lack."""

import json
from pathlib import Path
from typing import Any

from models.attention import AttentionConfig
from models.mla import MLAConfig
from models.moe import MoEConfig
from models.rotary import RotaryConfig, YarnConfig
from models.router import RouterConfig
from models.transformer import TransformerConfig

DEEPSEEK, DOTS = "DeepseekV3ForCausalLM", "Dots1ForCausalLM"
# Epsilon of the norms of the latent vectors in transformers' DeepSeek-V3, whatever `rms_norm_eps` says.
LATENT_NORM_EPS = 1e-6

# Settings that do not change what the model computes, or that say it twice.
_WITHOUT_EFFECT = {
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "ep_size", "initializer_range", "model_type",
    "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "torch_dtype", "transformers_version",
    "use_cache", "aux_loss_alpha", "seq_aux", "max_window_layers", "sliding_window", "num_nextn_predict_layers",
}  # fmt: skip
# Settings that must have one of these values, where they are given: ours is the same function only then.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "use_sliding_window": (False,),
}
_REMEDIES = {
    "attention_bias": "our attention has no biases",
    "mlp_bias": "our feed-forward layers have no biases",
    "quantization_config": "convert the weights to bf16 first (DeepSeek publishes fp8_cast_bf16.py with its weights)",
    "use_sliding_window": "our attention sees the whole document",
}
_ROPE_KEYS = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
}  # fmt: skip


class UnsupportedModelError(ValueError):
    """The checkpoint needs something that our model does not have."""


class _Settings:
    """config.json, with a note of what was asked of it."""

    def __init__(self, settings: dict[str, Any], name: str) -> None:
        self.settings, self.name = settings, name
        self.read: set[str] = set()

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value, or `default`: what transformers takes where the file says nothing or null."""
        self.read.add(key)
        value = self.settings.get(key)
        return default if value is None else value

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number, which has to be there where transformers has no default that fits every model.

        Raises:
            UnsupportedModelError: it is absent or no whole number.
        """
        value = self(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise UnsupportedModelError(f"{self.name}: {key}={value!r} must be a whole number; complete the file")
        return value

    def refuse(self, key: str, value: Any, why: str) -> UnsupportedModelError:
        """The error for a setting whose value we cannot compute."""
        return UnsupportedModelError(f"{self.name}: {key}={value!r} is not supported: {why}")


def read_settings(folder: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`.

    Raises:
        UnsupportedModelError: it is no JSON object, or not one of an architecture that we have.
    """
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{path} cannot be read as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(settings, dict):
        raise UnsupportedModelError(f"{path} is no JSON object; fetch the checkpoint again")
    if settings.get("architectures") not in ([DEEPSEEK], [DOTS]):
        raise UnsupportedModelError(
            f"{path}: architectures={settings.get('architectures')} is not supported; supported: {DEEPSEEK}, {DOTS}"
        )
    return settings


def transformer_config(settings: dict[str, Any], name: str) -> tuple[TransformerConfig, list[str]]:
    """Our shape of the model that `settings` describe, and notes on what differs or was not read.

    Args:
        settings: of `read_settings`.
        name: of the file, for messages.

    Raises:
        UnsupportedModelError: naming the setting, its value and why the model cannot be computed here.
        ValueError: a shape that our configuration refuses.
    """
    get = _Settings(settings, name)
    for key, values in _ONLY.items():
        if key in settings and get(key, values[0]) not in values:
            allowed = " or ".join(map(repr, values))
            raise get.refuse(key, settings[key], _REMEDIES.get(key, f"only {allowed} is computed here"))
    is_deepseek = settings["architectures"] == [DEEPSEEK]
    num_layers, num_heads = get.size("num_hidden_layers"), get.size("num_attention_heads")
    norm_eps = float(get("rms_norm_eps", 1e-6))
    num_dense_layers = min(int(get("first_k_dense_replace", 3 if is_deepseek else 0)), num_layers)
    has_experts = num_dense_layers < num_layers
    cfg = TransformerConfig(
        vocab_size=get.size("vocab_size"),
        seq_len=get.size("max_position_embeddings"),
        num_layers=num_layers,
        d_model=get.size("hidden_size"),
        d_ff=get.size("intermediate_size"),
        num_dense_layers=num_dense_layers if has_experts else 0,
        norm_eps=norm_eps,
        tie_embeddings=bool(get("tie_word_embeddings", False)),
        init_std=float(settings.get("initializer_range") or 0.02),
        rotary=_rotary(get, is_deepseek),
        attention=None if is_deepseek else _grouped_query(get, num_heads),
        mla=_latent(get, num_heads) if is_deepseek else None,
        moe=_experts(get, is_deepseek) if has_experts else None,
    )
    notes = []
    if is_deepseek and norm_eps != LATENT_NORM_EPS:
        notes.append(
            f"rms_norm_eps={norm_eps}: our latent norms use it too, transformers has {LATENT_NORM_EPS} there whatever "
            "the setting says, so the two differ slightly where latent vectors are small"
        )
    if get("attention_dropout", 0.0):
        notes.append(f"attention_dropout={settings['attention_dropout']}: our attention has no dropout in training")
    unread = sorted(settings.keys() - get.read - _WITHOUT_EFFECT)
    if unread:
        notes.append(f"settings of {name} that are not known here and were not read: {', '.join(unread)}")
    return cfg, notes


def rope_is_interleaved(settings: dict[str, Any]) -> bool:
    """Whether the rotary pairs of queries and keys are neighbours (DeepSeek's order), not halves."""
    given = settings.get("rope_interleave")
    return settings["architectures"] == [DEEPSEEK] and (given is None or bool(given))


def _latent(get: _Settings, num_heads: int) -> MLAConfig:
    for key, same in (("num_key_value_heads", num_heads), ("head_dim", get.size("qk_rope_head_dim"))):
        if get(key, same) != same:
            raise get.refuse(key, get(key), f"every latent head has its own keys and turned coordinates, {same}")
    get("rope_interleave")  # read by `rope_is_interleaved`
    return MLAConfig(
        num_heads=num_heads,
        kv_rank=get.size("kv_lora_rank"),
        # Null: queries have no latent vector. In transformers they have one where the file says nothing.
        query_rank=None if get.settings.get("q_lora_rank", 1536) is None else get.size("q_lora_rank", 1536),
        nope_head_dim=get.size("qk_nope_head_dim"),
        rope_head_dim=get.size("qk_rope_head_dim"),
        value_head_dim=get.size("v_head_dim"),
    )


def _grouped_query(get: _Settings, num_heads: int) -> AttentionConfig:
    windows = _sliding_layers(get)
    if windows:
        raise get.refuse("layer_types", f"sliding_attention in layers {windows[:4]}", "ours sees the whole document")
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=int(get("num_key_value_heads", num_heads)),
        head_dim=int(get("head_dim", get.size("hidden_size") // num_heads)),
        qk_norm=True,
    )


def _sliding_layers(get: _Settings) -> list[int]:
    """Layers whose attention sees less than the whole document, by transformers' rule where the file lists none."""
    layers = range(get.size("num_hidden_layers"))
    kinds = get("layer_types")
    if kinds is not None:
        return [layer for layer, kind in enumerate(kinds) if kind != "full_attention"]
    if get.settings.get("sliding_window", 4096) is None:
        return []
    return [layer for layer in layers if layer >= (get.settings.get("max_window_layers") or 62)]


def _experts(get: _Settings, is_deepseek: bool) -> MoEConfig:
    num_groups = int(get("n_group", 8 if is_deepseek else 1))
    top_groups = int(get("topk_group", 4 if is_deepseek else 1))
    if num_groups <= top_groups:  # all groups may be chosen from: no limit
        num_groups = top_groups = 1
    return MoEConfig(
        num_experts=get.size("n_routed_experts"),
        d_expert=get.size("moe_intermediate_size"),
        num_shared_experts=get.size("n_shared_experts", 1 if is_deepseek else None),
        router=RouterConfig(
            top_k=get.size("num_experts_per_tok"),
            normalize=bool(get("norm_topk_prob", is_deepseek)),
            route_scale=float(get("routed_scaling_factor", 2.5 if is_deepseek else 1.0)),
            num_groups=num_groups,
            top_groups=top_groups,
        ),
    )


def _rotary(get: _Settings, is_deepseek: bool) -> RotaryConfig:
    """`rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before)."""
    key = "rope_scaling" if get("rope_scaling") is not None else "rope_parameters"
    rope: dict[str, Any] = dict(get(key, {}))
    get("rope_parameters")
    theta = float(rope.get("rope_theta") or get("rope_theta", 10_000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise get.refuse(f"{key}.rope_type", kind, "only 'default' and 'yarn' are computed here")
    # Null, and these at the values of the plain form, say nothing.
    neutral = {"partial_rotary_factor": 1.0, "truncate": True}
    rope = {name: value for name, value in rope.items() if value is not None and neutral.get(name) != value}
    for name in sorted(rope.keys() - _ROPE_KEYS):
        raise get.refuse(f"{key}.{name}", rope[name], "our rotary positions have no such setting")
    if kind == "default":
        return RotaryConfig(theta=theta)
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise get.refuse(f"{key}.original_max_position_embeddings", None, "YaRN needs the length before stretching")
    mscale, mscale_all_dim = _mscales(get, key, rope, is_deepseek)
    scale = float(rope.get("factor") or get.size("max_position_embeddings") / original)
    yarn = YarnConfig(
        scale=scale,
        original_seq_len=int(original),
        alpha=float(rope.get("beta_slow", 1.0)),
        beta=float(rope.get("beta_fast", 32.0)),
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
    )
    return RotaryConfig(theta=theta, yarn=yarn)


def _mscales(get: _Settings, key: str, rope: dict[str, Any], is_deepseek: bool) -> tuple[float, float]:
    """`mscale` and `mscale_all_dim`, where ours computes with them what transformers does; see `YarnConfig`.

    transformers 5.23: the rotated coordinates get m(mscale) / m(mscale_all_dim) where both are there and not 0, else
    m(1). DeepSeek-V3 multiplies the scores by m(mscale_all_dim)^2, Dots1 never.
    """
    mscale, mscale_all_dim = float(rope.get("mscale", 1.0)), float(rope.get("mscale_all_dim", 0.0))
    if mscale_all_dim and not is_deepseek:
        why = "our attention multiplies the scores by its temperature, that of Dots1 does not; only 0 is computed here"
        raise get.refuse(f"{key}.mscale_all_dim", mscale_all_dim, why)
    if mscale_all_dim and not rope.get("mscale"):
        why = "without mscale transformers leaves it out of the factor of the rotated coordinates, which ours has"
        raise get.refuse(f"{key}.mscale_all_dim", mscale_all_dim, why)
    if mscale != 1 and not mscale_all_dim:
        why = "without mscale_all_dim transformers does not read it, while DeepSeek's code does; only 1.0 is certain"
        raise get.refuse(f"{key}.mscale", mscale, why)
    return mscale, mscale_all_dim
