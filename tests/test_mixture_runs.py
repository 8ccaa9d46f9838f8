"""Mixtures prepared, trained on and resumed: runs over several sources."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.prepare_data import main as prepare_main
from tests.test_mixture import source
from tests.tiny_run import VOCAB, final_tensors, make, run, without_clock
from train import loop
from train.config import Config, validate
from train.data import DataConfig, MixtureSource
from train.dedup import DedupConfig
from train.mixture import MixedData
from train.prepare import open_prepared, prepare
from train.shards import DataError, NotPreparedError


def write_text(path: Path, seed: int, words: str, count: int = 150) -> str:
    rng = np.random.default_rng(seed)
    texts = [" ".join(f"{words}{n}" for n in rng.integers(0, 300, rng.integers(10, 60))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A tiny run over two files, 3 : 1."""
    cfg = make(tmp_path / "data", tmp_path / "run")
    first = source(data_files=[write_text(tmp_path / "one.jsonl", 0, "ab")], val_fraction=0.3, weight=3, label="one")
    second = source(data_files=[write_text(tmp_path / "two.jsonl", 1, "cd")], val_fraction=0.3, label="two")
    cfg.data = DataConfig(
        root=str(tmp_path / "data"), vocab_size=VOCAB, dedup=DedupConfig(enabled=False), mixture=[first, second]
    )
    return cfg


def test_sources_by_their_settings_share_the_first_ones_tokenizer(cfg: Config) -> None:
    with pytest.raises(NotPreparedError, match="make prepare"):
        open_prepared(cfg.data)
    data = prepare(cfg.data)
    assert isinstance(data, MixedData) and [part.label for part in data.parts] == ["one", "two"]
    one, two = (part.data for part in data.parts)
    assert one.path != two.path and one.tokenizer_sha256 == two.tokenizer_sha256 == data.tokenizer_sha256
    assert two.provenance["settings"]["tokenizer"] == str(one.tokenizer_path)
    assert open_prepared(cfg.data).fingerprint == data.fingerprint
    assert data.provenance["documents_read"] == 300
    named = replace(cfg.data, mixture=[MixtureSource(prepared=p.data.path.name, weight=p.weight) for p in data.parts])
    assert open_prepared(named).fingerprint == data.fingerprint
    with pytest.raises(
        DataError, match=rf"prepared={one.path.name}x is no prepared folder .*did you mean {one.path.name}"
    ):
        prepare(replace(cfg.data, mixture=[MixtureSource(prepared=f"{one.path.name}x")]))
    with pytest.raises(DataError, match=r"data\.fingerprint=0123 is not that of"):
        prepare(replace(cfg.data, fingerprint="0123"))


def test_separately_trained_tokenizers_and_empty_sources_are_refused(cfg: Config, tmp_path: Path) -> None:
    folders = []
    for name, part in (("one", cfg.data.mixture[0]), ("two", cfg.data.mixture[1])):
        alone = cfg.data.of_source(part)
        folders.append(MixtureSource(prepared=prepare(alone).path.name, label=name))
    with pytest.raises(DataError, match=r"the tokenizer of source two \(.*\) is not that of source one"):
        prepare(replace(cfg.data, mixture=folders))
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="gave no document with text"):
        prepare(replace(cfg.data, mixture=[source(data_files=[str(tmp_path / "empty.jsonl")])]))
    nowhere = source(data_files=[str(tmp_path / "none.jsonl")])
    with pytest.raises(DataError, match=r"none\.jsonl is no file"):
        prepare(replace(cfg.data, mixture=[cfg.data.mixture[0], nowhere]))


def test_the_command_prepares_a_mixture(cfg: Config, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["{source:datasets,data_files:[" + s.data_files[0] + "],label:" + s.label + "}" for s in cfg.data.mixture]
    words = [f"data.root={cfg.data.root}", f"data.mixture=[{','.join(files)}]", "data.vocab_size=300"]
    assert prepare_main(words) == 0, capsys.readouterr().err
    assert "300 documents of" in capsys.readouterr().out


def test_run_validates_each_source_and_the_weighted_whole(cfg: Config, tmp_path: Path) -> None:
    result = run(cfg)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {label: record["val_loss"] for label, record in result["sources"].items()}
    assert list(losses) == ["one", "two"] and losses["one"] != losses["two"]
    assert result["val_loss"] == pytest.approx(0.75 * losses["one"] + 0.25 * losses["two"], rel=1e-12)
    assert result["val_tokens"] == sum(record["val_tokens"] for record in result["sources"].values())
    assert [result["sources"][label]["sequences"] for label in losses] == [48, 16]
    last = next(record for record in reversed(records) if "val/loss" in record)
    assert {label: last[f"val/loss_{label}"] for label in losses} == losses
    epochs = next(r for r in reversed(records) if "train/epochs_one" in r)
    assert epochs["train/epochs_two"] == result["sources"]["two"]["epochs"] > 0
    bytes_per_token = [part.data.bytes_per_token_val for part in prepare(cfg.data).parts]  # type: ignore[attr-defined]
    mean = 0.75 * bytes_per_token[0] + 0.25 * bytes_per_token[1]
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / np.log(2) / mean, rel=1e-9)
    one = result["sources"]["one"]
    assert one["val_bits_per_byte"] == pytest.approx(one["val_loss"] / np.log(2) / bytes_per_token[0])


def test_a_stopped_run_goes_on_bit_for_bit_and_refuses_another_mixture(
    cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = replace(cfg, run_dir=str(tmp_path / "straight"))
    run(straight)
    original, seen = loop.lr_scale, []

    def interrupted(*args: Any) -> float:
        seen.append(args)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_scale", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    one, two = cfg.data.mixture
    for mixture in ([replace(one, weight=2), two], [one], [one, replace(two, data_files=one.data_files)]):
        with pytest.raises(ValueError, match=r"holds a run of another configuration .*data\.mixture"):
            run(replace(cfg, data=replace(cfg.data, mixture=mixture)))
    run(cfg)
    want, got = final_tensors(tmp_path / "straight"), final_tensors(tmp_path / "run")
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    records = [
        without_clock([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
        for name in ("straight", "run")
    ]
    assert records[0] == records[1]


def test_changed_text_of_one_source_is_refused_at_resume(cfg: Config, tmp_path: Path) -> None:
    held = run(cfg)["data_fingerprint"]
    (tmp_path / "run" / "result.json").unlink()
    write_text(tmp_path / "two.jsonl", 5, "ef")
    with pytest.raises(ValueError, match=rf"trained on data of fingerprint {held}.*has [0-9a-f]+.*restore them"):
        run(cfg)


def test_validation_needs_a_window_for_each_source(cfg: Config) -> None:
    cfg.train.eval_tokens = 63
    with pytest.raises(ValueError, match=r"eval_tokens=63 must hold 1 x .*32 tokens for each of the 2 .*nearest: 64"):
        validate(cfg)
