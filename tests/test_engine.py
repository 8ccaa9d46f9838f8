"""The engine against plain torch: clipping, accumulation, Muon at both ZeRO stages, state."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models import native
from models.attention import AttentionConfig
from models.engram import EngramConfig
from models.initialize import initialize
from models.memory_table import LocalTable, MemoryOptimConfig
from models.moe import MoEConfig
from models.ngram_hash import NgramHasher, num_rows
from models.router import RouterConfig
from models.transformer import Transformer, TransformerConfig
from train.engine import Engine
from train.execution import DEEPSPEED_SETTINGS, EngineConfig, NativeKernels, Precision, resolve_native
from train.finite import NonFiniteLossError
from train.held import check_fits
from train.optim import OptimConfig, OptimizerKind

VOCAB, SEQ = 61, 24
CPU = torch.device("cpu")


def model_config() -> TransformerConfig:
    return TransformerConfig(
        vocab_size=VOCAB,
        seq_len=SEQ,
        num_layers=2,
        d_model=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
        moe=MoEConfig(num_experts=5, d_expert=16, num_shared_experts=1, router=RouterConfig(top_k=2)),
        engram=EngramConfig(layers=[1], num_hash_heads=2, d_memory=32, table_size=53),
    )


def fresh_model() -> Transformer:
    """Initial weights, but the convolution's taps not zero: its norm would have no gradient."""
    model = Transformer(model_config())
    initialize(model, 0)
    taps = next(p for name, p in model.named_parameters() if name.endswith("taps"))
    torch.nn.init.normal_(taps, std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def data(num: int, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (num, SEQ), generator=generator)
    return ids, (ids * 7 + 1) % VOCAB, torch.zeros_like(ids)


class Setup:
    """A model, its table, an engine, and one `step` over a global batch in `accumulation` micro-batches."""

    def __init__(self, optim: OptimConfig, zero_stage: int, deepspeed: dict[str, Any] | None = None) -> None:
        cfg = model_config()
        assert cfg.engram is not None
        self.model = fresh_model()
        self.hasher = NgramHasher(cfg.engram, torch.arange(VOCAB), pad_id=0)
        rows = num_rows(cfg.engram)[1]
        self.table = LocalTable(rows, cfg.engram.row_dim, 0.02, 0, MemoryOptimConfig(), layer=1)
        engine_cfg = EngineConfig(
            zero_stage=zero_stage, precision=Precision.fp32, num_threads=1, deepspeed=deepspeed or {}
        )
        self.engine = Engine(self.model, {1: self.table}, optim, engine_cfg, 4, CPU)

    def state(self) -> dict[str, Tensor]:
        """A copy of weights, moments and step counts, whole as one rank holds them."""
        return {one.name: one.values.detach().view(one.shape).clone() for one in self.engine.held_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        for one in self.engine.held_state():
            with torch.no_grad():
                one.values.copy_(state[one.name].view(one.values.shape))
        self.engine.state_was_filled()

    def backward(self, accumulation: int, seed: int = 3) -> float:
        ids, targets, documents = data(8, seed)
        total = 0.0
        for part in range(accumulation):
            piece = slice(part * 8 // accumulation, (part + 1) * 8 // accumulation)
            row_ids = self.hasher(ids[piece], documents[piece])
            rows = {1: self.table.lookup(row_ids[1])}
            nats = self.engine.forward(ids[piece], documents[piece], rows, targets[piece]).nats
            self.engine.backward(nats / targets.numel(), row_ids, rows)
            total += float(nats.detach())
        return total / targets.numel()


def torch_reference(clip: float) -> tuple[float, dict[str, Tensor], Tensor]:
    """Norm, clipped gradients and the clipped gradient of the table as one dense torch parameter."""
    cfg = model_config()
    assert cfg.engram is not None
    model = fresh_model()
    hasher = NgramHasher(cfg.engram, torch.arange(VOCAB), pad_id=0)
    local = LocalTable(num_rows(cfg.engram)[1], cfg.engram.row_dim, 0.02, 0, MemoryOptimConfig(), layer=1)
    dense = torch.nn.Parameter(local.weight.clone())
    ids, targets, documents = data(8)
    output = model(ids, documents, {1: dense[hasher(ids, documents)[1]]})
    torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten()).backward()
    norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), dense], clip)
    assert dense.grad is not None
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(norm), gradients, dense.grad


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_clipping_is_torchs_over_parameters_and_a_dense_table(
    zero_stage: int, accumulation: int, kind: OptimizerKind
) -> None:
    clip = 0.05
    norm, gradients, table_gradient = torch_reference(clip)
    assert norm > 3 * clip
    setup = Setup(OptimConfig(kind=kind, grad_clip=clip), zero_stage)
    setup.backward(accumulation)
    row_ids, rows_gradient = setup.table._gradient.merged()  # type: ignore[misc]
    raw = {name: gradient.clone() for name, _, gradient in setup.engine.gradients()}
    report = setup.engine.step(1.0)
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert report.clip_factor == pytest.approx(clip / (norm + 1e-6), rel=1e-5)
    assert raw.keys() == gradients.keys()
    for name, gradient in raw.items():
        assert distance(gradient * report.clip_factor, gradients[name].flatten()) < 1e-5, name
    full = torch.zeros_like(table_gradient)
    full[row_ids] = rows_gradient * report.clip_factor
    assert distance(full, table_gradient) < 1e-5


