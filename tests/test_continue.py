"""Runs that start from weights: an import's, or those of a run of ours; exact resume; memory added to a run's model."""

import hashlib
import json
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import transformer
from models.hyper_connections import HyperConnectionsConfig
from models.rotary import YarnConfig
from models.transformer import Transformer
from tests.test_import import imported, logits, make_theirs
from tests.tiny_run import VOCAB, final_tensors, make, run, without_clock
from train.checkpoint import DamagedCheckpointError, sign
from train.config import Config, compose_config, config_hash, load_config, resolve, validate
from train.data import DataConfig, DataSource, validation_batches
from train.files import read_records
from train.importing.build import import_model
from train.importing.source import SourceError
from train.prepare import open_prepared
from train.shards import DataError
from train.start import load_weights, recorded_tokenizer, weights_sha256

ROOT = Path(__file__).resolve().parent.parent
MEMORY = ["model.engram.table_size=97", "model.engram.d_memory=32"]


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3, imported with a memory."""
    root = tmp_path_factory.mktemp("huggingface")
    make_theirs("deepseek").save_pretrained(root / "from")
    import_model(root / "from", root / "to", "tiny_engram", words=[*MEMORY, "model.seq_len=32"])
    return root / "to"


def without_memory(data_root: Path, run_dir: Path, **changes: Any) -> Config:
    """A run of ours whose model has no memory."""
    cfg = make(data_root, run_dir)
    cfg.model.engram = None
    cfg.model.hyper_connections = HyperConnectionsConfig(num_streams=2) if changes.pop("hyper", False) else None
    cfg.train.max_steps = 3
    assert not changes
    return cfg


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run, finished."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    run(without_memory(data_root, run_dir))
    return run_dir


# A tokenizer of its own, for weights that came without one.
OTHER_TOKENS = ["data.tokenizer"]


@pytest.fixture(scope="module")
def with_memory(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a memory."""
    run_dir = tmp_path_factory.mktemp("with_memory") / "run"
    cfg = make(data_root, run_dir)
    cfg.train.max_steps = 3
    run(cfg)
    return run_dir


