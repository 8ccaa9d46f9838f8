"""What the plan says a checkpoint takes, against checkpoints of a real run."""

from pathlib import Path

import pytest

from sweeps.estimate import CHECKPOINT_FIXED_BYTES, checkpoint_bytes
from tests.test_resume import make, run


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_bytes_are_those_of_a_real_checkpoint(tmp_path: Path, ema_decay: float) -> None:
    config = make(tmp_path / "data", tmp_path / "run")
    assert config.model.engram is not None
    config.model.engram.table_size = 20_011  # rows enough that names and manifest do not count
    config.train.ema_decay, config.train.max_steps = ema_decay, 3
    run(config)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= checkpoint_bytes(config.model, ema_decay > 0) <= 1.01 * size + CHECKPOINT_FIXED_BYTES
