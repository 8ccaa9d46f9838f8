"""Every Triton kernel against its definition in plain torch, in fp64, on the device: outputs and all gradients."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from models.engram import GATE_NORM_EPS
from models.expert_kernels import swiglu_loop
from models.kernels import launch
from models.kernels.gate import engram_gate, engram_gate_definition
from models.kernels.grouped_swiglu import grouped_swiglu
from models.loss import IGNORE_INDEX, linear_cross_entropy
from scripts.gpu_table import Case, Column, Row, Section

F32, BF16 = torch.float32, torch.bfloat16
# Largest relative error ||a - b|| / ||b|| of a tensor. fp32: sums in another order. bf16: what is rounded to the
# nearest on the way is off by at most 2^-8 of a value each time: once in the gate; the logits' gradient and the
# result in the cross-entropy; pre-activations, hidden layer, its gradient and the result in the experts.
LIMITS = {
    "gate": {F32: 5e-6, BF16: 2**-8},
    "cross-entropy": {F32: 5e-6, BF16: 2**-7},
    "experts": {F32: 5e-6, BF16: 1e-2},
}
NATS_LIMIT = 1e-6  # of the summed loss, which is in fp32 whatever the type of the logits, from exact logits
# The gradient from above of the loss is one over this, as of a batch with so many targets: 0.24 % off the nearest bf16
# number, which as a common factor of all gradients would pass for their own roundings.
NUM_TARGETS = 2043
FACTOR_LIMIT = 1e-6  # of the hidden state's gradient against that of the loss alone, times 1 / NUM_TARGETS in fp32

# Batch and positions, branches, width, types of hidden, value_keys and norms.
GATE_CASES = (
    ((1, 1), 1, 33, (F32, F32, F32)),
    ((1, 1), 4, 100, (BF16, BF16, BF16)),
    ((3, 67), 4, 33, (F32, F32, F32)),
    ((2, 301), 4, 100, (F32, BF16, F32)),  # the residual stream in fp32 under autocast
    ((2, 301), 1, 768, (BF16, BF16, BF16)),
    ((1, 1003), 4, 2560, (BF16, BF16, BF16)),
    ((1, 1003), 4, 2560, (F32, BF16, F32)),
)
# Tokens, width, vocabulary.
HEAD_CASES = ((1, 8, 3), (7, 33, 64), (5, 24, 301), (37, 320, 4096), (67, 96, 129_280))
# Rows per expert, d_model, d_expert. Of one size, so that the kernels are tuned for it once, apart from the last.
EXPERT_CASES = (
    ([0, 3, 0, 17, 5, 0], 48, 80),  # no rows for the first, a middle and the last expert; nothing divides
    ([0, 0, 1, 0, 0, 0], 48, 80),  # one token
    ([129, 2, 0, 1, 300, 64], 48, 80),  # more rows than the largest block
    ([0, 1000, 0, 0, 0, 0], 48, 80),  # all rows to one expert
)
LARGE_EXPERTS = ([0, 129, 1, *[97] * 51, 700], 2560, 1536)  # the 55 experts of Engram-27B


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||a - b|| / ||b|| in fp64; the norm of a where b is zero."""
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = float(expected.norm())
    return float((actual - expected).norm()) / norm if norm else float(actual.norm())


def _rows(case: str, kind: str, compared: dict[str, tuple[Tensor, Tensor]]) -> list[Row]:
    rows = []
    for name, (actual, expected) in compared.items():
        limit = {"nats": NATS_LIMIT, "factor": FACTOR_LIMIT}.get(name, LIMITS[kind][actual.dtype])
        error = relative_error(actual, expected)
        passed = error <= limit and actual.shape == expected.shape
        verdict = "ok" if passed else "FAILED"
        rows.append({"case": case, "tensor": name, "relative_error": error, "limit": limit, "verdict": verdict})
    return rows


def _need_kernels(x: Tensor) -> None:
    if not launch.can_run(x):
        raise RuntimeError("the kernels do not run here (models.kernels.launch.can_run): torch would be checked")


