"""The elementwise C kernels against the plain torch they stand in for: outputs and every gradient, at odd sizes too."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from models import native
from models.attention import _SplitHeads
from models.feed_forward import swiglu_hidden, swiglu_hidden_backward
from models.norm import RMSNorm, add_rms_norm, rms_norm
from models.rotary import RotaryConfig, rotary_tables
from models.router import Router, RouterConfig, top_k_ids
from tests.tiny import relative_error

# One rounding to bf16 is at most 2^-9 of a value; the plain path rounds after every one of a few operations.
BF16 = 8e-3


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    native.use(native.Level.elementwise)
    yield
    native.use(native.Level.off)
    torch.set_num_threads(threads)


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on torch's own operations are used."""
    monkeypatch.setattr(native, "_level", native.Level.off)


def test_available_is_for_cpu_the_asked_type_and_the_threads_of_the_process(monkeypatch):
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert native.available(x) and not native.available(x.float()) and native.available(x.float(), torch.float32)
    torch.set_num_threads(2)
    assert native.available(x) == native.several_threads()
    monkeypatch.setattr(native, "several_threads", lambda: False)
    assert not native.available(x)
    torch.set_num_threads(1)
    assert native.available(x)
    plain(monkeypatch)
    assert not native.available(x)


def test_a_compiler_without_openmp_gives_kernels_for_one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__()["several_threads"]() == 1
    monkeypatch.setattr(native, "THREADS", ["-fno-such-option"])
    assert native.library.__wrapped__()["several_threads"]() == 0


def test_without_a_compiler_there_are_no_kernels(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.library.__wrapped__() is None


def test_a_failing_compiler_is_reported_and_survived(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.library.__wrapped__() is None
    assert "training is slower" in caplog.text


def test_a_damaged_library_is_built_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native._cached_path(["cc"])
    path.parent.mkdir()
    path.write_bytes(b"")
    assert native.library.__wrapped__() is not None
    assert path.stat().st_size > 10_000


def test_compiler_with_options(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "cc -DNOTHING")
    assert native.library.__wrapped__() is not None


def test_levels_that_do_not_work_here_are_refused(monkeypatch):
    monkeypatch.setattr(native, "matrix_unit", lambda: False)
    with pytest.raises(ValueError, match=r"native_kernels=matrices needs .* AVX-512"):
        native.use(native.Level.matrices)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match=r"native_kernels=elementwise needs .* compiler"):
        native.use(native.Level.elementwise)
    native.use(native.Level.off)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (64, 64), (5, 17)])
def test_swiglu(shape, weighted, monkeypatch):
    rows, width = shape
    pre = (3 * torch.randn(rows, 2 * width)).bfloat16()
    grad = torch.randn(rows, width).bfloat16()
    weights = torch.rand(rows, 1).bfloat16() if weighted else None
    actual = [swiglu_hidden(pre, weights), *swiglu_hidden_backward(pre, weights, grad)]
    plain(monkeypatch)
    exact = None if weights is None else weights.float()
    expected = [swiglu_hidden(pre.float(), exact), *swiglu_hidden_backward(pre.float(), exact, grad.float())]
    for a, b in zip(actual, expected, strict=True):
        assert (a is None and b is None) or relative_error(a, b) < BF16


def test_exponential_of_large_and_broken_values():
    values = torch.tensor([[-200.0, 200.0, 0.0, float("nan"), float("inf"), -float("inf")]])
    pre = torch.cat((values, torch.ones_like(values)), 1).bfloat16()
    hidden = swiglu_hidden(pre)[0].tolist()
    assert abs(hidden[0]) < 1e-30 and hidden[1] == 200.0 and hidden[2] == 0.0 and hidden[3] != hidden[3]
    assert hidden[4] == float("inf")


