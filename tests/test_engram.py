"""The Engram module against the official demonstration code's numbers, and its own rules."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from models.engram import GATE_NORM_EPS, Engram, EngramConfig, ShortConv
from models.initialize import initialize
from models.kernels.gate import signed_sqrt_gate
from models.ngram_hash import layer_multipliers, ngram_row_ids, prime_table_sizes
from tests.tiny import relative_error

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # relative norm per tensor


def load(name: str) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(GOLDEN / f"engram_trigram_{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def config_of(golden: dict) -> EngramConfig:
    orders = golden["max_ngram_size"] - 1
    return EngramConfig(
        layers=golden["layer_ids"],
        max_ngram_size=golden["max_ngram_size"],
        num_hash_heads=golden["n_head_per_ngram"],
        d_memory=golden["n_embed_per_ngram"] * orders,
        kernel_size=golden["kernel_size"],
        hash_seed=golden["seed"],
        use_bias=True,
    )


def names_in_golden(branches: int) -> dict[str, list[str]]:
    """Our parameter -> the golden parameters it is made of."""
    keys = [f"key_projs.{j}" for j in range(branches)]
    return {
        "value_key.weight": ["value_proj.weight"] + [f"{key}.weight" for key in keys],
        "value_key.bias": ["value_proj.bias"] + [f"{key}.bias" for key in keys],
        "key_norm": [f"norm1.{j}.weight" for j in range(branches)],
        "hidden_norm": [f"norm2.{j}.weight" for j in range(branches)],
        "short_conv.norm": [f"short_conv.norms.{j}.weight" for j in range(branches)],
        "short_conv.taps": ["short_conv.conv.weight"],
    }


def in_our_layout(name: str, parts: list[Tensor], branches: int, d_model: int) -> Tensor:
    if name.startswith("value_key"):
        return torch.cat(parts)
    if name == "short_conv.taps":  # (J * D, 1, w) -> (w, J, D)
        return parts[0][:, 0].t().reshape(-1, branches, d_model)
    return torch.stack(parts)


def golden_row_ids(golden: dict, tensors: dict[str, Tensor], layer: int) -> Tensor:
    sizes = prime_table_sizes(golden["engram_vocab_size"], golden["n_head_per_ngram"], golden["layer_ids"])
    multipliers = layer_multipliers(golden["seed"], layer, golden["max_ngram_size"], golden["compressed_vocab"])
    compressed = tensors["lookup_table"][tensors["input_ids"]]
    pad_id = int(tensors["lookup_table"][golden["pad_id"]])
    return ngram_row_ids(compressed, None, torch.from_numpy(multipliers), sizes[layer], pad_id)


@pytest.mark.parametrize("name", ["hc1", "hc4"])
def test_integers_equal_the_official_code(name):
    golden, tensors = load(name)
    sizes = prime_table_sizes(golden["engram_vocab_size"], golden["n_head_per_ngram"], golden["layer_ids"])
    for layer in golden["layer_ids"]:
        multipliers = layer_multipliers(golden["seed"], layer, golden["max_ngram_size"], golden["compressed_vocab"])
        assert multipliers.tolist() == tensors[f"multipliers.layer{layer}"].tolist()
        assert sizes[layer] == tensors[f"table_sizes.layer{layer}"].tolist()
        primes = tensors[f"table_sizes.layer{layer}"].flatten()
        offsets = primes.cumsum(0) - primes
        expected = tensors[f"hash_ids.layer{layer}"] + offsets
        assert torch.equal(golden_row_ids(golden, tensors, layer), expected)


@pytest.mark.parametrize("name", ["hc1", "hc4"])
def test_output_and_gradients_equal_the_official_code(name):
    golden, tensors = load(name)
    branches, d_model = golden["hc_mult"], golden["hidden_size"]
    module = Engram(config_of(golden), d_model, golden["module_layer"], branches)
    sources = names_in_golden(branches)
    assert set(sources) == {key for key, _ in module.named_parameters()}
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parts = [tensors[f"param.{part}"] for part in sources[key]]
            parameter.copy_(in_our_layout(key, parts, branches, d_model))

    row_ids = golden_row_ids(golden, tensors, golden["module_layer"])
    table = tensors["param.multi_head_embedding.embedding.weight"]
    rows = table[row_ids].requires_grad_()
    hidden = tensors["hidden_states"].clone().requires_grad_()
    output = module(hidden, rows).update
    assert relative_error(output, tensors["output"]) <= TOLERANCE

    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert relative_error(hidden.grad, tensors["grad.hidden_states"]) <= TOLERANCE
    for key, parameter in module.named_parameters():
        parts = [tensors[f"grad.{part}"] for part in sources[key]]
        expected = in_our_layout(key, parts, branches, d_model)
        assert relative_error(parameter.grad, expected) <= TOLERANCE, key

    table_grad = torch.zeros_like(table)
    for index, row in enumerate(row_ids.flatten().tolist()):
        table_grad[row] += rows.grad.view(-1, table.shape[1])[index]
    assert relative_error(table_grad.sum(1), tensors["grad_rowsum.embedding"]) <= TOLERANCE


def make(cfg: EngramConfig, d_model: int, branches: int) -> Engram:
    module = Engram(cfg, d_model, layer=1, num_branches=branches)
    initialize(module, seed=0, init_std=0.5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm"):
                parameter.normal_(1, 0.3)
            if name.endswith("taps"):
                parameter.normal_(0, 0.5)
    return module


@torch.no_grad()
def brute_force(module: Engram, hidden: Tensor, rows: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Eqs 3 to 6 position by position, in fp64."""
    hidden, rows = hidden.double(), rows.double()
    batch, seq_len, branches, d_model = hidden.shape
    weight = module.value_key.weight.double()
    conv = module.short_conv

    def norm(vector: Tensor, scale: Tensor, eps: float) -> Tensor:
        return vector / (vector.square().mean() + eps).sqrt() * scale.double()

    values, gates = torch.zeros_like(hidden), torch.zeros(batch, seq_len, branches, dtype=torch.float64)
    for b in range(batch):
        for t in range(seq_len):
            projected = weight @ rows[b, t].flatten()
            for j in range(branches):
                key = norm(projected[(1 + j) * d_model : (2 + j) * d_model], module.key_norm[j], GATE_NORM_EPS)
                query = norm(hidden[b, t, j], module.hidden_norm[j], GATE_NORM_EPS)
                s = float(query @ key) / math.sqrt(d_model)
                gates[b, t, j] = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(s), 1e-6)), s)))
                values[b, t, j] = gates[b, t, j] * projected[:d_model]
    update = torch.zeros_like(hidden)
    for b in range(batch):
        for t in range(seq_len):
            for j in range(branches):
                mixed = torch.zeros(d_model, dtype=torch.float64)
                for back in range(conv.kernel_size):
                    source = t - back * conv.dilation
                    if source >= 0 and document_ids[b, source] == document_ids[b, t]:
                        tap = conv.taps[conv.kernel_size - 1 - back, j].double()
                        mixed += tap * norm(values[b, source, j], conv.norm[j], conv.eps)
                update[b, t, j] = F.silu(mixed) + values[b, t, j]
    return update, gates


