"""Train one model: `python -m train.pretrain model=tiny data=python train.max_steps=400`.

Several processes train together where torchrun or the deepspeed launcher starts them:
`torchrun --nproc_per_node 4 -m train.pretrain ...`, `deepspeed --module train.pretrain ...`.

Settings are given as name=value; all of them, with their defaults, stand in `train/config.py` and the files it imports.
Exit codes: 0 finished, 2 wrong settings or data, 3 a non-finite loss, 75 stopped by a signal and resumable.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

from models.moe import ExpertKernel
from train.allocator import keep_freed_memory
from train.config import Config, compose_config, config_hash, resolve, to_yaml, validate
from train.kernel_choice import keep_expert_kernel
from train.ranks import join

EXIT_SETTINGS, EXIT_NOT_FINITE, EXIT_STOPPED = 2, 3, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again"


def main(arguments: list[str]) -> int:
    """Compose, check, train; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m train.pretrain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-path", "-cp", type=Path, help="folder of the configuration, e.g. of an earlier run")
    parser.add_argument("--config-name", "-cn", default="train", help="file name there; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher says it here and in LOCAL_RANK
    args = parser.parse_intermixed_args(arguments)

    keep_freed_memory()
    try:
        config = compose_config(args.config_path, args.config_name, args.overrides)
        keep_expert_kernel(config.model, Path(config.run_dir))
        validate(resolve(config))
    except ValueError as error:  # the same on every rank
        return _report(error, EXIT_SETTINGS) if int(os.environ.get("RANK", "0")) == 0 else EXIT_SETTINGS
    return run(config)


def run(config: Config) -> int:
    """Train what `config` describes, or say that it is done; the exit code."""
    from train.finite import NonFiniteLossError
    from train.loop import Stopped, train
    from train.run_folder import RunFolder

    max_steps = config.train.max_steps
    ranks = join("cuda" if torch.cuda.is_available() else "cpu", config.engine.expert_parallel)
    if config.model.moe is not None:
        config.model.moe.expert_kernel = ExpertKernel(ranks.from_main(config.model.moe.expert_kernel.value))
    identity = config_hash(config)
    try:
        with RunFolder(Path(config.run_dir), to_yaml(config), identity, ranks.is_main) as folder:
            ranks.barrier()  # rank 0 holds the folder, or has ended the run
            finished = folder.result() if ranks.is_main else None
            if ranks.from_main(str(finished is not None)) == "True":
                if finished is not None:
                    print(f"{folder.path} is finished: validation loss {finished['val_loss']:.4f}")
                return 0
            try:
                result = train(config, folder, identity, ranks)
            except BaseException as error:
                if not isinstance(error, Stopped):
                    folder.status("failed", folder.step, max_steps, f"{type(error).__name__}: {error}")
                if isinstance(error, NonFiniteLossError):
                    return _report(f"after step {folder.step} of {max_steps}: {error}", EXIT_NOT_FINITE)
                raise
            if not ranks.is_main:
                return 0
            print(
                f"validation loss {result['val_loss']:.4f} nats, {result['val_bits_per_byte']:.4f} bits per byte; "
                f"{result['tokens_per_second']:.0f} tokens/s; {folder.path}"
            )
            return 0
    except Stopped as stopped:
        if ranks.is_main:
            print(stopped)
        return EXIT_STOPPED
    except (ValueError, OSError) as error:
        return _report(error, EXIT_SETTINGS)


def _report(error: BaseException | str, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
