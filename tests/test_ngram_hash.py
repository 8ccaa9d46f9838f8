"""Hashing against Python integers, table sizes against trial division, bounds and document starts."""

import numpy as np
import pytest
import torch

from models.engram import EngramConfig
from models.ngram_hash import (
    INT64_MAX,
    NgramHasher,
    is_prime,
    layer_multipliers,
    ngram_row_ids,
    num_rows,
    prime_table_sizes,
    table_sizes,
)


def wrapped(value: int) -> int:
    """Python integer -> two's complement int64."""
    return (value + 2**63) % 2**64 - 2**63


def brute_force(
    compressed: list[list[int]], documents: list[list[int]], multipliers: list[int], sizes: list[list[int]], pad: int
) -> list:
    out = []
    for ids, docs in zip(compressed, documents, strict=True):
        positions = []
        for t in range(len(ids)):
            row, offset = [], 0
            for order, heads in enumerate(sizes):
                mix = 0
                for back in range(order + 2):
                    inside = t - back >= 0 and docs[t - back] == docs[t]
                    mix ^= wrapped((ids[t - back] if inside else pad) * multipliers[back])
                for prime in heads:
                    row.append(mix % prime + offset)
                    offset += prime
            positions.append(row)
        out.append(positions)
    return out


@pytest.mark.parametrize("huge", [False, True])
def test_row_ids_equal_python_integers(huge):
    generator = np.random.default_rng(1)
    compressed = generator.integers(0, 50, size=(3, 12))
    documents = np.sort(generator.integers(0, 4, size=(3, 12)))
    sizes = [[7, 11, 2], [13, 5, 3], [17, 19, 23]]
    # Multipliers near the end of int64 make products wrap around and mixes negative.
    low = INT64_MAX - 10**6 if huge else 1
    multipliers = generator.integers(low, INT64_MAX, size=4) | 1
    row_ids = ngram_row_ids(
        torch.from_numpy(compressed), torch.from_numpy(documents), torch.from_numpy(multipliers), sizes, pad_id=3
    )
    expected = brute_force(compressed.tolist(), documents.tolist(), multipliers.tolist(), sizes, 3)
    assert row_ids.tolist() == expected
    if huge:
        assert any(wrapped(int(a) * int(multipliers[0])) < 0 for a in compressed.flatten())


