"""The whole model: causality, document boundaries, checkpointing, determinism."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.loss import cross_entropy
from models.moe import ExpertKernel, MoEConfig
from models.transformer import ActivationCheckpointing, Output, Transformer, TransformerConfig, gate_histogram
from tests.tiny import ROUTERS, TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model

KINDS = [
    "dense", "moe", "engram", "moe_engram", "dense_mla", "moe_engram_mla", "dense_hyper", "moe_engram_hyper",
    "moe_engram_hyper_fused", *ROUTERS,
]  # fmt: skip


def logits_of(model: Transformer, memory: TinyMemory, token_ids: Tensor, document_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(token_ids, document_ids, memory.rows(token_ids, document_ids)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_token_changes_nothing_before_it(kind):
    cfg = tiny_config(kind)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, _ = tiny_batch(cfg)
    document_ids = torch.zeros_like(token_ids)
    before = logits_of(model, memory, token_ids, document_ids)
    for position in (0, 7, cfg.seq_len - 1):
        changed = token_ids.clone()
        changed[:, position] = (changed[:, position] + 1) % cfg.vocab_size
        after = logits_of(model, memory, changed, document_ids)
        assert relative_error(after[:, :position], before[:, :position]) < 1e-6 or position == 0
        assert relative_error(after[:, position], before[:, position]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_crosses_a_document_boundary(kind):
    cfg = tiny_config(kind)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, boundary=9)
    before = logits_of(model, memory, token_ids, document_ids)
    for position in (0, 8):  # 8 is the last token of the first document: n-grams and convolution reach furthest
        changed = token_ids.clone()
        changed[:, position] = (changed[:, position] + 1) % cfg.vocab_size
        after = logits_of(model, memory, changed, document_ids)
        assert relative_error(after[:, 9:], before[:, 9:]) < 1e-6
        assert relative_error(after[:, 8], before[:, 8]) > 1e-4
    one_document = logits_of(model, memory, token_ids, torch.zeros_like(document_ids))
    assert relative_error(one_document[:, 9:], before[:, 9:]) > 1e-3


def test_engram_reaches_as_far_as_ngrams_and_convolution_and_no_further():
    """With attention switched off, a token reaches max_ngram_size - 1 + (kernel_size - 1) * dilation = 2 + 9 ahead."""
    engram = replace(tiny_config().engram, layers=[0], table_size=1009)
    cfg = tiny_config("engram", seq_len=24, num_layers=1, engram=engram)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    with torch.no_grad():
        model.blocks[0].attention.output.weight.zero_()
    token_ids, _ = tiny_batch(cfg)
    document_ids = torch.zeros_like(token_ids)
    changed = token_ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % cfg.vocab_size
    before, after = (logits_of(model, memory, ids, document_ids) for ids in (token_ids, changed))
    differs = ((before - after).abs().amax(-1) > 1e-6).any(0)
    assert int(differs.nonzero().max()) == 4 + 2 + 9 and not bool(differs[:4].any())
    assert not bool(differs[4 + 2 + 9 + 1 :].any())


def backward(cfg: TransformerConfig) -> tuple[Output, dict[str, Tensor], dict[int, Tensor]]:
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, batch=3)
    rows = memory.rows(token_ids, document_ids)
    output = model(token_ids, document_ids, rows)
    nats, count = cross_entropy(output.logits[:, :-1], token_ids[:, 1:])
    (nats / count + sum(output.aux_losses.values())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, gradients, {layer: leaf.grad for layer, leaf in rows.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_and_row_gets_a_gradient(kind):
    _, gradients, row_gradients = backward(tiny_config(kind))
    assert [name for name, grad in gradients.items() if grad is None or not bool(grad.abs().sum() > 0)] == []
    assert all(bool(grad.abs().sum() > 0) for grad in row_gradients.values())


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_is_equal_to_the_bit_and_counts_once(kind):
    cfg = tiny_config(kind)
    plain, plain_grads, plain_rows = backward(cfg)
    again, grads, rows = backward(replace(cfg, activation_checkpointing=ActivationCheckpointing.full))
    assert torch.equal(plain.logits, again.logits)
    assert all(torch.equal(plain_grads[name], grads[name]) for name in plain_grads)
    assert all(torch.equal(plain_rows[layer], rows[layer]) for layer in plain_rows)
    if cfg.moe is not None:
        assert torch.equal(plain.stats.expert_counts, again.stats.expert_counts)
        assert again.stats.expert_counts.sum(1).tolist() == [3 * cfg.seq_len * cfg.moe.router.top_k] * 2


def test_equal_runs_are_equal_to_the_bit():
    first, first_grads, _ = backward(tiny_config())
    second, second_grads, _ = backward(tiny_config())
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(first_grads[name], second_grads[name]) for name in first_grads)


@pytest.mark.parametrize("kernel", [ExpertKernel.padded, ExpertKernel.grouped_mm])
def test_expert_kernels_give_the_same_model(kernel):
    def with_kernel(choice: ExpertKernel) -> TransformerConfig:
        cfg = tiny_config()
        return replace(cfg, moe=replace(cfg.moe, expert_kernel=choice))

    fast, fast_grads, fast_rows = backward(with_kernel(kernel))
    plain, plain_grads, plain_rows = backward(with_kernel(ExpertKernel.loop))
    assert relative_error(fast.logits, plain.logits) < 1e-5
    assert all(relative_error(fast_grads[name], plain_grads[name]) < 1e-4 for name in plain_grads)
    assert all(relative_error(fast_rows[layer], plain_rows[layer]) < 1e-4 for layer in plain_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_stays_near_fp32(kind):
    cfg = tiny_config(kind)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg)
    rows = memory.rows(token_ids, document_ids)
    plain = model(token_ids, document_ids, rows)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(token_ids, document_ids, rows)
    assert cast.logits.dtype == torch.bfloat16 and plain.logits.dtype == torch.float32
    assert relative_error(cast.logits, plain.logits) < 5e-2


def test_statistics_are_return_values_without_gradient():
    output, _, _ = backward(tiny_config())
    stats = output.stats
    assert stats.expert_counts.shape == (2, 5) and stats.expert_counts.dtype == torch.int64
    assert stats.router_entropy.shape == (2,) and not stats.router_entropy.requires_grad
    assert list(stats.gate_mean) == [1] and not stats.gate_mean[1].requires_grad
    assert stats.gate_histogram[1].shape == (10,) and stats.gate_histogram[1].sum().item() == 3 * 24
    assert set(output.aux_losses) == {"sequence_balance"}


def test_parts_that_are_absent_report_nothing():
    output, _, _ = backward(tiny_config("dense"))
    assert output.aux_losses == {} and output.stats.expert_counts is None and output.stats.gate_mean == {}


def test_histogram_counts_tenths():
    assert gate_histogram(torch.tensor([0.0, 0.05, 0.15, 0.95, 1.0, 0.95])).tolist() == [2, 1] + [0] * 7 + [3]


def test_expert_bias_moves_only_when_told():
    cfg = tiny_config("moe")
    model = Transformer(cfg)
    counts = torch.tensor([[9, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    model.update_expert_bias(counts)
    gamma = cfg.moe.router.bias_update_rate
    assert model.blocks[1].moe.router.expert_bias.tolist() == pytest.approx([-gamma] + [gamma] * 4)
    assert model.blocks[2].moe.router.expert_bias.tolist() == [0.0] * 5
    tiny_before = [block.moe.router.expert_bias.clone() for block in model.blocks[1:]]
    token_ids, document_ids = tiny_batch(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    model(token_ids, document_ids).logits.sum().backward()
    assert all(torch.equal(a, b.moe.router.expert_bias) for a, b in zip(tiny_before, model.blocks[1:], strict=True))


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_without_bias_are_left_alone(kind):
    model = tiny_model(tiny_config(kind))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.update_expert_bias(torch.tensor([[9, 0, 0, 0, 0], [1, 1, 1, 1, 1]]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "losses", "has_entropy", "can_drop"),
    [
        ("moe", {"sequence_balance"}, True, False),
        ("moe_softmax", {"expert_balance"}, True, False),
        ("moe_gshard", {"load_balance"}, True, True),
        ("moe_switch", {"load_balance"}, True, True),
        ("moe_hash", set(), False, False),
    ],
)
def test_each_router_reports_what_it_has(kind, losses, has_entropy, can_drop):
    cfg = tiny_config(kind)
    output, _, _ = backward(cfg)
    assert set(output.aux_losses) == losses
    assert (output.stats.router_entropy is not None) == has_entropy
    assert (output.stats.dropped is not None) == can_drop == cfg.moe.router.can_drop
    if can_drop:
        assert output.stats.dropped.tolist() == [0.0, 0.0]  # there is room for all


def test_tied_embeddings_share_one_matrix():
    model = tiny_model(tiny_config("dense", tie_embeddings=True))
    assert model.head is None
    token_ids, document_ids = tiny_batch(model.cfg)
    assert model(token_ids, document_ids).logits.shape == (2, 24, model.cfg.vocab_size)


def test_memory_rows_must_match_the_engram_layers():
    cfg = tiny_config("engram")
    token_ids, document_ids = tiny_batch(cfg)
    with pytest.raises(ValueError, match=r"memory_rows holds layers \[\], model.engram.layers asks for \[1\]"):
        tiny_model(cfg)(token_ids, document_ids)


def test_too_long_a_sequence_is_refused():
    model = tiny_model(tiny_config("dense"))
    too_long = torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"25 positions exceeds model.seq_len=24"):
        model(too_long, too_long)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_dense_layers": 9}, r"num_dense_layers=9 must be between 0 and model.num_layers=3; nearest: 3"),
        ({"d_model": 0}, r"d_model=0 must be at least 1"),
        ({"init_std": 0.0}, r"init_std=0.0"),
        ({"init_std": float("nan")}, r"init_std=nan .* must be positive and finite"),
        ({"norm_eps": float("nan")}, r"norm_eps=nan must be positive and finite"),
        ({"norm_eps": float("inf")}, r"norm_eps=inf must be positive and finite"),
        ({"embedding_init_std": float("nan")}, r"embedding_init_std=nan must be positive and finite"),
        ({"num_dense_layers": 3}, r"num_dense_layers=3 leaves no layer of model.num_layers=3 .*nearest: 2, or .*null"),
        (
            {"moe": MoEConfig(62, 8, router=ROUTERS["moe_hash"])},
            r"num_experts=62 must be at most model.vocab_size=61 with model.moe.router.kind=hash.*nearest: 61",
        ),
        ({"num_layers": 1, "num_dense_layers": 0}, r"engram.layers=\[1\] must lie in 0..0 .*nearest: \[0\]"),
    ],
)
def test_bad_shapes_are_refused_with_a_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_shared_widths_are_one_per_moe_layer():
    cfg = tiny_config("moe")
    with pytest.raises(ValueError, match=r"one width per MoE layer, 2 .*not 3"):
        replace(cfg, moe=replace(cfg.moe, shared_widths=[8, 8, 8]))
    model = Transformer(replace(cfg, moe=replace(cfg.moe, shared_widths=[24, 0])))
    assert model.blocks[1].moe.shared_expert.down.weight.shape == (16, 24)
    assert model.blocks[2].moe.shared_expert is None
