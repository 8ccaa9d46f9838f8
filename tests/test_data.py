"""Batches against a brute-force reading of the stream, and what does not fit the shards."""

import numpy as np
import pytest
import torch

from tests.test_shards import EOS, random_documents, write_folder
from train.data import IGNORE_INDEX, Batch, DataConfig, DataSource, TrainBatches, check_fits, validation_batches
from train.shards import DataError, PreparedData, open_folder

SEQ_LEN = 7


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("data") / "p"
    write_folder(folder, {"train": random_documents(0, 40), "val": random_documents(1, 30)})
    return open_folder(folder)


def brute_force_window(stream: list[int], start: int, seq_len: int) -> tuple[list[int], list[int], list[int]]:
    """One window by the words of the definition, token by token."""
    document = 0
    ids, targets, documents = [], [], []
    for t in range(start, start + seq_len):
        ids.append(stream[t])
        documents.append(document)
        if stream[t] == EOS:  # it ends its own document: what follows belongs to another one
            targets.append(IGNORE_INDEX)
            document += 1
        else:
            targets.append(stream[t + 1])
    return ids, targets, documents


def rows(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    return list(zip(batch.token_ids.tolist(), batch.targets.tolist(), batch.document_ids.tolist(), strict=True))


def test_an_epoch_is_every_window_once_as_brute_force_reads_it(prepared: PreparedData) -> None:
    stream = prepared.train.read(0, len(prepared.train)).tolist()
    batches = TrainBatches(prepared, SEQ_LEN, global_batch_size=1, seed=3)
    assert batches.num_windows == (len(stream) - 1) // SEQ_LEN > 20
    assert batches.tokens_per_epoch == batches.num_windows * SEQ_LEN
    got = [rows(batches.batch(step))[0] for step in range(batches.num_windows)]
    expected = [brute_force_window(stream, w * SEQ_LEN, SEQ_LEN) for w in range(batches.num_windows)]
    assert got != expected, "windows must be shuffled"
    assert sorted(got) == sorted(expected)


def test_batch_shapes_types_and_memory_is_its_own(prepared: PreparedData) -> None:
    batch = TrainBatches(prepared, SEQ_LEN, 4, seed=0).batch(2)
    for tensor in (batch.token_ids, batch.targets, batch.document_ids):
        assert tensor.shape == (4, SEQ_LEN) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert batch.document_ids.max() > 0
    before = TrainBatches(prepared, SEQ_LEN, 4, seed=0).batch(2).targets
    batch.token_ids += 1
    assert torch.equal(batch.targets, before)


def test_batch_is_a_function_of_seed_and_step_alone(prepared: PreparedData) -> None:
    forward = TrainBatches(prepared, SEQ_LEN, 4, seed=1)
    many = [rows(forward.batch(step)) for step in range(60)]
    assert forward.epoch(59) >= 2
    backward = TrainBatches(prepared, SEQ_LEN, 4, seed=1)
    assert [rows(backward.batch(step)) for step in reversed(range(60))] == many[::-1]
    assert rows(TrainBatches(prepared, SEQ_LEN, 4, seed=1).batch(37)) == many[37]
    assert rows(TrainBatches(prepared, SEQ_LEN, 4, seed=2).batch(0)) != many[0]


def test_batch_size_only_regroups_the_same_sequence_of_windows(prepared: PreparedData) -> None:
    small, large = (TrainBatches(prepared, SEQ_LEN, size, seed=5) for size in (2, 6))
    assert [row for s in range(30) for row in rows(small.batch(s))] == [
        row for s in range(10) for row in rows(large.batch(s))
    ]


def test_epochs_are_counted_and_each_has_its_own_order(prepared: PreparedData) -> None:
    batches = TrainBatches(prepared, SEQ_LEN, 1, seed=0)
    n = batches.num_windows
    assert [batches.epoch(step) for step in (0, n - 1, n, 2 * n - 1, 2 * n)] == [0, 0, 1, 1, 2]
    assert batches.epochs_needed(n) == 1.0
    assert batches.epochs_needed(n + 1) > 1.0
    epochs = [[rows(batches.batch(e * n + s))[0] for s in range(n)] for e in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    whole = TrainBatches(prepared, SEQ_LEN, 3 * n, seed=0)  # a batch of three epochs
    assert whole.epoch(0) == 2
    assert sorted(rows(whole.batch(0))) == sorted(3 * epochs[0])


def test_validation_is_fixed_even_and_bounded(prepared: PreparedData) -> None:
    stream = prepared.val.read(0, len(prepared.val)).tolist()
    available = (len(stream) - 1) // SEQ_LEN
    everything = [row for batch in validation_batches(prepared, SEQ_LEN, 4, 10**9) for row in rows(batch)]
    assert everything == [brute_force_window(stream, w * SEQ_LEN, SEQ_LEN) for w in range(available)]
    some = list(validation_batches(prepared, SEQ_LEN, 3, max_tokens=10 * SEQ_LEN + 3))
    assert [len(batch.token_ids) for batch in some] == [3, 3, 3, 1]
    chosen = [everything.index(row) for batch in some for row in rows(batch)]
    gaps = np.diff([*chosen, available])
    assert chosen[0] == 0 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("size", "count"), [(2, 2), (2, 3), (2, 9), (3, 4), (3, 7), (4, 10), (4, 12), (16, 5)])
def test_windows_dealt_out_are_the_same_and_far_apart(prepared: PreparedData, size: int, count: int) -> None:
    in_a_row = [row for b in validation_batches(prepared, SEQ_LEN, size, count * SEQ_LEN) for row in rows(b)]
    batches = [rows(b) for b in validation_batches(prepared, SEQ_LEN, size, count * SEQ_LEN, apart=True)]
    assert sorted(row for batch in batches for row in batch) == sorted(in_a_row) and len(in_a_row) == count
    lengths = [len(batch) for batch in batches]
    assert min(lengths) >= 2 and max(lengths) <= max(size, 3) and max(lengths) - min(lengths) <= 1
    for batch in batches:
        places = [in_a_row.index(row) for row in batch]
        assert set(np.diff(places)) == {len(batches)}  # and the last is further still from the first


def test_one_window_has_no_other_to_be_apart_from(prepared: PreparedData) -> None:
    with pytest.raises(DataError, match=rf"max_tokens={SEQ_LEN} .* hold 1; nearest: train.eval_tokens={2 * SEQ_LEN}"):
        validation_batches(prepared, SEQ_LEN, 4, SEQ_LEN, apart=True)


def test_what_does_not_fit_is_refused_with_a_remedy(prepared: PreparedData) -> None:
    check_fits(prepared, 50, SEQ_LEN)
    check_fits(prepared, 64, SEQ_LEN)
    with pytest.raises(DataError, match=r"model\.vocab_size=49 must be at least 50.*set model\.vocab_size=50"):
        check_fits(prepared, 49, SEQ_LEN)
    longest = prepared.num_val_tokens - 1
    assert longest < prepared.num_train_tokens - 1
    check_fits(prepared, 50, longest)
    with pytest.raises(
        DataError, match=rf"model\.seq_len={longest + 1} must be at least 1 and at most {longest}: split val"
    ):
        check_fits(prepared, 50, longest + 1)
    with pytest.raises(DataError, match="split train"):
        TrainBatches(prepared, prepared.num_train_tokens, 1, 0)
    with pytest.raises(DataError, match=r"model\.seq_len=0"):
        TrainBatches(prepared, 0, 1, 0)
    with pytest.raises(DataError, match="max_tokens=6 of validation"):
        validation_batches(prepared, SEQ_LEN, 1, max_tokens=6)
    with pytest.raises(ValueError, match="global_batch_size=0"):
        TrainBatches(prepared, SEQ_LEN, 0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab_size": 256}, r"data\.vocab_size=256 must be at least 257"),
        ({"max_documents": 1}, r"data\.max_documents=1 must be at least 2"),
        ({"val_fraction": 1.0}, r"data\.val_fraction=1\.0 must lie between 0 and 1"),
        ({"document_separator": ""}, r"data\.document_separator is empty"),
        ({"data_files": ["a.txt"]}, "set data=datasets"),
        ({"source": DataSource.datasets, "path": "a", "data_files": ["b.txt"]}, "both set"),
        ({"source": DataSource.datasets, "data_files": ["b.txt"], "val_split": "test"}, r"data\.val_files"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)
