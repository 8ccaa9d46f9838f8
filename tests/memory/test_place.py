"""The settings, and whole runs with tables in other places."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import transformer
from models.accounting import ParameterRole, bytes_per_parameter
from models.lazy_adam import MemoryOptimConfig, SecondMoment
from models.ngram_hash import num_rows
from tests.memory.tables import host
from tests.tiny import tiny_config
from tests.tiny_run import final_tensors, make, run, without_clock
from train.build import build_model
from train.config import config_hash, validate
from train.files import read_records
from train.footprint import Layout, footprints, rows_elsewhere
from train.generate import main as generate_main
from train.memory.place import Place, RowType, TableConfig, array_specs
from train.optim import OptimConfig
from train.start import load_weights

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8")


ROW_ONLY: dict[str, Any] = {"second_moment": SecondMoment.row, "beta1": 0.0}


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dtype": RowType.bf16},
            "table.dtype=bf16 has no effect with table.place=device; it needs table.place=host or",
        ),
        ({"asynchronous": True}, "table.asynchronous=True has no effect with table.place=device"),
        (
            {"place": Place.host, "folder": "/tmp"},
            "table.folder=/tmp has no effect with table.place=host; it needs table.p",
        ),
        ({"cache_mib": 8}, "table.cache_mib=8 has no effect with table.place=device; it needs table.place=file"),
        ({"place": Place.file, "cache_mib": 0}, "table.cache_mib=0 must be >= 1; nearest: 1"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableConfig(**settings)


def test_an_average_of_rows_elsewhere_is_refused(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path, table=TableConfig(Place.host))
    cfg.train.ema_decay = 0.9
    with pytest.raises(ValueError, match=r"train.ema_decay=0.9 needs .* table.place=host; nearest: train.ema_decay=0"):
        validate(cfg)


def test_a_table_larger_than_ram_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"table.place=host needs \d{5,}.\d GiB for one table.*or table.place=file"):
        host(tmp_path, rows=10**9, width=10**4)


def test_identity_counts_what_changes_numbers(data_root: Path, tmp_path: Path) -> None:
    def identity(**table: Any) -> str:
        return config_hash(make(data_root, tmp_path, table=TableConfig(**table)))

    file = identity(place=Place.file)
    assert file == identity(place=Place.file, folder="elsewhere") == identity(place=Place.file, cache_mib=1)
    others = [identity(), identity(place=Place.host), identity(place=Place.host, asynchronous=True)]
    others.append(identity(place=Place.host, dtype=RowType.bf16))
    assert len({file, *others}) == 5
    rule = MemoryOptimConfig(second_moment=SecondMoment.row)
    assert config_hash(make(data_root, tmp_path, memory=rule)) != identity()


@pytest.fixture(scope="session")
def on_the_device(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device")
    run(make(data_root, path))
    return path


@pytest.mark.parametrize("place", [Place.host, Place.file])
def test_a_run_equals_that_of_the_device(
    data_root: Path, tmp_path: Path, on_the_device: Path, monkeypatch: pytest.MonkeyPatch, place: Place
) -> None:
    monkeypatch.setattr("train.memory.place.row_bytes", lambda _: 2**18)  # four rows in a MiB
    cache = {"cache_mib": 10} if place is Place.file else {}
    run(make(data_root, tmp_path / "run", table=TableConfig(place, **cache)))
    ours, theirs = final_tensors(tmp_path / "run"), final_tensors(on_the_device)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    records = [without_clock(read_records(path / "metrics.jsonl")) for path in (tmp_path / "run", on_the_device)]
    assert records[0] == records[1]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in on_the_device.iterdir()}


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("place", [Place.host, Place.file])
def test_interrupted_equals_undisturbed(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Place, asynchronous: bool
) -> None:
    """bf16 rows with one second moment each: dies in the middle of step 6, goes on from step 3, ends to the bit."""
    changes: dict[str, Any] = {
        "table": TableConfig(place, RowType.bf16, asynchronous),
        "memory": MemoryOptimConfig(**ROW_ONLY),
    }
    base = make(data_root, tmp_path / "a")
    changes["train"] = replace(base.train, eval_interval=2)  # evaluation must not disturb what is read ahead
    whole = run(make(data_root, tmp_path / "a", **changes))
    calls, forward = 0, transformer.linear_cross_entropy

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 19:  # two micro-batches a step and four in each of two evaluations: the first half of step 6
            raise Interrupt
        return forward(*args)

    monkeypatch.setattr(transformer, "linear_cross_entropy", dies)
    with pytest.raises(Interrupt):
        run(make(data_root, tmp_path / "b", **changes))
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["step_00000003"]
    resumed = run(make(data_root, tmp_path / "b", **changes))
    assert resumed["val_loss"] == whole["val_loss"]
    a, b = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and a["table_1.weight"].dtype == torch.bfloat16
    assert ("table_1.previous_rows" in a) == asynchronous
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    records = [without_clock(read_records(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    assert records[0] == records[1]


def test_checkpoint_interval_does_not_change_an_asynchronous_run(data_root: Path, tmp_path: Path) -> None:
    ends = []
    for interval in (0, 1):
        cfg = make(data_root, tmp_path / str(interval), table=TableConfig(Place.host, asynchronous=True))
        cfg.train.checkpoint_interval = interval
        run(cfg)
        ends.append(final_tensors(tmp_path / str(interval)))
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    synchronous = make(data_root, tmp_path / "synchronous", table=TableConfig(Place.host))
    run(synchronous)
    assert not torch.equal(final_tensors(tmp_path / "synchronous")["table_1.weight"], ends[0]["table_1.weight"])


def test_text_is_generated_from_a_run_with_rows_in_a_file(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TableConfig(Place.file, RowType.bf16, asynchronous=True)
    run(make(data_root, tmp_path / "run", table=table))
    assert generate_main([str(tmp_path / "run"), "def", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("def")


@pytest.mark.parametrize("rule", [{}, {"second_moment": SecondMoment.row}, ROW_ONLY])
@pytest.mark.parametrize("dtype", list(RowType))
def test_bytes_of_each_combination_are_those_of_its_arrays(dtype: RowType, rule: dict[str, Any]) -> None:
    """And the numbers that docs/memory.md prints, for rows of 16."""
    optim = MemoryOptimConfig(**rule)
    bytes_held = sum(spec.nbytes for spec in array_specs(1000, 16, optim, dtype).values())
    each = bytes_per_parameter(ParameterRole.memory, row_dim=16, optim=optim, bf16_rows=dtype is RowType.bf16)
    assert each.total * 16_000 == bytes_held
    start = f"| {dtype.value} | {optim.second_moment.value} | {optim.beta1:g} |"
    line = next(line for line in DOCUMENT.splitlines() if line.startswith(start))
    assert line.split("|")[-2].strip() == f"{each.total:.2f}"


def test_rows_elsewhere_take_nothing_of_the_device() -> None:
    cfg, optim, layout = tiny_config("moe_engram"), MemoryOptimConfig(), Layout(world_size=2, table_shards=2)
    here = footprints(cfg, OptimConfig(), layout)
    assert rows_elsewhere(cfg, layout, optim, TableConfig()) == {}
    for table in (TableConfig(Place.host), TableConfig(Place.file)):
        away = footprints(cfg, OptimConfig(), layout, optim, table)
        assert away["memory"].total == 0 and (away["dense"], away["experts"]) == (here["dense"], here["experts"])
        sizes = rows_elsewhere(cfg, layout, optim, table)
        assert next(iter(sizes.values())).total == pytest.approx(here["memory"].total)
    held = rows_elsewhere(cfg, layout, optim, TableConfig(Place.file))
    assert held["its cache in RAM"].total > held["rows in a file"].total  # all of it fits, and the index comes on top
    big = replace(cfg, engram=replace(cfg.engram, table_size=10**6))
    cache = rows_elsewhere(big, layout, optim, TableConfig(Place.file, cache_mib=3))["its cache in RAM"]
    rows = sum(num_rows(big.memory).values()) / 2
    assert cache.total == pytest.approx(3 * 2**20 + 4 * rows, rel=1e-3)


def test_weights_of_another_run_are_taken_over(on_the_device: Path, tmp_path: Path) -> None:
    """As `init_from` does, into a file whose cache already holds other rows."""
    theirs = final_tensors(on_the_device)["table_1.weight"]
    rows, width = theirs.shape
    model = build_model(make(tmp_path, tmp_path).model, 0, torch.device("cpu"))
    for dtype in RowType:
        table = host(tmp_path, rows, width, Place.file, 20, dtype)
        some = torch.arange(10)
        table.lookup(some)
        load_weights(on_the_device, None, model, {1: table})
        assert torch.equal(table.lookup(some), theirs[:10].to(table.weight.dtype).float())
        assert torch.equal(table.weight, theirs.to(table.weight.dtype))
