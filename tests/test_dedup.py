"""Duplicates: hashed shingles against Python sets of words, removal against brute force over all pairs."""

import random
import re

import numpy as np
import pytest

from train.dedup import DedupConfig, MinHasher, find_duplicates, jaccard, shingle_hashes


def word_shingles(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"[A-Za-z0-9_\x80-\U0010ffff]+", text)
    if not words:
        return set()
    size = min(size, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def exact_jaccard(a: str, b: str, size: int) -> float:
    x, y = word_shingles(a, size), word_shingles(b, size)
    return len(x & y) / len(x | y)


def random_words(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices("abcdefgh_é9", k=rng.randint(1, 7))) for _ in range(count)]


def text_of(rng: random.Random, words: list[str]) -> str:
    return "".join(word + rng.choice([" ", "\n", "(", "):\n    ", " + "]) for word in words)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_shingles_and_jaccard_equal_sets_of_words(size: int) -> None:
    rng = random.Random(size)
    texts = [text_of(rng, rng.choices(random_words(rng, 12), k=rng.randint(1, 60))) for _ in range(30)]
    for text in texts:
        assert len(shingle_hashes(text.encode(), size)) == len(word_shingles(text, size))
    for a, b in zip(texts, texts[1:] + texts[:1], strict=True):
        got = jaccard(shingle_hashes(a.encode(), size), shingle_hashes(b.encode(), size))
        assert got == pytest.approx(exact_jaccard(a, b, size), abs=1e-12)


def test_text_without_words_has_no_shingle() -> None:
    assert len(shingle_hashes(b"", 5)) == 0
    assert len(shingle_hashes(b"+-*/ \n", 5)) == 0
    assert jaccard(shingle_hashes(b"", 5), shingle_hashes(b"", 5)) == 1.0


def test_signature_estimates_jaccard_within_four_standard_errors() -> None:
    hasher = MinHasher(512)
    for shared in (100, 500, 900):
        a = np.unique(np.random.default_rng(shared).integers(0, 2**64, 1000, dtype=np.uint64))
        b = np.concatenate([a[:shared], np.random.default_rng(7).integers(0, 2**64, 1000 - shared, dtype=np.uint64)])
        true = shared / (2000 - shared)
        estimate = (hasher.signature(a) == hasher.signature(b)).mean()
        assert abs(estimate - true) < 4 * np.sqrt(true * (1 - true) / 512)


def test_removal_equals_brute_force_over_all_pairs() -> None:
    """Copies with every share of changed words, so that similarities lie on both sides of the threshold."""
    rng = random.Random(0)
    texts: list[str] = []
    for _ in range(40):
        words = random_words(rng, 150)
        texts.append(text_of(rng, words))
        for changed in (0, 1, 2, 3, 5, 8, 20):
            copy = list(words)
            for position in rng.sample(range(len(copy)), changed):
                copy[position] = "changed"
            texts.append(text_of(rng, copy))
    rng.shuffle(texts)
    expected = []
    for i, text in enumerate(texts):
        earlier = (j for j in range(i) if expected[j])
        expected.append(not any(exact_jaccard(text, texts[j], 5) >= 0.8 for j in earlier))
    result = find_duplicates([text.encode() for text in texts], DedupConfig())
    assert result.keep.tolist() == expected
    assert 40 < sum(expected) < 300
    assert result.num_exact + result.num_near == len(texts) - sum(expected)


def test_exact_copies_keep_the_first_and_bytes_are_reported() -> None:
    done: list[int] = []
    result = find_duplicates([b"one two", b"three four five", b"one two", b"(", b"("], DedupConfig(), done.append)
    assert result.keep.tolist() == [True, True, False, True, False]
    assert (result.num_exact, result.num_near) == (2, 0)
    assert done == [7, 15, 7, 1, 1]


def test_disabled_keeps_copies() -> None:
    assert find_duplicates([b"same words"] * 3, DedupConfig(enabled=False)).keep.all()


@pytest.mark.parametrize(
    ("setting", "value"), [("threshold", 0.0), ("threshold", 1.5), ("shingle_size", 0), ("num_permutations", 8)]
)
def test_impossible_settings_are_named(setting: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"data\.dedup\.{setting}={value}"):
        DedupConfig(**{setting: value})
