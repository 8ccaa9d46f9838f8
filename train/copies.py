"""`train.dedup.find_duplicates` for a corpus larger than memory: sorted hashes on disk, compared in batches.

1. Each part's documents are hashed (`hash_documents`): a digest of the text, a MinHash signature, a 64-bit hash of each
   of its bands. 512 + 8 * 21 + 16 bytes a document, on disk.
2. `exact_copies` sorts the digests, `similar_groups` the hashes of one band after another. About SORTED of them are
   held at once; where there are more, the range of the hash is cut into slices, and the files are read once for each.
3. Documents that share a band hash with another one, directly or through others, form a component. What is removed in
   one does not depend on another: batches of components are compared in any process, each in the order of documents.

Memory: 1 byte a document and 40 * SORTED bytes while sorting, then 6 * num_bands + 40 bytes (166 with 21 bands) a
document that shares a band. While a batch is compared: 25 * num_bands bytes (525) a document of it; texts and
signatures are read as needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from train.dedup import ROWS_PER_BAND, DedupConfig, MinHasher, jaccard, mix_bits, shingle_hashes
from train.document_store import DocumentIndex, PartReader
from train.files import write_array, write_through

SORTED = 2**22  # hashes sorted at once: 100 MB with their documents and the order
BATCH_DOCUMENTS = 4096  # after which a batch of components ends; a larger component is a batch of its own


def hash_documents(folder: Path, part: str, texts: list[bytes], cfg: DedupConfig) -> None:
    """Write digests, band hashes and signatures of a part's documents."""
    hasher = MinHasher(cfg.num_permutations)
    digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts)
    signatures = np.stack([hasher.signature(shingle_hashes(text, cfg.shingle_size)) for text in texts])
    bands = signatures[:, : cfg.num_bands * ROWS_PER_BAND].reshape(len(texts), cfg.num_bands, ROWS_PER_BAND)
    hashes = np.zeros((cfg.num_bands, len(texts)), dtype=np.uint64)
    for row in range(ROWS_PER_BAND):
        hashes = mix_bits(hashes + bands[:, :, row].T + np.uint64(row + 1))
    write_array(folder / f"{part}.digests.npy", np.frombuffer(digests, dtype="<u8").reshape(-1, 2))
    write_array(folder / f"{part}.bands.npy", hashes)
    write_through(folder / f"{part}.signatures", [signatures.data])


def exact_copies(index: DocumentIndex) -> np.ndarray:
    """(documents,) whether a document equals an earlier one byte for byte."""
    copies = np.zeros(len(index), dtype=bool)
    for low, high in _slices(len(index)):
        digests, documents = [], []
        for i, part in enumerate(index.parts):
            found = np.load(index.folder / f"{part.name}.digests.npy", allow_pickle=False)
            chosen = np.flatnonzero(_within(found[:, 0], low, high))
            digests.append(found[chosen])
            documents.append(chosen + index.first[i])
        sums, numbers = np.concatenate(digests), np.concatenate(documents)
        order = np.lexsort((numbers, sums[:, 1], sums[:, 0]))
        sums, numbers = sums[order], numbers[order]
        copies[numbers[1:][(sums[1:] == sums[:-1]).all(axis=1)]] = True
    return copies


