"""An import: a checkpoint's weights in our model, with a memory added where one is asked for, as the start of a run.

<folder>/config.yaml         a whole configuration; `init_from` is the folder itself
<folder>/checkpoints/        one of step 0 with the weights alone
<folder>/import_report.json  what became of every tensor
"""

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from models.engram import Engram
from models.initialize import initialize
from models.ngram_hash import num_rows
from models.transformer import Transformer, TransformerConfig
from train.checkpoint import Checkpoint, verified_files
from train.checkpoint_writer import CheckpointWriter
from train.config import Config, compose_config, load_config, to_yaml
from train.data import DataConfig
from train.files import atomic_write
from train.identity import differing_settings, to_plain
from train.importing.configuration import read_settings, rope_is_interleaved, transformer_config
from train.importing.layout import AS_IT_IS, Ignored, Part, huggingface_ignored, huggingface_parts
from train.importing.report import Fate, Left, Own, Report
from train.importing.source import RunWeights, SafetensorsFolder, SourceError, check_index, huggingface_files
from train.loop import TrainConfig
from train.optim import OptimConfig
from train.pieces import whole
from train.run_folder import write_record
from train.start import FREE_SETTINGS, recorded_tokenizer, weights_of
from train.tokenizer import load_tokenizer

# Longest window of the configuration that is written for a foreign model, in tokens: that of the papers' pre-training
# (DeepSeek-V3, arXiv 2412.19437, 4.2), which many checkpoints exceed by far.
WINDOW = 4096
WINDOWS_PER_STEP = 16  # of that configuration: 65,536 tokens a step
# Its learning rate: where DeepSeek-V3's decay ends, kept for 333B tokens; the last 167B have 7.3e-6 (arXiv 2412.19437,
# 4.2). Configurations of transformers name none. Ours for fresh models are up to 450 times higher and would undo what
# was learnt.
CONTINUED_LR = 2.2e-5

_FREE = ("engram", *FREE_SETTINGS)  # a new memory leaves the function as it is, too


@dataclass
class Origin:
    """A checkpoint that was found fit to be imported, nothing of it read yet but names and shapes."""

    config: Config
    longest: int  # positions the weights were made for
    parts: list[Part]
    ignored: list[Ignored]
    source: SafetensorsFolder | RunWeights
    notes: list[str]
    state: dict[str, Any]  # what the import's checkpoint says of the tokenizer; see `train.start.recorded_tokenizer`


