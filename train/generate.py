"""Continue a text with a trained model: `python -m train.generate RUN PROMPT`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.build import Memory, build_memory, build_model
from train.checkpoint_folder import load_latest
from train.ema import WeightAverage
from train.prepare import open_prepared
from train.shards import PreparedData
from train.snapshot import check_data, fill_whole, load_tables
from train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from models.transformer import Transformer


PROMPT_VARIABLE = "ENGRAM_PROMPT"  # how make hands over a prompt: no shell reads its quotes, dollars and backquotes


@torch.no_grad()
def generate(
    model: "Transformer",
    memory: Memory,
    token_ids: list[int],
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    seed: int = 0,
) -> list[int]:
    """Sample `max_new_tokens` after `token_ids`, or fewer if the document ends; returns only the new ids.

    p(next) = softmax(logits / temperature); temperature 0 takes the most likely token. The window slides once it is
    full. Every token is computed anew (no cache): a window is short here.
    """
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    for _ in range(max_new_tokens):
        window = torch.tensor([(token_ids + new)[-model.cfg.seq_len :]])  # (1, S)
        documents = torch.zeros_like(window)
        rows: dict[int, Tensor] = {}
        if memory.hasher is not None:
            rows = {layer: memory.tables[layer].lookup(ids) for layer, ids in memory.hasher(window, documents).items()}
        output = model(window, documents, rows)
        assert output.logits is not None  # no targets were given
        logits = output.logits[0, -1].float()  # (V,)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == eos_id:
            break
        new.append(token)
    return new


def load(run_dir: Path) -> tuple["Transformer", Memory, PreparedData]:
    """Model and memory of a run's newest checkpoint, averaged where the run averaged its weights; and its data.

    Raises:
        ValueError: no run, no checkpoint, a damaged one, or the data are missing or others.
    """
    from train.config import load_config

    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"{run_dir} is not a run's folder (no config.yaml); give the run_dir of a `make train`")
    found = load_latest(run_dir / "checkpoints")
    if found is None:
        raise ValueError(
            f"{run_dir} holds no checkpoint: it has not come that far, or was a trial of a sweep, which keeps none "
            "(sweep.keep_checkpoints=last would); train one with make train"
        )
    config = load_config(run_dir / "config.yaml")
    if config.model.memory is not None and config.model.memory.shuffled:
        raise ValueError(
            f"{run_dir} is a control that reads the rows of a neighbouring sequence (shuffled=true): one text alone "
            "has none; give another run"
        )
    prepared = open_prepared(config.data)
    check_data(found, prepared, run_dir)
    device = torch.device("cpu")
    model = build_model(config.model, config.seed, device)
    fill_whole(found, "model", model.state_dict())
    memory = build_memory(config, prepared, device)
    load_tables(found, memory)
    if found.names("average"):
        average = WeightAverage(model, memory.local_tables, config.train.ema_decay, config.train.max_steps)
        fill_whole(found, "average", average.state_tensors())
        average.step = found.step
        average.replace_weights()
    return model, memory, prepared


def main(arguments: list[str]) -> int:
    """Load the run's newest checkpoint and print the continuation; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m train.generate", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that kept its last checkpoint")
    parser.add_argument("prompt", nargs="?", help=f"text to continue; default: the environment's {PROMPT_VARIABLE}")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    prompt = args.prompt if args.prompt is not None else os.environ.get(PROMPT_VARIABLE, "")
    try:
        if not 0 <= args.temperature < float("inf"):
            raise ValueError(f"--temperature={args.temperature} must be >= 0 and finite; 0 takes the most likely token")
        if args.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens={args.max_new_tokens} must be >= 1; nearest: 1")
        model, memory, prepared = load(args.run)
        tokenizer = load_tokenizer(str(prepared.tokenizer_path))
        prompt_ids = tokenizer.encode(prompt).ids
        if not prompt_ids:
            raise ValueError("PROMPT is empty; give at least one character")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    new = generate(model, memory, prompt_ids, args.max_new_tokens, args.temperature, prepared.eos_id, args.seed)
    print(prompt + tokenizer.decode(new))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
