"""RMSNorm's short path against torch and against finite differences."""

import pytest
import torch
from torch.nn import functional as F

from models.norm import RMSNorm, rms_norm
from tests.tiny import relative_error


@pytest.mark.parametrize("shape", [(7,), (1, 1), (5, 3), (2, 9, 33), (2, 3, 4, 8)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_output_and_gradients_equal_torch(shape, scale):
    x = (scale * torch.randn(shape)).requires_grad_()
    weight = torch.randn(shape[-1:], requires_grad=True)
    upstream = torch.randn(shape)
    actual, expected = rms_norm(x, weight, 1e-6), F.rms_norm(x, shape[-1:], weight, 1e-6)
    assert relative_error(actual, expected) < 1e-6
    grads = torch.autograd.grad(actual, (x, weight), upstream)
    exact = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    out = F.rms_norm(exact[0], shape[-1:], exact[1], 1e-6)
    for grad, reference in zip(grads, torch.autograd.grad(out, exact, upstream.double()), strict=True):
        # with one coordinate the normalised value is a constant, whose gradient is all rounding
        assert relative_error(grad, reference) < 1e-5 or shape[-1] == 1


def test_bf16_input_keeps_its_type():
    norm = RMSNorm(16, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 16).to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    assert relative_error(norm(x), norm(x.float())) < 1e-2


def test_autocast_does_not_reach_into_the_norm():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    plain = torch.autograd.grad(rms_norm(x, weight, 1e-6).square().sum(), (x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        out = rms_norm(x, weight, 1e-6)
    assert out.dtype == torch.float32
    assert all(
        torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(out.square().sum(), (x, weight)), strict=True)
    )