def import_model(
    folder: Path, to: Path, engram: str | None = None, model_overrides: Path | None = None, words: Iterable[str] = ()
) -> Report:
    """Write the import of `folder` to `to`, a folder that `train.start` can begin a run from.

    Args:
        folder: a Hugging Face checkpoint, or a run of ours that kept one.
        to: new or empty.
        engram: preset of conf/model whose memory the model gets.
        model_overrides: YAML file with settings of the model, e.g. `engram: {layers: [1, 14]}`.
        words: `setting=value` of the written configuration, e.g. model.engram.layers=[1,14] or optim.lr=1e-5.

    Raises:
        ValueError: naming the tensor, file or setting that does not fit, and the remedy; nothing was written.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is there already and not empty; give another folder, or remove it")
    origin = open_origin(folder)
    config = _with_settings(origin, engram, model_overrides, list(words))
    config.run_dir, config.init_from, config.init_sha256 = f"{to}-continued", str(to), None
    config.init_changes = []
    model, report = fill(origin, config, folder)
    weights = [whole(f"model.{name}", tensor) for name, tensor in model.state_dict().items()]
    CheckpointWriter(to / "checkpoints").save(0, weights, origin.state, final=True)
    write_record(to / "import_report.json", report.to_dict())
    atomic_write(to / "config.yaml", to_yaml(config))
    return report


def open_origin(folder: Path) -> Origin:
    """Recognise a checkpoint and compare its names and shapes with those that its configuration implies.

    Raises:
        ValueError: it is neither kind, unsupported, damaged, or incomplete.
    """
    if (folder / "config.json").is_file():
        origin = _huggingface(folder)
    elif (folder / "config.yaml").is_file():
        origin = _our_own(folder)
    else:
        raise SourceError(f"{folder} has neither config.json (Hugging Face) nor config.yaml (a run of ours)")
    expected = {part.source: part.shape for part in origin.parts}
    shapes = origin.source.shapes
    missing = sorted(expected.keys() - shapes.keys())
    surplus = sorted(shapes.keys() - expected.keys() - {tensor.source for tensor in origin.ignored})
    wrong = [name for name in sorted(expected.keys() & shapes.keys()) if expected[name] != shapes[name]]
    if missing or surplus:
        raise SourceError(
            f"{folder} does not fit its configuration: missing {missing[:3]} ({len(missing)}), surplus {surplus[:3]} "
            f"({len(surplus)}); fetch the checkpoint again, or one that is supported (docs/import.md)"
        )
    if wrong:
        raise SourceError(
            f"{folder}: {wrong[0]} has shape {shapes[wrong[0]]}, its configuration implies {expected[wrong[0]]} "
            f"({len(wrong)} such); fetch the checkpoint again"
        )
    return origin


def _huggingface(folder: Path) -> Origin:
    settings = read_settings(folder)
    model, notes = transformer_config(settings, "config.json")
    source = SafetensorsFolder(huggingface_files(folder))
    check_index(folder, source)
    longest, model.seq_len = model.seq_len, min(model.seq_len, WINDOW)
    data = DataConfig(vocab_size=model.vocab_size)
    state = {}
    if (folder / "tokenizer.json").is_file():
        data.tokenizer = str(folder.resolve())
        text = load_tokenizer(folder / "tokenizer.json").to_str()  # as `prepare` would save it
        state["tokenizer_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    else:
        notes.append(
            "no tokenizer.json: training on needs data.tokenizer=... of this model, or your tokens are not its tokens"
        )
    train = TrainConfig(global_batch_tokens=WINDOWS_PER_STEP * model.seq_len, micro_batch_size=1)
    config = Config(model=model, data=data, train=train, optim=_continued_optim())
    parts = huggingface_parts(model, rope_is_interleaved(settings), source.shapes)
    return Origin(config, longest, parts, huggingface_ignored(model, source.shapes), source, notes, state)


def _continued_optim() -> OptimConfig:
    """AdamW at CONTINUED_LR. No source has a rate for Muon here: it keeps the ratio that the defaults have."""
    fresh = OptimConfig()
    return OptimConfig(lr=CONTINUED_LR, muon_lr=fresh.muon_lr * CONTINUED_LR / fresh.lr)


def _our_own(folder: Path) -> Origin:
    config = load_config(folder / "config.yaml")
    try:
        path = weights_of(folder)
    except ValueError:
        raise SourceError(f"{folder} holds no checkpoint; give a run that kept its last one") from None
    if config.model.memory is not None:
        raise SourceError(f"{folder} is of a model that has a memory already; go on with make continue FROM={folder}")
    remedy = "give another checkpoint"
    verified_files(path, remedy, "model*.safetensors")
    found = Checkpoint(path, remedy)
    ignored = [
        Ignored(name, "a new run begins with the weights alone", tensor.numel)
        for name, tensor in found.tensors.items()
        if not name.startswith("model.")
    ]
    with torch.device("meta"):
        parts = [Part(name, tuple(t.shape), name) for name, t in Transformer(config.model).state_dict().items()]
    tokenizer = recorded_tokenizer(folder, [Path(config.data.root)])
    state = {}
    if tokenizer is not None:
        state = {"tokenizer_sha256": tokenizer.sha256, "imported_data_fingerprint": tokenizer.fingerprint}
    return Origin(config, config.model.seq_len, parts, ignored, RunWeights(found), [], state)


def _with_settings(origin: Origin, engram: str | None, model_overrides: Path | None, words: list[str]) -> Config:
    """The configuration with what the caller wants changed.

    Raises:
        ValueError: an unknown setting, or one that would change the function of the loaded weights.
    """
    plain: dict[str, Any] = to_plain(origin.config)
    if engram is not None:
        preset = compose_config(None, "train", [f"model={engram}"]).model.engram
        if preset is None:
            raise ValueError(f"--engram={engram} has no engram; give a preset that has one, e.g. engram_27b")
        plain["model"]["engram"] = to_plain(preset)
    if model_overrides is not None:
        _merge(plain["model"], _read_yaml(model_overrides))
    with tempfile.TemporaryDirectory() as folder:  # composed like any configuration, with the same messages
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(plain))
        config = compose_config(Path(folder), "config", words)
    changes = differing_settings(to_plain(origin.config.model), to_plain(config.model))
    for change in changes:
        name = change.split(":")[0]
        if name not in _FREE and not name.startswith("engram."):
            raise ValueError(
                f"model.{change} would change what the loaded weights compute; only these may differ from the "
                f"checkpoint: {', '.join(f'model.{free}' for free in _FREE)}"
            )
    if config.model.seq_len > origin.longest:
        raise ValueError(
            f"model.seq_len={config.model.seq_len} is longer than the weights were made for; nearest: {origin.longest}"
        )
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--model-overrides={path} cannot be read as YAML ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--model-overrides={path} holds no settings of a model, e.g. engram: {{layers: [1]}}")
    return settings


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value


@torch.no_grad()
def fill(origin: Origin, config: Config, folder: Path) -> tuple[Transformer, Report]:
    """Our model with the checkpoint's weights, new modules with their start values, and the account of both sides.

    A new Engram module gets a zero value projection: its update is then zero, v = 0, gate * v = 0 and silu(0) + 0 = 0
    behind the convolution, so the function is the source's to the bit. It learns all the same: the value projection's
    gradient is the outer product of (gate * upstream gradient) with the rows read, which are random, so it leaves zero
    with the first step. Rows, keys and norms get their gradient through v and therefore none in the first step, and one
    from the second step on. (Zero rows would serve as well, but then a start differs from a fresh table's, and keys of
    zero lie where the norm in the gate is steepest. Zero rows and a zero projection together would never learn.)
    """
    model = Transformer(config.model)
    state = model.state_dict()
    taken: dict[str, list[Part]] = {name: [] for name in state}
    filled = {part.target for part in origin.parts}
    initialize(model, config.seed, only=state.keys() - filled)  # what is filled is not drawn first; see `_own`
    for block in model.blocks:
        engram = block.engram
        if isinstance(engram, Engram):
            engram.value_key.weight[: config.model.d_model] = 0
    for part in origin.parts:
        place = state[part.target][part.region]
        values = part.convert(origin.source.read(part.source))
        assert place.shape == values.shape, f"{part.source} does not fill its place in {part.target}"
        place.copy_(values)
        taken[part.target].append(part)
    own = [_own(name, tensor, taken[name], config) for name, tensor in state.items()]
    own += [_rows(layer, rows, config.model) for layer, rows in _num_rows(config.model).items()]
    left = [Left(tensor.source, tensor.parameters, tensor.why) for tensor in origin.ignored]
    return model, Report(str(folder), own, left, origin.notes)


def _num_rows(cfg: TransformerConfig) -> dict[int, int]:
    return {} if cfg.engram is None else num_rows(cfg.engram)


def _own(name: str, tensor: Tensor, parts: list[Part], config: Config) -> Own:
    """Where one tensor of ours came from; it is filled wholly or not at all."""
    if parts:
        covered = sum(torch.Size(part.shape).numel() for part in parts)
        assert covered == tensor.numel(), f"{name} is filled by {covered} of {tensor.numel()} values"
        change = parts[0].change
        fate = Fate.loaded if change == AS_IT_IS else Fate.transformed
        return Own(name, tensor.numel(), fate, change, [part.source for part in parts])
    assert ".engram." in name, f"nothing fills {name}"
    if name.endswith("value_key.weight"):
        keys = f", keys normal(0, {config.model.init_std})" if len(tensor) > config.model.d_model else ""
        return Own(name, tensor.numel(), Fate.new, f"value zero{keys}", [])
    return Own(name, tensor.numel(), Fate.new, "ones" if name.endswith("norm") else "zeros", [])


def _rows(layer: int, rows: int, cfg: TransformerConfig) -> Own:
    assert cfg.engram is not None
    how = f"normal(0, {cfg.init_std}), drawn when the run starts"
    return Own(f"memory table of layer {layer}", rows * cfg.engram.row_dim, Fate.new, how, [])
