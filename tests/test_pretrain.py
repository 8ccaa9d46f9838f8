"""The command line: composed settings, clear messages, exit codes."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from models.engram import EngramConfig
from models.hyper_connections import HyperConnectionsConfig
from models.mla import MLAConfig
from models.moe import MoEConfig
from models.rotary import RotaryConfig, YarnConfig
from models.router import RouterConfig
from train import identity
from train.config import Config, compose_config, config_hash, load_config, resolve, to_plain, to_yaml, validate
from train.pretrain import main

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml"))
DATA = sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    return compose_config(None, "train", list(overrides))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("data", DATA)
def test_every_group_composes(model: str, data: str) -> None:
    cfg = composed(f"model={model}", f"data={data}")
    # the vocabulary of the data, or that of a paper's model
    assert cfg.model.vocab_size in (cfg.data.vocab_size, 8192, 102_400, 129_280)


def test_a_resolved_configuration_comes_back(tmp_path: Path) -> None:
    cfg = composed("model=tiny_engram", "optim.kind=muon", "train.max_steps=7")
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    back = load_config(tmp_path / "config.yaml")
    assert back == cfg and config_hash(back) == config_hash(cfg)


def test_latent_attention_and_stretched_positions_are_chosen_in_a_file(tmp_path: Path) -> None:
    model = {
        "attention": None,
        "mla": {"num_heads": 3, "query_rank": 16},
        "rotary": {"yarn": {"scale": 4, "original_seq_len": 64}},
    }
    path = tmp_path / "latent.yaml"
    path.write_text(yaml.safe_dump({"defaults": ["train_schema", "_self_"], "model": model}))
    cfg = compose_config(tmp_path, "latent", ["model.mla.kv_rank=24"])
    assert cfg.model.attention is None and cfg.model.mla == MLAConfig(3, kv_rank=24, query_rank=16)
    assert cfg.model.rotary == RotaryConfig(yarn=YarnConfig(4.0, 64))
    path.write_text(to_yaml(cfg))
    assert load_config(path) == cfg
    for wrong, message in (
        ({**model, "mla": {}}, r"model.mla.num_heads"),
        ({**model, "attention": {}}, r"model.attention=.* has no effect beside model.mla=.*; set model.attention=null"),
        ({**model, "rotary": {"yarn": {"scale": 4}}}, r"model.rotary.yarn.original_seq_len"),
    ):
        path.write_text(yaml.safe_dump({"defaults": ["train_schema", "_self_"], "model": wrong}))
        with pytest.raises(ValueError, match=message):
            compose_config(tmp_path, "latent", [])


def test_identity_is_what_is_computed_not_where() -> None:
    base = config_hash(composed())
    same = ["run_dir=elsewhere", "log.tensorboard=true", "data.root=far", "train.checkpoint_interval=7"]
    assert config_hash(composed(*same)) == base
    assert config_hash(composed("seed=1")) != base
    assert config_hash(composed("engine.num_threads=1")) != base


def test_settings_that_came_later_leave_the_identity_of_earlier_runs() -> None:
    cfg = composed("model=tiny_engram")
    earlier = to_plain(cfg)
    for part, name in (
        ("model", "over_encoding"),
        ("model", "mla"),
        ("model", "hyper_connections"),
        ("memory", "frozen"),
    ):
        del earlier[part][name]
    for name in ("kind", "normalize", "num_groups", "top_groups", "balance_coef", "capacity_factor"):
        del earlier["model"]["moe"]["router"][name]
    for name in ("compress", "gate", "shuffled", "multi_branch"):
        del earlier["model"]["engram"][name]
    assert identity.identity_hash(earlier) == config_hash(cfg)
    others = [
        "model.engram.compress=false",
        "model.engram.gate=false",
        "model.engram.shuffled=true",
        "memory.frozen=true",
    ]
    hashes = {config_hash(composed("model=tiny_engram", other)) for other in others}
    hashes.add(config_hash(composed("model=tiny_over_encoding")))
    assert len(hashes) == 5 and config_hash(cfg) not in hashes


def test_what_came_later_stands_at_its_default() -> None:
    """Otherwise a default run would not be the run that was recorded under its identity."""
    defaults = to_plain(Config())
    defaults["model"]["engram"] = to_plain(EngramConfig())
    defaults["model"]["moe"] = to_plain(MoEConfig())
    defaults["sweep"] = {"engram": defaults["model"]["engram"]}
    for path, settings in identity._LATER.items():
        part = defaults
        for key in path:
            part = part[key]
        assert {name: part[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+train.max_step=5", "max_step"),
        ("train.max_steps=many", "train.max_steps"),
        ("optim.kind=sgd", "optim.kind"),
        ("train.max_steps=0", "train.max_steps=0"),
        ("optim.lr=nan", "optim.lr=nan must be > 0 and finite"),
        ("optim.grad_clip=nan", "optim.grad_clip=nan must be >= 0 and finite"),
        ("engine.zero_stage=4", "engine.zero_stage=4"),
        ("model.moe.num_experts=2", "num_experts=2"),
    ],
)
def test_wrong_settings_are_named(override: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        composed(override)


@pytest.mark.parametrize(
    ("overrides", "ranks", "named"),
    [
        (["train.checkpoint_interval=0", "train.final_checkpoint=false"], 3, r"model.seq_len \* ranks = .* nearest: "),
        (["engine.expert_parallel=3"], 4, "engine.expert_parallel=3 must divide the number of ranks, 4; nearest: 2"),
        (["engine.expert_parallel=2"], 1, "engine.expert_parallel=2 must divide the number of ranks, 1; nearest: 1"),
        (["engine.expert_parallel=128"], 128, "engine.expert_parallel=128 must be at most model.moe.num_experts=64"),
        (["engine.expert_parallel=2", "engine.zero_stage=3"], 2, "engine.zero_stage=3 does not work with"),
        (["engine.expert_parallel=2", "model.moe=null"], 2, "engine.expert_parallel=2 has no effect"),
        (["engine.zero_stage=3", "train.ema_decay=0.9"], 1, "train.ema_decay=0.9 does not work with"),
    ],
)
def test_settings_that_do_not_fit_the_ranks_are_named(
    overrides: list[str], ranks: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=named):
        validate(resolve(composed(*overrides)))


def pretrain(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "train.pretrain", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def test_one_line_and_a_non_zero_exit(tmp_path: Path) -> None:
    result = pretrain("train.max_steps=0", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_unknown_setting_from_the_shell(tmp_path: Path) -> None:
    result = pretrain("train.max_stepz=5", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "error: train.max_stepz=5: there is no setting train.max_stepz; did you mean train.max_steps?\n"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["seed=1", "+train.max_step=5"], r"\+train.max_step=5: there is no setting .* did you mean train.max_steps?"),
        (["lr=3"], "lr=3: there is no setting lr; did you mean optim.lr?"),
        (["model.moe=null", "model.engram.rowdim=3"], "model.engram.rowdim=3: there is no setting .*"),
        (["train.max_steps=many"], "train.max_steps=many: .* could not be converted to Integer"),
        (["seed=1", "optim.kind=sgd"], "optim.kind=sgd: Invalid value 'sgd', expected one of .adamw, muon."),
        (["model=nope"], ".*'model/nope'; there are: .*tiny, tiny_arm.*"),
        (["train.max_steps"], "train.max_steps: a setting is given as name=value"),
        (
            ["model=tiny", "model.engram.table_size=3"],
            "model.engram.table_size=3: model.engram is null; 'model.engram={table_size:3}' switches it on",
        ),
        (
            ["model.moe=null", "model.moe.router.kind=hash"],
            "model.moe.router.kind=hash: model.moe is null; 'model.moe={router:{kind:hash}}' switches it on",
        ),
        (["model.mla={num_heads: 4}"], "model.attention=.* has no effect beside model.mla=.*"),
        (["model.mla={}", "model.attention=null"], "model.mla.num_heads: .* missing mandatory value: num_heads"),
        (["model.mla={num_head: 4}"], "there is no setting model.mla.num_head; did you mean model.mla.num_heads?.*"),
        (["+model.mla.num_heads=4"], ".*a setting below a part that is null; give the part itself first.*"),
        (
            ["model=tiny_arm", "model.moe.num_shared_experts=3"],
            "model.moe.num_shared_experts=3 has no effect beside model.moe.shared_widths=.*; set .*=null too.*",
        ),
        (["seed=1,2"], "seed=1,2: Ambiguous value .*"),
        (["model.attention=null"], "model.attention=null and model.mla=null leave layers without attention.*"),
        (
            ["model.attention.rope_theta=5"],
            ".*there is no setting model.attention.rope_theta any more; it is model.rotary.theta now: .*",
        ),
        (["model.embedding_init_std=0"], "model.embedding_init_std=0.0 must be positive.*"),
        (["+engine.deepspeed.amp=true"], "engine.deepspeed.amp=True is refused.*"),
        (["--config-path", "nowhere"], "--config-path=nowhere .*there is no file nowhere/train.yaml"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    overrides: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(overrides) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: {line.replace('?', '[?]')}\n", err), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("in_a_file", [False, True])
def test_parts_are_switched_on_from_the_command_line(tmp_path: Path, in_a_file: bool) -> None:
    """On a preset that lacks them as on a configuration that was written out, in the order of the words."""
    (tmp_path / "config.yaml").write_text(to_yaml(composed()))

    def changed(*words: str) -> Config:
        return compose_config(tmp_path, "config", list(words)) if in_a_file else composed(*words)

    model = changed("model.hyper_connections={}", "model.engram={}").model
    assert model.hyper_connections == HyperConnectionsConfig() and model.engram == EngramConfig()
    words = [
        "model.mla={num_heads:4,kv_rank:9}",
        "model.mla.kv_rank=8",
        "model.attention=null",
        "model.mla={query_rank:7}",
    ]
    assert changed(*words).model.mla == MLAConfig(4, kv_rank=8, query_rank=7)
    yarn = changed("model.rotary.yarn={scale:4,original_seq_len:64}").model.rotary.yarn
    assert yarn == YarnConfig(4.0, 64)
    moe = changed("model.moe=null", "model.moe={router:{top_k:2}}").model.moe
    assert moe == MoEConfig(router=RouterConfig(top_k=2))  # with its defaults, not with what was there
    assert changed("seed=1", "seed=2", "seed=1").seed == 1
    assert changed("model.moe={num_experts:32}").model.moe == replace(composed().model.moe, num_experts=32)
    assert changed("data.vocab_size=512", "model.vocab_size=${data.vocab_size}").model.vocab_size == 512
    assert config_hash(changed("model.engram={}")) != config_hash(changed())


def test_a_file_of_an_earlier_version_says_where_its_setting_went(tmp_path: Path) -> None:
    plain = to_plain(composed())
    plain["model"]["attention"]["rope_theta"] = 500.0
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    message = r"there is no setting model.attention.rope_theta any more; it is model.rotary.theta now: move its value"
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / "config.yaml")


def test_a_wrong_setting_in_a_file_is_named(tmp_path: Path) -> None:
    good = to_yaml(composed())
    for wrong, message in (
        (good.replace("max_steps:", "max_stepz:"), r"no setting train.max_stepz; did you mean train.max_steps\?"),
        (good.replace("max_steps: ", "max_steps: x"), r"^train.max_steps: Value 'x\d+' .* Integer$"),
    ):
        (tmp_path / "config.yaml").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            compose_config(tmp_path, "config", ["seed=2"])


def test_a_file_as_run_dir_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([f"run_dir={tmp_path / 'file'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: run_dir={tmp_path / 'file'} is a file") and len(err.splitlines()) == 1


def test_a_run_repeats_from_its_folder_alone(tmp_path: Path) -> None:
    settings = ["data=tiny", "data.max_documents=60", "data.vocab_size=320", "model.seq_len=32", "model.num_layers=1"]
    settings += [
        "model.moe.num_experts=4",
        "train.micro_batch_size=2",
        "train.global_batch_tokens=64",
        "optim.kind=adamw",
    ]
    settings += ["train.max_steps=2", "train.eval_tokens=64", "schedule.warmup_steps=1", "run_dir=first"]
    first = pretrain(*settings, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    line = first.stdout.strip().splitlines()[-1]
    assert line.startswith("validation loss ")
    again = pretrain(
        "--config-path", str(tmp_path / "first"), "--config-name", "config", "run_dir=second", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip().splitlines()[-1].split(";")[0] == line.split(";")[0]
    finished = pretrain("--config-path", str(tmp_path / "first"), "--config-name", "config", cwd=tmp_path)
    assert finished.returncode == 0 and "first is finished" in finished.stdout
    other = pretrain(*settings, "seed=1", cwd=tmp_path)
    assert other.returncode == 2 and "another configuration (seed: 0 -> 1)" in other.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "first", "second"]
    spoken = subprocess.run(
        [sys.executable, "-m", "train.generate", "first", "import "],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert spoken.returncode == 0, spoken.stderr
    assert spoken.stdout.startswith("import ")


def test_a_start_from_weights_is_refused_where_they_would_be_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = composed("model=tiny_engram", "train.global_batch_tokens=8192")
    cfg.init_from = "runs/earlier"
    validate(cfg)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_from=runs/earlier does not work with 2 ranks yet"):
        validate(cfg)
