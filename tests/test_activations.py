"""Activations in closed form against what autograd keeps, measured on the path of a GPU without one.

Fake tensors run the model's own code, kernels as operators of known shapes, and know which tensors share memory. Three
things of a CPU differ from a GPU and are set here as they are there: `F.rms_norm`, the fused attention, and which of
`models`' paths is taken. Real tensors need none of that, for the parts that a CPU computes alike.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from models import native, softmax_attention
from models.activations import activation_bytes
from models.attention import Attention, AttentionConfig
from models.engram import Engram
from models.hyper_connections import HyperConnection, HyperConnectionsConfig
from models.kernels import launch
from models.mla import LatentAttention, MLAConfig
from models.moe import ExpertKernel
from models.over_encoding import OverEncoding, OverEncodingConfig
from models.router import RouterConfig
from models.transformer import ActivationCheckpointing, Block, Transformer, TransformerConfig
from scripts.params import model_config
from tests.interpreted import interpreted_kernels
from tests.tiny import ROUTERS, tiny_config, tiny_model
from train.footprint import Layout, activations

BATCH = 3


def gpu_config(kind: str, **changes: Any) -> TransformerConfig:
    """A tiny configuration whose widths the expert kernels take; no two tensors of it share a shape by chance."""
    cfg = tiny_config(kind, d_model=32, seq_len=20, d_ff=56, **changes)
    if cfg.moe is not None:
        cfg = replace(cfg, moe=replace(cfg.moe, d_expert=16, expert_kernel=ExpertKernel.triton))
    return cfg


def with_moe(cfg: TransformerConfig, **changes: Any) -> TransformerConfig:
    return replace(cfg, moe=replace(cfg.moe, **changes))


def with_engram(cfg: TransformerConfig, **changes: Any) -> TransformerConfig:
    return replace(cfg, engram=replace(cfg.engram, **changes))


CONFIGS = {
    "dense": gpu_config("dense"),
    "qk_norm": gpu_config("dense", attention=AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=6, qk_norm=True)),
    "as_many_key_heads": gpu_config("dense", attention=AttentionConfig(num_heads=3, num_kv_heads=3, head_dim=6)),
    "mla": gpu_config("dense_mla"),
    "mla_plain_queries": gpu_config("dense_mla", mla=MLAConfig(5, 12, None, 7, 6, 3)),
    "moe": gpu_config("moe"),
    **{kind: gpu_config(kind) for kind in ROUTERS},
    "grouped_mm": with_moe(gpu_config("moe"), expert_kernel=ExpertKernel.grouped_mm),
    "no_shared": with_moe(gpu_config("moe"), num_shared_experts=0),
    "widths": with_moe(gpu_config("moe"), shared_widths=[40, 0]),
    "router_settings": with_moe(
        gpu_config("moe"), router=RouterConfig(top_k=3, sequence_balance_coef=0.0, normalize=False, route_scale=2.5)
    ),
    "groups": with_moe(gpu_config("moe"), num_experts=6, router=RouterConfig(top_k=2, num_groups=3, top_groups=2)),
    "engram": gpu_config("engram"),
    "engram_first": with_engram(gpu_config("moe_engram"), layers=[0, 2]),
    "four_grams_bias": with_engram(gpu_config("engram"), max_ngram_size=4, d_memory=24, use_bias=True, kernel_size=3),
    "taps_beyond_the_start": with_engram(gpu_config("engram"), max_ngram_size=5, d_memory=24, kernel_size=6),
    "no_gate": with_engram(gpu_config("engram"), gate=False),
    "no_convolution": with_engram(gpu_config("engram"), kernel_size=0),
    "value_alone": with_engram(gpu_config("engram"), kernel_size=0, gate=False),
    "over_encoding": gpu_config("moe", over_encoding=OverEncodingConfig(3, 2, 16, 23)),
    "tied": gpu_config("moe", tie_embeddings=True),
    "hyper": gpu_config("moe_hyper"),
    "hyper_two": gpu_config("dense", hyper_connections=HyperConnectionsConfig(num_streams=2, sinkhorn_iterations=3)),
    "hyper_over_encoding": gpu_config("dense_hyper", over_encoding=OverEncodingConfig(3, 2, 16, 23)),
    "hyper_engram": gpu_config("moe_engram_mla_hyper"),
    "hyper_engram_first": with_engram(gpu_config("moe_engram_hyper"), layers=[0, 1]),
    "hyper_no_gate": with_engram(gpu_config("engram_hyper"), gate=False, layers=[0, 1]),
    "hyper_fused": with_engram(gpu_config("moe_engram_hyper_fused"), layers=[0, 2]),
    "hyper_fused_no_gate": with_engram(gpu_config("engram_hyper_fused"), gate=False, layers=[0, 2]),
}


class FusedNorm(torch.autograd.Function):
    """What autocast makes of F.rms_norm on a GPU: torch lists it among its operators in fp32, and has one kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if x.dtype == torch.float32 else x.to(torch.float32, memory_format=torch.contiguous_format)
        inverse = x.new_empty(*x.shape[:-1], 1)
        ctx.save_for_backward(x, inverse, None if weight is None else weight.float())
        return torch.empty_like(x)


class FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output, whose heads lie side by side, and one fp32 number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        batch, heads, seq_len, _ = query.shape
        out = query.new_empty(batch, seq_len, heads, value.shape[-1]).transpose(1, 2)
        log_sum_exp = torch.empty(batch, heads, seq_len, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, out, log_sum_exp)
        return out


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_level", native.Level.off)
    monkeypatch.setattr(launch, "INSTALLED", True)
    monkeypatch.setattr(launch, "interpret_on_cpu", True)
    monkeypatch.setattr(softmax_attention, "MATERIALIZE_UP_TO", 0)
    monkeypatch.setattr(softmax_attention, "serves_grouped_heads", lambda query: False)
    monkeypatch.setattr(torch, "bincount", lambda ids, minlength: ids.new_zeros(minlength))  # its size is data
    monkeypatch.setattr(
        torch.nn.functional, "rms_norm", lambda x, shape, weight=None, eps=None: FusedNorm.apply(x, weight)
    )
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, attn_mask, scale, enable_gqa: FusedAttention.apply(query, key, value, attn_mask),
    )


OWNERS = {
    Transformer: "head",
    nn.Embedding: "residual stream",
    Block: "hyper-connections",
    Attention: "attention",
    LatentAttention: "attention",
    Engram: "engram",
    OverEncoding: "over-encoding",
    HyperConnection: "hyper-connections",
}
NAMES = {
    "norm": "residual stream",
    "attention_norm": "residual stream",
    "feed_forward_norm": "residual stream",
    "moe": "routed experts",
    "router": "router",
    "shared_expert": "shared experts",
    "feed_forward": "feed-forward",
}


class Kept(TorchDispatchMode):
    """Bytes of the distinct storages that autograd keeps while a model runs, by the part that keeps them first.

    As a mode it sees which tensors are copies of weight matrices.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.parts: Counter[str] = Counter()
        self.blocks: Counter[int] = Counter()  # the same by block, its inputs left out; -1 outside of blocks
        self.weight_copies: Counter[int] = Counter()  # bytes by block; -1 outside of blocks
        self._known: dict[int, Tensor] = {address(parameter): parameter for parameter in model.parameters()}
        self._matrices = {address(p): block_of(name) for name, p in model.named_parameters() if p.dim() > 1}
        self._copies: dict[int, int] = {}
        self._running: list[str] = []
        self._block, self._inputs = -1, [-1]  # index of the block that runs, addresses of hidden state and mask
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: self._enter(index, (args[0], args[1].bias)))
            block.register_forward_hook(lambda *_: setattr(self, "_block", -1))
        for name, module in model.named_modules():
            part = OWNERS.get(type(module)) or NAMES.get(name.rpartition(".")[2])
            if part is not None:
                module.register_forward_pre_hook(lambda *_, part=part: self._running.append(part))
                module.register_forward_hook(lambda *_: self._running.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and address(args[0]) in self._matrices:
            self._copies[address(result)] = self._matrices[address(args[0])]
            self._known[-len(self._copies)] = result  # kept alive, so that its address stays taken
        return result

    def _enter(self, index: int, inputs: tuple[Tensor, Tensor]) -> None:
        self._block, self._inputs = index, [address(tensor) for tensor in inputs]

    def hold(self, part: str, tensor: Tensor) -> None:
        """Count a tensor that lives whether autograd keeps it or not."""
        self._known[address(tensor)] = tensor
        self.parts[part] += tensor.nbytes

    def keep(self, tensor: Tensor) -> Tensor:
        if address(tensor) not in self._known:
            self._known[address(tensor)] = tensor
            if address(tensor) in self._copies:
                self.weight_copies[self._copies[address(tensor)]] += tensor.untyped_storage().nbytes()
            else:
                self.parts[self._running[-1]] += tensor.untyped_storage().nbytes()
                self.blocks[self._block] += tensor.untyped_storage().nbytes() * (address(tensor) not in self._inputs)
        return tensor


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def block_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def measure(model: Transformer, batch: int = BATCH) -> Kept:
    """One forward pass under bf16 autocast, as in training."""
    kept, cfg = Kept(model), model.cfg
    token_ids = torch.zeros(batch, cfg.seq_len, dtype=torch.int64)
    rows = {}
    if cfg.memory is not None:
        shape = (batch, cfg.seq_len, cfg.memory.num_rows_per_token, cfg.memory.row_dim)
        rows = {layer: torch.zeros(shape, requires_grad=True) for layer in cfg.memory.layers}
        for tensor in rows.values():
            kept.hold("memory rows", tensor)
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda tensor: tensor)
    with kept, hooks, torch.autocast("cpu", torch.bfloat16):
        model(token_ids, torch.zeros_like(token_ids), rows, torch.zeros_like(token_ids))
    return kept


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_is_what_autograd_keeps(name, like_a_gpu):
    cfg = CONFIGS[name]
    with FakeTensorMode():
        kept = measure(Transformer(cfg))
    assert dict(kept.parts) == activation_bytes(cfg, BATCH)
    copies = activations(cfg, Layout(), BATCH)["weight copies"]
    assert copies == sum(kept.weight_copies.values())
    assert "weight copies" not in activations(cfg, Layout(bf16_weights=True), BATCH)


def test_a_preset_at_full_width(like_a_gpu):
    """Four layers of Engram-27B with a sequence of 4096 tokens: 4 billion parameters, without their memory."""
    cfg = model_config("engram_27b", ["model.num_layers=4", "model.engram.layers=[1,3]"]).model
    cfg = with_moe(cfg, expert_kernel=ExpertKernel.triton)
    with FakeTensorMode():
        kept = measure(Transformer(cfg), batch=1)
    assert dict(kept.parts) == activation_bytes(cfg, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_keeps_the_inputs_and_one_block(name, like_a_gpu):
    """What is kept between the passes, as measured, and what running the largest block again adds to it."""
    cfg = replace(CONFIGS[name], activation_checkpointing=ActivationCheckpointing.full)
    with FakeTensorMode():
        between, again = measure(Transformer(cfg)), measure(Transformer(CONFIGS[name]))
    added = max(again.blocks[layer] for layer in range(cfg.num_layers))
    ids = BATCH * cfg.seq_len * 8  # document ids are an input of every block, and no activation
    full = sum(activation_bytes(cfg, BATCH).values())
    bias = BATCH * cfg.seq_len**2 * 2  # kept with the mask, a tuple, into which autograd's hooks do not look
    assert full == sum(between.parts.values()) - ids + bias + added
    assert full < sum(activation_bytes(CONFIGS[name], BATCH).values())


@pytest.mark.parametrize(
    "name",
    ["dense", "as_many_key_heads", "grouped_mm", "moe_softmax", "moe_gshard", "moe_switch", "hyper", "over_encoding"],
)
def test_parts_that_a_cpu_computes_alike(name, monkeypatch):
    """Real tensors, key and value heads repeated as for a GPU. The gate's definition keeps more than its kernel."""
    monkeypatch.setattr(softmax_attention, "serves_grouped_heads", lambda query: False)
    cfg = replace(CONFIGS[name], seq_len=softmax_attention.MATERIALIZE_UP_TO + 8)
    if cfg.moe is not None:
        cfg = with_moe(cfg, expert_kernel=ExpertKernel.grouped_mm)
    kept, expected = measure(tiny_model(cfg)), activation_bytes(cfg, BATCH)
    assert kept.parts == expected


