"""Hyper-connections against a transcription of the paper's equations in fp64, entry by entry, and their own rules."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models.hyper_connections import (
    HyperConnection,
    HyperConnectionsConfig,
    enter,
    leave,
    read,
    sinkhorn_knopp,
    sinkhorn_knopp_plain,
    write,
)
from models.initialize import initialize
from models.softmax_attention import causal_mask
from models.transformer import Transformer, TransformerConfig
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_config, tiny_model
from train.config import compose_config, load_config, to_yaml
from train.optim import OptimConfig, OptimizerKind, parameter_groups

TOLERANCE = 1e-5  # relative norm per tensor


def transcribed_sinkhorn(logits: list[list[Tensor]], iterations: int) -> list[list[Tensor]]:
    """Entry by entry: exponentials, then columns and rows divided by their sums."""
    size = range(len(logits))
    matrix = [[entry.exp() for entry in row] for row in logits]
    for _ in range(iterations):
        columns = [sum(matrix[i][j] for i in size) for j in size]
        matrix = [[matrix[i][j] / columns[j] for j in size] for i in size]
        rows = [sum(matrix[i][j] for j in size) for i in size]
        matrix = [[matrix[i][j] / rows[i] for j in size] for i in size]
    return matrix


def transcribed_mappings(x: Tensor, connection: HyperConnection) -> tuple[list, list, list]:
    """Eqs 7 and 8 at one position x (J, D), in the type of the parameters."""
    cfg, count = connection.cfg, connection.cfg.num_streams
    vector = [x[j, d] for j in range(count) for d in range(x.shape[1])]
    rms = (sum(entry * entry for entry in vector) / len(vector) + cfg.norm_eps).sqrt()
    normed = torch.stack([entry / rms for entry in vector])

    def logit(row: int, gate: int) -> Tensor:
        return connection.gates[gate] * (connection.projection[row] * normed).sum() + connection.bias[row]

    pre = [1 / (1 + (-logit(j, 0)).exp()) for j in range(count)]
    post = [2 / (1 + (-logit(count + j, 1)).exp()) for j in range(count)]
    res = [[logit(2 * count + count * i + j, 2) for j in range(count)] for i in range(count)]
    return pre, post, transcribed_sinkhorn(res, cfg.sinkhorn_iterations)


def flat(entries: list) -> list[Tensor]:
    """The entries of H_pre, H_post or, row by row, H_res."""
    return [entry for row in entries for entry in row] if isinstance(entries[0], list) else entries


def transcribed_read(streams: Tensor, connection: HyperConnection) -> tuple[Tensor, list]:
    """H_pre x of (B, S, J, D), and the mappings of every position."""
    mappings = [[transcribed_mappings(x, connection) for x in row] for row in streams]
    inputs = [[sum(p * x_j for p, x_j in zip(m[0], x, strict=True)) for m, x in zip(*pair, strict=True)]
              for pair in zip(mappings, streams, strict=True)]  # fmt: skip
    return torch.stack([torch.stack(row) for row in inputs]), mappings


def transcribed_write(streams: Tensor, update: Tensor, mappings: list) -> Tensor:
    """H_res x + H_post^T update."""
    out = []
    for row, updates, maps in zip(streams, update, mappings, strict=True):
        for x, f, (_, post, res) in zip(row, updates, maps, strict=True):
            mixed = [sum(r * x_j for r, x_j in zip(res_i, x, strict=True)) for res_i in res]
            out.append(torch.stack([m + p * f for m, p in zip(mixed, post, strict=True)]))
    return torch.stack(out).view(streams.shape)


def random_connection(cfg: HyperConnectionsConfig, d_model: int) -> HyperConnection:
    connection = HyperConnection(cfg, d_model, index=1)
    with torch.no_grad():
        connection.projection.normal_(0, 0.5)
        connection.bias.normal_()
        connection.gates.normal_()
    return connection


@pytest.mark.parametrize(("num_streams", "iterations"), [(4, 20), (2, 1), (3, 2)])
def test_outputs_and_gradients_equal_the_papers_equations(num_streams, iterations):
    cfg = HyperConnectionsConfig(num_streams=num_streams, sinkhorn_iterations=iterations)
    connection = random_connection(cfg, d_model=5)
    exact = random_connection(cfg, d_model=5).double()
    exact.load_state_dict(connection.state_dict())
    streams, update = torch.randn(2, 3, num_streams, 5).requires_grad_(), torch.randn(2, 3, 5).requires_grad_()
    exact_streams, exact_update = (tensor.detach().double().requires_grad_() for tensor in (streams, update))

    x, mappings = connection(streams)
    out = write(streams, x.sin() + update, mappings)
    expected_x, expected_mappings = transcribed_read(exact_streams, exact)
    expected = transcribed_write(exact_streams, expected_x.sin() + exact_update, expected_mappings)
    assert relative_error(x, expected_x) < TOLERANCE
    assert relative_error(out, expected) < TOLERANCE
    for index, mapping in enumerate((connection.mappings(streams)[0], *mappings)):
        entries = [[torch.stack(flat(m[index])) for m in row] for row in expected_mappings]
        exact_mapping = torch.stack([torch.stack(row) for row in entries]).view(mapping.shape)
        assert relative_error(mapping, exact_mapping) < TOLERANCE, index

    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert relative_error(streams.grad, exact_streams.grad) < TOLERANCE
    assert relative_error(update.grad, exact_update.grad) < TOLERANCE
    for name, parameter in connection.named_parameters():
        assert relative_error(parameter.grad, exact.get_parameter(name).grad) < TOLERANCE, name


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 1), (0, 4, 4), (1, 4, 4), (7, 2, 2), (2, 5, 3, 3), (5, 5)])
def test_fast_sinkhorn_equals_the_plain_one(shape, iterations):
    fast = (2 * torch.randn(shape)).requires_grad_()
    plain = fast.detach().double().requires_grad_()
    out, expected = sinkhorn_knopp(fast, iterations), sinkhorn_knopp_plain(plain, iterations)
    weight = torch.randn(shape)
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    assert out.shape == shape and out.dtype == torch.float32
    assert relative_error(out, expected) < 1e-6
    assert (fast.grad - plain.grad).norm() <= TOLERANCE * plain.grad.norm() + 1e-7


def test_gradient_of_the_fast_sinkhorn_equals_finite_differences():
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinkhorn_knopp(x, 20), (logits,))


def test_plain_sinkhorn_equals_the_transcription():
    logits = 3 * torch.randn(4, 4, dtype=torch.float64)
    expected = transcribed_sinkhorn([list(row) for row in logits], 20)
    assert relative_error(sinkhorn_knopp_plain(logits, 20), torch.tensor(expected)) < 1e-12


def test_residual_mapping_is_doubly_stochastic():
    """Rows, normalised last, sum to 1 up to rounding; columns only as nearly as 20 iterations reach."""
    logits = torch.randn(500, 4, 4)
    matrix = sinkhorn_knopp(logits, 20)
    assert bool((matrix >= 0).all())
    assert float((matrix.sum(-1) - 1).abs().max()) < 1e-6
    column_error = (matrix.sum(-2) - 1).abs().amax(-1)
    assert float(column_error.median()) < 1e-6 and float(column_error.max()) < 0.05
    assert float((sinkhorn_knopp(logits, 1).sum(-2) - 1).abs().max()) > 0.1


def test_sinkhorn_only_scales_rows_and_columns():
    """Then m_ij m_kl / (m_il m_kj) stays exp(l_ij + l_kl - l_il - l_kj) for every pair of rows and of columns."""
    logits = torch.randn(4, 4, dtype=torch.float64)

    def cross(log: Tensor) -> Tensor:
        differences = log[:, None] - log[None]  # (rows, rows, columns)
        return differences[..., :, None] - differences[..., None, :]

    assert relative_error(cross(sinkhorn_knopp(logits, 20).log()), cross(logits)) < 1e-12


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30])
def test_sinkhorn_stands_extreme_logits(scale):
    logits = scale * torch.randn(50, 4, 4)
    logits[0, 2] -= 5 * scale  # a row that vanishes in fp32 beside the others
    logits[1, :, 3] -= 5 * scale
    logits[2] = scale
    logits.requires_grad_()
    matrix = sinkhorn_knopp(logits, 20)
    matrix.square().sum().backward()
    matrix = matrix.detach()
    assert float((matrix.sum(-1) - 1).abs().max()) < 1e-6 and bool((matrix >= 0).all())
    assert bool(logits.grad.isfinite().all())
    assert relative_error(matrix[2], torch.full((4, 4), 0.25)) < 1e-6


def test_one_stream_needs_no_connection():
    with pytest.raises(ValueError, match=r"num_streams=1 must be at least 2; .* set model.hyper_connections to null"):
        HyperConnectionsConfig(num_streams=1)
    logits = torch.randn(3, 1, 1, requires_grad=True)
    matrix = sinkhorn_knopp(logits, 20)
    matrix.sum().backward()
    assert torch.equal(matrix, torch.ones(3, 1, 1)) and torch.equal(logits.grad, torch.zeros(3, 1, 1))
    hidden, update = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    x, mappings = read(None, enter(None, hidden))
    assert x is hidden and torch.equal(leave(None, write(hidden, update, mappings)), hidden + update)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinkhorn_iterations": 0}, r"sinkhorn_iterations=0 must be at least 1; nearest: 1"),
        ({"gate_init": 0.0}, r"gate_init=0.0 .* must be positive and finite; usual: 0.01"),
        ({"gate_init": float("nan")}, r"gate_init=nan .* must be positive and finite"),
        ({"norm_eps": -1.0}, r"norm_eps=-1.0 must be positive"),
    ],
)
def test_bad_settings_are_refused_with_a_remedy(settings, message):
    with pytest.raises(ValueError, match=message):
        HyperConnectionsConfig(**settings)


def test_one_fusion_without_streams_is_refused():
    engram = replace(tiny_config("engram").engram, multi_branch=False)
    with pytest.raises(ValueError, match=r"multi_branch=False has no effect with one residual stream"):
        tiny_config("engram", engram=engram)


def test_mappings_and_streams_stay_fp32_under_autocast():
    connection = random_connection(HyperConnectionsConfig(), d_model=8)
    streams, update = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 8).bfloat16()
    x, mappings = connection(streams)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(streams, torch.ones(8, 8)).dtype == torch.bfloat16
        cast_x, cast_mappings = connection(streams)
        cast_out = write(streams, update, cast_mappings)
    assert cast_out.dtype == torch.float32
    assert torch.equal(cast_out, write(streams, update.float(), mappings))
    assert torch.equal(x, cast_x)
    for cast, plain in zip(cast_mappings, mappings, strict=True):
        assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    half_x, half_mappings = connection.bfloat16()(streams.bfloat16())
    assert half_x.dtype == torch.bfloat16 and all(mapping.dtype == torch.float32 for mapping in half_mappings)


def loss_and_gradients(cfg: TransformerConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Freshly initialised, unlike `tests.tiny.tiny_model`; the gradients of the rows are named rows.<layer>."""
    model, memory = Transformer(cfg), TinyMemory(cfg)
    initialize(model, seed=0)
    token_ids, document_ids = tiny_batch(cfg)
    rows = memory.rows(token_ids, document_ids)
    output = model(token_ids, document_ids, rows, targets=token_ids.roll(-1, 1))
    (output.nats + sum(output.aux_losses.values())).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output.nats, gradients | {f"rows.{layer}": leaf.grad for layer, leaf in rows.items()}


