"""Train one model: `python -m train.pretrain model=tiny data=python train.max_steps=400`.

Exit codes: 0 finished, 2 wrong settings or data, 3 a non-finite loss, 75 stopped by a signal and resumable.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from train.allocator import keep_freed_memory
from train.config import config_hash, from_dictconfig, register_schema, resolve, to_yaml, validate

EXIT_SETTINGS, EXIT_NOT_FINITE, EXIT_STOPPED = 2, 3, 75  # 75: EX_TEMPFAIL of sysexits.h, "try again"

register_schema()


@hydra.main(config_path="../conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> None:
    """Compose, check, train."""
    keep_freed_memory()
    try:
        config = resolve(from_dictconfig(composed))
        validate(config)
        identity = config_hash(config)
    except (ValueError, OmegaConfBaseException) as error:
        sys.exit(_report(error, EXIT_SETTINGS))

    from train.loop import NonFiniteLossError, Stopped, train
    from train.run_folder import RunFolder

    try:
        with RunFolder(Path(config.run_dir), to_yaml(config), identity) as folder:
            finished = folder.result()
            if finished is not None:
                print(f"{folder.path} is finished: validation loss {finished['val_loss']:.4f}")
                return
            try:
                result = train(config, folder, identity)
            except BaseException as error:
                if not isinstance(error, Stopped):
                    folder.status("failed", 0, config.train.max_steps, f"{type(error).__name__}: {error}")
                raise
            print(
                f"validation loss {result['val_loss']:.4f} nats, {result['val_bits_per_byte']:.4f} bits per byte; "
                f"{result['tokens_per_second']:.0f} tokens/s; {folder.path}"
            )
    except Stopped as stopped:
        print(stopped)
        sys.exit(EXIT_STOPPED)
    except NonFiniteLossError as error:
        sys.exit(_report(error, EXIT_NOT_FINITE))
    except (ValueError, OSError) as error:
        sys.exit(_report(error, EXIT_SETTINGS))


def _report(error: BaseException, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