def continued(
    data_root: Path, start: Path, run_dir: Path, max_steps: int = 4, init_changes: list[str] | None = None
) -> Config:
    """The start's own configuration on the small corpus."""
    small = make(data_root, run_dir)
    cfg = load_config(start / "config.yaml")
    cfg.data, cfg.schedule, cfg.engine, cfg.train, cfg.log = (
        small.data, small.schedule, small.engine, small.train, small.log,
    )  # fmt: skip
    cfg.run_dir, cfg.init_from, cfg.init_sha256 = str(run_dir), str(start), None
    cfg.init_changes = init_changes or []
    cfg.train.max_steps, cfg.train.checkpoint_interval, cfg.schedule.warmup_steps = max_steps, 2, 1
    return resolve(cfg)


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_an_import_trains_on_and_resumes_exactly(
    data_root: Path, huggingface: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    """4 steps = die in step 4, lose the import, resume from the own checkpoint of step 2."""
    start = shutil.copytree(huggingface, tmp_path / "start")

    def config(run_dir: Path) -> Config:
        cfg = continued(data_root, start, run_dir, init_changes=OTHER_TOKENS)
        cfg.engine.zero_stage = zero_stage
        return cfg

    whole, interrupted = config(tmp_path / "a"), config(tmp_path / "b")
    result = run(whole)
    calls, original = 0, transformer.linear_cross_entropy

    def dies(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:  # two micro-batches a step: the first half of step 4
            raise Interrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(transformer, "linear_cross_entropy", dies)
        with pytest.raises(Interrupt):
            run(interrupted)
    shutil.rmtree(start)
    assert run(interrupted)["val_loss"] == result["val_loss"]
    first, second = final_tensors(tmp_path / "a"), final_tensors(tmp_path / "b")
    assert first.keys() == second.keys() and "table_1.weight" in first
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    records = [without_clock(read_records(tmp_path / name / "metrics.jsonl")) for name in "ab"]
    assert records[0] == records[1]
    value = first["model.blocks.1.engram.value_key.weight"][: whole.model.d_model]
    assert bool((value != 0).any())  # it learns


def test_the_run_starts_at_the_loss_of_hugging_face(data_root: Path, huggingface: Path, tmp_path: Path) -> None:
    """A step of almost no length leaves the validation loss at Hugging Face's, which reads each document apart."""
    cfg = continued(data_root, huggingface, tmp_path / "run", 1, OTHER_TOKENS)
    assert cfg.model.moe is not None
    cfg.optim.lr, cfg.schedule.warmup_steps, cfg.model.moe.router.bias_update_rate = 1e-30, 0, 0.0  # a free setting
    result = run(cfg)
    theirs, nats, count = make_theirs("deepseek"), 0.0, 0
    for batch in validation_batches(open_prepared(cfg.data), cfg.model.seq_len, 4, cfg.train.eval_tokens):
        for token_ids, targets, document_ids in zip(batch.token_ids, batch.targets, batch.document_ids, strict=True):
            for document in document_ids.unique():
                inside = document_ids == document
                with torch.no_grad():
                    scores = theirs(input_ids=token_ids[None, inside]).logits[0]
                nats += float(F.cross_entropy(scores, targets[inside], reduction="sum"))
                count += int((targets[inside] >= 0).sum())
    assert result["val_loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("hyper", [False, True])
def test_a_memory_for_a_model_of_ours(data_root: Path, tmp_path: Path, finished: Path, hyper: bool) -> None:
    source = finished
    if hyper:
        source = tmp_path / "hyper"
        run(without_memory(data_root, source, hyper=True))
    report = import_model(source, tmp_path / "to", "tiny_engram", words=MEMORY)
    model = imported(tmp_path / "to")
    plain = Transformer(load_config(source / "config.yaml").model)
    load_weights(source, None, plain, {})
    token_ids = torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    assert torch.equal(logits(model, token_ids), logits(plain, token_ids))
    own = [name for tensor in report.own for name in tensor.sources]
    weights = [name for name in final_tensors(source) if name.startswith("model.")]
    assert sorted(own) == sorted(name.removeprefix("model.") for name in weights)
    rest = final_tensors(source).keys() - set(weights)
    assert {tensor.name for tensor in report.ignored} == rest and any(name.startswith("optim.") for name in rest)
    assert {tensor.fate.value for tensor in report.own} == {"loaded", "new"}
    assert run(continued(data_root, tmp_path / "to", tmp_path / "run", max_steps=2))["steps"] == 2


def test_a_run_is_continued_with_its_memory(data_root: Path, tmp_path: Path) -> None:
    first = make(data_root, tmp_path / "first")
    run(first)
    with pytest.raises(SourceError, match="has a memory already; go on with make continue"):
        import_model(tmp_path / "first", tmp_path / "to")
    cfg = continued(data_root, tmp_path / "first", tmp_path / "second", max_steps=1)
    cfg.optim.lr, cfg.schedule.warmup_steps = 1e-30, 0
    run(cfg)
    before, after = final_tensors(tmp_path / "first"), final_tensors(tmp_path / "second")
    for name in before:
        if name == "table_1.weight" or (name.startswith("model.") and not name.endswith("expert_bias")):
            assert torch.equal(before[name], after[name]), name
    assert int(before["table_1.step"].max()) > 1 == int(after["table_1.step"].max())  # moments begin anew


def test_identity_is_that_of_the_weights_not_of_their_place(
    data_root: Path, finished: Path, huggingface: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(finished, tmp_path / "moved")
    here, there = (continued(data_root, start, tmp_path / "run") for start in (finished, moved))
    assert here.init_sha256 == there.init_sha256 == weights_sha256(moved)
    assert config_hash(here) == config_hash(there)
    assert weights_sha256(finished) != weights_sha256(huggingface)
    fresh = continued(data_root, finished, tmp_path / "run")
    fresh.init_from = fresh.init_sha256 = None
    assert config_hash(fresh) != config_hash(here)
    manifest = moved / "checkpoints" / "step_00000003" / "manifest.json"
    files = json.loads(manifest.read_text())
    files["files"]["optim.rank00000.safetensors"]["sha256"] = "0"
    write_signed(manifest, files)
    assert weights_sha256(moved) == here.init_sha256  # optimizer states do not count
    files["files"]["model.rank00000.safetensors"]["sha256"] = "0"
    write_signed(manifest, files)
    with pytest.raises(ValueError, match="no longer holds the weights of init_sha256"):
        run(there)
    there.init_sha256 = None
    with pytest.raises(DamagedCheckpointError, match=r"model.rank00000.safetensors is not what was written"):
        run(resolve(there))


def test_weights_that_do_not_fit_are_named(data_root: Path, finished: Path, tmp_path: Path) -> None:
    cfg = continued(data_root, finished, tmp_path / "run")
    cfg.model.engram = make(data_root, tmp_path).model.engram
    with pytest.raises(ValueError, match=r"missing \['blocks.1.engram.hidden_norm'.*add a memory to it first"):
        run(cfg)
    run(make(data_root, tmp_path / "memory"))
    cfg = continued(data_root, tmp_path / "memory", tmp_path / "other")
    assert cfg.model.engram is not None
    cfg.model.engram.table_size = 50
    with pytest.raises(ValueError, match=r"model.engram.table_size: 101 -> 50 would change what the weights"):
        run(cfg)
    cfg.init_changes = ["model.engram"]
    with pytest.raises(ValueError, match=r"table_1.weight holds rows of shape .* this model's memory needs"):
        run(cfg)
    with pytest.raises(ValueError, match=r"must not be init_from=.*-continued"):
        validate(continued(data_root, finished, finished))
    cfg.init_from = None
    with pytest.raises(ValueError, match=r"init_changes=\['model.engram'\] has no effect without init_from"):
        validate(replace(cfg, init_sha256=None))
    with pytest.raises(ValueError, match=r"init_sha256=.* has no effect without init_from"):
        validate(cfg)
    with pytest.raises(ValueError, match=r"holds no checkpoint; give the folder of an import"):
        weights_sha256(tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"moe": {"router": {"top_k": 1}}}, "model.moe.router.top_k"),
        ({"rotary": {"theta": 3.0}}, "model.rotary.theta"),
        ({"rotary": {"yarn": {"scale": 2.0, "original_seq_len": 32}}}, "model.rotary.yarn"),
        ({"engram": {"hash_seed": 7}}, "model.engram.hash_seed"),
        ({"engram": {"compress": False}}, "model.engram.compress"),
        ({"norm_eps": 1e-3}, "model.norm_eps"),
    ],
)
def test_settings_that_change_what_weights_compute_are_refused(
    data_root: Path, with_memory: Path, tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    def config(init_changes: list[str]) -> Config:
        cfg = continued(data_root, with_memory, tmp_path / "run", 2, init_changes)
        _set(cfg.model, change)
        return cfg

    with pytest.raises(ValueError, match=rf"{name}: .* would change what the weights .*init_changes=\[{name}\]"):
        run(config([]))
    with pytest.raises(ValueError, match=rf"model.d_ff lets no setting pass .* set init_changes=\[{name}\]"):
        run(config([name, "model.d_ff"]))
    assert run(config([name]))["steps"] == 2
    assert config_hash(config([name])) == config_hash(config([]))


def _set(part: Any, change: dict[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, dict) and getattr(part, name) is not None:
            _set(getattr(part, name), value)
        else:
            setattr(part, name, YarnConfig(**value) if isinstance(value, dict) else value)


def other_text(cfg: Config, folder: Path) -> Config:
    """The same run on text of other words, from which another tokenizer would be learnt."""
    folder.mkdir(exist_ok=True)
    words = [
        f"{name} {number * number} zebra quartz" for number, name in enumerate(["violin", "harbour", "mosaic"] * 60)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"{word}\n" * 40}) + "\n" for word in words))
    cfg.data = DataConfig(
        source=DataSource.datasets, root=cfg.data.root, vocab_size=VOCAB, data_files=[str(folder / "text.jsonl")],
        val_fraction=0.2, dedup=replace(cfg.data.dedup, enabled=False),
    )  # fmt: skip
    cfg.init_sha256 = None
    return cfg