@pytest.mark.parametrize("num_streams", [2, 4])
@pytest.mark.parametrize("kind", ["dense", "moe", "moe_engram"])
def test_the_start_is_the_plain_model_with_all_its_gradients(kind, num_streams):
    plain_cfg = tiny_config(kind)
    cfg = tiny_config(f"{kind}_hyper_fused", hyper_connections=HyperConnectionsConfig(num_streams=num_streams))
    plain, plain_gradients = loss_and_gradients(plain_cfg)
    loss, gradients = loss_and_gradients(cfg)
    assert relative_error(loss, plain) < 1e-6
    assert {name for name in gradients if "connection" not in name} == set(plain_gradients)
    for name, gradient in plain_gradients.items():
        assert relative_error(gradients[name], gradient) < TOLERANCE, name


def test_streams_part_at_the_first_step():
    """Streams with equal gradients would stay one stream for ever; each connection prefers another one to read."""
    _, gradients = loss_and_gradients(tiny_config("dense_hyper"))
    post = gradients["blocks.0.attention_connection.bias"][3:6]
    assert float(post.std()) > 0.01 * float(post.abs().mean())
    model = Transformer(tiny_config("dense_hyper"))
    connections = [module for module in model.modules() if isinstance(module, HyperConnection)]
    preferred = [int(connection.initial_bias()[:3].argmax()) for connection in connections]
    assert preferred == [0, 1, 2, 0, 1, 2]


