"""The search for copies on disk against its definition in memory, and components against a search by hand."""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.test_dedup import random_words, text_of
from train import copies
from train.copies import Batch, batches, exact_copies, hash_documents, near_copies, similar_groups
from train.corpus import Document
from train.dedup import DedupConfig, find_duplicates
from train.document_store import DocumentIndex, PartReader, write_parts


def texts_with_copies(seed: int) -> list[bytes]:
    """Clusters of texts with every share of changed words, exact copies, and texts without words."""
    rng = random.Random(seed)
    texts = ["+-*/", "()", "+-*/", "one"]
    for _ in range(25):
        words = random_words(rng, rng.choice([3, 40, 150]))
        for changed in (0, 0, 1, 2, 3, 5, 8, 20):
            copy = list(words)
            for position in rng.sample(range(len(copy)), min(changed, len(copy))):
                copy[position] = "changed"
            texts.append(text_of(rng, copy))
        texts.append(texts[-1])
    rng.shuffle(texts)
    return [text.encode() for text in texts]


def on_disk(folder: Path, texts: list[bytes], cfg: DedupConfig, part_bytes: int) -> tuple[np.ndarray, int, int, int]:
    """(keep, exact copies, near copies, batches) by the stages on disk."""
    documents = (Document(f"d{i}", text) for i, text in enumerate(texts))
    index = DocumentIndex(folder, list(write_parts(folder, "part", documents, part_bytes)))
    start = 0
    for part in index.parts:
        hash_documents(folder, part.name, texts[start : start + part.num_documents], cfg)
        start += part.num_documents
    exact = exact_copies(index)
    documents_alike, groups = similar_groups(index, cfg.num_bands, exact)
    order, bounds = batches(groups)
    keep, num_near = ~exact, 0
    names = [part.name for part in index.parts]
    for first, last in pairwise(bounds.tolist()):
        chosen = documents_alike[order[first:last]]
        batch = Batch(index.locations(chosen), groups[order[first:last]])
        with PartReader(folder, names) as reader, PartReader(folder, names, "signatures") as signatures:
            for row, copy in near_copies(batch, reader, signatures, cfg):
                keep[chosen[row]] &= not copy
                num_near += copy
    return keep, int(exact.sum()), num_near, len(bounds) - 1


@pytest.mark.parametrize(
    "cfg", [DedupConfig(), DedupConfig(threshold=0.5, shingle_size=2), DedupConfig(num_permutations=20)]
)
@pytest.mark.parametrize(
    ("part_bytes", "sorted_at_once", "batch"), [(8000, 60, 1), (40_000, 150, 20), (10**9, 10**9, 10**9)]
)
def test_copies_on_disk_are_those_of_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cfg: DedupConfig, part_bytes: int, sorted_at_once: int, batch: int
) -> None:
    """However parts, slices of the sort and batches are cut."""
    monkeypatch.setattr(copies, "SORTED", sorted_at_once)
    monkeypatch.setattr(copies, "BATCH_DOCUMENTS", batch)
    texts = texts_with_copies(1)
    expected = find_duplicates(texts, cfg)
    keep, num_exact, num_near, num_batches = on_disk(tmp_path, texts, cfg, part_bytes)
    assert keep.tolist() == expected.keep.tolist()
    assert (num_exact, num_near) == (expected.num_exact, expected.num_near)
    assert expected.num_exact > 20 and expected.num_near > 20
    assert num_batches > 3 if batch < 10 else num_batches >= 1


def test_equal_band_hashes_of_unequal_bands_are_no_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every band hash the same all documents are in one group, and still the same copies are found."""
    texts = texts_with_copies(2)[:60]
    expected = find_duplicates(texts, DedupConfig(threshold=0.3))
    monkeypatch.setattr(copies, "mix_bits", lambda hashes: hashes * np.uint64(0))
    keep, _, _, num_batches = on_disk(tmp_path, texts, DedupConfig(threshold=0.3), 500)
    assert keep.tolist() == expected.keep.tolist() and num_batches == 1


def test_without_copies_there_is_nothing_to_compare(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [text_of(rng, random_words(rng, 60)).encode() for _ in range(20)]
    keep, num_exact, num_near, num_batches = on_disk(tmp_path, texts, DedupConfig(), 400)
    assert keep.all() and (num_exact, num_near, num_batches) == (0, 0, 0)


def test_batches_hold_whole_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "BATCH_DOCUMENTS", 15)
    rng = np.random.default_rng(0)
    groups = np.where(rng.random((300, 3)) < 0.45, rng.integers(0, 120, (300, 3)), -1).astype(np.int32)
    order, bounds = batches(groups)
    assert sorted(order.tolist()) == list(range(300)) and bounds[0] == 0 and bounds[-1] == 300
    batch_of = np.empty(300, dtype=int)
    for i, (first, last) in enumerate(pairwise(bounds.tolist())):
        batch_of[order[first:last]] = i
    assert len(bounds) > 4
    for band in range(3):
        for group in range(120):
            assert len(set(batch_of[groups[:, band] == group])) <= 1
    # By hand: all that a row reaches through shared groups, in order, one component after another.
    seen: list[int] = []
    for row in range(300):
        if row in seen:
            continue
        component, frontier = {row}, [row]
        while frontier:
            one = frontier.pop()
            shared = (groups == groups[one]) & (groups[one] >= 0)
            near = set(np.flatnonzero(shared.any(axis=1)).tolist())
            frontier += near - component
            component |= near
        seen += sorted(component)
    assert order.tolist() == seen


def test_parts_are_cut_anywhere_and_read_back(tmp_path: Path) -> None:
    texts = texts_with_copies(3)
    decided = [None, True, False]
    documents = [Document(f"{i}", text, decided[i % 3]) for i, text in enumerate(texts)]
    for part_bytes in (1, 5000, 10**9):
        folder = tmp_path / str(part_bytes)
        folder.mkdir()
        index = DocumentIndex(folder, list(write_parts(folder, "part", documents, part_bytes)))
        assert len(index) == len(texts) and index.num_bytes == sum(map(len, texts))
        everything = np.random.default_rng(0).permutation(len(texts))
        with index.reader() as reader:
            got = [reader.read(part, offset, size) for part, _, offset, size in index.locations(everything).tolist()]
        assert got == [texts[i] for i in everything]
        held = np.concatenate([np.load(folder / f"{part.name}.decided.npy") for part in index.parts])
        assert held.tolist() == [[-1, 1, 0][i % 3] for i in range(len(texts))]
    assert len(index.parts) == 1
