"""Every ablation of the Engram module against a float64 transcription of its equations, gradients included."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.engram import GATE_NORM_EPS, Engram, EngramConfig
from models.initialize import initialize
from tests.tiny import relative_error

TOLERANCE_FP32, TOLERANCE_FP64 = 1e-5, 1e-10  # relative norms per tensor, against the transcription in fp64
D_MODEL = 10
DOCUMENTS = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]])

# (gate, kernel_size, max_ngram_size, use_bias, branches)
FORMS = [
    *itertools.product((True, False), (0, 1, 4), (3,), (False,), (1, 4)),
    (True, 0, 4, False, 4),  # later production models: orders 2 to 4, no convolution
    (True, 4, 2, True, 2),
    (False, 0, 4, True, 1),
]


def make(gate: bool, kernel_size: int, max_ngram_size: int, use_bias: bool, branches: int) -> Engram:
    cfg = EngramConfig(
        max_ngram_size=max_ngram_size,
        num_hash_heads=2,
        d_memory=6 * (max_ngram_size - 1),
        table_size=11,
        kernel_size=kernel_size,
        gate=gate,
        use_bias=use_bias,
    )
    module = Engram(cfg, D_MODEL, layer=1, num_branches=branches)
    initialize(module, seed=0, init_std=0.5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("weight"):
                parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return module


def rms(vector: Tensor, eps: float) -> Tensor:
    return vector / (vector.square().mean() + eps).sqrt()


def transcription(
    cfg: EngramConfig, weights: dict[str, Tensor], hidden: Tensor, rows: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Eqs 3 to 6 position by position; `weights` by the module's parameter names."""
    batch, seq_len, branches, d_model = hidden.shape
    bias = weights.get("value_key.bias", torch.zeros(len(weights["value_key.weight"]), dtype=hidden.dtype))
    gated: dict[tuple[int, int, int], Tensor] = {}
    gates = []
    for b, t, j in itertools.product(range(batch), range(seq_len), range(branches)):
        projected = weights["value_key.weight"] @ rows[b, t].flatten() + bias
        gated[b, t, j] = projected[:d_model]
        if cfg.gate:
            key = rms(projected[(1 + j) * d_model : (2 + j) * d_model], GATE_NORM_EPS) * weights["key_norm"][j]
            query = rms(hidden[b, t, j], GATE_NORM_EPS) * weights["hidden_norm"][j]
            s = (key * query).sum() / math.sqrt(d_model)
            gates.append(1 / (1 + torch.exp(-s.sign() * s.abs().clamp_min(1e-6).sqrt())))
            gated[b, t, j] = gates[-1] * gated[b, t, j]
    update = []
    for b, t, j in itertools.product(range(batch), range(seq_len), range(branches)):
        out = gated[b, t, j]
        if cfg.kernel_size:
            mixed = torch.zeros(d_model, dtype=hidden.dtype)
            for back in range(cfg.kernel_size):
                source = t - back * cfg.max_ngram_size
                if source >= 0 and documents[b, source] == documents[b, t]:
                    normed = rms(gated[b, source, j], cfg.norm_eps) * weights["short_conv.norm"][j]
                    mixed = mixed + weights["short_conv.taps"][cfg.kernel_size - 1 - back, j] * normed
            out = mixed / (1 + torch.exp(-mixed)) + out
        update.append(out)
    return torch.stack(update).view_as(hidden), torch.stack(gates).view(hidden.shape[:3]) if cfg.gate else None


@pytest.mark.parametrize(("gate", "kernel_size", "max_ngram_size", "use_bias", "branches"), FORMS)
def test_every_form_equals_its_equations(gate, kernel_size, max_ngram_size, use_bias, branches):
    module = make(gate, kernel_size, max_ngram_size, use_bias, branches)
    num_rows = 2 * (max_ngram_size - 1)
    cfg = EngramConfig(
        max_ngram_size=max_ngram_size, num_hash_heads=2, d_memory=3 * num_rows, kernel_size=kernel_size, gate=gate
    )
    hidden = torch.randn(2, 11, branches, D_MODEL)
    rows = torch.randn(2, 11, num_rows, 3)
    single = module(hidden, rows, DOCUMENTS)
    module.double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    ours, theirs = ([tensor.double().requires_grad_() for tensor in (hidden, rows)] for _ in range(2))

    out = module(*ours, DOCUMENTS)
    update, gates = transcription(cfg, weights, *theirs, DOCUMENTS)
    assert (out.gate is None) == (gates is None) == (not gate)
    for found, tolerance in ((single, TOLERANCE_FP32), (out, TOLERANCE_FP64)):
        assert relative_error(found.update, update) < tolerance
        assert gates is None or relative_error(found.gate, gates) < tolerance

    # In fp64 alone: near similarity 0 the root's slope is 500, and a gradient in fp32 says more about its rounding.
    weight = torch.randn_like(update)
    (out.update * weight).sum().backward()
    (update * weight).sum().backward()
    assert relative_error(ours[1].grad, theirs[1].grad) < TOLERANCE_FP64
    for name, parameter in module.named_parameters():
        assert relative_error(parameter.grad, weights[name].grad) < TOLERANCE_FP64, name
    if gate:
        assert relative_error(ours[0].grad, theirs[0].grad) < TOLERANCE_FP64
    else:
        assert ours[0].grad is None and theirs[0].grad is None  # nothing is read from the hidden state


def test_parts_that_are_left_out_have_no_parameters():
    def names(**settings: object) -> set[str]:
        return {name for name, _ in Engram(EngramConfig(**settings), 8, layer=1).named_parameters()}

    whole = names()
    assert whole - names(kernel_size=0) == {"short_conv.norm", "short_conv.taps"}
    assert whole - names(gate=False) == {"key_norm", "hidden_norm"}
    assert names(gate=False, kernel_size=0) == {"value_key.weight"}
    assert Engram(EngramConfig(gate=False), 8, layer=1, num_branches=4).value_key.weight.shape == (8, 128)


def test_a_norm_without_convolution_is_refused():
    with pytest.raises(ValueError, match=r"norm_eps=1e-06 has no effect with model.engram.kernel_size=0.*1e-05"):
        EngramConfig(kernel_size=0, norm_eps=1e-6)
    assert replace(EngramConfig(norm_eps=1e-6), kernel_size=1).norm_eps == 1e-6
    with pytest.raises(ValueError, match=r"kernel_size=-1 must be at least 0; nearest: 0"):
        EngramConfig(kernel_size=-1)