def check_gate(
    case: str, tokens: tuple[int, int], branches: int, width: int, dtypes: tuple[torch.dtype, ...], residual: bool,
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """Output, gates and four gradients.

    Keys agree with the hidden state or oppose it, so that no similarity is near the kink at 0, where the slope of the
    square root makes a large difference of a small one.
    """
    torch.manual_seed(0)
    hidden = 2 * torch.randn(*tokens, branches, width)
    signs = torch.tensor([0.7, -0.7]).repeat(hidden.numel() // width)[: hidden.numel() // width]
    value_keys = torch.randn(*tokens, 1 + branches, width)
    value_keys[..., 1:, :] += signs.view(*tokens, branches, 1) * hidden
    norms = [1 + 0.3 * torch.randn(branches, width) for _ in range(2)]
    types = (dtypes[0], dtypes[1], dtypes[2], dtypes[2])
    leaves = [x.to(device, t).requires_grad_() for x, t in zip((hidden, value_keys, *norms), types, strict=True)]
    _need_kernels(leaves[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual = engram_gate(leaves[0], leaves[1], leaves[2], leaves[3], GATE_NORM_EPS, residual)
    expected = engram_gate_definition(exact[0], exact[1], exact[2], exact[3], GATE_NORM_EPS, residual)
    upstream = [torch.randn_like(result) for result in actual]
    gradients = torch.autograd.grad(actual, leaves, upstream)
    references = torch.autograd.grad(expected, exact, [grad.double() for grad in upstream])
    names = ("out", "gate", "grad hidden", "grad value_keys", "grad hidden_norm", "grad key_norm")
    pairs = zip((*actual, *gradients), (*expected, *references), strict=True)
    return _rows(case, "gate", dict(zip(names, pairs, strict=True)))


def check_cross_entropy(
    case: str, sizes: tuple[int, int, int], dtype: torch.dtype, autocast: bool, device: torch.device
) -> list[Row]:
    """Summed loss and both gradients, and the factor from above on its own; a third of the targets is ignored.

    The logits are exact in bf16, whole numbers of an eighth: what is compared is the kernel, not a rounding before it.
    With `autocast` leaves are fp32 and matmuls bf16, as in training.
    """
    tokens, width, vocab = sizes
    torch.manual_seed(0)
    hidden = torch.zeros(tokens, width)
    hidden[torch.arange(tokens), torch.randint(0, width, (tokens,))] = 1.0
    weight = (24 * torch.randn(vocab, width)).clamp(-120, 120).round() / 8
    targets = torch.randint(0, vocab, (tokens,)).to(device)
    targets[1::3] = IGNORE_INDEX
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    _need_kernels(leaves[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with torch.autocast(device.type, BF16, enabled=autocast):
        nats = linear_cross_entropy(leaves[0], leaves[1], targets)
    expected = F.cross_entropy(F.linear(*exact), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    (whole,) = torch.autograd.grad(nats, leaves[:1], retain_graph=True)
    scale = torch.tensor(1 / NUM_TARGETS, device=device)
    gradients = torch.autograd.grad(nats, leaves, scale)
    references = torch.autograd.grad(expected / NUM_TARGETS, exact)
    compared = {"nats": (nats, expected), "factor": (gradients[0], (whole.float() * scale).to(dtype))}
    for name, gradient, reference in zip(("grad hidden", "grad weight"), gradients, references, strict=True):
        # A gradient in fp32 of bf16 matmuls carries their rounding: it is held to their limit.
        compared[name] = (gradient.to(BF16) if autocast else gradient, reference)
    return _rows(case, "cross-entropy", compared)


def check_experts(
    case: str, counts: list[int], d_model: int, d_expert: int, dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """Output and the gradients of rows, gate values and both stacks of matrices; `dtypes` of rows and of matrices."""
    torch.manual_seed(0)
    rows, matrices = dtypes
    with torch.device(device):  # drawn there: half a billion values at 27B size
        inputs = (
            torch.randn(sum(counts), d_model).to(rows),
            torch.rand(sum(counts), 1).to(rows),
            (torch.randn(len(counts), d_model, 2 * d_expert) * d_model**-0.5).to(matrices),
            (torch.randn(len(counts), d_expert, d_model) * d_expert**-0.5).to(matrices),
        )
    leaves = [x.requires_grad_() for x in inputs]
    _need_kernels(leaves[0])
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    sizes = torch.tensor(counts, device=device)
    actual = grouped_swiglu(leaves[0], leaves[1], sizes, leaves[2], leaves[3])
    expected = swiglu_loop(exact[0], exact[1], sizes, exact[2], exact[3])
    upstream = torch.randn_like(actual)
    gradients = torch.autograd.grad(actual, leaves, upstream)
    references = torch.autograd.grad(expected, exact, upstream.double())
    # A gradient in fp32 of bf16 rows carries their rounding: it is held to the limit of the rows.
    gradients = tuple(gradient.to(rows) for gradient in gradients)
    names = ("out", "grad tokens", "grad weights", "grad gate_up", "grad down")
    pairs = zip((actual, *gradients), (expected, *references), strict=True)
    return _rows(case, "experts", dict(zip(names, pairs, strict=True)))


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "/".join({F32: "fp32", BF16: "bf16"}[dtype] for dtype in dtypes)


def cases(device: torch.device, quick: bool) -> list[Case]:
    """All checks; `quick` leaves out the experts of 27B size, for which the kernels are tuned at length."""
    found = []
    for tokens, branches, width, dtypes in GATE_CASES:
        for residual in (False, True):
            name = f"gate {tokens[0]}x{tokens[1]} J={branches} D={width} {_names(dtypes)}{' residual' * residual}"
            arguments = (name, tokens, branches, width, dtypes, residual, device)
            found.append(Case(name, partial(check_gate, *arguments)))
    for sizes in HEAD_CASES:
        for dtype, autocast in ((F32, False), (BF16, False), (F32, True)):
            name = "cross-entropy T={} D={} V={} {}".format(*sizes, _names((dtype,))) + " autocast" * autocast
            found.append(Case(name, partial(check_cross_entropy, name, sizes, dtype, autocast, device)))
    for counts, d_model, d_expert in (*EXPERT_CASES, *(() if quick else (LARGE_EXPERTS,))):
        for types in ((F32, F32), (BF16, BF16), (BF16, F32)):
            if d_model > 1000 and types != (BF16, BF16):
                continue
            load = str(counts) if len(counts) < 10 else f"{len(counts)} experts"
            name = f"experts {load} D={d_model} F={d_expert} {_names(types)}"
            found.append(Case(name, partial(check_experts, name, counts, d_model, d_expert, types, device)))
    return found


def section(device: torch.device, quick: bool) -> Section:
    """The table of checks."""
    return Section(
        "checks",
        "Correctness on the device",
        "Each kernel against its definition in plain torch in fp64: `||a - b|| / ||b||` per tensor.",
        [
            Column("check", "case"),
            Column("tensor", "tensor"),
            Column("relative error", "relative_error", form=".1e"),
            Column("limit", "limit", form=".1e"),
            Column("", "verdict"),
        ],
        cases(device, quick),
    )


def failures(table: Section) -> int:
    """Checks that failed, raised, or were not reached."""
    failed = sum("error" in row or row["verdict"] != "ok" for row in table.rows)
    return failed + len(table.cases) - table.reached
