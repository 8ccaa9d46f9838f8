"""Continue a text with a trained model: `python -m train.generate RUN PROMPT`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train import checkpoint
from train.build import Memory, build_memory, build_model
from train.prepare import open_prepared
from train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from models.transformer import Transformer


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
        logits = model(window, documents, rows).logits[0, -1].float()  # (V,)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        if token == eos_id:
            break
        new.append(token)
    return new


def main() -> None:
    """Load the run's newest checkpoint and print the continuation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that kept its last checkpoint")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from train.config import load_config

    if not (args.run / "config.yaml").exists():
        sys.exit(f"error: {args.run} is not a run's folder (no config.yaml); give RUN=runs/<name>")
    found = checkpoint.load_latest(args.run / "checkpoints")
    if found is None:
        sys.exit(f"error: {args.run} kept no checkpoint; train with train.final_checkpoint=true")
    config = load_config(args.run / "config.yaml")
    prepared = open_prepared(config.data)
    tokenizer = load_tokenizer(str(prepared.tokenizer_path))
    prompt_ids = tokenizer.encode(args.prompt).ids
    if not prompt_ids:
        sys.exit("error: PROMPT is empty; give at least one character")
    device = torch.device("cpu")
    model = build_model(config.model, config.seed, device)
    model.load_state_dict(dict(found.tensors["model"]))
    memory = build_memory(config, prepared, device)
    for layer, table in memory.tables.items():
        table.load_state_shards(dict(found.tensors[f"table_{layer}"]))
    new = generate(model, memory, prompt_ids, args.max_new_tokens, args.temperature, prepared.eos_id, args.seed)
    print(args.prompt + tokenizer.decode(new))


if __name__ == "__main__":
    main()
