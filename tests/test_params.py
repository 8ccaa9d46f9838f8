"""Presets against the papers, and bytes per device against sums over real tensors."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.accounting import count_parameters
from models.transformer import Transformer
from scripts.params import PAPERS, Figure, comparison, conventions, main, model_config
from tests.tiny import TinyMemory, tiny_config
from train.footprint import Layout, footprints, meta_model
from train.optim import OptimConfig, OptimizerKind

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_its_closed_form_is_the_module(name):
    cfg = model_config(name, []).model
    model = meta_model(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(cfg).trained_by_engine == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "figure"), [(name, figure) for name, figures in PAPERS.items() for figure in figures])
def test_presets_agree_with_their_papers(name, figure):
    cfg = model_config(name, []).model
    value = conventions(cfg, count_parameters(cfg))[figure.counted]
    assert figure.agrees(value), f"{value:,} against {figure.printed}"


def test_what_agrees():
    assert Figure("", "26.7B", "", "").agrees(26.96e9) and not Figure("", "26.7B", "", "").agrees(26.98e9)
    assert Figure("", "0.3B", "", "").agrees(0.345e9) and not Figure("", "0.3B", "", "").agrees(0.355e9)
    assert Figure("", "993M", "", "").agrees(1002e6) and not Figure("", "993M", "", "").agrees(1004e6)


def test_the_table_in_the_docs_is_the_one_that_is_printed():
    assert comparison(list(PAPERS)) in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_bytes_of_one_device_are_those_of_its_tensors():
    cfg = tiny_config("moe_engram")
    parts = footprints(cfg, OptimConfig(), Layout())
    model, memory = Transformer(cfg), TinyMemory(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = sum(p.nbytes for p in model.parameters())
    moments = sum(state[key].nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert parts["dense"].weights + parts["experts"].weights == weights
    assert parts["dense"].gradients + parts["experts"].gradients == weights
    assert parts["dense"].optimizer + parts["experts"].optimizer == moments
    tensors = memory.tables[1].state_shards()
    assert parts["memory"].total == pytest.approx(sum(tensor.nbytes for tensor in tensors.values()), rel=0.01)


def test_what_is_divided_between_devices():
    cfg = tiny_config("moe_engram")  # 5 experts in each of two layers
    one = footprints(cfg, OptimConfig(), Layout(bf16_weights=True))
    layout = Layout(world_size=8, zero_stage=1, expert_parallel_size=2, table_shards=4, bf16_weights=True)
    many = footprints(cfg, OptimConfig(), layout)
    assert many["dense"].weights == one["dense"].weights and many["dense"].gradients == one["dense"].gradients
    assert many["dense"].optimizer == one["dense"].optimizer / 8
    assert many["experts"].weights == one["experts"].weights * 3 / 5  # the fullest of two devices
    assert many["experts"].optimizer == pytest.approx(one["experts"].optimizer * 3 / 5 / 4)
    rows = one["memory"].weights / 4 / cfg.engram.row_dim
    assert many["memory"].weights == math.ceil(rows / 4) * 4 * cfg.engram.row_dim
    third = footprints(cfg, OptimConfig(), replace(layout, zero_stage=3))
    assert third["dense"].total == pytest.approx(one["dense"].total / 8)


def test_muon_keeps_one_moment_of_matrices():
    cfg = tiny_config("moe")
    adamw, muon = (footprints(cfg, OptimConfig(kind=kind), Layout())["experts"] for kind in OptimizerKind)
    assert muon.optimizer == adamw.optimizer / 2 and muon.weights == adamw.weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "'model/nope'; there are: base_2e20"),
        (["tiny", "--zero", "4"], "--zero 4 must be 0, 1, 2 or 3; nearest: 3"),
        (
            ["tiny", "--world-size", "6", "--expert-parallel", "4"],
            "--expert-parallel 4 must divide --world-size 6; nearest: 3",
        ),
        (["tiny", "model.d_model=none"], "model.d_model=none"),
        (["tiny", "--micro-batch", "0"], "--micro-batch 0 must be at least 1; nearest: 1"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line


def test_the_tables_are_printed(capsys):
    arguments = ["--world-size", "8", "--zero", "2", "--table-shards", "8", "--micro-batch", "2"]
    assert main(["tiny_engram", *arguments, "--checkpointing", "full"]) == 0
    out = capsys.readouterr().out
    assert "micro-batch 2 x 256 in bf16, checkpointing full" in out and "block inputs" in out
    assert "without vocabulary" in out and "attention projections" in out and "8 devices, ZeRO 2" in out


def test_settings_may_follow_options(capsys):
    assert main(["tiny", "--zero", "1", "model.num_layers=3"]) == 0
    printed = capsys.readouterr().out
    assert main(["tiny", "model.num_layers=3", "--zero", "1"]) == 0
    assert capsys.readouterr().out == printed and "ZeRO 1" in printed
    assert main(["tiny", "--zero", "1"]) == 0
    assert capsys.readouterr().out != printed


def documented_parts() -> dict[str, list[str]]:
    """{part: words} of the table in docs/models.md."""
    text = (ROOT / "docs" / "models.md").read_text()
    rows = [
        line.split("|")[1:3] for line in text.partition("## Switching parts")[2].splitlines() if line.count("|") == 3
    ]
    return {part.strip(): re.findall("`([^`]+)`", words) for part, words in rows[2:]}


@pytest.mark.parametrize(("part", "words"), documented_parts().items(), ids=documented_parts())
def test_documented_parts_can_be_switched(part: str, words: list[str]) -> None:
    plain = model_config("tiny", [])
    assert model_config("tiny", words) != plain
    assert main(["tiny", *words]) == 0