def similar_groups(index: DocumentIndex, num_bands: int, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents that share the hash of a band with another one.

    Args:
        index: the documents.
        num_bands: bands of a signature.
        left_out: (documents,) bool, documents that are compared with none.

    Returns:
        documents: (n,) in order.
        groups: (n, num_bands) int32: equal numbers in a column are equal hashes; -1 where nobody shares it.
    """
    folder = index.folder
    grouped = np.zeros(len(index), dtype=bool)
    for band in range(num_bands):
        members, total = [], 0
        for documents, starts in _runs(index, band, left_out):
            numbers = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(documents)))
            members.append(np.stack([documents, total + numbers], axis=1))
            total += len(starts)
            grouped[documents] = True
        write_array(folder / f"band-{band:03d}.npy", np.concatenate(members))
    documents = np.flatnonzero(grouped)
    groups = np.full((len(documents), num_bands), -1, dtype=np.int32)
    for band in range(num_bands):
        path = folder / f"band-{band:03d}.npy"
        members_of = np.load(path, allow_pickle=False)
        groups[np.searchsorted(documents, members_of[:, 0]), band] = members_of[:, 1]
        path.unlink()
    return documents, groups


def batches(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deal the rows of `groups` out into batches of whole components.

    Returns:
        order: (n,) rows, component by component, in each in their order.
        bounds: (batches + 1,) where batches begin in `order`.
    """
    component = _components(groups)
    order = np.argsort(component, kind="stable")
    begins = np.flatnonzero(np.diff(component[order], prepend=-1))  # of components
    chosen = begins[
        np.diff(begins // BATCH_DOCUMENTS, prepend=-1) > 0
    ]  # the first in each stretch of so many documents
    return order, np.concatenate([chosen, [len(order)]]).astype(np.int64)


def _components(groups: np.ndarray) -> np.ndarray:
    """(n,) for each row the lowest row that it is connected with, through groups of any band."""
    component = np.arange(len(groups))
    while True:
        before = component
        for band in range(groups.shape[1]):
            rows = np.flatnonzero(groups[:, band] >= 0)
            rows = rows[np.argsort(groups[rows, band], kind="stable")]
            starts = np.flatnonzero(np.diff(groups[rows, band], prepend=-1))
            if len(rows) == 0:
                continue
            labels = component[rows]
            lowest = np.repeat(np.minimum.reduceat(labels, starts), np.diff(starts, append=len(rows)))
            parent = np.arange(len(groups))
            np.minimum.at(parent, labels, lowest)
            while (parent[parent] != parent).any():
                parent = parent[parent]
            component = parent[component]
        if (component == before).all():
            return component


@dataclass
class Batch:
    """Some documents, in order, and where to read them."""

    locations: np.ndarray  # (n,) document_store.LOCATION
    groups: np.ndarray  # (n, num_bands) as of `similar_groups`


def near_copies(
    batch: Batch, texts: PartReader, signatures: PartReader, cfg: DedupConfig
) -> Iterator[tuple[int, bool]]:
    """(row, whether it is a near copy) of each document of a batch; the first of those alike is kept.

    The kept documents of a group are a chain: `newest[group]` is its last one, `previous[row, band]` the one before.
    """
    num_bands = batch.groups.shape[1]
    shared = batch.groups >= 0
    # Groups of all bands under one numbering from 0.
    ids = np.full(batch.groups.shape, -1, dtype=np.int64)
    keys = batch.groups.astype(np.int64) * num_bands + np.arange(num_bands)
    ids[shared] = np.unique(keys[shared], return_inverse=True)[1]
    newest = np.full(int(ids.max(initial=-1)) + 1, -1, dtype=np.int32)
    previous = np.full(batch.groups.shape, -1, dtype=np.int32)

    def signature(row: int) -> np.ndarray:
        place, size = batch.locations[row], 4 * cfg.num_permutations
        found = signatures.read(int(place["part"]), int(place["row"]) * size, size)
        return np.frombuffer(found, dtype=np.uint32)

    @lru_cache(maxsize=4)
    def shingles(row: int) -> np.ndarray:
        place = batch.locations[row]
        return shingle_hashes(texts.read(*(int(place[name]) for name in ("part", "offset", "size"))), cfg.shingle_size)

    for row in range(len(batch.groups)):
        own = np.flatnonzero(shared[row])
        candidates = set()
        for band in own:
            other = int(newest[ids[row, band]])
            while other >= 0:
                candidates.add(other)
                other = int(previous[other, band])
        mine = signature(row)
        close = []
        for other in candidates:
            equal = mine == signature(other)
            # Unequal bands may have equal hashes, once in 2**64 pairs.
            candidate = equal[: num_bands * ROWS_PER_BAND].reshape(num_bands, -1).all(axis=1).any()
            if candidate and equal.mean() >= cfg.close:
                close.append((-float(equal.mean()), other))
        copy = any(jaccard(shingles(row), shingles(other)) >= cfg.threshold for _, other in sorted(close))
        if not copy:
            for band in own:
                previous[row, band] = newest[ids[row, band]]
                newest[ids[row, band]] = row
        yield row, copy


def _slices(count: int) -> list[tuple[int, int]]:
    """The range of 64-bit hashes in slices, each of which holds about SORTED of `count`."""
    number = -(-count // SORTED)
    return [(2**64 * i // number, 2**64 * (i + 1) // number) for i in range(number)]


def _within(hashes: np.ndarray, low: int, high: int) -> np.ndarray:
    """Which hashes lie in low ... high - 1."""
    chosen: np.ndarray = (hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1))
    return chosen


def _runs(index: DocumentIndex, band: int, left_out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each slice of the hashes of a band: documents with equal hashes behind one another, and where runs begin."""
    for low, high in _slices(len(index)):
        hashes, documents = [], []
        for i, part in enumerate(index.parts):
            found = np.load(index.folder / f"{part.name}.bands.npy", mmap_mode="r", allow_pickle=False)[band]
            chosen = np.flatnonzero(_within(found, low, high) & ~left_out[index.first[i] : index.first[i + 1]])
            hashes.append(found[chosen])
            documents.append(chosen + index.first[i])
        keys, numbers = np.concatenate(hashes), np.concatenate(documents)
        order = np.argsort(keys, kind="stable")
        keys, numbers = keys[order], numbers[order]
        begins = np.concatenate([np.ones(min(len(keys), 1), dtype=bool), keys[1:] != keys[:-1]])
        runs = np.cumsum(begins) - 1
        several = np.bincount(runs)[runs] > 1 if len(keys) else begins
        yield numbers[several], np.flatnonzero(begins[several])