def test_no_clipping_when_the_norm_is_small_or_it_is_off() -> None:
    for optim in (OptimConfig(grad_clip=1e9), OptimConfig(grad_clip=0.0)):
        setup = Setup(optim, 0)
        setup.backward(1)
        assert setup.engine.step(1.0).clip_factor == 1.0


@pytest.mark.parametrize("clip", [0.05, 0.0])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_stage_1_learns_exactly_as_stage_0(kind: OptimizerKind, clip: float) -> None:
    """Muon with clipping at stage >= 1 does not learn in DeepSpeed's own configuration; here it must."""
    curves = []
    for stage in (0, 1):
        setup = Setup(OptimConfig(kind=kind, lr=1e-2, grad_clip=clip), stage)
        losses = []
        for _ in range(12):
            losses.append(setup.backward(2))
            setup.engine.step(1.0)
        curves.append(losses)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][-1] < curves[0][0] - 0.7


def test_adamw_step_is_torchs() -> None:
    """One unclipped step of every dense parameter against torch.optim.AdamW run by hand."""
    optim = OptimConfig(lr=1e-2, grad_clip=0.0)
    setup = Setup(optim, 1)
    setup.backward(1)
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    gradients = {name: gradient.clone() for name, _, gradient in setup.engine.gradients()}
    setup.engine.step(0.5)
    for group in setup.engine.groups:
        for name, parameter in group.parameters:
            # the first Adam step: m / (1 - b1) = g, v / (1 - b2) = g^2
            g = gradients[name].view_as(parameter)
            expected = before[name] * (1 - 0.005 * group.weight_decay) - 0.005 * g / (g.abs() + optim.eps)
            assert distance(parameter.detach(), expected) < 1e-5, name


@pytest.mark.parametrize(("stage", "other"), [(0, 1), (1, 0), (1, 2), (2, 3), (3, 0), (0, 2), (3, 1)])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_state_goes_on_bit_for_bit_even_at_another_stage(kind: OptimizerKind, stage: int, other: int) -> None:
    optim = OptimConfig(kind=kind, lr=1e-2, grad_clip=0.1)
    first = Setup(optim, stage)
    for _ in range(3):
        first.backward(2)
        first.engine.step(1.0)
    rows = {name: tensor.clone() for name, tensor in first.table.state_shards().items()}
    second = Setup(optim, other)
    second.load(first.state())
    second.table.load_state_shards(rows)
    for _ in range(3):
        assert first.backward(2) == second.backward(2)
        first.engine.step(1.0)
        second.engine.step(1.0)
    expected = second.state()
    for name, tensor in first.state().items():
        assert torch.equal(tensor, expected[name]), name


def test_muon_gets_matrices_only() -> None:
    setup = Setup(OptimConfig(kind=OptimizerKind.muon), 0)
    state = setup.state()
    for group in setup.engine.groups:
        for name, _ in group.parameters:
            moments = {key.rpartition(".")[2] for key in state if key.startswith(f"optim.{name}.")}
            is_matrix = any(part in name for part in ("qkv", "output", "gate_up", "down", "value_key"))
            assert moments == ({"momentum_buffer"} if is_matrix else {"step", "exp_avg", "exp_avg_sq"}), name


def test_foreign_state_is_refused() -> None:
    setup = Setup(OptimConfig(), 0)
    held, names = list(setup.engine.held_state()), setup.engine.state_names("model")
    shapes = {one.name: one.shape for one in held}
    assert {name for name in shapes if name.startswith("model.")} == set(names)
    assert {name for name in shapes if name.startswith("optim.")} == set(setup.engine.state_names("optim"))
    check_fits(held[: len(names)], shapes, "model", names)
    shapes["model.head.weight"] = (7, 7)
    with pytest.raises(ValueError, match=r"other shapes \['model.head.weight'\] \(1\)"):
        check_fits(held[: len(names)], shapes, "model", names)
    shapes.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing \['model.norm.weight'\]"):
        check_fits(held[: len(names)], shapes, "model", names)