@pytest.mark.parametrize("shape", [(1, 8), (2, 7, 24), (3, 5, 128), (4, 33), (300, 40)])
def test_rms_norm(shape, monkeypatch):
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        weight = torch.randn(shape[-1], requires_grad=True)
        out = rms_norm(x, weight, 1e-6)
        (out * torch.randn(shape)).sum().backward()
        results.append((out, x.grad, weight.grad))
        plain(monkeypatch)
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("shape", [(1, 8), (2, 7, 24), (4, 33), (300, 40)])
def test_rms_norm_rounded_to_bf16(shape, monkeypatch):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    upstream = torch.randn(shape).bfloat16()
    results = []
    for _ in range(2):
        out = rms_norm(x, weight, 1e-6, torch.bfloat16)
        results.append((out, *torch.autograd.grad(out, (x, weight), upstream)))
        plain(monkeypatch)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    expected = torch.autograd.grad(exact, (x, weight), upstream.double())
    for out, *gradients in results:
        assert out.dtype == torch.bfloat16 and relative_error(out, exact) < 4e-3
        for gradient, reference in zip(gradients, expected, strict=True):
            assert gradient.dtype == torch.float32 and relative_error(gradient, reference) < 1e-6


@pytest.mark.parametrize("shape", [(1, 8), (2, 7, 24), (3, 5, 128), (4, 33), (300, 40)])
def test_add_rms_norm(shape, monkeypatch):
    norm = RMSNorm(shape[-1], 1e-6)
    torch.nn.init.normal_(norm.weight)
    hidden, update = torch.randn(shape, requires_grad=True), torch.randn(shape).bfloat16().requires_grad_()
    inputs = (hidden, norm.weight, update)
    upstream = [torch.randn(shape), torch.randn(shape), torch.randn(shape).bfloat16()]
    results = []
    for _ in range(2):
        outs = add_rms_norm(hidden, update, norm, torch.bfloat16)
        results.append([*outs, *torch.autograd.grad(outs, inputs, upstream)])
        # any of the three may go unused
        for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2]):
            outs = add_rms_norm(hidden, update, norm, torch.bfloat16)
            given = ([outs[i] for i in used], inputs, [upstream[i] for i in used])
            gradients = torch.autograd.grad(*given, allow_unused=True, materialize_grads=True)
            results[-1] += gradients
        plain(monkeypatch)
    limits = (0.0, 1e-6, 4e-3, *(1e-6, 1e-6, 5e-3) * 7)
    for (a, b), limit in zip(zip(*results, strict=True), limits, strict=True):
        assert a.dtype == b.dtype and relative_error(a, b) <= limit


