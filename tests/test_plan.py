"""A plan is data: the same settings give the same trials, and every choice is written into them."""

import copy
import csv
import dataclasses
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from models.accounting import count_parameters, flops_per_token
from models.engram import EngramConfig
from models.moe import MoEConfig
from models.transformer import TransformerConfig
from sweeps.estimate import STARTUP_SECONDS, Machine
from sweeps.plan import Planner, planned_seconds
from sweeps.plan_table import plan_table, short
from sweeps.run import compose_sweep, make_plan
from sweeps.settings import KeepCheckpoints, SweepConfig
from sweeps.trial import CONTROL_KINDS, Plan, Trial, TrialKind, read_plan, trial_id, write_plan
from train.config import Config, config_hash, load_config, to_plain, to_yaml
from train.execution import Precision
from train.identity import differing_settings
from train.shards import PreparedData


def base() -> Config:
    config = Config(model=TransformerConfig(moe=MoEConfig(num_experts=64)))
    config.engine.precision = Precision.fp32
    config.engine.num_threads = 1
    return config


def sweep(**changes: object) -> SweepConfig:
    return SweepConfig(**{"rhos": [0.0, 0.4, 1.0], "seeds": [0, 1], "control_rho": 0.4, **changes})  # type: ignore[arg-type]


def prepared(
    fingerprint: str = "abc", num_train_tokens: int = 10_000_000, num_val_tokens: int = 100_000
) -> PreparedData:
    return PreparedData(
        path=Path("data"), fingerprint=fingerprint, vocab_size=4096, eos_id=0, pad_id=1,
        num_train_tokens=num_train_tokens, num_val_tokens=num_val_tokens, bytes_per_token_val=3.5,
        compression_table=np.arange(4096), tokenizer_path=Path("data/tokenizer.json"), provenance={}, shards={},
    )  # fmt: skip


def make(settings: SweepConfig | None = None, config: Config | None = None, **changes: object) -> Plan:
    return Planner(config or base(), settings or sweep(), **{"prepared": prepared(), **changes}).first_stage()  # type: ignore[arg-type]


def load_sweep_base() -> Config:
    """What the trials of the default sweep share."""
    root = compose_sweep([])
    return Config(**{field.name: getattr(root, field.name) for field in dataclasses.fields(Config)})


def by_kind(plan: Plan, kind: TrialKind) -> list[Trial]:
    return [trial for trial in plan.trials if trial.kind is kind]


def test_every_arm_with_every_seed() -> None:
    plan = make(sweep(controls=CONTROL_KINDS))
    assert sorted((t.rho, t.seed) for t in by_kind(plan, TrialKind.arm)) == [
        (rho, seed) for rho in (0.0, 0.4, 1.0) for seed in (0, 1)
    ]
    for kind in CONTROL_KINDS:
        rho = 1.0 if kind is TrialKind.one_row_pure else 0.4
        assert [(t.rho, t.seed) for t in by_kind(plan, kind)] == [(rho, 0), (rho, 1)]
    assert len({trial.trial_id for trial in plan.trials}) == len(plan.trials) == 18


def test_shuffled_and_frozen_trials_differ_from_their_arm_in_one_setting() -> None:
    plan = make(sweep(controls=[TrialKind.shuffled, TrialKind.frozen]))
    arm = next(t for t in by_kind(plan, TrialKind.arm) if t.rho == 0.4).config
    shuffled, frozen = (by_kind(plan, kind)[0].config for kind in (TrialKind.shuffled, TrialKind.frozen))
    assert differing_settings(arm, shuffled) == ["model.engram.shuffled: False -> True"]
    assert differing_settings(arm, frozen) == ["memory.frozen: False -> True"]
    other_rate = base()
    other_rate.memory.lr_multiplier = 2.0  # a frozen table has no learning rate
    again = by_kind(make(sweep(controls=[TrialKind.frozen]), other_rate), TrialKind.frozen)
    assert again[0].config["memory"] == frozen["memory"]


def test_controls_that_are_the_same_trial() -> None:
    config = base()
    config.memory.frozen = True
    with pytest.raises(ValueError, match=r"sweep\.controls: arm and frozen are the same trial"):
        make(sweep(controls=[TrialKind.frozen]), config)


def test_an_extra_shared_expert_in_the_only_moe_layer_is_no_module() -> None:
    config = base()
    config.model = dataclasses.replace(config.model, num_layers=1)
    settings = sweep(controls=[TrialKind.no_module, TrialKind.extra_shared], engram=EngramConfig(layers=[0]))
    with pytest.raises(ValueError, match="no_module and extra_shared are the same trial"):
        make(settings, config)


