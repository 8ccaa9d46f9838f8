"""The elementwise C kernels against the plain torch they stand in for: outputs and every gradient, at odd sizes too."""

import ctypes
import subprocess
import sys

import pytest
import torch

from models import native
from models.feed_forward import swiglu_hidden, swiglu_hidden_backward
from models.norm import rms_norm
from models.router import top_k_ids
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


def test_available_is_for_one_thread_cpu_and_the_asked_type(monkeypatch):
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert native.available(x) and not native.available(x.float()) and native.available(x.float(), torch.float32)
    torch.set_num_threads(2)
    assert not native.available(x)
    torch.set_num_threads(1)
    plain(monkeypatch)
    assert not native.available(x)


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
    with pytest.raises(ValueError, match=r"native_kernels=matrices needs .* AMX"):
        native.use(native.Level.matrices)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ValueError, match=r"native_kernels=elementwise needs .* compiler"):
        native.use(native.Level.elementwise)
    native.use(native.Level.off)


def test_exponential_is_exact_to_fp32(tmp_path):
    source = tmp_path / "exponential.c"
    source.write_text(
        '#include "common.h"\nvoid run(long n, const float *x, float *y) '
        "{ for (long i = 0; i < n; i++) y[i] = exponential(x[i]); }\n"
    )
    built = tmp_path / "exponential.so"
    command = ["cc", *native.FLAGS, f"-I{native.FOLDER}", str(source), "-o", str(built), "-lm"]
    subprocess.run(command, check=True)
    x = torch.linspace(-86.0, 87.0, 100_001)
    y = torch.empty_like(x)
    ctypes.CDLL(str(built)).run(ctypes.c_long(len(x)), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()))
    assert float((y.double() / x.double().exp() - 1).abs().max()) < 1.5e-7  # 2^-23 and a little


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


@pytest.mark.parametrize("shape", [(1, 8), (2, 7, 24), (3, 5, 128), (4, 33)])
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


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 7, 3), (50, 64, 4), (6, 4, 4)])
def test_top_k(shape, monkeypatch):
    rows, experts, top_k = shape
    scores = torch.rand(rows, experts)
    actual = top_k_ids(scores, top_k)
    plain(monkeypatch)
    assert torch.equal(actual.sort(-1).values, top_k_ids(scores, top_k).sort(-1).values)


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
