"""Held-out loss in nats per token and bits per byte, over fixed windows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from models.loss import IGNORE_INDEX
from models.transformer import Output
from train.data import Batch
from train.finite import check_finite
from train.ranks import Ranks


@dataclass
class Evaluation:
    """Validation result."""

    loss: float  # nats per predicted token
    bits_per_byte: float  # loss / ln 2 / (mean bytes per token of the validation split)
    tokens: int  # predicted tokens


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], Output], batches: Iterable[Batch], bytes_per_token: float, ranks: Ranks | None = None
) -> Evaluation:
    """Mean cross-entropy of `forward` over `batches`, and over those of the other `ranks`.

    loss = sum of nats / number of targets; the sum is kept in double precision.
    bits per byte = loss / (ln 2 * bytes_per_token), with the split's own mean bytes per token.

    Raises:
        NonFiniteLossError: the loss is not a number.
    """
    nats, count = 0.0, 0
    for batch in batches:
        output = forward(batch)
        assert output.nats is not None  # `forward` gives the model the batch's targets
        nats += float(output.nats)
        count += int((batch.targets != IGNORE_INDEX).sum())
    if ranks is not None and ranks.world_size > 1:
        nats, count = ranks.sum(torch.tensor([nats, count], dtype=torch.float64, device=batch.targets.device)).tolist()
        count = int(count)
    if count == 0:
        raise ValueError("the validation split holds no predictable token; prepare data with a larger validation split")
    loss = nats / count
    check_finite("validation loss", loss)
    return Evaluation(loss=loss, bits_per_byte=loss / (math.log(2) * bytes_per_token), tokens=count)