def make_hasher(table_size: int = 29, vocab_size: int = 40, **settings) -> tuple[EngramConfig, NgramHasher]:
    cfg = EngramConfig(layers=[0, 2], num_hash_heads=3, d_memory=24, table_size=table_size, **settings)
    return cfg, NgramHasher(cfg, torch.arange(vocab_size) // 2, pad_id=5)


@pytest.mark.parametrize("table_size", [1, 2, 29, 5000])
def test_row_ids_stay_inside_their_heads(table_size):
    cfg, hasher = make_hasher(table_size)
    documents = torch.sort(torch.randint(0, 3, (4, 200)), dim=1).values
    rows = hasher(torch.randint(0, 40, (4, 200)), documents)
    for layer, sizes in table_sizes(cfg).items():
        flat = torch.tensor(sizes).flatten()
        ends = flat.cumsum(0)
        assert rows[layer].shape == (4, 200, cfg.num_rows_per_token) and rows[layer].dtype == torch.int64
        assert bool((rows[layer] >= ends - flat).all()) and bool((rows[layer] < ends).all())
        assert int(ends[-1]) == num_rows(cfg)[layer]


def test_hasher_compresses_and_pads_with_the_compressed_pad_id():
    cfg, hasher = make_hasher()
    token_ids = torch.tensor([[8, 9, 30, 31, 4]])
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    rows = hasher(token_ids, documents)
    compressed = (token_ids // 2).tolist()
    for layer, sizes in table_sizes(cfg).items():
        multipliers = layer_multipliers(cfg.hash_seed, layer, cfg.max_ngram_size, 20).tolist()
        assert rows[layer].tolist() == brute_force(compressed, documents.tolist(), multipliers, sizes, pad=2)
    same_text = hasher(token_ids ^ 1, documents)  # 2k and 2k + 1 share a compressed id
    assert all(torch.equal(rows[layer], same_text[layer]) for layer in rows)


def test_without_compression_every_token_is_its_own_key():
    cfg, hasher = make_hasher(compress=False)
    token_ids, documents = torch.tensor([[8, 9, 30, 31, 4]]), torch.tensor([[0, 0, 1, 1, 1]])
    rows = hasher(token_ids, documents)
    for layer, sizes in table_sizes(cfg).items():
        multipliers = layer_multipliers(cfg.hash_seed, layer, cfg.max_ngram_size, 40).tolist()
        assert rows[layer].tolist() == brute_force(token_ids.tolist(), documents.tolist(), multipliers, sizes, pad=5)
    same_text = hasher(token_ids ^ 1, documents)
    assert not any(torch.equal(rows[layer], same_text[layer]) for layer in rows)


def test_history_stops_at_the_document_start():
    _, hasher = make_hasher()
    token_ids = torch.randint(0, 40, (1, 10))
    documents = (torch.arange(10) >= 4).long()[None]
    whole, tail = hasher(token_ids, documents), hasher(token_ids[:, 4:])
    for layer in whole:
        assert torch.equal(whole[layer][:, 4:], tail[layer])
    changed = token_ids.clone()
    changed[:, :4] = (changed[:, :4] + 7) % 40
    again = hasher(changed, documents)
    for layer in whole:
        assert torch.equal(whole[layer][:, 4:], again[layer][:, 4:])
        assert not torch.equal(whole[layer][:, :4], again[layer][:, :4])


def test_a_token_reaches_max_ngram_size_minus_one_positions_ahead():
    _, hasher = make_hasher(table_size=100_003, max_ngram_size=3)
    token_ids = torch.randint(0, 40, (1, 12))
    changed = token_ids.clone()
    changed[0, 5] = (changed[0, 5] + 9) % 40
    before, after = hasher(token_ids), hasher(changed)
    for layer in before:
        differs = (before[layer] != after[layer]).any(-1)[0].tolist()
        assert differs == [5 <= t <= 7 for t in range(12)]


def test_no_documents_means_one_document_per_row():
    _, hasher = make_hasher()
    token_ids = torch.randint(0, 40, (3, 9))
    left, right = hasher(token_ids), hasher(token_ids, torch.zeros(3, 9, dtype=torch.int64))
    assert all(torch.equal(left[layer], right[layer]) for layer in left)


def test_sequences_shorter_than_the_ngram():
    _, hasher = make_hasher()
    assert all(rows.shape == (2, 1, 6) for rows in hasher(torch.zeros(2, 1, dtype=torch.int64)).values())


def test_primes_by_trial_division():
    def plain(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    assert [n for n in range(3000) if is_prime(n)] == [n for n in range(3000) if plain(n)]
    # Strong pseudoprimes to the first bases, a Carmichael number, and the largest prime below 2^63.
    assert not any(map(is_prime, (3215031751, 341550071728321, 561, (2**31 - 1) * (2**31 - 1))))
    assert is_prime(2**63 - 25) and is_prime(2**31 - 1)


def test_table_sizes_are_the_next_primes_and_never_repeat():
    sizes = prime_table_sizes([20, 24], 3, [4, 1])
    assert sizes == {4: [[23, 29, 31], [37, 41, 43]], 1: [[47, 53, 59], [61, 67, 71]]}
    assert list(sizes) == [4, 1]
    cfg = EngramConfig(layers=[1, 5], num_hash_heads=4, d_memory=64, table_size=10_000)
    flat = [prime for layer in table_sizes(cfg).values() for order in layer for prime in order]
    assert len(set(flat)) == len(flat) == 16
    assert min(flat) >= 10_000 and all(map(is_prime, flat))


def test_one_row_control_has_one_row_per_head():
    cfg = EngramConfig(layers=[0, 2], num_hash_heads=3, d_memory=24, table_size=1)
    assert table_sizes(cfg) == {0: [[1, 1, 1], [1, 1, 1]], 2: [[1, 1, 1], [1, 1, 1]]}
    rows = NgramHasher(cfg, torch.arange(40), 0)(torch.randint(0, 40, (2, 5)))
    assert all(torch.equal(ids, torch.arange(6).expand(2, 5, 6)) for ids in rows.values())


def test_multipliers_are_odd_bounded_and_differ_by_layer():
    seen = []
    for layer in range(4):
        multipliers = layer_multipliers(3, layer, 4, 1000)
        assert all(m % 2 == 1 and m > 0 and 999 * int(m) <= INT64_MAX for m in multipliers.tolist())
        seen.append(tuple(multipliers.tolist()))
    assert len(set(seen)) == 4
    assert layer_multipliers(3, 1, 4, 1000).tolist() == list(seen[1])
    assert layer_multipliers(0, 0, 2, INT64_MAX).tolist() == [1, 1]  # half_bound is never below 1


@pytest.mark.parametrize(
    ("table", "pad", "message"),
    [
        (torch.arange(10), 10, "pad_id=10 must be a token id in 0..9"),
        (torch.arange(10) - 1, 0, "non-negative ids"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, "one row of"),
    ],
)
def test_bad_tables_are_refused(table, pad, message):
    with pytest.raises(ValueError, match=message):
        NgramHasher(EngramConfig(), table, pad)
