"""Token ids -> rows of the memory tables: compressed n-grams, multiplicative-XOR hashes, prime table sizes.

Integers only, no parameters, outside the model's forward pass (arXiv 2601.07372, 2.2, and its demonstration code).
"""

from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

INT64_MAX = 2**63 - 1
# Distance between the seeds of neighbouring layers in the demonstration code.
LAYER_SEED_STRIDE = 10_007


class HashConfig(Protocol):
    """What hashing asks of a configuration with tables: an `EngramConfig` or an `OverEncodingConfig`."""

    max_ngram_size: int
    num_hash_heads: int
    table_size: int
    hash_seed: int
    compress: bool
    shuffled: bool

    @property
    def layers(self) -> list[int]:
        """Keys of the tables: the layers that read them."""
        ...

    @property
    def num_orders(self) -> int:
        """N, orders 2..max_ngram_size."""
        ...


class NgramRows:
    """The rows that a token reads: what the settings of Engram and of OverEncoding have in common.

    The four settings are fields of those two dataclasses, each with its own order and default.
    """

    max_ngram_size: int
    num_hash_heads: int
    d_memory: int
    table_size: int

    def check_rows(self, part: str) -> None:
        """Refuse numbers below their least, and a `d_memory` that cannot be cut into rows of one width.

        Args:
            part: name of the settings' group, for the message.

        Raises:
            ValueError: naming the setting, its value, the rule and the nearest valid value.
        """
        for name, least in (("max_ngram_size", 2), ("num_hash_heads", 1), ("table_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"model.{part}.{name}={getattr(self, name)} must be at least {least}; nearest: {least}"
                )
        rows = self.num_rows_per_token
        if self.d_memory < 1 or self.d_memory % rows:
            nearest = max(rows, round(self.d_memory / rows) * rows)
            raise ValueError(
                f"model.{part}.d_memory={self.d_memory} must be a positive multiple of "
                f"(max_ngram_size - 1) * num_hash_heads = {rows}; nearest: {nearest}"
            )

    @property
    def num_orders(self) -> int:
        """N: number of n-gram orders, 2..max_ngram_size."""
        return self.max_ngram_size - 1

    @property
    def num_rows_per_token(self) -> int:
        """R = N * G: table rows read per token and layer with a table."""
        return self.num_orders * self.num_hash_heads

    @property
    def row_dim(self) -> int:
        """M: width of one row, d_memory / R."""
        return self.d_memory // self.num_rows_per_token


@lru_cache(maxsize=100_000)
def is_prime(n: int) -> bool:
    """Whether n is prime; Miller-Rabin with the first twelve primes as bases, exact below 3.3e24."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        if not any((x := x * x % n) == n - 1 for _ in range(twos - 1)):
            return False
    return True


def prime_table_sizes(rows_per_order: list[int], num_heads: int, layers: list[int]) -> dict[int, list[list[int]]]:
    """Rows of every table: for each head the next prime >= the wanted number that no other table has.

    Distinct primes make the heads of one order, which share one hash, disagree about which n-grams collide.

    Args:
        rows_per_order: wanted rows per head, one entry per order (2-grams first).
        num_heads: G.
        layers: layers with a table, in the order in which they take their primes.

    Returns:
        {layer: [[rows per head] per order]}.
    """
    seen: set[int] = set()
    sizes: dict[int, list[list[int]]] = {}
    for layer in layers:
        sizes[layer] = []
        for wanted in rows_per_order:
            heads: list[int] = []
            candidate = wanted - 1
            while len(heads) < num_heads:
                candidate += 1
                if is_prime(candidate) and candidate not in seen:
                    seen.add(candidate)
                    heads.append(candidate)
            sizes[layer].append(heads)
    return sizes


def table_sizes(cfg: HashConfig) -> dict[int, list[list[int]]]:
    """Rows per head, per order and layer: {layer: [[G numbers] x N]}; with table_size = 1, every head has one row."""
    if cfg.table_size == 1:
        return {layer: [[1] * cfg.num_hash_heads for _ in range(cfg.num_orders)] for layer in cfg.layers}
    return prime_table_sizes([cfg.table_size] * cfg.num_orders, cfg.num_hash_heads, cfg.layers)


def num_rows(cfg: HashConfig) -> dict[int, int]:
    """Rows of each layer's table, all heads together: {layer: rows}."""
    return {layer: sum(map(sum, sizes)) for layer, sizes in table_sizes(cfg).items()}


def layer_multipliers(seed: int, layer: int, max_ngram_size: int, compressed_vocab_size: int) -> np.ndarray:
    """Odd hash multipliers m_0..m_{max_ngram_size - 1} of one layer, int64; m_0 belongs to the current token.

    m = 2 r + 1 with r uniform in [0, max(1, (INT64_MAX // V') // 2)), so that a product with a token id < V' stays
    below 2^63.
    """
    half_bound = max(1, (INT64_MAX // compressed_vocab_size) // 2)
    generator = np.random.default_rng(seed + LAYER_SEED_STRIDE * layer)
    return generator.integers(0, half_bound, size=max_ngram_size, dtype=np.int64) * 2 + 1


def ngram_row_ids(
    compressed_ids: Tensor, document_ids: Tensor | None, multipliers: Tensor, sizes: list[list[int]], pad_id: int
) -> Tensor:
    """Row of every order and head: ( x_t m_0 XOR x_{t-1} m_1 XOR ... XOR x_{t-n+1} m_{n-1} ) mod prime + offset.

    Products wrap around in int64. Tokens before the start of the document are replaced by `pad_id`. The heads' tables
    lie one after the other in one table, orders outermost; the offset is the number of rows before the head's own.

    Args:
        compressed_ids: (B, S) int64, ids after tokenizer compression.
        document_ids: (B, S), equal within a document, or None for one document per row.
        multipliers: (>= N + 1,) int64.
        sizes: rows per head, per order, as in `table_sizes`.
        pad_id: compressed id that fills missing history.

    Returns:
        (B, S, R) int64, 0 <= id < total rows; R runs over orders, then heads.
    """
    primes = torch.tensor(sizes, dtype=torch.int64, device=compressed_ids.device)  # (N, G)
    offsets = (primes.flatten().cumsum(0) - primes.flatten()).view_as(primes)
    mix = compressed_ids * multipliers[0]  # (B, S)
    row_ids = []
    for order in range(primes.shape[0]):
        distance = order + 1
        history = torch.full_like(compressed_ids, pad_id)
        history[:, distance:] = compressed_ids[:, :-distance]
        if document_ids is not None:
            same_document = document_ids[:, distance:] == document_ids[:, :-distance]
            history[:, distance:].masked_fill_(~same_document, pad_id)
        mix = mix ^ (history * multipliers[distance])
        row_ids.append(mix[..., None] % primes[order] + offsets[order])  # (B, S, G)
    return torch.cat(row_ids, dim=-1)  # (B, S, R)


class NgramHasher:
    """Maps a batch of token ids to the rows that each table's layer reads.

    `cfg.shuffled` is a control: sequence b of a micro-batch of B reads the rows of sequence b + 1 (the last one those
    of the first), position by position. Within every micro-batch exactly the same rows are read equally often as
    without it, and a row gets as many gradients; but they come from a text that its n-gram is not part of. What a
    sequence reads is a function of the other sequence alone, so it cannot hold the sequence's own coming tokens, and
    says nothing about its text as long as the two are independent. In training they are: a micro-batch holds windows
    in the order of a random permutation of the whole split, and two neighbours belong to one document no more often
    than chance brings them together. In validation, whose windows are in the order of the text, `train.data` puts
    windows into one micro-batch that lie about 1 / B of the split apart. The result depends on how a batch is cut into
    micro-batches, which no other part of the model does.

    Args:
        cfg: orders, heads, table sizes, layers and seed.
        compression_table: (V,) int64, token id -> compressed id (tokens of equal normalised text share one); without
            `cfg.compress` only its length counts, and every token is its own.
        pad_id: *token* id whose compressed id fills the history before a document's start.
        device: where the row ids are computed.
    """

    def __init__(
        self,
        cfg: HashConfig,
        compression_table: Tensor | np.ndarray,
        pad_id: int,
        device: torch.device | str | None = None,
    ):
        table = torch.as_tensor(compression_table, dtype=torch.int64, device=device)
        if table.dim() != 1 or table.numel() == 0 or int(table.min()) < 0:
            raise ValueError(
                f"compression table of shape {tuple(table.shape)} must be one row of non-negative ids, one per token; "
                "prepare the data again"
            )
        if not 0 <= pad_id < table.numel():
            raise ValueError(f"pad_id={pad_id} must be a token id in 0..{table.numel() - 1} (the tokenizer's padding)")
        if not cfg.compress:
            table = torch.arange(table.numel(), device=table.device)
        self.shuffled = cfg.shuffled
        self.compression_table = table
        self.compressed_pad_id = int(table[pad_id])
        self.table_sizes = table_sizes(cfg)
        compressed_vocab_size = int(table.max()) + 1
        self.multipliers = {
            layer: torch.from_numpy(
                layer_multipliers(cfg.hash_seed, layer, cfg.max_ngram_size, compressed_vocab_size)
            ).to(table.device)
            for layer in cfg.layers
        }

    def __call__(self, token_ids: Tensor, document_ids: Tensor | None = None) -> dict[int, Tensor]:
        """Rows of every layer with a table.

        Args:
            token_ids: (B, S) int64.
            document_ids: (B, S) int64, or None for one document per row.

        Returns:
            {layer: (B, S, R) int64} on the device of the compression table.

        Raises:
            ValueError: shuffled rows are asked for a batch of one sequence, which has no neighbour.
        """
        if self.shuffled and token_ids.shape[0] == 1:
            raise ValueError(
                "shuffled=true gives a sequence the rows of its neighbour, and this batch is one sequence; nearest: 2 "
                "(in training train.micro_batch_size=2)"
            )
        compressed = self.compression_table[token_ids.to(self.compression_table.device)]
        if document_ids is not None:
            document_ids = document_ids.to(compressed.device)
        row_ids = {
            layer: ngram_row_ids(compressed, document_ids, self.multipliers[layer], sizes, self.compressed_pad_id)
            for layer, sizes in self.table_sizes.items()
        }
        return {layer: ids.roll(-1, dims=0) for layer, ids in row_ids.items()} if self.shuffled else row_ids
