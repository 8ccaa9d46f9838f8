"""The expert kernel of a run: measured on a GPU only, once, and kept by what has begun."""

from pathlib import Path

import pytest
import torch

from models.expert_choice import Measured
from models.moe import ExpertKernel, MoEConfig
from sweeps.trial import Plan
from tests.test_plan import base, make
from tests.tiny_run import make as make_run
from train import config as config_module
from train import kernel_choice
from train.config import config_hash, resolve, to_yaml
from train.kernel_choice import keep_expert_kernel

FAILURES: dict[ExpertKernel, str] = {}
TIMES = {ExpertKernel.loop: 0.3, ExpertKernel.grouped_mm: 0.1, ExpertKernel.triton: 0.2}


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, torch.dtype]]:
    """A machine with a GPU as far as the choice goes; what was measured there."""
    calls = []

    def seconds(model, device, num_tokens, precision):
        assert device.type == "cuda"
        calls.append((model.moe.num_experts, num_tokens, precision))
        return Measured(TIMES, FAILURES)

    monkeypatch.setattr(kernel_choice, "expert_kernel_seconds", seconds)
    monkeypatch.setattr(kernel_choice.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_choice.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(kernel_choice, "_measured", {})
    monkeypatch.setattr(config_module, "resolve_native", lambda cfg: cfg.native_kernels)
    return calls


def kernels(plan: Plan) -> set[str]:
    return {trial.config["model"]["moe"]["expert_kernel"] for trial in plan.trials}


def test_a_cpu_takes_padded_without_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_choice, "expert_kernel_seconds", None)
    config = make_run(tmp_path, tmp_path / "run")
    assert MoEConfig().expert_kernel is config.model.moe.expert_kernel is ExpertKernel.auto
    assert resolve(config).model.moe.expert_kernel is ExpertKernel.padded
    assert kernels(make()) == {"padded"}


def test_a_gpu_measures_the_layer_and_the_micro_batch_of_the_run(tmp_path, measurements, capsys):
    config = resolve(make_run(tmp_path, tmp_path / "run"))
    assert config.model.moe.expert_kernel is ExpertKernel.grouped_mm
    assert measurements == [(4, 4 * 32, torch.float32)]
    (line,) = capsys.readouterr().out.splitlines()
    times = "loop 300, grouped_mm 100, triton 200"
    assert line == f"expert kernel: grouped_mm (ms forward and backward of one layer, 128 tokens: {times})"


def test_a_kernel_that_fails_is_said(tmp_path, measurements, monkeypatch, capsys):
    monkeypatch.setitem(FAILURES, ExpertKernel.padded, "RuntimeError: Failed to find C compiler")
    resolve(make_run(tmp_path, tmp_path / "run"))
    line, _ = capsys.readouterr().out.splitlines()
    assert line == "expert kernel: padded is left out (RuntimeError: Failed to find C compiler)"


def test_a_run_begun_on_a_cpu_says_once_that_a_gpu_waits_for_it(tmp_path, measurements, monkeypatch, capsys):
    kernel_choice._say_that_padded_waits.cache_clear()
    config = make_run(tmp_path, tmp_path / "run")
    config.model.moe.expert_kernel = ExpertKernel.padded
    assert resolve(config).model.moe.expert_kernel is ExpertKernel.padded
    resolve(config)
    (line,) = capsys.readouterr().out.splitlines()
    assert "a GPU waits" in line and "model.moe.expert_kernel=auto" in line and not measurements
    kernel_choice._say_that_padded_waits.cache_clear()
    monkeypatch.setattr(kernel_choice.torch.cuda, "is_available", lambda: False)
    resolve(config)
    assert not capsys.readouterr().out


def test_a_kernel_that_is_named_is_not_measured(tmp_path, measurements):
    config = make_run(tmp_path, tmp_path / "run")
    config.model.moe.expert_kernel = ExpertKernel.loop
    assert resolve(config).model.moe.expert_kernel is ExpertKernel.loop and not measurements
    config.model.moe = None
    assert resolve(config).model.moe is None and not measurements


def test_a_plan_measures_once_and_is_kept(measurements, monkeypatch):
    started = make()
    assert kernels(started) == {"grouped_mm"}
    make()
    assert len(measurements) == 1  # planning again asks the process
    monkeypatch.setattr(kernel_choice, "_measured", {})
    monkeypatch.setitem(TIMES, ExpertKernel.loop, 0.01)
    again = make(previous=started)
    assert [trial.trial_id for trial in again.trials] == [trial.trial_id for trial in started.trials]
    assert len(measurements) == 1
    assert kernels(make()) == {"loop"}  # another sweep
    named = base()
    named.model.moe.expert_kernel = ExpertKernel.triton
    assert kernels(make(config=named, previous=started)) == {"triton"}


def test_a_run_goes_on_with_its_kernel(tmp_path, measurements, monkeypatch):
    run_dir = tmp_path / "run"
    config = make_run(tmp_path, run_dir)
    keep_expert_kernel(config.model, run_dir)  # nothing has begun
    identity = config_hash(resolve(config))
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr(kernel_choice, "_measured", {})
    monkeypatch.setitem(TIMES, ExpertKernel.loop, 0.01)
    again = make_run(tmp_path, run_dir)
    keep_expert_kernel(again.model, run_dir)
    assert config_hash(resolve(again)) == identity and len(measurements) == 1
    other = make_run(tmp_path, tmp_path / "other")
    keep_expert_kernel(other.model, Path(other.run_dir))
    assert config_hash(resolve(other)) != identity


@pytest.mark.parametrize("text", ["", "- a list", "model: {moe: null}", "model: {moe: {expert_kernel: none}}", "{"])
def test_a_folder_that_names_no_kernel(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    config = make_run(tmp_path, tmp_path)
    keep_expert_kernel(config.model, tmp_path)
    assert config.model.moe.expert_kernel is ExpertKernel.auto
