"""The chunked cross-entropy against torch's."""

import math

import pytest
import torch
from torch.nn import functional as F

from models import loss as loss_module
from models.loss import IGNORE_INDEX, cross_entropy, linear_cross_entropy
from tests.tiny import relative_error


def random_case(shape: tuple[int, ...], vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (3 * torch.randn(*shape, vocab)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, shape)
    targets[torch.rand(shape) < 0.3] = IGNORE_INDEX
    return logits, targets


@pytest.mark.parametrize("chunk_elements", [1, 200, 1 << 17])
@pytest.mark.parametrize("shape", [(2, 9), (1, 1), (37,)])
def test_sum_and_gradient_equal_torch(shape, chunk_elements, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_elements)
    logits, targets = random_case(shape, 53, torch.float32)
    total, count = cross_entropy(logits, targets)
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert torch.allclose(total, expected, rtol=1e-6, atol=1e-6) and total.dtype == torch.float32
    assert int(count) == int((targets != IGNORE_INDEX).sum())
    (grad,) = torch.autograd.grad(total / 7, logits)
    (expected_grad,) = torch.autograd.grad(expected / 7, logits)
    if count:
        assert relative_error(grad, expected_grad) < 1e-6


def test_bf16_logits_are_exponentiated_in_fp32():
    logits, targets = random_case((64,), 4096, torch.bfloat16)
    total, _ = cross_entropy(logits, targets)
    (grad,) = torch.autograd.grad(total, logits)
    exact = logits.detach().float().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (expected_grad,) = torch.autograd.grad(expected, exact)
    assert torch.allclose(total, expected, rtol=1e-6)
    assert grad.dtype == torch.bfloat16 and relative_error(grad, expected_grad) < 3e-3


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    total, _ = cross_entropy(logits, torch.tensor([1, 0]))
    assert total.item() == pytest.approx(2e4 + math.log(3))
    total.backward()
    assert bool(logits.grad.isfinite().all())


def test_everything_ignored_gives_zero_and_no_gradient():
    logits = torch.randn(3, 5, requires_grad=True)
    total, count = cross_entropy(logits, torch.full((3,), IGNORE_INDEX))
    total.backward()
    assert total.item() == 0.0 and int(count) == 0
    assert logits.grad.count_nonzero() == 0


def test_ignored_rows_with_infinite_logits_do_not_spoil_the_rest():
    logits = torch.zeros(2, 4)
    logits[1, 2] = math.inf
    total, count = cross_entropy(logits, torch.tensor([3, IGNORE_INDEX]))
    assert total.item() == pytest.approx(math.log(4)) and int(count) == 1


def test_uniform_logits_cost_log_v_nats():
    total, count = cross_entropy(torch.zeros(2, 3, 17), torch.zeros(2, 3, dtype=torch.int64))
    assert (total / count).item() == pytest.approx(math.log(17), rel=1e-6)


def test_linear_cross_entropy_is_that_of_the_product():
    hidden, weight = torch.randn(2, 9, 6, requires_grad=True), torch.randn(31, 6, requires_grad=True)
    _, targets = random_case((2, 9), 31, torch.float32)
    actual, (expected, _) = linear_cross_entropy(hidden, weight, targets), cross_entropy(hidden @ weight.t(), targets)
    assert relative_error(actual, expected) < 1e-6
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (actual, expected)), strict=True):
        assert relative_error(a, b) < 1e-6


def test_no_tokens_cost_nothing():
    hidden, weight = torch.zeros(0, 6, requires_grad=True), torch.randn(31, 6, requires_grad=True)
    nats = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    grad_hidden, grad_weight = torch.autograd.grad(nats, (hidden, weight))
    assert nats.item() == 0.0 and grad_hidden.shape == (0, 6) and not grad_weight.any()