@pytest.mark.parametrize(
    "setting",
    [
        "gradient_clipping",
        "optimizer",
        "torch_autocast",
        "zero_optimization",
        "scheduler",
        "amp",
        "wall_clock_breakdown",
    ],
)
def test_settings_that_would_break_training_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"engine.deepspeed.{setting}"):
        EngineConfig(deepspeed={setting: 1.0})


def test_accepted_deepspeed_settings_change_no_bit() -> None:
    values = {"dump_state": True, "memory_breakdown": True, "steps_per_print": 1}
    assert set(values) == set(DEEPSPEED_SETTINGS)
    states = []
    for deepspeed in ({}, values):
        setup = Setup(OptimConfig(lr=1e-2), 1, deepspeed)
        for _ in range(2):
            setup.backward(2)
            setup.engine.step(1.0)
        states.append(setup.state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("where", ["parameter", "table"])
@pytest.mark.parametrize("stage", [0, 1])
def test_an_infinite_gradient_leaves_everything_as_it_was(where: str, stage: int) -> None:
    setup = Setup(OptimConfig(lr=1e-2), stage)
    setup.backward(1)
    setup.engine.step(1.0)
    before = setup.state()
    rows = {name: tensor.clone() for name, tensor in setup.table.state_shards().items()}
    setup.backward(1)
    if where == "parameter":
        next(setup.engine.gradients()).values[0] = float("inf")
    else:
        setup.table._gradient.merged()[1][0, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match=r"gradient norm is inf.*optim.lr"):
        setup.engine.step(1.0)
    setup.table.discard()
    for name, tensor in setup.state().items():
        assert torch.equal(tensor, before[name]), name
    for name, tensor in setup.table.state_shards().items():
        assert torch.equal(tensor, rows[name]), name


def test_bf16_is_close_to_fp32_and_weights_stay_fp32() -> None:
    losses = {}
    for precision in (Precision.fp32, Precision.bf16):
        setup = Setup(OptimConfig(), 0)
        setup.engine = Engine(setup.model, {1: setup.table}, OptimConfig(), EngineConfig(precision=precision), 4, CPU)
        losses[precision] = setup.backward(1)
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in setup.model.parameters())
    assert losses[Precision.bf16] == pytest.approx(losses[Precision.fp32], rel=5e-3)
    assert losses[Precision.bf16] != losses[Precision.fp32]


@pytest.mark.parametrize(
    ("precision", "threads", "library", "unit", "openmp", "expected"),
    [
        (Precision.bf16, 1, object(), True, True, NativeKernels.matrices),
        (Precision.bf16, 1, object(), False, True, NativeKernels.elementwise),
        (Precision.bf16, 1, None, False, False, NativeKernels.off),
        (Precision.bf16, 2, object(), True, True, NativeKernels.matrices),
        (Precision.bf16, 2, object(), True, False, NativeKernels.off),
        (Precision.bf16, 1, object(), True, False, NativeKernels.matrices),
        (Precision.fp32, 1, object(), True, True, NativeKernels.off),
    ],
)
def test_native_kernels_are_resolved_to_what_works_here(
    monkeypatch, precision, threads, library, unit, openmp, expected
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "library", lambda: library)
    monkeypatch.setattr(native, "matrix_unit", lambda: unit)
    monkeypatch.setattr(native, "several_threads", lambda: openmp)
    assert resolve_native(EngineConfig(precision=precision, num_threads=threads)) is expected


def test_native_kernels_that_could_not_run_are_refused(monkeypatch) -> None:
    asked = EngineConfig(num_threads=2, native_kernels=NativeKernels.matrices)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "library", lambda: object())
    monkeypatch.setattr(native, "several_threads", lambda: False)
    with pytest.raises(ValueError, match=r"native_kernels=matrices .* one thread .*num_threads=2.* OpenMP"):
        resolve_native(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"native_kernels=matrices works on a CPU only.*native_kernels=off"):
        resolve_native(asked)


def test_a_step_that_deepspeed_skips_is_not_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(OptimConfig(), 1)
    setup.backward(1)
    rows = setup.table.weight.clone()
    monkeypatch.setattr(setup.engine._engine, "was_step_applied", lambda: False)
    with pytest.raises(NonFiniteLossError, match="norm of the optimizer's update is inf"):
        setup.engine.step(1.0)
    assert torch.equal(setup.table.weight, rows)
    setup.table.discard()
