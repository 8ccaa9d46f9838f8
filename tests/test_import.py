"""Imported models against the Hugging Face models that wrote them, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, Dots1Config, Dots1ForCausalLM

from models import initialize as initialize_module
from models.transformer import Transformer
from scripts.import_hf import main
from tests.tiny import TinyMemory, relative_error
from train.config import load_config
from train.importing.build import import_model, open_origin
from train.importing.configuration import transformer_config
from train.importing.report import Report
from train.importing.source import SourceError
from train.start import load_weights

VOCAB = 320
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "n_shared_experts": 2,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "n_group": 3,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
LATENT = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "q_lora_rank": 9,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK_YARN = {**YARN, "beta_fast": 8.0, "mscale": 0.7, "mscale_all_dim": 1.3}
YARN_ZERO = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}  # says no more than YARN
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("deepseek", {"rope_parameters": DEEPSEEK_YARN}),
    "deepseek_plain_queries": ("deepseek", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_halves": ("deepseek", {"rope_interleave": False, "routed_scaling_factor": 1.0, "norm_topk_prob": False}),
    "deepseek_dense": ("deepseek", {"first_k_dense_replace": 3, "tie_word_embeddings": True}),
    "deepseek_all_groups": ("deepseek", {"n_group": 2, "topk_group": 2, "first_k_dense_replace": 0}),
    "dots": ("dots", {}),
    "dots_yarn": ("dots", {"rope_parameters": YARN_ZERO, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True}),
    "deepseek_yarn": ("deepseek", {"rope_parameters": {**YARN, "mscale": 1.0}, "first_k_dense_replace": 2}),
}


def make_theirs(name: str) -> DeepseekV3ForCausalLM | Dots1ForCausalLM:
    """A random model; what starts at zero or one is moved off it, so that it matters."""
    kind, changes = MODELS[name]
    if kind == "deepseek":
        model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SHAPE, **LATENT, **changes}))
    else:
        model = Dots1ForCausalLM(Dots1Config(**{**SHAPE, **GROUPED, **changes}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif key.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.15, generator=generator)
    return model.eval()


def imported(folder: Path) -> Transformer:
    """The model of an import, as a run would start from it."""
    model = Transformer(load_config(folder / "config.yaml").model)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    load_weights(folder, None, model, {})
    return model


def logits(model: Transformer, token_ids: Tensor) -> Tensor:
    document_ids = torch.zeros_like(token_ids)
    result = model(token_ids, document_ids, TinyMemory(model.cfg).rows(token_ids, document_ids)).logits
    assert result is not None
    return result.detach()


def tokens(length: int = 80) -> Tensor:
    return torch.randint(0, VOCAB, (2, length), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per model: every other one in many small files, the rest in one."""
    root = tmp_path_factory.mktemp("huggingface")
    for number, name in enumerate(MODELS):
        make_theirs(name).save_pretrained(root / name, max_shard_size="15KB" if number % 2 == 0 else "1GB")
    return root


def copy_of(saved: Path, name: str, to: Path) -> Path:
    shutil.copytree(saved / name, to)
    return to


def change_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


