"""OverEncoding against Python: hashes of integers, averages term by term."""

import itertools
from dataclasses import replace

import pytest
import torch

from models.memory_table import LocalTable
from models.ngram_hash import NgramHasher, layer_multipliers, num_rows, table_sizes
from models.over_encoding import OverEncoding, OverEncodingConfig
from models.transformer import Transformer
from scripts.params import model_config
from tests.test_ngram_hash import brute_force
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model
from train.optim import OptimConfig, OptimizerKind, parameter_groups


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("max_ngram_size", "num_hash_heads"), [(3, 2), (2, 1), (4, 3)])
def test_the_input_equals_averages_of_rows_found_by_python_integers(max_ngram_size, num_hash_heads, compress):
    num_row = (max_ngram_size - 1) * num_hash_heads
    cfg = OverEncodingConfig(max_ngram_size, num_hash_heads, 5 * num_row, table_size=13, hash_seed=4, compress=compress)
    compression = torch.arange(40) // 2
    hasher = NgramHasher(cfg, compression, pad_id=7)
    token_ids = torch.randint(0, 40, (2, 9))
    documents = torch.tensor([[0] * 4 + [1] * 5, [3] * 8 + [4]])
    table = LocalTable(num_rows(cfg)[0], cfg.row_dim, 1.0, seed=0)
    embedding = torch.randn(40, 6)
    module = OverEncoding(cfg, d_model=6)
    torch.nn.init.normal_(module.projection.weight)
    row_ids = hasher(token_ids, documents)
    assert list(row_ids) == cfg.layers == [0]
    rows = table.lookup(row_ids[0])
    out = module(embedding[token_ids], rows)

    key_of = compression.tolist() if compress else list(range(40))
    multipliers = layer_multipliers(4, 0, max_ngram_size, max(key_of) + 1).tolist()
    keys = [[key_of[i] for i in line] for line in token_ids.tolist()]
    expected_ids = brute_force(keys, documents.tolist(), multipliers, table_sizes(cfg)[0], key_of[7])
    assert row_ids[0].tolist() == expected_ids

    weight, rows_of = module.projection.weight.double(), table.weight.double()
    row_grad = torch.zeros_like(rows_of)
    signs = torch.randn(2, 9, 6).double()
    for b, t in itertools.product(range(2), range(9)):
        terms = [embedding[token_ids[b, t]].double()]
        for place, row in enumerate(expected_ids[b][t]):
            own = weight[:, place * 5 : (place + 1) * 5]  # W of this order and head
            terms.append(own @ rows_of[row])
            row_grad[row] += own.t() @ signs[b, t] / (1 + num_row)
        assert relative_error(out[b, t], sum(terms) / len(terms)) < 1e-5
    (out * signs.float()).sum().backward()
    table.accumulate(row_ids[0], rows.grad)
    merged = torch.zeros_like(row_grad)
    merged[table.pending_rows()] = table._gradient.merged()[1].double()
    assert relative_error(merged, row_grad) < 1e-5


@pytest.mark.parametrize("preset", ["tiny_over_encoding", "tiny_arm_over_encoding"])
def test_the_averaged_state_of_the_presets_starts_at_the_scale_of_tiny(preset):
    cfg = model_config(preset, []).model
    embedding = torch.randn(1, 256, cfg.d_model) * cfg.embedding_init_std
    module = OverEncoding(cfg.over_encoding, cfg.d_model)
    averaged = module(embedding, torch.zeros(1, 256, cfg.over_encoding.num_rows_per_token, cfg.over_encoding.row_dim))
    assert averaged.std().item() == pytest.approx(model_config("tiny", []).model.embedding_init_std, rel=0.05)


def over_encoded(kind: str = "moe"):
    return tiny_config(kind, over_encoding=OverEncodingConfig(num_hash_heads=2, d_memory=16, table_size=23))


def test_a_model_with_it_is_the_model_without_it_on_another_embedding():
    cfg = over_encoded()
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    plain = Transformer(replace(cfg, over_encoding=None))
    token_ids, document_ids = tiny_batch(cfg)
    rows = memory.rows(token_ids, document_ids)
    inputs = model.over_encoding(model.embedding(token_ids), rows[0])
    shared = {name: p for name, p in model.state_dict().items() if not name.startswith("over_encoding.")}
    plain.load_state_dict(shared)
    plain.embedding = torch.nn.Embedding.from_pretrained(inputs.detach().flatten(0, 1))
    as_ids = torch.arange(token_ids.numel()).view_as(token_ids)
    with torch.no_grad():
        expected, found = plain(as_ids, document_ids).logits, model(token_ids, document_ids, rows).logits
    assert torch.equal(expected, found)
    assert set(shared) == set(Transformer(replace(cfg, over_encoding=None)).state_dict())


@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_the_projection_is_a_matrix(kind):
    groups = parameter_groups(tiny_model(over_encoded()), OptimConfig(kind=kind))
    (group,) = (g for g in groups if "over_encoding.projection.weight" in dict(g.parameters))
    assert (group.name, group.use_muon) == ("matrices", kind is OptimizerKind.muon)


def test_rows_are_asked_for_under_the_key_0():
    model = tiny_model(over_encoded())
    token_ids, document_ids = tiny_batch(model.cfg)
    with pytest.raises(ValueError, match=r"holds layers \[\], model.over_encoding.layers asks for \[0\]"):
        model(token_ids, document_ids)
    rows = torch.zeros(2, 24, 4, 4)
    with pytest.raises(ValueError, match=r"holds layers \[1\], model.over_encoding.layers asks for \[0\]"):
        model(token_ids, document_ids, {1: rows})


def test_not_beside_engram():
    with pytest.raises(ValueError, match=r"model.engram and model.over_encoding are both set.*set one of them to null"):
        tiny_config("moe_engram", over_encoding=OverEncodingConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_memory": 100}, r"over_encoding.d_memory=100 must be a positive multiple of .* = 8; nearest: 96"),
        ({"max_ngram_size": 1}, r"over_encoding.max_ngram_size=1 must be at least 2"),
        ({"table_size": 0}, r"over_encoding.table_size=0 must be at least 1; nearest: 1"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        OverEncodingConfig(**settings)
