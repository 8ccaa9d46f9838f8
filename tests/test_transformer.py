"""The whole model: causality, document boundaries, checkpointing, determinism, parity with Hugging Face's Dots1."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Dots1Config, Dots1ForCausalLM

from models.attention import AttentionConfig
from models.loss import cross_entropy
from models.moe import ExpertKernel, MoEConfig
from models.router import RouterConfig
from models.transformer import ActivationCheckpointing, Output, Transformer, TransformerConfig, gate_histogram
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model

KINDS = ["dense", "moe", "engram", "moe_engram"]


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


def test_tied_embeddings_share_one_matrix():
    model = tiny_model(tiny_config("dense", tie_embeddings=True))
    assert model.head is None
    token_ids, document_ids = tiny_batch(model.cfg)
    assert model(token_ids, document_ids).logits.shape == (2, 24, model.cfg.vocab_size)


@pytest.mark.parametrize("qk_norm", [True])
def test_logits_and_gradients_equal_hugging_face_dots1(qk_norm):
    """Same weights, same logits: attention with QK-norm, a leading dense layer, shared and routed experts, and bias."""
    cfg = TransformerConfig(
        vocab_size=97,
        seq_len=16,
        num_layers=3,
        d_model=24,
        d_ff=40,
        num_dense_layers=1,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=qk_norm),
        moe=MoEConfig(num_experts=6, d_expert=16, num_shared_experts=2, router=RouterConfig(top_k=2, route_scale=1.7)),
    )
    theirs = Dots1ForCausalLM(
        Dots1Config(
            vocab_size=97,
            hidden_size=24,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            n_shared_experts=2,
            n_routed_experts=6,
            routed_scaling_factor=1.7,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            norm_topk_prob=True,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            rms_norm_eps=cfg.norm_eps,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    )
    model = tiny_model(cfg)
    copy_into_dots1(model, theirs)
    token_ids = torch.randint(0, 97, (2, 16))
    logits = model(token_ids, torch.zeros_like(token_ids)).logits
    expected = theirs(input_ids=token_ids).logits
    assert relative_error(logits, expected) < 1e-5
    weight = torch.randn_like(expected)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, name in (
        (model.embedding.weight, "model.embed_tokens.weight"),
        (model.head.weight, "lm_head.weight"),
        (model.blocks[1].moe.router.weight, "model.layers.1.mlp.gate.weight"),
        (model.blocks[2].attention.output.weight, "model.layers.2.self_attn.o_proj.weight"),
        (model.blocks[0].feed_forward.down.weight, "model.layers.0.mlp.down_proj.weight"),
        (model.blocks[1].attention.key_norm.weight, "model.layers.1.self_attn.k_norm.weight"),
    ):
        assert relative_error(ours.grad, theirs.get_parameter(name).grad) < 1e-4, name
    down = theirs.get_parameter("model.layers.2.mlp.experts.down_proj").grad
    assert relative_error(model.blocks[2].moe.experts.down.grad.transpose(1, 2), down) < 1e-4


@torch.no_grad()
def copy_into_dots1(model: Transformer, theirs: Dots1ForCausalLM) -> None:
    """Writes our weights into Hugging Face's names and layouts; fails if any of theirs is left over."""
    cfg, state = model.cfg, {}
    state["model.embed_tokens.weight"] = model.embedding.weight
    state["model.norm.weight"] = model.norm.weight
    state["lm_head.weight"] = model.head.weight
    widths = [
        count * cfg.attention.head_dim for count in (cfg.attention.num_heads,) + (cfg.attention.num_kv_heads,) * 2
    ]
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}"
        state[f"{prefix}.input_layernorm.weight"] = block.attention_norm.weight
        state[f"{prefix}.post_attention_layernorm.weight"] = block.feed_forward_norm.weight
        for name, weight in zip("qkv", block.attention.qkv.weight.split(widths), strict=True):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        state[f"{prefix}.self_attn.o_proj.weight"] = block.attention.output.weight
        state[f"{prefix}.self_attn.q_norm.weight"] = block.attention.query_norm.weight
        state[f"{prefix}.self_attn.k_norm.weight"] = block.attention.key_norm.weight
        dense, name = (
            (block.feed_forward, "mlp") if block.moe is None else (block.moe.shared_expert, "mlp.shared_experts")
        )
        gate, up = dense.gate_up.weight.chunk(2)
        state[f"{prefix}.{name}.gate_proj.weight"], state[f"{prefix}.{name}.up_proj.weight"] = gate, up
        state[f"{prefix}.{name}.down_proj.weight"] = dense.down.weight
        if block.moe is not None:
            state[f"{prefix}.mlp.gate.weight"] = block.moe.router.weight
            state[f"{prefix}.mlp.gate.e_score_correction_bias"] = block.moe.router.expert_bias
            state[f"{prefix}.mlp.experts.gate_up_proj"] = block.moe.experts.gate_up.transpose(1, 2)
            state[f"{prefix}.mlp.experts.down_proj"] = block.moe.experts.down.transpose(1, 2)
    theirs.load_state_dict(state, strict=True)


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
        ({"num_layers": 1}, r"engram.layers=\[1\] must lie in 0..0 .*nearest: \[0\]"),
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
