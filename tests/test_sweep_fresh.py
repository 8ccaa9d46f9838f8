"""The plan where nothing is prepared yet, and where what is prepared is wrong: real folders, nothing replaced."""

import json
from pathlib import Path

import pytest

from sweeps.run import Action, SweepRoot, act
from sweeps.trial import read_plan
from tests.test_sweep_run import composed
from train.data import DataConfig, DataSource
from train.prepare import open_prepared, prepare
from train.shards import DataError, NotPreparedError


def planned(tmp_path: Path, *overrides: str) -> SweepRoot:
    root = composed(f"sweep.root={tmp_path / 'runs'}", "sweep.seeds=[0]", *overrides)
    root.action = Action.plan
    return root


def small_data(tmp_path: Path) -> DataConfig:
    rows = ({"text": " ".join(f"word{(i * 7919 + j * j) % 997}" for j in range(400))} for i in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        source=DataSource.datasets, root=str(tmp_path / "data"), vocab_size=300, val_fraction=0.2,
        data_files=[str(tmp_path / "rows.jsonl")],
    )  # fmt: skip


def test_plan_of_a_fresh_clone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = planned(tmp_path, f"data.root={tmp_path / 'data'}")
    with pytest.raises(NotPreparedError):
        open_prepared(root.data)
    assert act(root) == 0
    assert "trial ids are provisional" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_wrong_data_are_no_fresh_clone(tmp_path: Path) -> None:
    root = planned(tmp_path)
    root.data = small_data(tmp_path)
    root.model.vocab_size = root.data.vocab_size
    folder = prepare(root.data).path
    assert act(root) == 0
    root.data.fingerprint = "0123"
    with pytest.raises(DataError, match=r"data\.fingerprint=0123 is not that of"):
        act(root)
    root.data.fingerprint = ""
    (folder / "train-00000.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="truncated or altered"):
        act(root)
    with pytest.raises(FileNotFoundError):
        read_plan(tmp_path / "runs" / "default")
