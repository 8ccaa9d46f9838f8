"""The C kernels of residual streams against plain torch: outputs and every gradient, at odd sizes too."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models import native
from models.hyper_connections import HyperConnection, HyperConnectionsConfig, write
from models.stream_kernels import MOST_STREAMS, streams_available
from models.transformer import ActivationCheckpointing, TransformerConfig
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model

TOLERANCE = 2e-5  # relative norm per tensor; both sides round in fp32


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    threads = torch.get_num_threads()
    native.use(native.Level.elementwise)
    yield
    native.use(native.Level.off)
    torch.set_num_threads(threads)


def results(connection: HyperConnection, streams: Tensor, update: Tensor, level: native.Level) -> dict[str, Tensor]:
    """Outputs and gradients of reading, a sub-layer, and writing, by name."""
    native.use(level)
    assert streams_available(streams) == (level is not native.Level.off)
    streams, update = (tensor.clone().requires_grad_() for tensor in (streams, update))
    connection.zero_grad(set_to_none=True)
    x, mappings = connection(streams)
    out = write(streams, x.sin().to(update.dtype) + update, mappings)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weight + out.square()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in connection.named_parameters()}
    inner = {"x": x, "post": mappings.post, "res": mappings.res, "out": out}
    return inner | gradients | {"streams": streams.grad, "update": update.grad}


def random_connection(num_streams: int, width: int, iterations: int) -> HyperConnection:
    cfg = HyperConnectionsConfig(num_streams=num_streams, sinkhorn_iterations=iterations)
    connection = HyperConnection(cfg, width, index=0)
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    return connection


@pytest.mark.parametrize(
    ("num_streams", "tokens", "width", "iterations"),
    # tokens: less than a block of 16, one block, one more; width: less than a vector of 16, odd, whole vectors
    [
        (4, 1, 1, 20),
        (4, 15, 5, 1),
        (4, 16, 16, 2),
        (4, 17, 33, 20),
        (2, 33, 16, 20),
        (3, 5, 7, 3),
        (8, 18, 64, 20),
        (4, 300, 8, 3),
    ],
)
def test_outputs_and_gradients_equal_plain_torch(num_streams, tokens, width, iterations):
    connection = random_connection(num_streams, width, iterations)
    streams, update = torch.randn(1, tokens, num_streams, width), torch.randn(1, tokens, width)
    fast = results(connection, streams, update, native.Level.elementwise)
    plain = results(connection, streams, update, native.Level.off)
    assert fast.keys() == plain.keys()
    for name, expected in plain.items():
        assert relative_error(fast[name], expected) < TOLERANCE, name


@pytest.mark.skipif(not native.several_threads(), reason="the compiler has no OpenMP")
@pytest.mark.parametrize("num_streams", [4, 3])
def test_any_number_of_threads_gives_the_same_bits(num_streams):
    """Three parts of 128 tokens, the last unfinished. Projections by torch's matmul are left out: theirs may differ."""
    num_tokens, width, iterations = 300, 33, 5
    maps = num_streams * (num_streams + 2)
    streams, update = torch.randn(num_tokens, num_streams, width), torch.randn(num_tokens, width)
    raw, gates, bias = torch.randn(num_tokens, maps), torch.randn(3), torch.randn(maps)
    post, res = torch.randn(num_tokens, num_streams), torch.randn(num_tokens, num_streams, num_streams)
    sizes = (num_streams, num_tokens, width)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        read = [torch.empty(shape) for shape in (update.shape, (num_tokens,), post.shape, res.shape)]
        native.call("streams_read_forward", *sizes, iterations, 1e-6, streams, raw, gates, bias, *read)
        grads = [torch.empty_like(tensor) for tensor in (streams, raw, gates, bias)]
        given = (streams, raw, gates, bias, read[1], update, post, res)
        native.call("streams_read_backward", *sizes, iterations, *given, *grads)
        out = torch.empty_like(streams)
        native.call("streams_write_forward", *sizes, streams, update, post, res, out)
        written = [torch.empty_like(tensor) for tensor in (streams, update, post, res)]
        native.call("streams_write_backward", *sizes, streams, update, post, res, out, *written)
        return [*read, *grads, out, *written]

    one = run(1)
    assert all(tensor.isfinite().all() for tensor in one)
    for threads in (2, 3):
        for expected, result in zip(one, run(threads), strict=True):
            assert torch.equal(expected, result)


def test_updates_in_bf16_and_streams_that_share_memory():
    """The streams enter as one embedding seen J times, and updates come from bf16 matmuls."""
    connection = random_connection(4, 16, 20)
    streams, update = torch.randn(2, 9, 1, 16).expand(-1, -1, 4, -1), torch.randn(2, 9, 16).bfloat16()
    fast = results(connection, streams, update, native.Level.elementwise)
    plain = results(connection, streams, update, native.Level.off)
    assert fast["update"].dtype == torch.bfloat16
    for name, expected in plain.items():
        # One rounding of the update to bf16 may fall to either side; what follows from it is as far apart.
        assert relative_error(fast[name], expected) < 4e-3, name


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
def test_extreme_logits_leave_rows_that_sum_to_one(scale):
    connection = random_connection(4, 8, 20)
    with torch.no_grad():
        connection.projection.mul_(scale)
    streams = torch.randn(1, 40, 4, 8, requires_grad=True)
    x, mappings = connection(streams)
    out = write(streams, x, mappings)
    out.sum().backward()
    res = mappings.res.detach()
    assert bool((res >= 0).all()) and float((res.sum(-1) - 1).abs().max()) < 1e-6
    assert bool(out.isfinite().all()) and bool(connection.bias.grad.isfinite().all())


def test_more_streams_than_the_kernels_hold_take_the_plain_path():
    assert streams_available(torch.zeros(1, 1, MOST_STREAMS, 4))
    assert not streams_available(torch.zeros(1, 1, MOST_STREAMS + 1, 4))
    assert not streams_available(torch.zeros(1, 1, 2, 4, dtype=torch.float64))
    connection = random_connection(MOST_STREAMS + 1, 4, 3)
    x, mappings = connection(torch.randn(1, 5, MOST_STREAMS + 1, 4))
    assert x.shape == (1, 5, 4) and mappings.res.shape == (1, 5, MOST_STREAMS + 1, MOST_STREAMS + 1)


def gradients_of_model(cfg: TransformerConfig, level: native.Level) -> dict[str, Tensor]:
    native.use(level)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg)
    output = model(token_ids, document_ids, memory.rows(token_ids, document_ids))
    output.logits.square().sum().backward()
    return {"logits": output.logits} | {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["engram_hyper", "engram_hyper_fused"])
def test_the_model_is_the_same_with_and_without_them(kind):
    plain = gradients_of_model(tiny_config(kind), native.Level.off)
    fast = gradients_of_model(tiny_config(kind), native.Level.elementwise)
    for name, expected in plain.items():
        assert relative_error(fast[name], expected) < 1e-4, name


def test_checkpointing_is_equal_to_the_bit():
    cfg = tiny_config("engram_hyper")
    once = gradients_of_model(cfg, native.Level.elementwise)
    again = gradients_of_model(
        replace(cfg, activation_checkpointing=ActivationCheckpointing.full), native.Level.elementwise
    )
    assert all(torch.equal(once[name], again[name]) for name in once)
