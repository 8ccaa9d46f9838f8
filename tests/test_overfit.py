"""Every architecture learns one batch by heart: something in each part would have to be wrong for it not to."""

import pytest
import torch

from models.initialize import initialize
from models.loss import IGNORE_INDEX
from models.transformer import Transformer
from tests.combinations import COMPRESSION_TABLE, Combination, make_config
from tests.tiny import TinyMemory, tiny_batch

STEPS = 20
# Those that papers compare (dense, the routers of DeepSeekMoE's Table 1, Engram in its forms, OverEncoding).
ARCHITECTURES = [
    Combination("grouped", "plain", "dense", "none"),
    Combination("mla", "plain", "dense", "none"),
    Combination("grouped", "plain", "sigmoid", "none"),
    Combination("grouped_norm_yarn", "plain", "sigmoid_leading_dense", "none"),
    Combination("grouped", "plain", "softmax", "none"),
    Combination("grouped", "plain", "gshard", "none"),
    Combination("grouped", "plain", "switch", "none"),
    Combination("grouped", "plain", "hash", "none"),
    Combination("grouped", "hyper", "dense", "none"),
    Combination("grouped", "plain", "sigmoid", "engram"),
    Combination("grouped", "plain", "sigmoid", "engram_orders_234"),
    Combination("mla", "hyper_fused", "sigmoid_leading_dense", "engram_no_conv"),
    Combination("mla_yarn", "hyper", "sigmoid_leading_dense", "engram_two_modules"),
    Combination("grouped", "plain", "sigmoid", "over_encoding"),
]


@pytest.mark.parametrize("combination", ARCHITECTURES, ids=str)
def test_a_repeated_batch_is_learnt(combination):
    cfg = make_config(combination, d_model=16, init_std=0.1)
    model, memory = Transformer(cfg), TinyMemory(cfg, compression_table=COMPRESSION_TABLE)
    initialize(model, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    token_ids, document_ids = tiny_batch(cfg, batch=4, boundary=5)
    targets = token_ids.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    losses = []
    for _ in range(STEPS):
        row_ids = memory.row_ids(token_ids, document_ids)
        rows = {layer: memory.tables[layer].lookup(ids) for layer, ids in row_ids.items()}
        output = model(token_ids, document_ids, rows, targets)
        nats = output.nats / (targets != IGNORE_INDEX).sum()
        (nats + sum(output.aux_losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer, table in memory.tables.items():
            table.accumulate(row_ids[layer], rows[layer].grad)
            table.apply(1.0, lr=0.01)
        if output.stats.expert_counts is not None:
            model.update_expert_bias(output.stats.expert_counts)
        losses.append(float(nats.detach()))
    assert losses[-1] < losses[0] / 10