def split_heads(heads: Tensor, weights: list[Tensor | None], tables: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """The definition in the type of `heads`: norm, rotation of the pairs (i, i + C / 2), heads before positions."""
    num_kv_heads = (heads.shape[2] - num_heads) // 2
    half = heads.shape[-1] // 2
    cos, sin = (table[:, None] for table in tables)  # (S, 1, C), sin positive in its second half
    turned = []
    for part, weight in zip(heads.split((num_heads, num_kv_heads, num_kv_heads), dim=2), weights, strict=False):
        part = part if weight is None else rms_norm(part, weight, 1e-6)
        a, b = part[..., :half], part[..., half:]
        c, s = cos[..., :half], sin[..., half:]
        turned.append(torch.cat((a * c - b * s, b * c + a * s), dim=-1).transpose(1, 2))
    return *turned, heads[:, :, num_heads + num_kv_heads :].transpose(1, 2)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(
    ("batch", "seq_len", "num_heads", "num_kv_heads", "width"),
    # positions: one, an unfinished part of 64, a second part; widths: the usual one, less than two vectors, odd halves
    [(1, 1, 1, 1, 2), (2, 7, 3, 1, 32), (3, 64, 4, 2, 32), (2, 65, 6, 3, 26), (1, 130, 2, 2, 32), (2, 9, 2, 1, 64)],
)
def test_split_heads(batch, seq_len, num_heads, num_kv_heads, width, normed):
    heads = torch.randn(batch, seq_len, num_heads + 2 * num_kv_heads, width).bfloat16().requires_grad_()
    weights = [torch.randn(width, requires_grad=True) if normed else None for _ in range(2)]
    tables = rotary_tables(seq_len, width, RotaryConfig())
    inputs = [heads, *(weight for weight in weights if weight is not None)]
    fast = _SplitHeads.apply(heads, *weights, tables, num_heads, 1e-6)
    upstream = [torch.randn(out.shape).bfloat16() for out in fast]
    fast_gradients = torch.autograd.grad(fast, inputs, upstream)
    exact = split_heads(heads.double(), [w if w is None else w.double() for w in weights], tables.double(), num_heads)
    gradients = torch.autograd.grad(exact, inputs, [tensor.double() for tensor in upstream])
    for out, expected in zip(fast, exact, strict=True):
        assert out.dtype == torch.bfloat16 and relative_error(out, expected) < 4e-3
    assert torch.equal(fast[2], heads[:, :, num_heads + num_kv_heads :].transpose(1, 2))
    assert fast_gradients[0].dtype == torch.bfloat16 and relative_error(fast_gradients[0], gradients[0]) < 4e-3
    for gradient, expected in zip(fast_gradients[1:], gradients[1:], strict=True):
        assert relative_error(gradient, expected) < 1e-5


def with_threads(count: int) -> list[Tensor]:
    """Results and gradients of every kernel of rows, at several parts of them and an unfinished last one."""
    torch.set_num_threads(count)
    torch.manual_seed(0)
    results = []
    x, weight = torch.randn(1100, 40, requires_grad=True), torch.randn(40, requires_grad=True)
    norm = RMSNorm(40, 1e-6)
    torch.nn.init.normal_(norm.weight)
    update = torch.randn(1100, 40).bfloat16().requires_grad_()
    for dtype in (torch.float32, torch.bfloat16):
        out = rms_norm(x, weight, 1e-6, dtype)
        results += [out, *torch.autograd.grad(out, (x, weight), torch.randn(out.shape).to(dtype))]
    outs = add_rms_norm(x, update, norm, torch.bfloat16)
    upstream = [torch.randn(out.shape).to(out.dtype) for out in outs]
    results += [*outs, *torch.autograd.grad(outs, (x, update, norm.weight), upstream)]
    pre, gates = torch.randn(1100, 80).bfloat16(), torch.rand(1100, 1).bfloat16()
    results.append(swiglu_hidden(pre, gates))
    results += [r for r in swiglu_hidden_backward(pre, gates, torch.randn(1100, 40).bfloat16()) if r is not None]
    for width in (24, 32):
        heads = torch.randn(3, 200, 7, width).bfloat16().requires_grad_()
        weights = [torch.randn(width, requires_grad=True) for _ in range(2)]
        outs = _SplitHeads.apply(heads, *weights, rotary_tables(200, width, RotaryConfig()), 3, 1e-6)
        upstream = [torch.randn(out.shape).bfloat16() for out in outs]
        results += [*outs, *torch.autograd.grad(outs, (heads, *weights), upstream)]
    return results


@pytest.mark.skipif(not native.several_threads(), reason="the compiler has no OpenMP")
def test_any_number_of_threads_gives_the_same_bits():
    one = with_threads(1)
    for count in (2, 3):
        for expected, result in zip(one, with_threads(count), strict=True):
            assert torch.equal(expected, result)


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 7, 3), (50, 64, 4), (6, 4, 4)])
def test_top_k(shape, monkeypatch):
    rows, experts, top_k = shape
    scores = torch.rand(rows, experts)
    actual = top_k_ids(scores, top_k)
    plain(monkeypatch)
    assert torch.equal(actual.sort(-1).values, top_k_ids(scores, top_k).sort(-1).values)


