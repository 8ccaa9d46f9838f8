"""torch.compile of whole models: the eager loss and gradients, and no new graphs once the first step has run."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from models.compiled import compile_transformer
from models.loss import IGNORE_INDEX
from tests.combinations import ATTENTION, COMPRESSION_TABLE, FEED_FORWARD, MEMORY, RESIDUAL, Combination, make_config
from tests.tiny import TinyMemory, relative_error, tiny_batch, tiny_model

# Dynamo itself looks at the gradient of what it passes from one graph to the next.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

STEPS = 5
# Every value of every axis.
EACH = [
    Combination("grouped", "plain", "dense", "none"),
    Combination("mla_yarn", "hyper", "sigmoid_leading_dense", "engram"),
    Combination("mla", "plain", "sigmoid", "engram_no_gate"),
    Combination("grouped_norm_yarn", "hyper_fused", "softmax", "engram_no_conv"),
    Combination("mla", "plain", "gshard", "engram_no_compression"),
    Combination("grouped", "plain", "switch", "engram_orders_234"),
    Combination("grouped", "plain", "hash", "engram_two_modules"),
    Combination("grouped_norm_yarn", "plain", "dense", "over_encoding"),
]


def check_compiled(combination: Combination, backend: str, bf16: bool = False) -> None:
    """Five steps on other texts, documents and expert loads each: loss and gradients are the eager ones."""
    torch._dynamo.reset()
    counters.clear()
    cfg = make_config(combination, init_std=0.1)
    eager, model, memory = tiny_model(cfg), tiny_model(cfg), TinyMemory(cfg, compression_table=COMPRESSION_TABLE)
    compiled = compile_transformer(model, backend)

    def backward(forward, token_ids: Tensor, document_ids: Tensor) -> tuple[float, dict[int, Tensor]]:
        rows = memory.rows(token_ids, document_ids)
        targets = token_ids.roll(-1, 1).masked_fill(document_ids == 1, IGNORE_INDEX)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            output = forward(token_ids, document_ids, rows, targets)
        loss = output.nats / (targets != IGNORE_INDEX).sum() + sum(output.aux_losses.values())
        loss.backward()
        return float(loss.detach()), {layer: leaf.grad for layer, leaf in rows.items()}

    graphs = []
    for step in range(STEPS):
        batch = tiny_batch(cfg, batch=3, boundary=2 + step, seed=step)
        expected, expected_rows = backward(eager, *batch)
        actual, actual_rows = backward(compiled, *batch)
        assert actual == pytest.approx(expected, rel=1e-2 if bf16 else 1e-5)
        tolerance = 5e-2 if bf16 else 1e-4
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert relative_error(ours.grad, theirs.grad) < tolerance, name
        assert all(relative_error(actual_rows[layer], expected_rows[layer]) < tolerance for layer in expected_rows)
        model.zero_grad()
        eager.zero_grad()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * STEPS and graphs[0] > 0


def test_each_value_of_each_axis_is_compiled():
    for axis, values in enumerate((ATTENTION, RESIDUAL, FEED_FORWARD, MEMORY)):
        assert {combination[axis] for combination in EACH} == set(values)


def test_a_dense_model_is_one_graph():
    check_compiled(EACH[0], "aot_eager")
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] == 1


def test_graphs_equal_the_eager_model():
    check_compiled(Combination("grouped", "plain", "sigmoid", "engram"), "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("combination", EACH, ids=str)
def test_inductor_equals_the_eager_model(combination):
    check_compiled(combination, "inductor")


@pytest.mark.slow
def test_inductor_equals_the_eager_model_under_bf16_autocast():
    check_compiled(EACH[1], "inductor", bf16=True)
