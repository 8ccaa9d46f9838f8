"""Mixtures: exact shares, slices that make up the global batch, one tokenizer, and a run from start to resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_data import rows
from tests.test_shards import random_documents, write_folder
from train.compose import compose
from train.config import Config, config_hash
from train.data import DataConfig, DataSource, MixtureSource, TrainBatches, check_fits
from train.identity import identity_hash, to_plain
from train.mixture import PERIOD, MixedData, Schedule, mix, shares
from train.shards import DataError, PreparedData, open_folder

SEQ_LEN = 7


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[PreparedData]:
    """Three data sets whose tokens tell them apart: ids 1 ... 9, 10 ... 29, 30 ... 49."""
    root = tmp_path_factory.mktemp("data")
    folders = []
    for i, (low, high, count) in enumerate([(1, 10, 60), (10, 30, 25), (30, 50, 40)]):
        rng = np.random.default_rng(i)
        documents = [rng.integers(low, high, rng.integers(1, 12)).tolist() for _ in range(count)]
        write_folder(root / f"p{i}", {"train": documents, "val": documents[:12]})
        folders.append(open_folder(root / f"p{i}"))
    return folders


def mixed(sources: list[PreparedData], *weights: float) -> MixedData:
    labels = [f"s{i}" for i in range(len(weights))]
    return mix(sources[0].path.parent, labels, weights, sources[: len(weights)])


def source_of(token_ids: list[int]) -> int:
    kinds = {int(np.searchsorted([10, 30], token, side="right")) for token in token_ids if token != 0}
    (kind,) = kinds
    return kind


def test_shares_are_weights_by_largest_remainders() -> None:
    assert shares([0.7, 0.3]) == [7000, 3000]
    assert shares([7, 3]) == [7000, 3000]
    assert shares([1, 1, 1]) == [3334, 3333, 3333]
    assert shares([1, 0, 2]) == [3333, 0, 6667]
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.random(rng.integers(1, 9))
        got = np.array(shares(weights))
        assert got.sum() == PERIOD
        assert (np.abs(got - weights / weights.sum() * PERIOD) < 1).all()


@pytest.mark.parametrize("counts", [[1], [7, 3], [1, 1], [50, 30, 19, 1], [1, 1, 1, 1, 1, 1, 34], [7000, 2999, 1]])
def test_proportions_are_exact_over_a_period_and_hold_all_along(counts: list[int]) -> None:
    length, num_sources = sum(counts), len(counts)
    schedule = Schedule(counts, seed=3)
    order, numbers = schedule.at(0, 3 * length)
    for period in range(3):
        assert np.bincount(order[period * length : (period + 1) * length], minlength=num_sources).tolist() == counts
    drawn: Counter[int] = Counter()
    for n, (source, number) in enumerate(zip(order.tolist(), numbers.tolist(), strict=True)):
        if n % 97 == 0:
            assert schedule.counts(n).tolist() == [drawn[i] for i in range(num_sources)]
        assert number == drawn[source], "a source's sequences are taken one after another"
        drawn[source] += 1
        for i, count in enumerate(counts):
            weight = count / length
            bound = 1 + weight * (num_sources - 2)
            assert abs(drawn[i] - (n + 1) * weight) <= bound + 1e-9
    if num_sources > 1 and max(counts) > 1:
        first, second = order[:length].tolist(), order[length : 2 * length].tolist()
        assert first != second, "each period is shuffled anew"
        assert Schedule(counts, seed=4).at(0, 3 * length)[0].tolist() != order.tolist()


def test_any_stretch_of_the_schedule_is_the_same_as_the_whole() -> None:
    schedule = Schedule([5, 3, 2], seed=0)
    order, numbers = schedule.at(0, 100)
    for first, last in ((0, 1), (9, 11), (37, 93), (99, 100), (3, 4)):
        got = Schedule([5, 3, 2], seed=0).at(first, last)
        assert got[0].tolist() == order[first:last].tolist()
        assert got[1].tolist() == numbers[first:last].tolist()


def test_batches_hold_the_sources_in_their_shares_and_each_window_once_an_epoch(sources: list[PreparedData]) -> None:
    data = mixed(sources, 0.5, 0.3, 0.2)
    batches = TrainBatches(data, SEQ_LEN, 10, seed=1)
    per_source: list[list[Any]] = [[], [], []]
    for step in range(40):
        for row in rows(batches.batch(step)):
            per_source[source_of(row[0])].append(row)
    lengths = [len(found) for found in per_source]
    assert all(abs(n - 400 * w) <= 2 for n, w in zip(lengths, (0.5, 0.3, 0.2), strict=True))
    assert batches.source_sequences(40) == dict(zip(("s0", "s1", "s2"), lengths, strict=True))
    for i, found in enumerate(per_source):
        alone = TrainBatches(sources[i], SEQ_LEN, 1, seed=9)
        windows = sorted(rows(alone.batch(n))[0] for n in range(alone.num_windows))
        for epoch in range(len(found) // alone.num_windows):
            read = found[epoch * alone.num_windows : (epoch + 1) * alone.num_windows]
            assert sorted(read) == windows and read != windows
        assert batches.source_epochs(40)[f"s{i}"] == len(found) / alone.num_windows
    assert batches.epoch(39) == int(np.ceil(max(batches.source_epochs(40).values()))) - 1 >= 1
    assert batches.epochs_needed(40) == max(batches.source_epochs(40).values())


def test_a_mixture_of_one_source_is_that_source(sources: list[PreparedData]) -> None:
    one, plain = (TrainBatches(data, SEQ_LEN, 5, seed=2) for data in (mixed(sources, 3.0), sources[0]))
    assert [rows(one.batch(s)) for s in range(50)] == [rows(plain.batch(s)) for s in range(50)]
    assert plain.source_epochs(3) == {} and list(one.source_epochs(3)) == ["s0"]


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_of_ranks_make_up_the_global_batch_from_any_step(
    sources: list[PreparedData], world_size: int, mixture: bool
) -> None:
    data = mixed(sources, 0.5, 0.3, 0.2) if mixture else sources[0]
    whole = TrainBatches(data, SEQ_LEN, 12, seed=5)
    size = 12 // world_size
    for step in (0, 1, 7, 900, 901):  # of other periods and epochs; nothing was read before
        ranks = [TrainBatches(data, SEQ_LEN, 12, seed=5) for _ in range(world_size)]
        parts = [ranks[r].batch(step, r * size, (r + 1) * size) for r in range(world_size)]
        expected = whole.batch(step)
        for name in ("token_ids", "targets", "document_ids"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))


def test_a_slice_reads_its_own_windows_alone(sources: list[PreparedData], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = TrainBatches(mixed(sources, 1, 1), SEQ_LEN, 64, seed=0)
    calls = []
    original = type(sources[0].train).read
    monkeypatch.setattr("train.shards.TokenStream.read", lambda *args: (calls.append(args), original(*args))[1])
    batches.batch(3, 16, 24)
    assert len(calls) == 8
    for first, last in ((0, 65), (5, 5), (-1, 3), (9, 8)):
        with pytest.raises(IndexError, match=f"sequences {first} to {last} of a global batch of 64"):
            batches.batch(0, first, last)


def test_a_second_epoch_is_said_for_its_source(sources: list[PreparedData]) -> None:
    data = mixed(sources, 1, 9)
    batches = TrainBatches(data, SEQ_LEN, 10, seed=0)
    windows = [s.num_windows for s in batches._sources]
    steps = windows[1] // 9 + 2
    assert windows[0] > steps
    (note,) = batches.epoch_notes(steps)
    tokens = f"{sources[1].num_train_tokens:,}"
    assert note.endswith(f"epochs over {tokens} training tokens of s1: text is read again") and note.startswith("1.")
    assert batches.epoch_notes(1) == []
    alone = TrainBatches(sources[0], SEQ_LEN, 1, seed=0)
    assert alone.epoch_notes(alone.num_windows) == []
    assert alone.epoch_notes(3 * alone.num_windows) == [
        f"3.00 epochs over {sources[0].num_train_tokens:,} training tokens: text is read again"
    ]


def test_a_mixture_lasts_until_its_first_source_ends(sources: list[PreparedData]) -> None:
    data = mixed(sources, 1, 1, 2)
    lasts = [n.num_train_tokens * factor for n, factor in zip(sources, (4, 4, 2), strict=True)]
    assert data.num_train_tokens == min(lasts)
    assert data.num_val_tokens == sum(source.num_val_tokens for source in sources)


def test_a_source_of_weight_0_only_validates(sources: list[PreparedData]) -> None:
    data = mixed(sources, 1, 0, 1)
    batches = TrainBatches(data, SEQ_LEN, 4, seed=0)
    assert {source_of(row[0]) for step in range(50) for row in rows(batches.batch(step))} == {0, 2}
    assert [part.share for part in data.parts] == [5000, 0, 5000]
    check_fits(data, 50, SEQ_LEN)
    short = sources[1].num_train_tokens  # no window of this length in source 1, which is not trained on
    with pytest.raises(DataError, match="split val"):
        check_fits(data, 50, short)


def test_fingerprint_follows_sources_and_shares_not_labels(sources: list[PreparedData]) -> None:
    held = mixed(sources, 0.7, 0.3).fingerprint
    assert mixed(sources, 7, 3).fingerprint == held
    assert mix(sources[0].path, ["a", "b"], [7, 3], sources[:2]).fingerprint == held
    others = [
        mixed(sources, 0.6, 0.4),
        mixed(sources, 0.7, 0.3, 0.0),
        mix(sources[0].path, ["s0", "s1"], [0.7, 0.3], [sources[1], sources[0]]),
        mix(sources[0].path, ["s0", "s1"], [0.7, 0.3], [sources[0], sources[2]]),
    ]
    assert len({held, *(other.fingerprint for other in others)}) == 5


def test_sources_with_other_tokenizers_are_refused_by_name(sources: list[PreparedData], tmp_path: Path) -> None:
    documents = {"train": random_documents(0, 20), "val": random_documents(1, 9)}
    write_folder(tmp_path / "other", documents, vocab_size=60)
    with pytest.raises(
        DataError,
        match=r"the compression of token ids of source b \(.*other\) is not that of source a .*data\.tokenizer=",
    ):
        mix(tmp_path, ["a", "b"], [1, 1], [sources[0], open_folder(tmp_path / "other")])


def source(**settings: Any) -> MixtureSource:
    return MixtureSource(source=DataSource.datasets, **settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: MixtureSource(weight=-0.5, label="x"),
            r"data\.mixture: weight=-0\.5 of source x must be .* at least 0",
        ),
        (lambda: MixtureSource(weight=float("nan")), r"weight=nan of source python"),
        (lambda: MixtureSource(label="a b/c"), r"label=a b/c names metrics .*nearest: a_b_c"),
        (
            lambda: MixtureSource(prepared="p", max_documents=9),
            r"source p gives prepared=p, beside which max_documents",
        ),
        (lambda: MixtureSource(data_files=["a.txt"]), r"data\.mixture\[\.\.\.\]\.source=datasets; set source=datasets"),
        (
            lambda: DataConfig(mixture=[MixtureSource(weight=0), source(path="a/b", weight=0)]),
            r"the weights of python, b are all 0.*at least one",
        ),
        (
            lambda: DataConfig(mixture=[MixtureSource(), MixtureSource()]),
            r"2 sources are called python; give each a lab",
        ),
        (
            lambda: DataConfig(mixture=[MixtureSource()], max_documents=60),
            r"data\.max_documents=60 has no effect beside data\.mixture",
        ),
        (
            lambda: DataConfig(mixture=[MixtureSource(weight=1e-5), source(path="a")]),
            r"weight=1e-05 of source python is less than one sequence of 10,000; nearest: 0\.0001, or 0",
        ),
    ],
)
def test_impossible_mixtures_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_mixture_composes_from_yaml_and_from_the_command_line(tmp_path: Path) -> None:
    words = "data.mixture=[{weight:0.7},{source:datasets,data_files:[a.jsonl],weight:0.3,label:mine}]"
    (tmp_path / "run.yaml").write_text(
        "defaults: [train_schema, _self_]\n"
        "data:\n  mixture:\n  - {weight: 0.7}\n"
        "  - {source: datasets, data_files: [a.jsonl], weight: 0.3, label: mine}\n"
    )
    (tmp_path / "plain.yaml").write_text("defaults: [train_schema, _self_]\n")
    from_file = compose(Config, "train_schema", "run", [], tmp_path)
    from_words = compose(Config, "train_schema", "plain", [words], tmp_path)
    assert from_file == from_words
    assert from_file.data.mixture == [
        MixtureSource(weight=0.7),
        source(data_files=["a.jsonl"], weight=0.3, label="mine"),
    ]
    for wrong, message in (
        ("data.mixture=[{weigth:1}]", "weigth"),
        ("data.mixture=[{weight:heavy}]", "heavy"),
        ("data.mixture=[{source:nowhere}]", "nowhere"),
        ("data.mixture=[{weight:-1}]", r"weight=-1\.0 of source python"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(Config, "train_schema", "plain", [wrong], tmp_path)


def test_identity_without_a_mixture_is_as_before_and_counts_weights_with_one() -> None:
    plain = to_plain(Config())
    del plain["data"]["mixture"]
    assert identity_hash(plain) == config_hash(Config())
    hashes = {config_hash(Config(data=DataConfig(mixture=[MixtureSource(weight=w), source(path="a")]))) for w in (1, 2)}
    assert len(hashes | {config_hash(Config())}) == 3
