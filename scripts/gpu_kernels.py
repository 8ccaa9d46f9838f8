"""The Engram gate over the copy bandwidth, the head with its loss against torch's own, and one layer of attention."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.accounting import flops_per_token
from models.attention import AttentionConfig
from models.engram import GATE_NORM_EPS
from models.initialize import initialize
from models.kernels.gate import bytes_moved, engram_gate, engram_gate_definition
from models.loss import cross_entropy, linear_cross_entropy
from models.mla import MLAConfig
from models.softmax_attention import causal_mask
from models.transformer import TransformerConfig, make_attention
from scripts.gpu_table import Case, Column, Row, Section
from scripts.gpu_timing import Bench, backward_of

F32, BF16 = torch.float32, torch.bfloat16
# Tokens, branches, width; of the 27B models with four streams, and of `medium` with one.
GATE_SHAPES = ((8192, 4, 2560), (16384, 4, 2560), (16384, 1, 768))
# Types of hidden, value_keys and norms: all bf16, and the fp32 stream that autocast leaves.
GATE_TYPES = {"bf16": (BF16, BF16, BF16), "fp32 stream": (F32, BF16, F32)}
# Tokens, width and vocabulary of the head (conf/model/moe_27b.yaml).
HEAD = (8192, 2560, 129_280)
# One layer of the 27B models' attention (the same file) over one sequence, of documents of 1000 tokens; and GROUPED,
# one with four query heads for every key head.
ATTENTION = TransformerConfig(
    seq_len=4096, num_layers=1, d_model=2560, attention=None, mla=MLAConfig(num_heads=32), init_std=0.006
)
GROUPED = replace(ATTENTION, mla=None, attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128))
DOCUMENT = 1000


def gate(bench: Bench, name: str, shape: tuple[int, int, int], types: tuple[torch.dtype, ...], way: str) -> list[Row]:
    """Forward and backward pass of one implementation; the bytes are those that the kernels must move."""
    tokens, branches, width = shape
    hidden = bench.random(1, tokens, branches, width, dtype=types[0])
    value_keys = bench.random(1, tokens, 1 + branches, width, dtype=types[1])
    norms = [torch.ones(branches, width, dtype=types[2], device=bench.device) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (hidden, value_keys, *norms)]
    call: Callable[..., tuple[Tensor, Tensor]] = engram_gate if way == "kernel" else engram_gate_definition
    if way == "compiled":
        call = torch.compile(engram_gate_definition, dynamic=False)
    with torch._functorch.config.patch(donated_buffer=False):  # or what is compiled could run backwards only once
        out, _ = call(*leaves, GATE_NORM_EPS)
    moved = bytes_moved(hidden, value_keys, out)
    seconds = {}
    with torch.no_grad():
        seconds["forward"] = bench.seconds(lambda: call(*leaves, GATE_NORM_EPS))
    seconds["backward"] = bench.seconds(backward_of(out, leaves))
    return [
        {"case": name, "way": way, "pass": direction, "seconds": seconds[direction], "bytes": count / taken,
         "share": bench.of_copy(count / taken)}
        for (direction, taken), count in zip(seconds.items(), moved, strict=True)
    ]  # fmt: skip


def gate_section(bench: Bench) -> Section:
    """Kernel, definition and torch.compile of the definition."""
    found = []
    for shape in GATE_SHAPES[:1] if bench.quick else GATE_SHAPES:
        for stream, types in GATE_TYPES.items():
            name = "T={} J={} D={}, {}".format(*shape, stream)
            for way in ("kernel", "definition", "compiled"):
                found.append(Case(f"{name}, {way}", partial(gate, bench, name, shape, types, way)))
    return Section(
        "gate",
        "Engram gate",
        "Bytes that one pass of the kernels must at least move (`models.kernels.gate.bytes_moved`) over the time, and "
        "that over the copy bandwidth. Aim: at least 80 %. The other two ways are held to the same bytes.",
        [
            Column("shape", "case"),
            Column("way", "way"),
            Column("pass", "pass"),
            Column("ms", "seconds", 1e3, ".3f"),
            Column("TB/s", "bytes", 1e-12, ".2f"),
            Column("of copy", "share", 1, ".0%"),
        ],
        found,
    )


def torch_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual way: all logits in the type of the matmul and again in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def head(bench: Bench, shape: tuple[int, int, int], way: str, ours: Row) -> list[Row]:
    """Forward and backward pass under bf16 autocast with an fp32 weight; `ours` is filled by the kernel's case."""
    tokens, width, vocab = shape
    hidden = bench.random(tokens, width).requires_grad_()
    weight = bench.random(vocab, width, dtype=F32, std=width**-0.5).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), device=bench.device)
    calls: dict[str, Callable[..., Tensor]] = {
        "kernel": linear_cross_entropy,
        "torch, logits held": torch_head,
        "torch.compile of that": torch.compile(torch_head, dynamic=False),
        "definition": lambda *tensors: cross_entropy(F.linear(*tensors[:2]), tensors[2])[0],
    }

    def run() -> None:
        with torch.autocast(bench.device.type, BF16):
            nats = calls[way](hidden, weight, targets)
        torch.autograd.grad(nats, (hidden, weight))

    seconds = bench.seconds(run)
    peak = bench.peak_bytes(run)
    rate = 6 * tokens * width * vocab / seconds
    row: Row = {"case": way, "seconds": seconds, "flops": rate, "share": bench.of_matmul(rate), "peak": peak}
    if way == "kernel":
        ours.update(row)
    if ours:
        row["slower"] = seconds / ours["seconds"]
        row["larger"] = peak / ours["peak"] if peak and ours["peak"] else None
    return [row]


