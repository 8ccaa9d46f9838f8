"""Generation from a run's folder: causal, with memory and averages, and clear errors."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_run import make, run
from train import evaluate
from train.build import build_memory, build_model
from train.data import Batch, validation_batches
from train.generate import generate, load
from train.generate import main as generate_main
from train.prepare import open_prepared


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def test_generation_is_causal_and_uses_the_memory(data_root: Path, tmp_path: Path) -> None:
    cfg = make(data_root, tmp_path / "run")
    cfg.train.max_steps = 30
    run(cfg)
    prepared = open_prepared(cfg.data)
    state = load_file(sorted((tmp_path / "run").glob("checkpoints/step_*"))[-1] / "model.rank00000.safetensors")
    model = build_model(cfg.model, 0, torch.device("cpu"))
    model.load_state_dict(state)
    memory = build_memory(cfg, prepared, torch.device("cpu"))
    prompt = [5, 6, 7]
    greedy = generate(model, memory, prompt, 40, 0.0, eos_id=-1)
    assert len(greedy) == 40  # longer than the window of 32
    assert generate(model, memory, prompt, 40, 0.0, eos_id=-1) == greedy
    assert generate(model, memory, prompt, 40, 0.0, eos_id=greedy[3]) == greedy[: greedy.index(greedy[3])]
    sampled = generate(model, memory, prompt, 40, 1.0, eos_id=-1)
    assert sampled != greedy and generate(model, memory, prompt, 40, 1.0, eos_id=-1) == sampled
    memory.tables[1].weight.normal_(0, 5.0, generator=torch.Generator().manual_seed(0))
    assert generate(model, memory, prompt, 40, 1.0, eos_id=-1) != sampled


def test_generation_uses_the_averages(data_root: Path, tmp_path: Path) -> None:
    """What `load` gives has the run's validation loss, which was measured with averages; plain weights have another."""
    cfg = make(data_root, tmp_path / "run")
    cfg.train.ema_decay = 0.9
    result = run(cfg)
    model, memory, prepared = load(tmp_path / "run")
    batches = list(validation_batches(prepared, cfg.model.seq_len, cfg.train.micro_batch_size, cfg.train.eval_tokens))

    def loss() -> float:
        def forward(batch: Batch) -> Any:
            rows = memory.lookup(memory.row_ids(batch))
            return model(batch.token_ids, batch.document_ids, rows, batch.targets)

        return evaluate.evaluate(forward, batches, prepared.bytes_per_token_val).loss

    assert loss() == pytest.approx(result["val_loss"], rel=1e-6)
    newest = sorted((tmp_path / "run").glob("checkpoints/step_*"))[-1]
    model.load_state_dict(load_file(newest / "model.rank00000.safetensors"))
    assert loss() != pytest.approx(result["val_loss"], rel=1e-6)
    model, memory, prepared = load(tmp_path / "run")
    memory.tables[1].load_state_shards(load_file(newest / "table_1.rank00000.safetensors"))
    assert loss() != pytest.approx(result["val_loss"], rel=1e-6)


@pytest.mark.parametrize("damage", ["checkpoint", "data", "config", "none"])
def test_generation_says_in_one_line_what_is_wrong(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    cfg = make(data_root, tmp_path / "run")
    run(cfg)
    arguments = [str(tmp_path / "run"), "import "]
    if damage == "checkpoint":
        next((tmp_path / "run").glob("checkpoints/*/model.rank00000.safetensors")).write_bytes(b"short")
        named = "model.rank00000.safetensors is not what was written"
    elif damage == "data":
        text = (tmp_path / "run" / "config.yaml").read_text()
        (tmp_path / "run" / "config.yaml").write_text(text.replace(str(data_root), str(tmp_path / "nothing")))
        named = "holds no data prepared"
    elif damage == "config":
        (tmp_path / "run" / "config.yaml").write_text("train: {max_stepz: 3}\n")
        named = "did you mean train.max_steps?"
    else:
        arguments, named = [*arguments, "--temperature", "-1"], "--temperature=-1.0 must be >= 0"
    capsys.readouterr()
    assert generate_main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and named in err and len(err.splitlines()) == 1


def test_make_hands_the_prompt_over_as_it_is(tmp_path: Path) -> None:
    """Quotes, backquotes and dollars are text of the prompt, not of a shell."""
    root = Path(__file__).resolve().parent.parent
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nprintf "%s" "$ENGRAM_PROMPT"\n')
    shown.chmod(0o755)
    prompt = "x = \"a b\" + 'c' `id` $(id) $HOME"
    done = subprocess.run(
        ["make", "-s", "generate", f"BIN={tmp_path}", f"STAMP={shown}", "RUN=r", f"PROMPT={prompt}"],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.stdout == prompt, done.stderr


def test_the_prompt_comes_from_the_environment(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make(data_root, tmp_path / "run"))
    monkeypatch.setenv("ENGRAM_PROMPT", "import ")
    assert generate_main([str(tmp_path / "run"), "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("import ")
    monkeypatch.delenv("ENGRAM_PROMPT")
    assert generate_main([str(tmp_path / "run")]) == 2
    assert "PROMPT is empty" in capsys.readouterr().err