def change_weights(folder: Path, **changes: Any) -> None:
    """Rewrite `model.safetensors`: a tensor under a name adds or replaces it, None removes it."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_hugging_face(saved: Path, tmp_path: Path, name: str) -> None:
    is_sharded = (saved / name / "model.safetensors.index.json").is_file()
    assert is_sharded == (list(MODELS).index(name) % 2 == 0)
    import_model(saved / name, tmp_path / "to")
    expected = make_theirs(name)(input_ids=tokens()).logits
    assert relative_error(logits(imported(tmp_path / "to"), tokens()), expected) < 1e-5


@torch.no_grad()
def test_one_file_and_many_give_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    make_theirs("dots").save_pretrained(tmp_path / "many", max_shard_size="15KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert (saved / "dots" / "model.safetensors").is_file() != (tmp_path / "many" / "model.safetensors").is_file()
    for source, to in ((saved / "dots", "a"), (tmp_path / "many", "b")):
        import_model(source, tmp_path / to)
    first, second = (imported(tmp_path / to).state_dict() for to in "ab")
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@torch.no_grad()
def test_stacked_experts_and_half_precision(saved: Path, tmp_path: Path) -> None:
    """The other spelling, as transformers 5 holds experts in memory; bf16 values arrive as they are."""
    folder = copy_of(saved, "deepseek_plain_queries", tmp_path / "stacked")
    theirs = make_theirs("deepseek_plain_queries")
    state = {key: tensor.bfloat16() for key, tensor in theirs.state_dict().items()}
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in state)
    save_file(state, folder / "model.safetensors")
    report = import_model(folder, tmp_path / "to")
    theirs.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    model = imported(tmp_path / "to")
    assert relative_error(logits(model, tokens()), theirs(input_ids=tokens()).logits) < 1e-5
    assert torch.equal(model.embedding.weight, state["model.embed_tokens.weight"].float())
    check_account(report, model, folder)


@torch.no_grad()
def test_both_spellings_of_yarn(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, "deepseek", tmp_path / "old")
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    old = {**settings, "rope_theta": theta, "rope_scaling": {**rope, "type": kind}}
    new = json.loads((saved / "deepseek" / "config.json").read_text())
    first, second = (transformer_config(settings, "config.json")[0] for settings in (old, new))
    assert first == second and first.rotary.yarn is not None
    (folder / "config.json").write_text(json.dumps(old))
    import_model(folder, tmp_path / "to")
    expected = make_theirs("deepseek")(input_ids=tokens()).logits
    assert relative_error(logits(imported(tmp_path / "to"), tokens()), expected) < 1e-5


def check_account(report: Report, model: Transformer, source: Path) -> None:
    """Every tensor of either side once, with its size."""
    own = {tensor.name: tensor.parameters for tensor in report.own}
    assert len(own) == len(report.own)
    tables = {name: count for name, count in own.items() if name.startswith("memory table")}
    assert {name: tensor.numel() for name, tensor in model.state_dict().items()} | tables == own
    shapes = {key: t.shape for file in source.glob("*.safetensors") for key, t in load_file(file).items()}
    used = [name for tensor in report.own for name in tensor.sources] + [tensor.name for tensor in report.ignored]
    assert sorted(used) == sorted(shapes)
    assert all(tensor.parameters == shapes[tensor.name].numel() for tensor in report.ignored)
    assert all((tensor.sources == []) == (tensor.fate.value == "new") for tensor in report.own)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_accounted_for_and_filled_once(saved: Path, tmp_path: Path, name: str) -> None:
    report = import_model(saved / name, tmp_path / "to", engram="tiny_engram")
    model = imported(tmp_path / "to")
    check_account(report, model, saved / name)
    written = json.loads((tmp_path / "to" / "import_report.json").read_text())
    assert written["parameters"]["new"] == sum(t["parameters"] for t in written["new"]) > 0
    assert sum(written["parameters"].values()) == sum(tensor.parameters for tensor in report.own)
    filled = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items()}
    for part in open_origin(saved / name).parts:
        filled[part.target][part.region] += 1
    assert {key for key, count in filled.items() if not bool((count == 1).all())} == {
        tensor.name for tensor in report.own if tensor.fate.value == "new" and tensor.name in filled
    }


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deepseek", []),
        ("deepseek", ["model.engram.gate=false"]),
        ("dots", ["model.engram.layers=[0,2]", "model.engram.kernel_size=0", "model.engram.max_ngram_size=2"]),
        ("dots", ["model.engram.use_bias=true"]),
    ],
)
def test_a_new_memory_changes_nothing_and_learns(saved: Path, tmp_path: Path, name: str, words: list[str]) -> None:
    import_model(saved / name, tmp_path / "plain")
    import_model(saved / name, tmp_path / "memory", engram="tiny_engram", words=[*words, "model.engram.table_size=97"])
    model, token_ids = imported(tmp_path / "memory"), tokens(32)
    assert torch.equal(logits(model, token_ids), logits(imported(tmp_path / "plain"), token_ids))
    memory, document_ids = TinyMemory(model.cfg), torch.zeros_like(token_ids)
    assert model.cfg.engram is not None
    with torch.enable_grad():
        for step in range(2):
            rows = memory.rows(token_ids, document_ids)
            nats = model(token_ids, document_ids, rows, token_ids).nats
            assert nats is not None
            model.zero_grad()
            nats.backward()
            for layer in model.cfg.engram.layers:
                projection = model.blocks[layer].engram.value_key.weight
                width = model.cfg.d_model
                assert bool(projection.grad[:width].abs().sum() > 0)
                assert bool(projection.grad[width:].abs().sum() > 0) == (step > 0 and model.cfg.engram.gate)
                assert bool(rows[layer].grad.abs().sum() > 0) == (step > 0)
                projection.data[:width] -= 1e-2 * projection.grad[:width].sign()


def test_only_what_is_new_is_drawn(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the values that a fresh model of the same seed has."""
    drawn, fill_normal = [], initialize_module._fill_normal
    monkeypatch.setattr(
        initialize_module, "_fill_normal", lambda *args: (drawn.append(args[-1]), fill_normal(*args))[1]
    )
    import_model(saved / "dots", tmp_path / "to", engram="tiny_engram", words=["model.engram.layers=[1]", "seed=7"])
    assert drawn == ["blocks.1.engram.value_key.weight"]
    model = imported(tmp_path / "to")
    fresh = Transformer(model.cfg)
    initialize_module.initialize(fresh, 7)
    width = model.cfg.d_model
    for (name, ours), expected in zip(model.named_parameters(), fresh.parameters(), strict=True):
        if name == "blocks.1.engram.value_key.weight":
            assert torch.equal(ours[width:], expected[width:]) and not ours[:width].any()
        else:
            assert torch.equal(ours, expected) == (".engram." in name), name


