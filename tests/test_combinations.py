"""Which positions see which, for every combination of attention, residual, feed-forward and memory.

One forward pass per combination holds a sequence and, in further rows, the same sequence with another token at each
position in turn. So it gives the whole matrix "the token at t moves the logits at s", which must be that of the
attention mask: nothing moves before t or in another document, and everything moves from t to the end of the document.
"""

import pytest
import torch
from torch import Tensor

from models.softmax_attention import attention_mask
from models.transformer import TransformerConfig
from tests.combinations import COMBINATIONS, COMPRESSION_TABLE, Combination, make_config
from tests.tiny import TinyMemory, tiny_model

BOUNDARY = 5  # length of a document: n-grams and convolution reach out of each into the one before
# Relative change of logits in fp64. What must not move, moves by 5e-8 at most: the routers' scores are in fp32.
NOTHING, SOMETHING = 1e-6, 1e-3


def influence(cfg: TransformerConfig, document_ids: Tensor) -> Tensor:
    """How far the token at t moves the logits at s, relative to their norm: (t, s) fp64; document_ids is (S,)."""
    model, memory = tiny_model(cfg).double(), TinyMemory(cfg, compression_table=COMPRESSION_TABLE)
    original = torch.randint(0, cfg.vocab_size, (cfg.seq_len,))
    # Half of the vocabulary away: another token, of another normalised text.
    other = (original + cfg.vocab_size // 2) % cfg.vocab_size
    changed = torch.where(torch.eye(cfg.seq_len, dtype=torch.bool), other, original)
    token_ids = torch.cat((original[None], changed))  # (1 + S, S)
    documents = document_ids.expand_as(token_ids)
    with torch.no_grad():
        rows = {layer: rows.double() for layer, rows in memory.rows(token_ids, documents).items()}
        logits = model(token_ids, documents, rows).logits
    return (logits[1:] - logits[0]).norm(dim=-1) / logits[0].norm(dim=-1)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_a_token_moves_what_follows_in_its_document_and_nothing_else(combination: Combination):
    cfg = make_config(combination)
    positions = torch.arange(cfg.seq_len)
    for document_ids in (torch.zeros_like(positions), positions // BOUNDARY):
        moved = influence(cfg, document_ids)
        sees = attention_mask(document_ids[None])[0, 0].t()  # (t, s)
        assert float(moved[~sees].max()) < NOTHING and float(moved[sees].min()) > SOMETHING


def test_there_is_every_combination():
    assert len(COMBINATIONS) == len(set(COMBINATIONS)) == 4 * 7 * (6 * 3 + 2 * 2)
