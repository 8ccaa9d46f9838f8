"""What a trial and a plan are: plain records, their identity, and the files they are kept in.

Nothing here imports torch or a config framework: the runner, the collector and the report need only these records.
"""

import csv
import dataclasses
import io
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from train.files import atomic_write
from train.identity import identity_hash

SCHEMA_VERSION = 1  # of plan.json
PLAN_FILE = "plan.json"
PYTHON = ".venv/bin/python"  # how commands shown to a user begin; they are given in the project's folder
# Engram, arXiv 2601.07372, section 3.1: 2e20 FLOPs and 568M active parameters give 58.7B tokens at 6 FLOPs per active
# parameter and token; 5.7B parameters in all.
PAPER_TOKENS_PER_PARAM = 58.7e9 / 5.7e9


class TrialKind(str, Enum):
    """What a trial is for."""

    arm = "arm"  # a point of the curve: loss against rho
    one_row_pure = "one_row_pure"  # control (a): rho = 1 experts and a module with one row per head
    no_module = "no_module"  # control (b): the experts of control_rho, no module
    one_row = "one_row"  # control (c): the arm at control_rho with one row per head
    shuffled = "shuffled"  # control (d): the arm at control_rho, each sequence with its neighbour's rows
    frozen = "frozen"  # control (e): the arm at control_rho with random tables that are not trained
    extra_shared = "extra_shared"  # control (f): the arm at control_rho, shared experts of equal size for its modules
    lr = "lr"  # an arm at another learning rate
    rung = "rung"  # a model of a ladder (sweeps/ladder.py)


# Kinds that stand beside the arm of `control_rho`, or beside rho = 1.
CONTROL_KINDS = [kind for kind in TrialKind if kind not in (TrialKind.arm, TrialKind.lr, TrialKind.rung)]


@dataclass
class Trial:
    """One training run of a sweep: what it is, what it costs, and its whole resolved configuration."""

    trial_id: str  # first 12 hex digits of SHA-256 of `config` without the run folder's place
    kind: TrialKind
    rho: float  # requested share of inactive parameters that are routed experts
    rho_actual: float  # solved share
    seed: int
    lr_scale: float  # factor on the learning rates of the base configuration
    num_experts: int  # routed experts per MoE layer
    slots: int  # memory slots of d_memory parameters each
    total_params: int  # without embedding and head
    active_params: int  # read per token, without embedding and head
    memory_params: int  # all table rows
    embedding_params: int  # embedding and head
    flops_per_token: float  # forward, with the LM head
    flops_per_token_no_head: float
    params_residual: float  # (total_params - those of rho = 1) / those of rho = 1
    flops_residual: float  # the same for flops_per_token
    tokens: int  # training tokens
    tokens_per_param: float  # tokens / total_params
    estimated_seconds: float
    estimated_disk_bytes: int  # of one checkpoint
    num_threads: int  # CPU threads of its process
    config: dict[str, Any]  # resolved; what is written to config.yaml
    name: str = ""  # of a ladder's rung; trials of a sweep have none


@dataclass
class Plan:
    """All trials of a sweep, as data."""

    name: str
    fingerprint: str  # of the prepared data; "" where they are not prepared yet: then trial ids are provisional
    jobs: int  # trials at once
    keep_checkpoints: str  # none | last
    num_params_base: int  # non-embedding parameters of the rho = 1 arm
    identity: dict[str, Any]  # what all trials share: base configuration, memory template, matching
    trials: list[Trial] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)  # in words: trials that can only be planned after the arms
    notes: list[str] = field(default_factory=list)  # choices made for the user, in words
    provenance: dict[str, Any] = field(default_factory=dict)  # of the prepared data
    command: list[str] = field(default_factory=list)  # that the sweep was last started with


def trial_id(config: dict[str, Any]) -> str:
    """First 12 hex digits of SHA-256 over the canonical JSON of the resolved configuration."""
    return identity_hash(config)[:12]


def pretrain_arguments(folder: str) -> list[str]:
    """Arguments of Python that start, or continue, the run that `<folder>/config.yaml` describes."""
    return ["-m", "train.pretrain", "--config-path", folder, "--config-name", "config"]


def write_plan(plan: Plan, sweep_dir: Path) -> None:
    """Write plan.json (everything) and plan.csv (the table, without the configurations)."""
    sweep_dir.mkdir(parents=True, exist_ok=True)
    record = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(plan)}
    atomic_write(sweep_dir / PLAN_FILE, json.dumps(record, indent=1) + "\n")
    columns = [column.name for column in dataclasses.fields(Trial) if column.name != "config"]
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**dataclasses.asdict(trial), "kind": trial.kind.value} for trial in plan.trials)
    atomic_write(sweep_dir / "plan.csv", table.getvalue())


def read_plan(sweep_dir: Path) -> Plan:
    """Read plan.json.

    Raises:
        FileNotFoundError: no plan in this folder; the message says how to make one.
        ValueError: a plan of another schema, or one that is not whole.
    """
    path = Path(sweep_dir) / PLAN_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: no sweep was started here; start it first (make sweep)")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not whole ({error}); remove it: the sweep makes it anew when started") from error
    if record.pop("schema_version", None) != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has not schema_version {SCHEMA_VERSION}: another version wrote it; choose another sweep.name"
        )
    try:
        trials = [Trial(**{**trial, "kind": TrialKind(trial["kind"])}) for trial in record.pop("trials")]
        return Plan(**record, trials=trials)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not whole ({error}); remove it: the sweep makes it anew when started") from error


def started_plan(sweep_dir: Path) -> Plan | None:
    """The plan of a folder that holds trials already, or None where nothing was started."""
    started = (sweep_dir / PLAN_FILE).is_file() and any(sweep_dir.glob("trials/*"))
    return read_plan(sweep_dir) if started else None


def trial_dir(sweep_dir: Path, trial: Trial) -> Path:
    """Absolute folder of a trial."""
    return Path(sweep_dir).resolve() / "trials" / trial.trial_id


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration a trial folder was made for, or None where there is none."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