def test_other_text_is_read_with_the_tokenizer_of_the_weights(
    data_root: Path, with_memory: Path, tmp_path: Path
) -> None:
    """A tokenizer learnt from other text would give every row of the embedding, and of the memory, another meaning."""
    trained_on = open_prepared(load_config(with_memory / "config.yaml").data)
    cfg = resolve(other_text(continued(data_root, with_memory, tmp_path / "run", 2), tmp_path))
    assert cfg.data.tokenizer == str(trained_on.tokenizer_path)
    run(cfg)
    now = open_prepared(cfg.data)
    assert now.fingerprint != trained_on.fingerprint and now.tokenizer_sha256 == trained_on.tokenizer_sha256
    assert (now.compression_table == trained_on.compression_table).all()

    own = other_text(continued(data_root, with_memory, tmp_path / "own", 2, OTHER_TOKENS), tmp_path)
    assert resolve(own).data.tokenizer is None
    run(own)  # as meant
    learnt = open_prepared(own.data)
    assert learnt.tokenizer_sha256 != trained_on.tokenizer_sha256

    wrong = other_text(continued(data_root, with_memory, tmp_path / "wrong", 2), tmp_path)
    wrong.data.tokenizer = str(learnt.tokenizer_path)
    with pytest.raises(DataError, match=r"the tokenizer and the compression of token ids of .* differ from what the"):
        run(resolve(wrong))
    unmeant = other_text(continued(data_root, with_memory, tmp_path / "unmeant", 2, OTHER_TOKENS), tmp_path)
    unmeant.data.tokenizer = str(trained_on.tokenizer_path)
    with pytest.raises(DataError, match=r"data.tokenizer is that of init_from=.*; leave the word out"):
        run(resolve(unmeant))


