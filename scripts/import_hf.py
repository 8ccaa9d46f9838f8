"""A checkpoint as the start of a run: a Hugging Face DeepSeek-V3 or Dots1, or a run of ours that gets a memory.

    python -m scripts.import_hf CHECKPOINT FOLDER [--engram PRESET] [--model-overrides FILE] [setting=value ...]

Then `make continue FROM=FOLDER`. What is supported, and what the report says: docs/import.md.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from train.importing.build import import_model


def main(arguments: list[str]) -> int:
    """Import, print the report; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.import_hf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors, or of a run")
    parser.add_argument("folder", type=Path, help="where the import goes; new or empty")
    parser.add_argument("--engram", help="preset of conf/model whose engram the model gets")
    parser.add_argument("--model-overrides", type=Path, help="YAML file of model settings: engram: {layers: [1]}")
    parser.add_argument("overrides", nargs="*", metavar="setting=value")
    args = parser.parse_intermixed_args(arguments)
    try:
        report = import_model(args.checkpoint, args.folder, args.engram, args.model_overrides, args.overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(report.table())
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    console.print(
        f"{args.folder}: train on with make continue FROM={args.folder}", highlight=False, soft_wrap=True, markup=False
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
