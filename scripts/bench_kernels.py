"""The plain-torch fallback of each GPU kernel, and the C kernels of a CPU, against the naive form of the same function.

    python -m scripts.bench_kernels [--threads 1] [--rounds 7]

The fallback is what a CPU computes with, and a GPU without Triton; the naive form is what one writes first
(`scripts/naive_forms.py`). All forms of a case get the same inputs and run forward and backward in interleaved rounds.
Before that outputs and all gradients are compared with the naive form in fp32. The table goes to `benchmarks/results/`.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from models import native
from models.engram import GATE_NORM_EPS
from models.expert_kernels import swiglu_native
from models.kernels.gate import engram_gate
from models.loss import IGNORE_INDEX, linear_cross_entropy
from models.moe import ExpertKernel, Experts, LocalDispatcher
from models.precision import compute_dtype
from scripts import naive_forms
from scripts.bench_common import arguments, load, machine, paired_ratio, timed_rounds, write
from train.allocator import keep_freed_memory

F32, BF16 = torch.float32, torch.bfloat16
NAMES = {F32: "fp32", BF16: "bf16"}
# Largest ||a - b|| / ||b|| of an output or a gradient against the naive form in fp32. fp32: sums in another order.
# bf16: each rounding is off by at most 2^-9 of a value, and up to five follow one another in the experts.
LIMITS = {F32: 1e-5, BF16: 2e-2}
MOST_SECONDS = 8.0  # of a case's rounds, but at least three are made
NAIVE = "naive"
TOP_K = 4


class Gate(NamedTuple):
    """T, J, D."""

    tokens: int
    branches: int
    d_model: int


class Head(NamedTuple):
    """T, D, V."""

    tokens: int
    d_model: int
    vocab: int


class Routed(NamedTuple):
    """T, D, E, F."""

    tokens: int
    d_model: int
    num_experts: int
    d_expert: int


# The tiny model's (scripts/bench_train.py), and larger ones within about a second per call of the naive form.
GATES = (Gate(4096, 1, 128), Gate(4096, 4, 512))
HEADS = (Head(4096, 128, 4096), Head(2048, 256, 16384))
ROUTED = (Routed(4096, 128, 64, 64), Routed(2048, 256, 64, 256))
EVERY_EXPERT_UP_TO = 4096 * 128 * 64 * 64  # tokens * d_model * num_experts * d_expert: half a second in fp32

Result = tuple[Tensor, ...]


@dataclass
class Form:
    """One way to compute a case: output and gradients of all inputs, in the order and shape of the naive form's."""

    name: str
    run: Callable[[], Result]
    is_fallback: bool = False


@dataclass
class Case:
    """A function at one shape in one type."""

    kernel: str
    shape: str
    dtype: torch.dtype
    reference: Callable[[], Result]  # the naive form in fp32, at the inputs as they are rounded
    forms: list[Form] = field(default_factory=list)


def forward_backward(
    call: Callable[..., Tensor], leaves: list[Tensor], dtype: torch.dtype, level: native.Level = native.Level.off
) -> Result:
    """Output of `call` under autocast to bf16, if asked for, and the gradients of `leaves`."""
    with using(level):
        with torch.autocast("cpu", BF16, enabled=dtype is BF16):
            out = call(*leaves)
        upstream = torch.linspace(-1, 1, out.shape[-1]).expand(out.shape) if out.dim() else torch.ones(())
        return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


@contextmanager
def using(level: native.Level) -> Iterator[None]:
    """Switch the C kernels to `level`, and off again."""
    native.use(level)
    try:
        yield
    finally:
        native.use(native.Level.off)


def exact(leaves: list[Tensor]) -> list[Tensor]:
    """Their values in fp32."""
    return [leaf.detach().float().requires_grad_() for leaf in leaves]


def levels() -> list[native.Level]:
    """Of the C kernels that run here in bf16, beside none."""
    if native.library() is None or (torch.get_num_threads() != 1 and not native.several_threads()):
        return []
    return [native.Level.elementwise, *([native.Level.matrices] if native.matrix_unit() else [])]


