"""Which checkpoint of a run is the newest good one: every file verified, damaged ones named and set aside."""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from train.checkpoint import MANIFEST, Checkpoint, DamagedCheckpointError, file_fault, read_manifest

Join = Callable[[list[str]], Sequence[str]]  # the lines of this rank -> those of all ranks, the same on each

_STEP_FOLDER = re.compile(r"step_(\d{8,})")


def _alone(lines: list[str]) -> list[str]:
    return lines


def checkpoints(folder: Path) -> list[Path]:
    """The folders of checkpoints below `folder`, oldest first, good or not; those set aside do not count."""
    found = [(int(m.group(1)), path) for path in folder.glob("step_*") if (m := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`, verified or not, or None."""
    found = checkpoints(folder)
    return found[-1] if found else None


def verify(path: Path, rank: int = 0, world_size: int = 1) -> list[str]:
    """What is wrong with a checkpoint folder, one line each: every file is compared with the manifest by one rank.

    The caller joins the lists of all ranks. Files are dealt out by size, so that ranks have about equally much to read.

    Raises:
        CheckpointVersionError: it is of a schema that is not known here.
    """
    try:
        manifest = read_manifest(path, "")
    except DamagedCheckpointError as error:
        return [str(error).removesuffix("; ")]
    faults = []
    named = _STEP_FOLDER.fullmatch(path.name)
    if named and manifest.step is not None and int(named.group(1)) != manifest.step:
        faults.append(f"{path / MANIFEST} is of step {manifest.step}")
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name]["bytes"], name))
    faults += [fault for name in by_size[rank::world_size] if (fault := file_fault(path / name, manifest.files[name]))]
    if not faults and rank == 0:
        try:
            Checkpoint(path)
        except DamagedCheckpointError as error:
            faults.append(str(error))
    return faults


def newest_good(
    folder: Path,
    set_aside: bool,
    rank: int = 0,
    world_size: int = 1,
    join: Join = _alone,
) -> Path | None:
    """The newest checkpoint below `folder` of which every file is what was written; None where there is none at all.

    Damaged ones that are newer are named in a warning and, with `set_aside`, kept as `step_XXXXXXXX.damaged`, where
    they do not count. Only a good one makes that safe: without it a later start would find nothing and begin anew.

    Args:
        folder: of the checkpoints.
        set_aside: rename damaged ones; else leave the folder as it is.
        rank: this one of `world_size`; all of them call this together.
        world_size: ranks that share the verification; rank 0 alone prints and renames.
        join: the lines of all ranks together, the same on each; called equally often on all ranks.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none is good; nothing was renamed.
        CheckpointVersionError: the newest is of a schema that is not known here.
    """
    damaged: dict[Path, list[str]] = {}
    good = None
    for path in reversed(checkpoints(folder)):
        faults = sorted(set(join(verify(path, rank, world_size))))
        if not faults:
            good = path
            break
        damaged[path] = faults
    if damaged and good is None:
        lines = "; ".join(fault for faults in damaged.values() for fault in faults[:3])
        raise DamagedCheckpointError(
            f"{folder} holds no checkpoint that is whole: {lines}; restore one, or remove the run to start anew"
        )
    for path, faults in damaged.items():
        if rank == 0:
            aside = move_aside(path) if set_aside else path
            print(
                f"warning: {'; '.join(faults[:3])}; going on from {good}"
                + (f", the damaged checkpoint is kept as {aside.name}" if set_aside else ""),
                file=sys.stderr,
            )
    if damaged:
        join([])  # nobody goes on before the folders have their names
    return good


def move_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `<name>.damaged`, or `.damaged-2` and so on where that is taken; the new path."""
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(aside)
    return aside


def load_latest(
    folder: Path, set_aside: bool = False, rank: int = 0, world_size: int = 1, join: Join = _alone
) -> Checkpoint | None:
    """Open the newest good checkpoint below `folder`, every file verified; None if there is none. See `newest_good`."""
    path = newest_good(folder, set_aside, rank, world_size, join)
    return None if path is None else Checkpoint(path)


def remove_leftovers(folder: Path, keep: str = "") -> None:
    """Remove temporary folders that killed attempts to write or remove a checkpoint left, but not `keep`."""
    for leftover in folder.glob(".step_*.tmp"):
        if leftover.name != keep:
            shutil.rmtree(leftover, ignore_errors=True)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; each loses its name first, so none is ever seen in part.

    What cannot be removed now is tried again with the next checkpoint.
    """
    for old in checkpoints(folder)[:-keep]:
        nameless = old.with_name(f".{old.name}.old.tmp")
        shutil.rmtree(nameless, ignore_errors=True)
        with suppress(OSError):
            old.rename(nameless)
        shutil.rmtree(nameless, ignore_errors=True)
