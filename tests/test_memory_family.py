"""Whole models with every form of memory: causality, documents, gradients, recomputation; and the shuffled control."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.engram import EngramConfig
from models.ngram_hash import NgramHasher
from models.over_encoding import OverEncodingConfig
from models.transformer import ActivationCheckpointing, TransformerConfig
from tests.test_transformer import backward, logits_of
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model


def with_engram(**settings: object) -> TransformerConfig:
    engram = EngramConfig(**{"layers": [1], "num_hash_heads": 2, "d_memory": 24, "table_size": 23, **settings})
    return tiny_config("moe_engram", engram=engram)


OVER_ENCODING = OverEncodingConfig(num_hash_heads=2, d_memory=16, table_size=23)
FORMS = {
    "no_gate": with_engram(gate=False),
    "no_convolution": with_engram(kernel_size=0),
    "no_gate_no_convolution": with_engram(gate=False, kernel_size=0),
    "no_compression": with_engram(compress=False),
    "production": with_engram(max_ngram_size=4, kernel_size=0),
    "two_modules": with_engram(layers=[0, 2], d_memory=12),
    "over_encoding": tiny_config("moe", over_encoding=OVER_ENCODING),
    "over_encoding_dense": tiny_config("dense", over_encoding=replace(OVER_ENCODING, max_ngram_size=4, d_memory=24)),
}


def changed_at(token_ids: Tensor, position: int, vocab_size: int) -> Tensor:
    changed = token_ids.clone()
    changed[:, position] = (changed[:, position] + 1) % vocab_size
    return changed


@pytest.mark.parametrize("name", FORMS)
def test_a_changed_token_changes_nothing_before_it(name):
    cfg = FORMS[name]
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, _ = tiny_batch(cfg)
    document_ids = torch.zeros_like(token_ids)
    before = logits_of(model, memory, token_ids, document_ids)
    for position in (1, 7, cfg.seq_len - 1):
        after = logits_of(model, memory, changed_at(token_ids, position, cfg.vocab_size), document_ids)
        assert relative_error(after[:, :position], before[:, :position]) < 1e-6
        assert relative_error(after[:, position], before[:, position]) > 1e-3


@pytest.mark.parametrize("name", FORMS)
def test_nothing_crosses_a_document_boundary(name):
    cfg = FORMS[name]
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, boundary=9)
    before = logits_of(model, memory, token_ids, document_ids)
    for position in (0, 8):  # 8 is the last token of the first document
        after = logits_of(model, memory, changed_at(token_ids, position, cfg.vocab_size), document_ids)
        assert relative_error(after[:, 9:], before[:, 9:]) < 1e-6
        assert relative_error(after[:, 8], before[:, 8]) > 1e-4


@pytest.mark.parametrize("name", FORMS)
def test_every_parameter_and_row_gets_a_gradient_also_under_recomputation(name):
    cfg = FORMS[name]
    plain, gradients, row_gradients = backward(cfg)
    assert [key for key, grad in gradients.items() if grad is None or not bool(grad.abs().sum() > 0)] == []
    assert all(bool(grad.abs().sum() > 0) for grad in row_gradients.values())
    assert list(row_gradients) == cfg.memory.layers
    again, grads, rows = backward(replace(cfg, activation_checkpointing=ActivationCheckpointing.full))
    assert torch.equal(plain.logits, again.logits)
    assert all(torch.equal(gradients[key], grads[key]) for key in gradients)
    assert all(torch.equal(row_gradients[layer], rows[layer]) for layer in rows)


def test_a_module_without_a_gate_reports_none():
    assert backward(FORMS["no_gate"])[0].stats.gate_mean == {}
    assert list(backward(FORMS["two_modules"])[0].stats.gate_mean) == [0, 2]


SHUFFLED = {
    "engram": with_engram(shuffled=True),
    "over_encoding": tiny_config("moe", over_encoding=replace(OVER_ENCODING, shuffled=True)),
}


def straight(cfg: TransformerConfig) -> TransformerConfig:
    part = "engram" if cfg.engram is not None else "over_encoding"
    return replace(cfg, **{part: replace(cfg.memory, shuffled=False)})


@pytest.mark.parametrize("batch", [2, 3, 5])
@pytest.mark.parametrize("name", SHUFFLED)
def test_shuffled_rows_are_the_neighbours_and_the_same_rows_in_all(name, batch):
    cfg = SHUFFLED[name]
    token_ids, document_ids = tiny_batch(cfg, batch=batch)
    (ids,) = TinyMemory(cfg).row_ids(token_ids, document_ids).values()
    (own,) = TinyMemory(straight(cfg)).row_ids(token_ids, document_ids).values()
    assert all(torch.equal(ids[b], own[(b + 1) % batch]) for b in range(batch))
    assert not any(torch.equal(ids[b], own[b]) for b in range(batch))
    assert Counter(ids.flatten().tolist()) == Counter(own.flatten().tolist())


@pytest.mark.parametrize("name", SHUFFLED)
def test_what_a_sequence_reads_is_a_function_of_its_neighbour_alone(name):
    """Three sequences: 0 reads 1, 1 reads 2, 2 reads 0."""
    cfg = SHUFFLED[name]
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, batch=3)
    rows = memory.rows(token_ids, document_ids)
    (before,) = memory.row_ids(token_ids, document_ids).values()
    logits = logits_of(model, memory, token_ids, document_ids)

    other = token_ids.clone()
    other[1] = (other[1] + 17) % cfg.vocab_size
    (after,) = memory.row_ids(other, document_ids).values()
    assert torch.equal(after[1:], before[1:]) and not torch.equal(after[0], before[0])
    found = logits_of(model, memory, other, document_ids)
    assert relative_error(found[2], logits[2]) < 1e-6  # neither its text nor its neighbour's has changed
    with torch.no_grad():
        as_if = model(other, document_ids, rows).logits  # the rows that the old batch gave
    assert relative_error(found[1:], as_if[1:]) < 1e-6
    assert relative_error(found[0], as_if[0]) > 1e-3

    position = 7  # of the neighbour: what it changes lies at or behind it, and in its own document
    after = logits_of(model, memory, torch.cat((token_ids[:1], changed_at(token_ids[1:], position, 61))), document_ids)
    assert relative_error(after[0, :position], logits[0, :position]) < 1e-6
    assert relative_error(after[0, position], logits[0, position]) > 1e-4
    assert relative_error(after[0, 9:], logits[0, 9:]) < 1e-6


def test_a_sequence_alone_has_no_neighbour():
    cfg = SHUFFLED["engram"]
    hasher = NgramHasher(cfg.engram, torch.arange(61), pad_id=0)
    with pytest.raises(ValueError, match=r"this batch is one sequence; nearest: 2 .*train.micro_batch_size=2"):
        hasher(torch.zeros(1, 5, dtype=torch.int64))