def test_start_values():
    model = Transformer(tiny_config("dense_hyper"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    initialize(model, seed=0)
    connection = model.blocks[1].feed_forward_connection
    assert bool((connection.projection == 0).all()) and connection.gates.tolist() == pytest.approx([0.01] * 3)
    with torch.no_grad():
        pre, mappings = connection.mappings(torch.randn(2, 3, 3, 16))
    assert pre[1, 2].tolist() == pytest.approx([0.5, 0.25, 0.25], abs=1e-6)  # sub-layer 3, stream 0
    assert torch.equal(mappings.post, torch.ones(2, 3, 3))
    assert torch.equal(mappings.res[0, 0], mappings.res[1, 2])
    assert float(mappings.res[0, 0].diagonal().min()) > 0.9


def test_matrices_are_decayed_and_vectors_are_not():
    groups = parameter_groups(Transformer(tiny_config("dense_hyper")), OptimConfig(kind=OptimizerKind.muon))
    group_of = {name: group for group in groups for name, _ in group.parameters}
    prefix = "blocks.0.attention_connection."
    assert group_of[f"{prefix}projection"].use_muon
    for name in ("bias", "gates"):
        assert not group_of[prefix + name].use_muon and group_of[prefix + name].weight_decay == 0


@pytest.mark.parametrize("kind", ["engram_hyper", "engram_hyper_fused"])
def test_two_layers_equal_a_slow_model_with_all_gradients(kind):
    """The model's own attention, feed-forward and Engram, between streams that are read and written in loops."""
    base = tiny_config(kind)
    cfg = replace(base, num_layers=2, seq_len=5, hyper_connections=HyperConnectionsConfig(3, sinkhorn_iterations=4))
    model, memory = tiny_model(cfg).double(), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg, batch=1, boundary=3)
    leaves = [memory.rows(token_ids, document_ids)[1].detach().double().requires_grad_() for _ in range(2)]
    weight = torch.randn(1, 5, cfg.vocab_size, dtype=torch.float64)

    output = model(token_ids, document_ids, {1: leaves[0]})
    (output.logits * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    streams = model.embedding(token_ids)[:, :, None] * torch.ones(3, 1, dtype=torch.float64)
    mask = causal_mask(document_ids, streams)
    for block in model.blocks:
        if block.engram is not None and cfg.engram.multi_branch:
            streams = streams + block.engram(streams, leaves[1], document_ids).update
        x, mappings = transcribed_read(streams, block.attention_connection)
        recalled = torch.zeros_like(x)
        if block.engram is not None and not cfg.engram.multi_branch:
            recalled = block.engram(x[:, :, None], leaves[1], document_ids).update[:, :, 0]
        attended = block.attention(block.attention_norm(x + recalled), mask)
        streams = transcribed_write(streams, recalled + attended, mappings)
        x, mappings = transcribed_read(streams, block.feed_forward_connection)
        streams = transcribed_write(streams, block.feed_forward(block.feed_forward_norm(x)), mappings)
    logits = F.linear(model.norm((streams[:, :, 0] + streams[:, :, 1] + streams[:, :, 2]) / 3), model.head.weight)
    (logits * weight).sum().backward()

    assert relative_error(output.logits, logits) < 1e-10
    assert relative_error(leaves[0].grad, leaves[1].grad) < 1e-10
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < 1e-10, name


@pytest.mark.parametrize(("kind", "branches"), [("engram_hyper", 3), ("engram_hyper_fused", 1)])
def test_every_branch_has_a_gate_in_the_statistics(kind, branches):
    cfg = tiny_config(kind)
    model, memory = tiny_model(cfg), TinyMemory(cfg)
    token_ids, document_ids = tiny_batch(cfg)
    stats = model(token_ids, document_ids, memory.rows(token_ids, document_ids)).stats
    assert stats.gate_histogram[1].sum().item() == 2 * cfg.seq_len * branches
    assert 0 < stats.gate_mean[1].item() < 1 and not stats.gate_mean[1].requires_grad


def test_a_run_can_ask_for_it_and_be_repeated(tmp_path):
    config = compose_config(None, "train", ["model=tiny_engram_hyper", "model.hyper_connections.num_streams=2"])
    assert config.model.hyper_connections == HyperConnectionsConfig(num_streams=2)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