@pytest.mark.parametrize("name", ["engram", "no_convolution", "hyper_fused"])
def test_gate_and_head_in_their_kernels(name):
    """Real tensors, kernels interpreted; the attention of short sequences keeps its probabilities on a CPU."""
    cfg = CONFIGS[name]
    if cfg.moe is not None:
        cfg = with_moe(cfg, expert_kernel=ExpertKernel.grouped_mm)
    with interpreted_kernels():
        kept = measure(tiny_model(cfg))
    expected = activation_bytes(cfg, BATCH)
    assert kept.parts.keys() == expected.keys()
    for part in expected.keys() - {"attention"}:
        assert kept.parts[part] == expected[part], part


def test_twice_the_sequences_are_twice_the_bytes_but_for_what_has_the_size_of_weights():
    cfg = gpu_config("moe_engram_hyper")
    one, two = activation_bytes(cfg, 1), activation_bytes(cfg, 2)
    assert two["engram"] == 2 * one["engram"] and two["memory rows"] == 2 * one["memory rows"]
    weight = cfg.vocab_size * cfg.d_model * 4
    assert two["head"] - weight == 2 * (one["head"] - weight)


def test_copies_of_weights_by_layout():
    cfg = with_moe(gpu_config("moe"), expert_kernel=ExpertKernel.grouped_mm)
    layout = Layout(world_size=2, expert_parallel_size=2)
    dense = activations(gpu_config("moe"), Layout(), 1)["weight copies"]
    one_expert = 2 * 3 * cfg.d_model * cfg.moe.d_expert
    assert activations(cfg, Layout(), 1)["weight copies"] == dense + 2 * 5 * one_expert
    assert activations(cfg, layout, 1)["weight copies"] == dense + 2 * 3 * one_expert  # the fullest of two devices
    full = replace(cfg, activation_checkpointing=ActivationCheckpointing.full)
    attention = 2 * (32 * 32 + 16 * 32)  # 8 heads of 4 and 4 heads' outputs
    shared = 2 * 3 * 32 * cfg.moe.shared_width(0)
    assert activations(full, Layout(), 1)["weight copies"] == attention + shared + 5 * one_expert
    with pytest.raises(ValueError, match="micro_batch_size=0 must be at least 1; nearest: 1"):
        activations(cfg, Layout(), 0)