def gate_case(shape: Gate, dtype: torch.dtype) -> Case:
    """In bf16 with the types that autocast gives it: residual stream and norms in fp32, projections in bf16."""
    torch.manual_seed(0)
    hidden = torch.randn(1, *shape)
    value_keys = torch.randn(1, shape.tokens, 1 + shape.branches, shape.d_model)
    # Keys agree with the hidden state or oppose it: no similarity near 0, where the root is steep and rounding counts.
    value_keys[..., 1:, :] += 0.7 * hidden * torch.tensor([1.0, -1.0]).repeat(shape.tokens // 2)[:, None, None]
    norms = [1 + 0.3 * torch.randn(shape.branches, shape.d_model) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (hidden, value_keys.to(dtype), *norms)]
    case = Case("Engram gate", f"T={shape.tokens} J={shape.branches} D={shape.d_model}", dtype, lambda: ())
    case.reference = lambda: forward_backward(naive_forms.gate, exact(leaves), F32)
    case.forms = [
        Form(NAIVE, lambda: forward_backward(naive_forms.gate, leaves, dtype)),
        Form("torch fallback", lambda: forward_backward(our_gate, leaves, dtype), True),
    ]
    return case


def our_gate(hidden: Tensor, value_keys: Tensor, hidden_norm: Tensor, key_norm: Tensor) -> Tensor:
    """The fallback's output without its gates."""
    return engram_gate(hidden, value_keys, hidden_norm, key_norm, GATE_NORM_EPS)[0]


def head_case(shape: Head, dtype: torch.dtype) -> Case:
    """Summed loss with a weight in fp32; one target in 64 is ignored."""
    torch.manual_seed(0)
    weight = torch.randn(shape.vocab, shape.d_model) * shape.d_model**-0.5
    leaves = [x.requires_grad_() for x in (torch.randn(shape.tokens, shape.d_model), weight)]
    targets = torch.randint(0, shape.vocab, (shape.tokens,))
    targets[::64] = IGNORE_INDEX
    naive, ours = (partial(call, targets=targets) for call in (naive_forms.linear_cross_entropy, linear_cross_entropy))
    case = Case("Head and cross-entropy", f"T={shape.tokens} D={shape.d_model} V={shape.vocab}", dtype, lambda: ())
    case.reference = lambda: forward_backward(naive, exact(leaves), F32)
    case.forms = [
        Form(NAIVE, lambda: forward_backward(naive, leaves, dtype)),
        Form("torch fallback", lambda: forward_backward(ours, leaves, dtype), True),
    ]
    if dtype is BF16 and native.Level.matrices in levels():
        run = partial(forward_backward, ours, leaves, dtype, native.Level.matrices)
        case.forms.append(Form("C kernel", run))
    return case


def routed_case(shape: Routed, dtype: torch.dtype) -> Case:
    """Dispatch, experts and combine; an uneven load, as a young router gives it."""
    torch.manual_seed(0)
    tokens, width, num_experts, hidden = shape
    scores = (torch.randn(tokens, num_experts) + 0.5 * torch.randn(num_experts)).sigmoid()
    weights, ids = scores.topk(TOP_K)
    leaves = [
        torch.randn(tokens, width),
        weights / weights.sum(-1, keepdim=True),
        torch.randn(num_experts, width, 2 * hidden) * width**-0.5,
        torch.randn(num_experts, hidden, width) * hidden**-0.5,
    ]
    leaves = [nn.Parameter(leaf) for leaf in leaves]
    turned = [*leaves[:2], *(nn.Parameter(leaf.detach().transpose(1, 2).contiguous()) for leaf in leaves[2:])]
    naive, every = (
        lambda x, *rest, call=call: call(x.to(compute_dtype(x)), *rest, ids)
        for call in (naive_forms.experts_loop, naive_forms.every_expert)
    )
    name = f"T={tokens} D={width} E={num_experts} F={hidden} K={TOP_K}"
    case = Case("Experts", name, dtype, lambda: turned_back(forward_backward(naive, exact(turned), F32)))
    case.forms = [Form(NAIVE, lambda: turned_back(forward_backward(naive, turned, dtype)))]
    if tokens * width * num_experts * hidden <= EVERY_EXPERT_UP_TO:
        case.forms.append(Form("every expert on every token", lambda: forward_backward(every, leaves, dtype)))
    for kernel in (ExpertKernel.loop, ExpertKernel.padded, ExpertKernel.grouped_mm):
        run = partial(forward_backward, partial(our_experts, kernel, ids), leaves, dtype)
        case.forms.append(Form(f"`{kernel.value}`", run, True))
    for level in levels() if dtype is BF16 else []:
        call = c_experts if level is native.Level.matrices else partial(our_experts, ExpertKernel.padded)
        run = partial(forward_backward, partial(call, ids), leaves, dtype, level)
        case.forms.append(Form("C kernel" if level is native.Level.matrices else "`padded`, SwiGLU in C", run))
    return case


def turned_back(result: Result) -> Result:
    """The experts' gradients in our layout; views, which cost nothing."""
    return *result[:3], *(grad.transpose(1, 2) for grad in result[3:])


def our_experts(
    kernel: ExpertKernel, ids: Tensor, x: Tensor, weights: Tensor, gate_up: nn.Parameter, down: nn.Parameter
) -> Tensor:
    """`MoE.routed` with given choices and weights."""
    experts = Experts(0, x.shape[1], down.shape[1], kernel)
    experts.gate_up, experts.down = gate_up, down
    dispatcher = LocalDispatcher(len(down), padded=kernel is ExpertKernel.padded)
    sent = dispatcher.dispatch(x.to(compute_dtype(x)), ids, weights)
    return dispatcher.combine(experts(sent), sent)


def c_experts(ids: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The kernel that does all of it."""
    return swiglu_native(x.to(BF16), ids, weights, gate_up, down)


def peak_bytes(run: Callable[[], Result]) -> tuple[int, Result]:
    """The most bytes of tensors at one time that `run` allocated, its results among them, and these."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, result


def largest_error(result: Result, reference: Result) -> float:
    """Largest over outputs and gradients of ||a - b|| / ||b||."""
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(result, reference, strict=True))


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: every form checked, then timed.

    Raises:
        RuntimeError: a form computes something else.
    """
    reference = tuple(tensor.detach() for tensor in case.reference())
    checked: dict[str, tuple[int, float]] = {}
    for form in case.forms:
        peak, result = peak_bytes(form.run)
        error = largest_error(tuple(tensor.detach() for tensor in result), reference)
        if not error <= LIMITS[case.dtype]:
            raise RuntimeError(f"{case.kernel}, {case.shape}, {NAMES[case.dtype]}: {form.name} is off by {error:.1e}")
        checked[form.name] = (peak, error)
    steps = {form.name: form.run for form in case.forms}
    timed_rounds(steps, 1)  # warm-up
    seconds = timed_rounds(steps, rounds, MOST_SECONDS)
    rows = []
    for form in case.forms:
        peak, error = checked[form.name]
        times = seconds[form.name]
        speed = paired_ratio(seconds[NAIVE], times)
        rows.append(
            {"kernel": case.kernel, "shape": case.shape, "precision": NAMES[case.dtype], "form": form.name,
             "is_fallback": form.is_fallback, "seconds": statistics.median(times), "rounds": len(times),
             "speed": speed, "peak_bytes": peak, "memory": peak / checked[NAIVE][0], "error": error}
        )  # fmt: skip
        print(f"  {case.kernel} {case.shape} {NAMES[case.dtype]}, {form.name}: {speed:.2f}", flush=True)
    return rows


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """Per kernel how much faster the fallbacks are, and every case in which one is not, or takes more memory."""
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        ours = [row for row in rows if row["kernel"] == kernel and row["is_fallback"]]
        speeds, memory = [row["speed"] for row in ours], [row["memory"] for row in ours]
        lines.append(
            f"**{kernel}: fallback {min(speeds):.2f} to {max(speeds):.2f} times as fast as the naive form, with "
            f"{min(memory):.0%} to {max(memory):.0%} of its peak memory.**"
        )
        slow = _named([row for row in ours if row["speed"] <= 1], "speed")
        large = _named([row for row in ours if row["memory"] > 1], "memory")
        lines.append(f"Not faster: {slow}." if slow else "Faster in every case.")
        lines += [f"More memory: {large}.", ""] if large else [""]
    return lines


def _named(rows: list[dict[str, Any]], ratio: str) -> str:
    return "; ".join(f"{row['form']}, {row['shape']}, {row['precision']} ({row[ratio]:.2f})" for row in rows)


def report(rows: list[dict[str, Any]], threads: int) -> str:
    """The committed table."""
    fewest, most = min(row["rounds"] for row in rows), max(row["rounds"] for row in rows)
    rounds = f"{fewest} to {most}" if fewest < most else str(most)
    lines = [
        "# Fallbacks of the GPU kernels on a CPU",
        "",
        f"{machine(threads)}; forward and backward of one call, bf16 under autocast with weights in fp32; median of "
        f"{rounds} interleaved rounds. `faster` is the naive form's time over this one's in the same round. "
        "`peak` is the most memory of tensors made by one call, results included. `off by` is the largest relative "
        "error of an output or a gradient against the naive form in fp32. The naive gate is its equations one after "
        "the other, the naive head holds all logits in fp32, the naive experts are the loop of Hugging Face's eager "
        "experts; on a CPU `moe.expert_kernel=auto` is `padded`.",
        load(),
        "",
        *verdict(rows),
    ]
    if native.Level.matrices not in levels():
        lines += ["The C kernels of whole layers need one thread and a matrix unit (AMX) and did not run here.", ""]
    columns = ("kernel", "shape", "precision", "form", "ms", "faster", "peak MB", "off by")
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append(
            f"| {row['kernel']} | {row['shape']} | {row['precision']} | {row['form']} | {1e3 * row['seconds']:.1f} | "
            f"{row['speed']:.2f} | {row['peak_bytes'] / 1e6:.0f} | {row['error']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def cases() -> Iterator[Case]:
    """All of them; each holds its inputs, so they are made one after the other."""
    for dtype in (BF16, F32):
        yield from (gate_case(shape, dtype) for shape in GATES)
        yield from (head_case(shape, dtype) for shape in HEADS)
        yield from (routed_case(shape, dtype) for shape in ROUTED)


def main() -> None:
    """Measure, print and write."""
    args = arguments(__doc__).parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    rows = [row for case in cases() for row in measure(case, args.rounds)]
    rows.sort(key=lambda row: row["kernel"])  # stable: a kernel's cases stay in their order
    write("kernels", args.threads, report(rows, args.threads), rows)


if __name__ == "__main__":
    main()
