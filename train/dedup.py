"""Exact and near-duplicate removal over a whole corpus, before it is split.

Copies of a training document in the validation set reward a model that memorises n-grams, which is exactly what an
Engram memory does. So duplicates are removed across the whole corpus first, and only then is anything held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_WORD_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2**64 (2**64 / golden ratio)
ROWS_PER_BAND = 6  # an LSH band is 6 hashes: at Jaccard 0.8 and 21 bands a copy is missed with probability 0.0017
_VERIFY_SIGMAS = 4.0  # pairs whose estimate is within 4 standard errors below the threshold are compared exactly
_MINHASH_TABLE = 512  # shingles up to which a table (permutations, shingles) stays in a core's cache
_MINHASH_CHUNK = 8192  # shingles hashed at once: 8192 x 8 bytes stay in a core's cache


@dataclass
class DedupConfig:
    """What counts as the same document."""

    enabled: bool = True  # false keeps every document, copies included
    threshold: float = 0.8  # Jaccard similarity of shingle sets from which a document counts as a copy
    shingle_size: int = 5  # words in one shingle
    num_permutations: int = 128  # length of a MinHash signature; its standard error is at most 0.5 / sqrt(this)

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"data.dedup.threshold={self.threshold} must lie in (0, 1]; the usual value is 0.8")
        if self.shingle_size < 1:
            raise ValueError(f"data.dedup.shingle_size={self.shingle_size} must be at least 1 word; usual is 5")
        if self.num_permutations < 16:
            raise ValueError(f"data.dedup.num_permutations={self.num_permutations} must be at least 16; usual is 128")

    @property
    def num_bands(self) -> int:
        """Bands of a signature; documents that agree in all hashes of one are compared."""
        return self.num_permutations // ROWS_PER_BAND

    @property
    def close(self) -> float:
        """Estimated similarity from which a pair is compared exactly."""
        return float(self.threshold - _VERIFY_SIGMAS * 0.5 / np.sqrt(self.num_permutations))


@dataclass(frozen=True)
class DedupResult:
    """Which documents stay."""

    keep: np.ndarray  # (documents,) bool
    num_exact: int  # documents removed as byte-for-byte copies of an earlier one
    num_near: int  # documents removed as near copies of an earlier kept one


# (256,) whether a byte belongs to a word: letters and digits of ASCII, the underscore, parts of other characters
_IS_WORD = np.array([bytes([code]).isalnum() or code == ord("_") or code >= 0x80 for code in range(256)])
_WORD_BLOCK = 2**18  # bytes hashed at once: what is made of them is 10 MB, however long the document


def _word_hashes(text: bytes) -> np.ndarray:
    """(words,) uint64 hash of each maximal run of letters, digits, underscores or non-ASCII bytes.

    A word's hash is sum_j byte_j * base**j modulo 2**64 with j counted from the word's start, so it does not depend on
    where a text is cut between words.
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    hashes = []
    start = 0
    while start < len(codes):
        stop = start + _WORD_BLOCK
        while stop < len(codes) and _IS_WORD[codes[stop - 1]]:  # to the end of the word
            rest = np.flatnonzero(~_IS_WORD[codes[stop : stop + _WORD_BLOCK]])
            stop += int(rest[0]) + 1 if len(rest) else _WORD_BLOCK
        hashes.append(_block_hashes(codes[start:stop]))
        start = stop
    return np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)


