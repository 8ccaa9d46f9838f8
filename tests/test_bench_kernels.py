"""`make bench`: the forms of every kernel compute one function, and the report says where ours is not faster."""

import json
import sys
from collections.abc import Iterator

import pytest
import torch

from models import native
from scripts import bench_common, bench_kernels
from scripts.bench_common import paired_ratio, timed_rounds
from scripts.bench_kernels import Form, Gate, Head, Routed, measure, peak_bytes, verdict

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path) -> Iterator[None]:
    """Small shapes, one thread, and every level of the C kernels: without the unit they run in plain C."""
    monkeypatch.setattr(bench_kernels, "GATES", (Gate(12, 2, 16),))
    monkeypatch.setattr(bench_kernels, "HEADS", (Head(70, 32, 96),))
    monkeypatch.setattr(bench_kernels, "ROUTED", (Routed(40, 32, 8, 16),))
    monkeypatch.setattr(bench_kernels, "keep_freed_memory", lambda: False)  # it would hold for the whole process
    monkeypatch.setattr(bench_common, "OUT", tmp_path)
    monkeypatch.setattr(native, "matrix_unit", lambda: True)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_form_is_compared_and_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--rounds", "2"])
    bench_kernels.main()
    rows = json.loads((tmp_path / f"{bench_common.page('kernels', 1)}.json").read_text())
    forms = {(row["kernel"], row["precision"]): [] for row in rows}
    for row in rows:
        forms[row["kernel"], row["precision"]].append(row["form"])
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["rounds"] == 2
    ours = ["naive", "torch fallback"]
    experts = ["naive", "every expert on every token", "`loop`", "`padded`", "`grouped_mm`"]
    assert forms == {
        ("Engram gate", "bf16"): ours,
        ("Engram gate", "fp32"): ours,
        ("Experts", "bf16"): [*experts, "`padded`, SwiGLU in C", "C kernel"],
        ("Experts", "fp32"): experts,
        ("Head and cross-entropy", "bf16"): [*ours, "C kernel"],
        ("Head and cross-entropy", "fp32"): ours,
    }
    page = (tmp_path / f"{bench_common.page('kernels', 1)}.md").read_text()
    assert "**Experts: fallback" in page and page.count("\n| ") == 1 + len(rows)
    assert native.available(torch.zeros(1, dtype=BF16)) is False  # switched off again


@pytest.mark.parametrize("place", range(4))
def test_a_form_that_computes_something_else_is_refused(place):
    case = bench_kernels.head_case(Head(70, 32, 96), F32)
    right = case.forms[1].run

    def wrong() -> tuple[torch.Tensor, ...]:
        return tuple(x * (1.001 if i == place else 1.0) for i, x in enumerate(right()))

    case.forms[1] = Form("wrong", wrong, True)
    if place == 3:  # a loss and two gradients: nothing is wrong
        assert len(measure(case, 1)) == 2
        return
    with pytest.raises(RuntimeError, match=r"Head and cross-entropy, T=70 D=32 V=96, fp32: wrong is off by 1\.0e-03"):
        measure(case, 1)


def test_without_a_matrix_unit_its_kernels_are_left_out(monkeypatch):
    monkeypatch.setattr(native, "matrix_unit", lambda: False)
    names = [form.name for form in bench_kernels.routed_case(Routed(40, 32, 8, 16), BF16).forms]
    assert "C kernel" not in names and "`padded`, SwiGLU in C" in names
    assert "C kernel" not in [form.name for form in bench_kernels.head_case(Head(70, 32, 96), BF16).forms]
    torch.set_num_threads(2)
    monkeypatch.setattr(native, "several_threads", lambda: False)
    assert bench_kernels.levels() == []


def test_the_peak_counts_what_is_there_at_one_time():
    x = torch.zeros(1000)

    def run() -> tuple[torch.Tensor, ...]:
        first = x + x
        second = first + first
        del first
        return second + second, second

    assert peak_bytes(run)[0] == 2 * 4000


def test_rounds_are_interleaved_and_end_with_the_time():
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "ab"}
    assert {len(times) for times in timed_rounds(steps, 4).values()} == {4} and called == ["a", "b"] * 4
    assert {len(times) for times in timed_rounds(steps, 9, most_seconds=0.0, fewest=2).values()} == {2}
    assert paired_ratio([2.0, 9.0, 3.0], [1.0, 1.0, 3.0]) == 2.0


def test_the_verdict_names_what_is_not_faster():
    row = {"kernel": "K", "shape": "T=1", "precision": "fp32", "form": "ours", "is_fallback": True, "memory": 0.5}
    naive = {**row, "form": "naive", "is_fallback": False, "speed": 1.0, "memory": 1.0}
    assert verdict([naive, {**row, "speed": 1.5}])[1] == "Faster in every case."
    lines = verdict([naive, {**row, "speed": 1.5}, {**row, "shape": "T=2", "speed": 0.9}])
    assert "fallback 0.90 to 1.50 times as fast as the naive form, with 50% to 50% of its peak memory" in lines[0]
    assert lines[1:] == ["Not faster: ours, T=2, fp32 (0.90).", ""]
    lines = verdict([naive, {**row, "speed": 1.5, "memory": 1.25}])
    assert lines[1:] == ["Faster in every case.", "More memory: ours, T=1, fp32 (1.25).", ""]