def test_a_shuffled_trial_needs_two_sequences() -> None:
    config = base()
    config.train.micro_batch_size = 1
    make(config=config)
    with pytest.raises(ValueError, match=r"train.micro_batch_size=1 must be at least 2.*nearest: 2"):
        make(sweep(controls=[TrialKind.shuffled]), config)


def test_the_shipped_sweeps_keep_their_trial_ids() -> None:
    """A new setting whose default computes what was computed before goes into train/identity.py, not into the ids."""
    fixed = ["engine.precision=fp32", "engine.num_threads=1", "engine.native_kernels=off", "sweep.jobs=1"]
    found = {}
    for name in ("default", "long", "smoke"):
        _, plan = make_plan(compose_sweep([f"sweep={name}", *fixed]), None, Path("none"))
        ids = " ".join(trial.trial_id for trial in plan.trials)
        found[name] = (plan.trials[0].trial_id, hashlib.sha256(ids.encode()).hexdigest()[:16])
    assert found == {
        "default": ("267340590bd6", "93224349342b05b0"),
        "long": ("75977a88cd54", "b8533be552684746"),
        "smoke": ("74047761c564", "493e1be69a95ae92"),
    }


def test_seeds_of_an_arm_differ_in_the_seed_alone() -> None:
    first, second = (t for t in by_kind(make(), TrialKind.arm) if t.rho == 0.4)
    assert first.config["seed"] == 0
    assert {**first.config, "seed": 1} == second.config


def test_arms_of_a_seed_differ_in_the_model_alone() -> None:
    trials = [t for t in by_kind(make(), TrialKind.arm) if t.seed == 0]
    for trial in trials[1:]:
        assert {**trial.config, "model": None} == {**trials[0].config, "model": None}


def test_the_plan_is_a_function_of_its_settings() -> None:
    assert make() == make()


def test_trial_id_is_the_hash_of_the_run_itself(tmp_path: Path) -> None:
    """The trial checks its folder by train.config.config_hash; the sweep names the folder by trial_id."""
    trial = make().trials[0]
    path = tmp_path / "config.yaml"
    import yaml

    path.write_text(yaml.safe_dump({**trial.config, "run_dir": "/somewhere/else"}))
    config = load_config(path)
    assert config_hash(config)[:12] == trial.trial_id
    assert trial_id(yaml.safe_load(to_yaml(config))) == trial.trial_id
    config.run_dir, config.log.tensorboard = "elsewhere", True
    assert trial_id(to_plain(config)) == trial.trial_id
    config.optim.lr *= 1.01
    assert trial_id(to_plain(config)) != trial.trial_id


def test_data_are_part_of_the_identity() -> None:
    first, second = make(), make(prepared=prepared("def"))
    assert first.trials[0].config["data"]["fingerprint"] == "abc"
    assert not {t.trial_id for t in first.trials} & {t.trial_id for t in second.trials}


def test_unprepared_data_are_said() -> None:
    plan = make(prepared=None)
    assert plan.fingerprint == ""
    assert any("provisional" in note for note in plan.notes)


def test_second_epoch_is_said() -> None:
    plan = make(prepared=prepared(num_train_tokens=819_200))  # the default run reads 1,638,400 tokens
    assert any(note.startswith("2.00 epochs") for note in plan.notes)
    assert not any("epochs" in note for note in make().notes)


def test_vocabulary_that_does_not_fit_the_data() -> None:
    config = base()
    config.model.vocab_size = config.data.vocab_size = 1000
    with pytest.raises(ValueError, match="vocab"):
        make(config=config)


def test_costs_are_the_accounting_of_the_arm() -> None:
    for trial in make(sweep(controls=CONTROL_KINDS)).trials:
        plain = copy.deepcopy(trial.config)
        config = _model_of(plain)
        counts, flops = count_parameters(config), flops_per_token(config)
        assert (trial.total_params, trial.active_params, trial.memory_params) == (
            counts.total,
            counts.active,
            counts.memory,
        )
        assert (trial.flops_per_token, trial.flops_per_token_no_head) == (flops.with_head, flops.without_head)
        assert trial.tokens == 400 * 4096
        assert trial.tokens_per_param == trial.tokens / counts.total


def _model_of(plain: dict) -> TransformerConfig:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain)).model


