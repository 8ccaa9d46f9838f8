"""What an import reads from config.json: transformers' defaults, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, Dots1Config

from tests.test_import import DEEPSEEK_YARN, GROUPED, LATENT, SHAPE, YARN
from train.importing.build import import_model
from train.importing.configuration import UnsupportedModelError, rope_is_interleaved, transformer_config

CONFIGS = {
    "deepseek": DeepseekV3Config(**SHAPE, **LATENT, architectures=["DeepseekV3ForCausalLM"]),
    "dots": Dots1Config(**SHAPE, **GROUPED, architectures=["Dots1ForCausalLM"]),
}


@pytest.mark.parametrize(
    "config",
    [
        DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]),
        Dots1Config(
            architectures=["Dots1ForCausalLM"], n_shared_experts=2, n_routed_experts=128, num_experts_per_tok=6
        ),
    ],
)
def test_what_a_file_leaves_out_is_what_transformers_takes(config: DeepseekV3Config | Dots1Config) -> None:
    """Every setting alone: it is asked for, or without it the shape is that of transformers' default."""
    full = config.to_dict()
    expected, _ = transformer_config(full, "config.json")
    asked_for = set()
    for name in full.keys() - {"architectures"}:
        rest = {key: value for key, value in full.items() if key != name}
        try:
            assert transformer_config(rest, "config.json")[0] == expected, name
            assert rope_is_interleaved(rest) == rope_is_interleaved(full), name
        except UnsupportedModelError as error:
            assert f"{name}=None must be a whole number" in str(error)
            asked_for.add(name)
    assert {"hidden_size", "n_routed_experts", "max_position_embeddings"} <= asked_for
    assert {"first_k_dense_replace", "norm_topk_prob", "rope_parameters", "q_lora_rank"}.isdisjoint(asked_for)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "deepseek",
            {"architectures": ["LlamaForCausalLM"]},
            r"architectures=\['LlamaForCausalLM'\].*Dots1ForCausalLM",
        ),
        ("deepseek", {"attention_bias": True}, r"attention_bias=True is not supported: our attention has no biases"),
        ("deepseek", {"hidden_act": "gelu"}, r"hidden_act='gelu' .*only 'silu'"),
        ("deepseek", {"scoring_func": "softmax"}, r"scoring_func='softmax'"),
        ("deepseek", {"quantization_config": {"quant_method": "fp8"}}, r"quantization_config=.*convert .* to bf16"),
        ("deepseek", {"num_key_value_heads": 1}, r"num_key_value_heads=1"),
        ("deepseek", {"kv_lora_rank": None}, r"kv_lora_rank=None must be a whole number"),
        ("deepseek", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, r"rope_type='linear'"),
        ("deepseek", {"rope_parameters": {**YARN, "attention_factor": 1.1}}, r"attention_factor=1.1"),
        (
            "deepseek",
            {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}},
            r"config.json: rope_parameters.mscale_all_dim=1.0 .*without mscale",
        ),
        (
            "deepseek",
            {"rope_parameters": {**YARN, "mscale": 0, "mscale_all_dim": 1.0}},
            r"rope_parameters.mscale_all_dim=1.0 .*without mscale",
        ),
        ("deepseek", {"rope_parameters": {**YARN, "mscale": 0.7}}, r"rope_parameters.mscale=0.7 .*only 1.0 is certain"),
        ("dots", {"rope_parameters": {**YARN, "mscale": 0.7}}, r"rope_parameters.mscale=0.7 .*only 1.0 is certain"),
        ("dots", {"rope_parameters": DEEPSEEK_YARN}, r"rope_parameters.mscale_all_dim=1.3 .*Dots1.*only 0 is computed"),
        (
            "dots",
            {"rope_parameters": None, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
            r"rope_scaling.mscale_all_dim=1.0 .*Dots1.*only 0 is computed",
        ),
        ("dots", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, r"layers \[1\]"),
        ("dots", {"layer_types": None, "max_window_layers": 2}, r"sliding_attention in layers \[2\]"),
    ],
)
def test_settings_that_we_cannot_compute_are_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    given = json.loads(CONFIGS[name].to_json_string(use_diff=False))
    (tmp_path / "config.json").write_text(json.dumps({**given, **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        import_model(tmp_path, tmp_path / "to")
    assert not (tmp_path / "to").exists()