@pytest.mark.parametrize("shape", [(40, 7, 3), (40, 16, 16), (40, 70, 9)])
def test_top_k_is_a_stable_sort(shape):
    rows, experts, top_k = shape
    scores = torch.randint(0, 4, (rows, experts)).float()
    scores[scores == 3] = -math.inf
    scores[:, -1] = math.inf
    expected = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(top_k_ids(scores, top_k), expected)
    scores[0, 1:] = math.nan
    assert len(set(top_k_ids(scores, top_k)[0].tolist())) == top_k


def test_top_k_of_equal_scores_are_distinct():
    assert top_k_ids(torch.ones(2, 5), 3).tolist() == [[0, 1, 2]] * 2
    assert top_k_ids(torch.full((1, 5), float("nan")), 3).tolist() == [[0, 1, 2]]


def test_freed_memory_is_kept_and_used_again():
    code = """if True:
        import resource, torch
        from train.allocator import keep_freed_memory
        assert keep_freed_memory()
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                torch.ones(16 << 20, dtype=torch.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        for _ in range(3):  # until the heap has its final shape
            faults()
        assert faults() < 1000, "16 MiB are 4096 pages"
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "shape", [(1, 1, 6, 3, 3), (2, 7, 6, 5, 2), (3, 9, 6, 40, 4), (2, 33, 35, 64, 6), (1, 64, 80, 17, 4)]
)
def test_router(shape, normalize, coefficient, monkeypatch):
    batch, seq_len, d_model, num_experts, top_k = shape
    cfg = RouterConfig(
        top_k=top_k, route_scale=1.7, normalize=normalize, sequence_balance_coef=coefficient, bias_update_rate=0.01
    )
    router = Router(cfg, d_model, num_experts)
    torch.nn.init.normal_(router.weight, 0.0, 2 * d_model**-0.5)
    router.expert_bias.normal_(0, 0.3)
    x = torch.randn(batch, seq_len, d_model, requires_grad=True)
    upstream = torch.randn(batch * seq_len, num_experts)  # by expert, since the order of the chosen ones is free
    results = []
    for _ in range(2):
        routing = router(x)
        loss = routing.aux_losses["sequence_balance"]
        total = (routing.weights * upstream.gather(1, routing.expert_ids)).sum() + 5 * loss
        by_expert = torch.zeros_like(upstream).scatter(1, routing.expert_ids, routing.weights.detach())
        results.append(
            (by_expert, routing.counts, loss, routing.entropy, *torch.autograd.grad(total, (x, router.weight)))
        )
        assert not routing.entropy.requires_grad
        plain(monkeypatch)
    for name, a, b in zip(("weights", "counts", "balance", "entropy", "x", "weight"), *results, strict=True):
        assert relative_error(a, b) < 2e-6, name


@pytest.mark.parametrize("shape", [(5, 70, 9, 40, 4), (3, 33, 35, 7, 2)])
def test_router_is_the_same_with_any_number_of_threads(shape):
    batch, seq_len, d_model, num_experts, top_k = shape
    router = Router(RouterConfig(top_k=top_k, sequence_balance_coef=0.3), d_model, num_experts)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(batch, seq_len, d_model, requires_grad=True)
    upstream = torch.randn(batch * seq_len, top_k)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        routing = router(x)
        loss = routing.aux_losses["sequence_balance"]
        gradients = torch.autograd.grad((routing.weights * upstream).sum() + loss, (x, router.weight))
        results.append(
            (routing.expert_ids, routing.weights, routing.counts, loss.detach(), routing.entropy, *gradients)
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_router_gives_distinct_experts_for_broken_and_equal_scores():
    router = Router(RouterConfig(top_k=4), 3, 9)
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 5, 3)
    x[0, 1] = math.nan
    x[1, 2] = 0.0  # equal scores: the first experts
    ids = router(x).expert_ids
    assert all(len(set(row)) == 4 and min(row) >= 0 and max(row) < 9 for row in ids.tolist())
    assert ids[7].tolist() == [0, 1, 2, 3]