def test_estimates_follow_finished_trials() -> None:
    guess, known = make(), make(tokens_per_second=[1000.0, 2000.0, 64_000.0])
    tokens = 400 * 4096 + 100_000 / 3  # trained, and validated on all there is: a forward pass is a third
    assert known.trials[0].estimated_seconds == pytest.approx(STARTUP_SECONDS + tokens / 2000)
    assert [t.trial_id for t in guess.trials] == [t.trial_id for t in known.trials]


def test_first_estimate_is_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """conf/model/tiny.yaml, 2,048 tokens a step: 15,000 tokens/s on one thread in bf16, 0.45 of it in fp32."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = load_sweep_base()
    config.engine.num_threads = 1
    tokens = config.train.max_steps * config.train.global_batch_tokens + config.train.eval_tokens / 3
    for precision, speed in ((Precision.bf16, 15_000), (Precision.fp32, 0.45 * 15_000)):
        config.engine.precision = precision
        plan = make(config=config, prepared=prepared(num_val_tokens=10**6))
        for trial in plan.trials:
            assert trial.estimated_seconds == pytest.approx(STARTUP_SECONDS + tokens / speed, rel=0.02)


def test_every_validation_is_in_the_estimate() -> None:
    config = base()
    config.train.eval_interval = 100  # after steps 100, 200 and 300, and at the end
    few, many = make(tokens_per_second=[1000.0]), make(config=config, tokens_per_second=[1000.0])
    assert many.trials[0].estimated_seconds - few.trials[0].estimated_seconds == pytest.approx(3 * 100_000 / 3 / 1000)


def test_duration_of_a_sweep_counts_what_is_pending() -> None:
    planner = Planner(base(), sweep(jobs=2, lr_scales=[0.5, 2.0]), prepared=prepared(), tokens_per_second=[1000.0])
    plan = planner.first_stage()
    each = plan.trials[0].estimated_seconds
    assert planned_seconds(plan) == pytest.approx((6 + 4 + 4) / 2 * each)
    losses = {trial.trial_id: 4.0 for trial in by_kind(plan, TrialKind.arm)}
    assert planned_seconds(planner.second_stage(plan, losses)) == pytest.approx(planned_seconds(plan))
    plan.jobs = 100
    assert planned_seconds(plan) == pytest.approx(each)


def test_machine_choices_are_resolved_and_written() -> None:
    config = base()
    config.engine.precision, config.engine.num_threads = Precision.auto, 0
    plan = make(sweep(jobs=1), config)
    for trial in plan.trials:
        assert trial.config["engine"]["precision"] in ("fp32", "bf16")
        assert trial.config["engine"]["num_threads"] == trial.num_threads >= 1
    assert (config.engine.precision, config.engine.num_threads) == (Precision.auto, 0)  # the caller's is untouched


def test_a_started_sweep_keeps_its_machine_choices() -> None:
    config = base()
    config.engine.precision, config.engine.num_threads = Precision.bf16, 7
    started = make(config=config)
    open_config = base()
    open_config.engine.precision, open_config.engine.num_threads = Precision.auto, 0
    again = make(sweep(jobs=1), open_config, previous=started)
    assert [t.trial_id for t in again.trials] == [t.trial_id for t in started.trials]
    assert again.jobs == 1


@pytest.mark.parametrize(
    ("machine", "num_trials", "jobs"),
    [
        (Machine(cores=2, gpus=0, memory_bytes=20 * 10**9), 16, 2),
        (Machine(cores=64, gpus=0, memory_bytes=500 * 10**9), 16, 16),
        (Machine(cores=64, gpus=8, memory_bytes=500 * 10**9), 16, 8),
        (Machine(cores=8, gpus=0, memory_bytes=5 * 10**9), 16, 2),
        (Machine(cores=8, gpus=0, memory_bytes=10**9), 16, 1),
    ],
)
def test_jobs_by_cores_gpus_memory_and_trials(machine: Machine, num_trials: int, jobs: int) -> None:
    assert machine.jobs(num_trials, process_bytes=2 * 10**9) == jobs


def test_final_checkpoint_follows_the_setting() -> None:
    assert not make().trials[0].config["train"]["final_checkpoint"]
    kept = make(sweep(keep_checkpoints=KeepCheckpoints.last))
    assert kept.trials[0].config["train"]["final_checkpoint"]


def test_learning_rates_at_rho_1_first_and_at_the_best_rho_when_known() -> None:
    planner = Planner(base(), sweep(rhos=[0.0, 0.4, 0.7, 1.0], lr_scales=[0.5, 2.0], lr_seeds=[1]), prepared=prepared())
    plan = planner.first_stage()
    first = by_kind(plan, TrialKind.lr)
    assert [(t.rho, t.seed, t.lr_scale) for t in first] == [(1.0, 1, 0.5), (1.0, 1, 2.0)]
    assert [t.config["optim"]["lr"] for t in first] == [3e-3 * 0.5, 3e-3 * 2.0]
    assert [t.config["optim"]["muon_lr"] for t in first] == [2e-2 * 0.5, 2e-2 * 2.0]
    assert plan.pending
    # rho = 0.4 has the best single seed, rho = 0.7 the best mean, rho = 1 is best of all but never the answer
    mean = {0.0: (4.2, 4.2), 0.4: (4.0, 4.3), 0.7: (4.1, 4.1), 1.0: (3.0, 3.0)}
    losses = {t.trial_id: mean[t.rho][t.seed] for t in by_kind(plan, TrialKind.arm)}
    longer = planner.second_stage(plan, losses)
    assert longer.trials[: len(plan.trials)] == plan.trials
    added = longer.trials[len(plan.trials) :]
    assert [(t.kind, t.rho, t.seed, t.lr_scale) for t in added] == [
        (TrialKind.lr, 0.7, 1, 0.5),
        (TrialKind.lr, 0.7, 1, 2.0),
    ]
    assert not longer.pending
    assert planner.second_stage(longer, losses) == longer


def test_second_stage_waits_for_all_arms() -> None:
    planner = Planner(base(), sweep(lr_scales=[0.5]), prepared=prepared())
    plan = planner.first_stage()
    losses = {t.trial_id: 4.0 for t in by_kind(plan, TrialKind.arm)[1:]}
    assert planner.second_stage(plan, losses) == plan


def test_nothing_is_pending_without_learning_rates() -> None:
    assert make().pending == []


def test_plan_files(tmp_path: Path) -> None:
    plan = make(sweep(controls=CONTROL_KINDS))
    write_plan(plan, tmp_path)
    assert read_plan(tmp_path) == plan
    with (tmp_path / "plan.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["trial_id"] for row in table] == [trial.trial_id for trial in plan.trials]
    assert [row["kind"] for row in table] == [trial.kind.value for trial in plan.trials]
    assert not list(tmp_path.glob(".*tmp"))


def test_unreadable_plans(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sweep was started here"):
        read_plan(tmp_path)
    write_plan(make(), tmp_path)
    record = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**record, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({**record, "trials": [{"trial_id": "abc"}]}))
    with pytest.raises(ValueError, match="not whole"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(record)[:-100])
    with pytest.raises(ValueError, match="not whole"):
        read_plan(tmp_path)


def test_table_shows_every_shape() -> None:
    console = Console(width=160, file=io.StringIO(), record=True)
    plan = make(sweep(controls=CONTROL_KINDS))
    console.print(plan_table(plan))
    text = console.export_text()
    for trial in plan.trials:
        assert short(trial.total_params) in text
        assert trial.kind.value in text
    assert text.count("0,1") == 9  # one line a shape, seeds together


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rhos": [0.0, 1.2, 1.0]}, r"1\.2 must lie in \[0, 1\].*nearest: 1"),
        ({"rhos": [-0.5, 1.0]}, r"-0\.5 must lie in \[0, 1\].*nearest: 0"),
        ({"rhos": [0.4, 0.4, 1.0]}, r"each may occur once: \[0\.4, 1\.0\]"),
        ({"rhos": [0.0, 0.4]}, r"must contain 1\.0"),
        ({"rhos": []}, r"must contain 1\.0"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [3, 3]}, "each may occur once"),
        ({"lr_seeds": [5]}, "must be among"),
        ({"lr_scales": [1.0]}, "other than 1"),
        ({"lr_scales": [-2.0]}, "positive"),
        ({"jobs": -1}, ">= 0"),
        ({"name": "a/b"}, "plain folder name"),
        ({"name": ""}, "plain folder name"),
        ({"controls": [TrialKind.lr]}, "lr is no control"),
        ({"controls": [TrialKind.one_row], "control_rho": 0.5}, r"must be one of.*nearest: 0\.4"),
        ({"controls": [TrialKind.no_module], "control_rho": 1.0}, "below 1"),
    ],
)
def test_bad_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**changes)


def test_two_rhos_of_one_arm() -> None:
    with pytest.raises(ValueError, match=r"0\.4 and 0\.401 both round to 28 experts"):
        make(sweep(rhos=[0.4, 0.401, 1.0]))


def test_base_with_a_memory() -> None:
    config = base()
    config.model = dataclasses.replace(config.model, engram=EngramConfig())
    with pytest.raises(ValueError, match=r"model\.engram must be null"):
        make(config=config)