def test_text_that_changed_since_is_not_read_with_a_new_tokenizer(
    data_root: Path, with_memory: Path, tmp_path: Path
) -> None:
    """The settings are those of the weights' run, but the text they name is another one now."""
    first = other_text(continued(data_root, with_memory, tmp_path / "first", 2, OTHER_TOKENS), tmp_path)
    run(resolve(first))
    (tmp_path / "text.jsonl").write_text((tmp_path / "text.jsonl").read_text().replace("zebra", "tiger"))
    cfg = load_config(tmp_path / "first" / "config.yaml")
    cfg.run_dir, cfg.init_from, cfg.init_sha256 = str(tmp_path / "second"), str(tmp_path / "first"), None
    cfg.init_changes = []
    with pytest.raises(DataError, match=r"set data.tokenizer=.*tokenizer.json, or say"):
        run(resolve(cfg))


def test_weights_without_a_known_tokenizer_need_one(
    data_root: Path, with_memory: Path, huggingface: Path, tmp_path: Path
) -> None:
    message = r"data.tokenizer=null would train a new tokenizer under the weights of init_from=.*"
    with pytest.raises(ValueError, match=message + "is not known; give data.tokenizer"):
        continued(data_root, huggingface, tmp_path / "run")
    # A checkpoint of an earlier version knows the fingerprint of its data alone.
    old = shutil.copytree(with_memory, tmp_path / "old")
    rewrite_state(old, tokenizer_sha256=None, compression_sha256=None)
    cfg = resolve(other_text(continued(data_root, old, tmp_path / "run"), tmp_path))
    assert cfg.data.tokenizer is not None and cfg.data.tokenizer.startswith(str(data_root))
    rewrite_state(old, tokenizer_sha256="0" * 64)
    with pytest.raises(ValueError, match=message + "lies no more below"):
        resolve(other_text(continued(data_root, old, tmp_path / "run"), tmp_path))


def rewrite_state(folder: Path, **changes: str | None) -> None:
    """A checkpoint whose state.json says something else; None takes a name out."""
    newest = sorted(folder.glob("checkpoints/step_*"))[-1]
    state = json.loads((newest / "state.json").read_text()) | changes
    text = json.dumps({name: value for name, value in state.items() if value is not None}).encode()
    (newest / "state.json").write_bytes(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    write_signed(newest / "manifest.json", manifest)


def write_signed(path: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("manifest_sha256", None)
    path.write_text(json.dumps(sign(manifest)))


def test_an_import_remembers_its_tokenizer(data_root: Path, finished: Path, tmp_path: Path) -> None:
    """That of a checkpoint's tokenizer.json, as well as that of a run."""
    make_theirs("dots").save_pretrained(tmp_path / "from")
    trained_on = open_prepared(load_config(finished / "config.yaml").data)
    loaded = json.loads(trained_on.tokenizer_path.read_text())
    loaded["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "from" / "tokenizer.json").write_text(json.dumps(loaded, indent=1))  # another file, the same tokenizer
    import_model(tmp_path / "from", tmp_path / "foreign", words=["model.seq_len=32"])
    import_model(finished, tmp_path / "own", "tiny_engram", words=MEMORY)
    for name in ("foreign", "own"):
        recorded = recorded_tokenizer(tmp_path / name, [])
        assert recorded is not None and recorded.sha256 == trained_on.tokenizer_sha256
        cfg = resolve(other_text(continued(data_root, tmp_path / name, tmp_path / f"{name}_run", 2), tmp_path))
        assert cfg.data.tokenizer == str(tmp_path / "from" if name == "foreign" else trained_on.tokenizer_path)
        assert run(cfg)["steps"] == 2


def test_the_command_of_make_continue(huggingface: Path, tmp_path: Path) -> None:
    """What `make continue` runs: the import's configuration, and the caller's words after it."""
    shown = subprocess.run(
        ["make", "-n", "--no-print-directory", "-o", ".venv/.installed",
         "continue", f"FROM={huggingface}/", "ARGS=run_dir=mine seed=3"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = shlex.split(shown.strip().splitlines()[-1])
    assert words[1:7] == ["-m", "train.pretrain", "--config-path", f"{huggingface}/", "--config-name", "config"]
    cfg = compose_config(huggingface, "config", words[7:])
    assert (cfg.init_from, cfg.init_sha256, cfg.init_changes) == (f"{huggingface}/", None, [])
    assert (cfg.run_dir, cfg.seed) == ("mine", 3)
    assert compose_config(huggingface, "config", words[7:-2]).run_dir == f"{huggingface}-continued"
    assert compose_config(huggingface, "config", []).init_from == str(huggingface)
