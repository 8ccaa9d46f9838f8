"""Held-out loss in nats per token and bits per byte, over fixed windows."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from models.loss import IGNORE_INDEX
from models.transformer import Output
from train.data import Batch, TrainBatches
from train.finite import check_finite
from train.mixture import MixedData
from train.ranks import ALONE, Ranks
from train.shards import PreparedData


@dataclass
class Evaluation:
    """Validation result."""

    loss: float  # nats per predicted token
    bits_per_byte: float  # loss / ln 2 / (mean bytes per token of the validation split)
    tokens: int  # predicted tokens
    sources: dict[str, "Evaluation"] = field(default_factory=dict)  # of a mixture, by label

    def metrics(self) -> dict[str, float]:
        """Names and values as they are recorded; a mixture's sources beside the whole."""
        results = {"": self} | {f"_{label}": result for label, result in self.sources.items()}
        losses = {f"val/loss{suffix}": result.loss for suffix, result in results.items()}
        return losses | {f"val/bits_per_byte{suffix}": result.bits_per_byte for suffix, result in results.items()}


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], Output], batches: Iterable[Batch], bytes_per_token: float, ranks: Ranks = ALONE
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
    if ranks.world_size > 1:
        nats, count = ranks.sum(torch.tensor([nats, count], dtype=torch.float64, device=batch.targets.device)).tolist()
        count = int(count)
    if count == 0:
        raise ValueError("the validation split holds no predictable token; prepare data with a larger validation split")
    loss = nats / count
    check_finite("validation loss", loss)
    return Evaluation(loss=loss, bits_per_byte=loss / (math.log(2) * bytes_per_token), tokens=count)


def evaluate_sources(
    forward: Callable[[Batch], Output],
    prepared: PreparedData,
    max_tokens: int,
    batches: Callable[[PreparedData, int], Iterable[Batch]],
    ranks: Ranks = ALONE,
) -> Evaluation:
    """`evaluate` over the validation split; of a mixture over each source's, and their weighted mean.

    With weights w and mean bytes per token b of the sources: loss = sum w loss, and
    bits per byte = sum w loss / (ln 2 * sum w b), those of a text mixed as the training sequences are.

    Args:
        forward: one batch to the model's output.
        prepared: the data.
        max_tokens: input tokens of all sources together; each has an equal part of them.
        batches: this rank's validation batches of one data set, which on all ranks hold so many tokens.
        ranks: the processes that share the work.

    Raises:
        NonFiniteLossError: a loss is not a number.
    """
    if not isinstance(prepared, MixedData):
        return evaluate(forward, batches(prepared, max_tokens), prepared.bytes_per_token_val, ranks)
    parts, results = prepared.parts, {}
    for part in parts:
        data = part.data
        windows = batches(data, max_tokens // len(parts))
        results[part.label] = evaluate(forward, windows, data.bytes_per_token_val, ranks)
    loss = sum(part.weight * results[part.label].loss for part in parts)
    return Evaluation(
        loss=loss,
        bits_per_byte=loss / (math.log(2) * prepared.bytes_per_token_val),
        tokens=sum(result.tokens for result in results.values()),
        sources=results,
    )


def source_records(
    prepared: PreparedData, batches: TrainBatches, num_steps: int, evaluation: Evaluation
) -> dict[str, dict[str, float | int | str]]:
    """What a run of `num_steps` read and lost of each source of a mixture, for its result; empty without one."""
    if not isinstance(prepared, MixedData):
        return {}
    sequences, epochs = batches.source_sequences(num_steps), batches.source_epochs(num_steps)
    return {
        part.label: {
            "weight": part.weight,
            "sequences": sequences.get(part.label, 0),
            "epochs": epochs.get(part.label, 0.0),
            "val_loss": evaluation.sources[part.label].loss,
            "val_bits_per_byte": evaluation.sources[part.label].bits_per_byte,
            "val_tokens": evaluation.sources[part.label].tokens,
            "data_fingerprint": part.data.fingerprint,
        }
        for part in prepared.parts
    }