def _block_hashes(codes: np.ndarray) -> np.ndarray:
    """The hashes of whole words, from one running sum: (prefix[end] - prefix[start]) * base**-start."""
    edges = np.flatnonzero(np.diff(_IS_WORD[codes], prepend=False, append=False))
    starts, ends = edges[0::2], edges[1::2]
    powers = np.cumprod(np.full(len(codes), _WORD_BASE))
    prefix = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers, out=prefix[1:])
    inverse = np.uint64(pow(int(_WORD_BASE), -1, 2**64))
    inverse_powers = np.cumprod(np.full(len(codes), inverse))
    hashes: np.ndarray = (prefix[ends] - prefix[starts]) * inverse_powers[starts]
    return hashes


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingle_hashes(text: bytes, shingle_size: int) -> np.ndarray:
    """Sorted unique uint64 hashes of every run of `shingle_size` consecutive words.

    A text of fewer words has one shingle, all of it; a text without words has none.
    """
    words = mix_bits(_word_hashes(text))
    if len(words) == 0:
        return words
    size = min(shingle_size, len(words))
    shingles = np.zeros(len(words) - size + 1, dtype=np.uint64)
    for offset in range(size):
        shingles = mix_bits(shingles + words[offset : offset + len(shingles)] + np.uint64(offset + 1))
    return np.unique(shingles)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sorted arrays of unique hashes; 1 for two empty ones."""
    if len(a) + len(b) == 0:
        return 1.0
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


class MinHasher:
    """Signatures whose share of equal entries estimates the Jaccard similarity (Broder 1997).

    Entry p of a signature is min over shingles x of the upper 32 bits of (a_p * x + b_p) modulo 2**64
    (multiply-shift hashing, Dietzfelbinger 1996).
    """

    def __init__(self, num_permutations: int) -> None:
        rng = np.random.default_rng(0)
        self._a = rng.integers(0, 2**63, num_permutations, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._b = rng.integers(0, 2**64, num_permutations, dtype=np.uint64)

    def signature(self, shingles: np.ndarray) -> np.ndarray:
        """(num_permutations,) uint32; all ones for a document without words."""
        result = np.full(len(self._a), 2**64 - 1, dtype=np.uint64)
        if 0 < len(shingles) <= _MINHASH_TABLE:  # a short document: all permutations at once
            result = (self._a[:, None] * shingles + self._b[:, None]).min(axis=1)
            return (result >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(shingles), _MINHASH_CHUNK):
            chunk = shingles[start : start + _MINHASH_CHUNK]
            for p in range(len(self._a)):
                result[p] = min(result[p], (chunk * self._a[p] + self._b[p]).min())
        return (result >> np.uint64(32)).astype(np.uint32)


def find_duplicates(
    texts: Sequence[bytes], cfg: DedupConfig, advance: Callable[[int], None] = lambda _: None
) -> DedupResult:
    """Mark every document whose shingle set has Jaccard similarity >= threshold with an earlier kept document.

    The definition, in memory: about 6 kB a document. `train.copies` finds the same on disk.

    Candidates come from locality-sensitive hashing of MinHash signatures; each close one is confirmed on the full
    shingle sets, so a document is never removed by an unlucky estimate. The first in order is the one kept.

    Args:
        texts: UTF-8 documents; indexed again when a candidate pair is confirmed, so it may read from disk.
        cfg: What counts as a copy.
        advance: Called with the number of bytes done, for a progress bar.
    """
    keep = np.ones(len(texts), dtype=bool)
    if not cfg.enabled:
        return DedupResult(keep, 0, 0)
    hasher = MinHasher(cfg.num_permutations)
    bands: list[dict[bytes, list[int]]] = [{} for _ in range(cfg.num_bands)]
    signatures = np.zeros((len(texts), cfg.num_permutations), dtype=np.uint32)
    seen: set[bytes] = set()
    num_exact = num_near = 0
    for i in range(len(texts)):
        text = texts[i]
        digest = hashlib.blake2b(text, digest_size=16).digest()
        if digest in seen:
            keep[i] = False
            num_exact += 1
            advance(len(text))
            continue
        seen.add(digest)
        shingles = shingle_hashes(text, cfg.shingle_size)
        signatures[i] = hasher.signature(shingles)
        keys = [signatures[i, b * ROWS_PER_BAND : (b + 1) * ROWS_PER_BAND].tobytes() for b in range(len(bands))]
        found = {j for band, key in zip(bands, keys, strict=True) for j in band.get(key, ())}
        candidates = np.array(sorted(found), dtype=np.int64)
        estimates = (signatures[candidates] == signatures[i]).mean(axis=1)
        order = np.lexsort((candidates, -estimates))
        if any(
            jaccard(shingles, shingle_hashes(texts[int(candidates[j])], cfg.shingle_size)) >= cfg.threshold
            for j in order
            if estimates[j] >= cfg.close
        ):
            keep[i] = False
            num_near += 1
        else:
            for band, key in zip(bands, keys, strict=True):
                band.setdefault(key, []).append(i)
        advance(len(text))
    return DedupResult(keep, num_exact, num_near)