def head_section(bench: Bench) -> Section:
    """The kernel first, since the others are compared with it."""
    ours: Row = {}
    ways = ("kernel", "torch, logits held", "torch.compile of that", "definition")
    return Section(
        "cross_entropy",
        "Head and cross-entropy",
        "T={} D={} V={}, forward and backward, 6 T V D FLOPs; peak memory beyond the inputs.".format(*HEAD),
        [
            Column("way", "case"),
            Column("ms", "seconds", 1e3, ".2f"),
            Column("TFLOP/s", "flops", 1e-12, ".0f"),
            Column("of the dense rate", "share", 1, ".0%"),
            Column("peak GB", "peak", 1e-9, ".2f"),
            Column("time over ours", "slower", 1, ".2f"),
            Column("memory over ours", "larger", 1, ".2f"),
        ],
        [Case(way, partial(head, bench, HEAD, way, ours)) for way in ways],
    )


def attention_backend(call: Callable[[], Any]) -> str:
    """Names of the attention operators that `call` runs, as torch's profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    prefix = "aten::_scaled_dot_product_"
    names = {event.key.removeprefix(prefix) for event in profile.key_averages() if event.key.startswith(prefix)}
    return ", ".join(sorted(name for name in names if not name.endswith("_backward"))) or "none"


def attention_case(cfg: TransformerConfig, backend: SDPBackend | None) -> str:
    """Name of a row."""
    kind = "latent" if cfg.attention is None else "grouped queries"
    return f"{kind}, {'as the layer chooses' if backend is None else f'forced: {backend.name}'}"


def attention(bench: Bench, cfg: TransformerConfig, batch: int, backend: SDPBackend | None) -> list[Row]:
    """Forward and backward pass of one layer under bf16 autocast, with the document mask."""
    layer = make_attention(cfg)
    initialize(layer, seed=0, init_std=cfg.init_std)
    layer.to(bench.device)
    x = bench.random(batch, cfg.seq_len, cfg.d_model).requires_grad_()
    document_ids = (torch.arange(cfg.seq_len, device=bench.device) // DOCUMENT).expand(batch, -1)
    mask = causal_mask(document_ids, x.to(BF16))
    leaves = [x, *layer.parameters()]

    def run() -> None:
        choice = nullcontext() if backend is None else sdpa_kernel([backend])
        with torch.autocast(bench.device.type, BF16), choice:
            out = layer(x, mask)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    ran = attention_backend(run)
    seconds = bench.seconds(run)
    counts = flops_per_token(cfg)
    rate = 3 * (counts.attention_projections + counts.attention_scores) * batch * cfg.seq_len / seconds
    return [
        {"case": attention_case(cfg, backend), "ran": ran, "seconds": seconds, "flops": rate,
         "share": bench.of_matmul(rate), "peak": bench.peak_bytes(run)}
    ]  # fmt: skip


def attention_section(bench: Bench) -> Section:
    """What the layers take by themselves, and every backend that could be forced."""
    forced = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
    pairs = [(ATTENTION, None), (GROUPED, None), *((ATTENTION, backend) for backend in forced)]
    return Section(
        "attention",
        "Attention with the document mask",
        f"One layer, one sequence of {ATTENTION.seq_len}, 32 heads: latent of 192 and 128, grouped of 128 with 8 key "
        "heads; forward and backward. FLOPs count all S^2 pairs. `attention_math` among the operators would mean that "
        "all probabilities are held.",
        [
            Column("case", "case"),
            Column("operator", "ran"),
            Column("ms", "seconds", 1e3, ".2f"),
            Column("TFLOP/s", "flops", 1e-12, ".0f"),
            Column("of the dense rate", "share", 1, ".0%"),
            Column("peak GB", "peak", 1e-9, ".2f"),
        ],
        [
            Case(attention_case(cfg, backend), partial(attention, bench, cfg, 1, backend))
            for cfg, backend in pairs
        ],
    )  # fmt: skip
