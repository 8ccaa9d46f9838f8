"""A stand-in for `train.pretrain` in the runner's tests: same folder, same files, no training.

Its "loss" is a recurrence over all steps, so that a step left out or done twice on resume changes the result. The seed
says how it behaves: 0 quick, 1 slow, 2 fails, 3 ends without a result.
"""

import fcntl
import json
import os
import sys
import time
from pathlib import Path

import yaml

STEPS = 20


def main() -> None:
    folder = Path(sys.argv[sys.argv.index("--config-path") + 1])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    checkpoint = folder / "checkpoints" / "state.json"
    checkpoint.parent.mkdir(exist_ok=True)
    state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "value": start_value(config)}
    print(f"begins at step {state['step']} threads {os.environ['OMP_NUM_THREADS']}", flush=True)
    if config["seed"] == 2:
        print("about to fail\nlast words", flush=True)
        raise SystemExit(7)
    while state["step"] < STEPS:
        with (folder / "steps.log").open("a") as log:
            log.write(f"{state['step']}\n")
        state = {"step": state["step"] + 1, "value": (state["value"] * 1.7 + 0.3) % 1.0}
        write(checkpoint, state)
        write(folder / "status.json", {"state": "running", "step": state["step"], "max_steps": STEPS})
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": state["step"], "train/loss": state["value"]}) + "\n")
        time.sleep(0.1 if config["seed"] == 1 else 0.0)
    if config["seed"] != 3:
        result = {"val_loss": state["value"], "val_bits_per_byte": 1.0, "train_seconds": 1.0, "tokens_per_second": 9.0}
        write(folder / "result.json", result)


def start_value(config: dict) -> float:
    """Given by a test, or different for every arm and seed of a real plan."""
    if "value" in config:
        return config["value"]
    return (config["model"]["moe"]["num_experts"] * 37 + config["seed"] * 11) % 97 / 97


def write(path: Path, record: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(path)


if __name__ == "__main__":
    main()