@pytest.mark.parametrize(("branches", "kernel_size"), [(1, 4), (3, 2), (2, 1)])
def test_module_with_documents_equals_a_loop_over_positions(branches, kernel_size):
    cfg = EngramConfig(max_ngram_size=2, num_hash_heads=3, d_memory=12, table_size=11, kernel_size=kernel_size)
    module = make(cfg, d_model=8, branches=branches)
    hidden, rows = torch.randn(2, 9, branches, 8), torch.randn(2, 9, 3, 4)
    document_ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [5, 5, 6, 6, 6, 6, 6, 6, 6]])
    out = module(hidden, rows, document_ids)
    update, gate = brute_force(module, hidden, rows, document_ids)
    assert relative_error(out.update, update) < 1e-5
    assert relative_error(out.gate, gate) < 1e-5


def test_branches_are_independent_and_share_the_value():
    cfg = EngramConfig(max_ngram_size=2, num_hash_heads=2, d_memory=8, table_size=11)
    module = make(cfg, d_model=8, branches=2)
    single = Engram(cfg, 8, layer=1, num_branches=1)
    with torch.no_grad():
        single.value_key.weight.copy_(torch.cat((module.value_key.weight[:8], module.value_key.weight[16:24])))
        for target, source in ((single, module), (single.short_conv, module.short_conv)):
            for name, parameter in target.named_parameters(recurse=False):
                branch = getattr(source, name)
                parameter.copy_(branch[:, 1:] if name == "taps" else branch[1:])
    hidden, rows = torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 4)
    whole, part = module(hidden, rows), single(hidden[:, :, 1:], rows)
    assert relative_error(whole.update[:, :, 1:], part.update) < 1e-6


def test_zero_taps_leave_gate_times_value():
    cfg = EngramConfig(max_ngram_size=2, num_hash_heads=2, d_memory=8, table_size=11)
    module = Engram(cfg, 8, layer=1)
    initialize(module, seed=0, init_std=0.5)
    hidden, rows = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 2, 4)
    out = module(hidden, rows)
    value = rows.flatten(2) @ module.value_key.weight[:8].t()
    assert torch.allclose(out.update[:, :, 0], out.gate * value, atol=1e-6)


def test_convolution_equals_torch_without_documents():
    cfg = EngramConfig(max_ngram_size=3, num_hash_heads=2, d_memory=8, table_size=11, kernel_size=4)
    conv = ShortConv(cfg, d_model=6, num_branches=2)
    with torch.no_grad():
        conv.norm.normal_(1, 0.2)
        conv.taps.normal_()
    values = torch.randn(2, 15, 2, 6)
    normed = F.rms_norm(values, (6,), eps=cfg.norm_eps) * conv.norm
    weight = conv.taps.flatten(1).t()[:, None]  # (J * D, 1, w)
    padded = F.pad(normed.flatten(2).transpose(1, 2), (9, 0))
    expected = F.silu(F.conv1d(padded, weight, groups=12, dilation=3)).transpose(1, 2).view_as(values) + values
    assert relative_error(conv(values, None), expected) < 1e-6


def test_gate_at_known_points():
    s = torch.tensor([0.0, 4.0, -4.0, 1e-9, -1e-9])
    expected = [0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2)), 1 / (1 + math.exp(-1e-3)), 1 / (1 + math.exp(1e-3))]
    assert signed_sqrt_gate(s).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_memory": 100}, r"d_memory=100 must be a positive multiple of .* = 8; nearest: 96"),
        ({"layers": []}, r"layers=\[\] must name at least one layer"),
        ({"layers": [1, 1]}, r"each once"),
        ({"max_ngram_size": 1}, r"max_ngram_size=1 must be at least 2"),
        ({"table_size": 0}, r"table_size=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        EngramConfig(**settings)