def test_what_our_model_lacks_is_left_out_and_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, "deepseek_plain_queries", tmp_path / "from")
    extra = {"model.layers.3.eh_proj.weight": torch.ones(24, 48), "model.layers.3.enorm.weight": torch.ones(24)}
    change_weights(folder, **extra, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    change_config(folder, rms_norm_eps=1e-5, attention_dropout=0.1, something_new=7)
    report = import_model(folder, tmp_path / "to")
    check_account(report, imported(tmp_path / "to"), folder)
    assert [(t.name, t.parameters) for t in report.ignored] == [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", 2),
        ("model.layers.3.eh_proj.weight", 24 * 48),
        ("model.layers.3.enorm.weight", 24),
    ]
    notes = "\n".join(report.notes)
    assert all(text in notes for text in ("rms_norm_eps=1e-05", "attention_dropout=0.1", "something_new", "tokenizer"))


EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({EXPERT: None}, rf"missing \['{EXPERT}'\] \(1\)"),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)},
            r"surplus \['model.layers.0.self_attn.q_proj.bias'\]",
        ),
        ({EXPERT: torch.ones(16, 23)}, rf"{EXPERT} has shape \(16, 23\), its configuration implies \(16, 24\)"),
        ({EXPERT: torch.full((16, 24), float("nan"))}, rf"{EXPERT} holds values that are not finite"),
        ({EXPERT: torch.ones(16, 24, dtype=torch.float8_e4m3fn)}, rf"{EXPERT} is of type F8_E4M3.*fp8_cast_bf16"),
        ({EXPERT: torch.ones(16, 24, dtype=torch.float64)}, rf"{EXPERT} is of type F64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = copy_of(saved, "dots", tmp_path / "from")
    change_weights(folder, **changes)
    with pytest.raises(SourceError, match=message):
        import_model(folder, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    sharded = copy_of(saved, "deepseek", tmp_path / "sharded")
    victim = sorted(sharded.glob("model-*.safetensors"))[2]
    whole, index = victim.read_bytes(), (sharded / "model.safetensors.index.json").read_text()

    def refused(message: str) -> None:
        with pytest.raises(SourceError, match=message):
            import_model(sharded, tmp_path / "to")
        assert not (tmp_path / "to").exists()

    victim.write_bytes(whole[:-5])
    refused(f"{victim.name} is no whole safetensors file")
    victim.write_bytes(whole[:8] + b"}" + whole[9:])
    refused(f"{victim.name} is no whole safetensors file")
    victim.unlink()
    refused(f"names {victim.name}, which is not in")
    shutil.copy(sorted(sharded.glob("model-*.safetensors"))[0], victim)
    refused(r"lies in model-.* and in")
    victim.write_bytes(whole)
    file = json.loads(index)
    first = "model.norm.weight"  # not alone in its file
    del file["weight_map"][first]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(file))
    refused(f"{first} is in the files, but not in the index")
    file["weight_map"][first] = "../sharded/" + victim.name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(file))
    refused(r"names ../sharded/.*, which is not in")
    (sharded / "model.safetensors.index.json").write_text(index[:-20])
    refused(r"index.json is no index of safetensors files")


def test_pickled_weights_are_not_read(saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, "dots", tmp_path / "from")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pytorch_model.bin: pickled weights .* convert them to safetensors"):
        import_model(folder, tmp_path / "to")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match=r"neither model.safetensors nor"):
        import_model(folder, tmp_path / "to")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.norm_eps=1e-5"], r"model.norm_eps: 1e-06 -> 1e-05 would change what the loaded weights compute"),
        (["model.num_layers=2"], r"model.num_layers: 3 -> 2"),
        (["model.seq_len=512"], r"model.seq_len=512 is longer than .*nearest: 256"),
        (["model.nothing=1"], r"there is no setting model.nothing"),
        (["model.engram.layers=[7]"], r"model.engram.layers=\[7\] must lie in 0..2"),
    ],
)
def test_only_free_settings_may_differ(saved: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_model(saved / "dots", tmp_path / "to", engram="tiny_engram", words=words)


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = tmp_path / "memory.yaml"
    overrides.write_text("engram: {layers: [0, 2], table_size: 31}\nseq_len: 64\n")
    arguments = [str(saved / "dots"), str(tmp_path / "to"), "--model-overrides", str(overrides), "optim.lr=1e-4"]
    assert main(arguments) == 0
    assert "experts stacked" in (printed := capsys.readouterr().out) and "make continue FROM=" in printed
    config = load_config(tmp_path / "to" / "config.yaml")
    assert config.model.engram is not None and config.model.engram.layers == [0, 2] and config.model.seq_len == 64
    assert config.optim.lr == 1e-4 and config.init_from == str(tmp_path / "to")
    assert config.optim.muon_lr == pytest.approx(2e-2 * 2.2e-5 / 3e-3)  # no fresh model's rate either
    assert main(arguments) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    overrides.write_text("- engram")
    assert main([str(saved / "dots"), str(tmp_path / "b"), "--model-overrides", str(overrides)]) == 2
    assert "holds no settings of a model" in capsys.readouterr().err
    assert main([str(saved / "dots"), str(tmp_path / "b"), "--engram", "tiny"]) == 2
    assert "--engram=tiny has no engram" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "b")]) == 2
    assert "has neither config.json" in capsys.readouterr().err
