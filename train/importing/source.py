"""Reading safetensors of a folder tensor by tensor, whether one file or many. Nothing is unpickled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint import Checkpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EXACT_TYPES = ("F32", "BF16", "F16")  # those whose every value fp32 holds


class SourceError(ValueError):
    """The files of a checkpoint are missing, damaged, or of a kind that is not read."""


class SafetensorsFolder:
    """Names and shapes of the tensors in some safetensors files, and the tensors one at a time.

    Args:
        files: to read; a tensor's name may occur in one of them only.

    Raises:
        SourceError: naming the file that cannot be read, or the tensor that lies in two.
    """

    def __init__(self, files: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            try:
                self._open[path] = file = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise SourceError(f"{path} is no whole safetensors file ({error}); fetch it again") from error
            for name in file.keys():  # noqa: SIM118, no mapping
                if name in self._file_of:
                    raise SourceError(f"{name} lies in {self._file_of[name].name} and in {path.name}; keep one")
                part = file.get_slice(name)
                if part.get_dtype() not in EXACT_TYPES:
                    raise SourceError(
                        f"{path}: {name} is of type {part.get_dtype()}, read are {', '.join(EXACT_TYPES)}: convert "
                        "quantised weights to bf16 first (DeepSeek publishes fp8_cast_bf16.py with its weights)"
                    )
                self._file_of[name], self.shapes[name] = path, tuple(part.get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor in fp32, which holds bf16 and fp16 exactly.

        Raises:
            SourceError: it holds a value that is not finite.
        """
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name).float()
        if not bool(tensor.isfinite().all()):
            raise SourceError(f"{self._file_of[name]}: {name} holds values that are not finite; fetch it again")
        return tensor


class RunWeights:
    """The weights of one of our checkpoints, whole, whatever number of ranks wrote it."""

    def __init__(self, found: Checkpoint) -> None:
        self._found = found
        self.shapes = {name: found.tensors[f"model.{name}"].shape for name in found.names("model")}

    def read(self, name: str) -> Tensor:
        """One tensor in fp32.

        Raises:
            SourceError: it holds a value that is not finite.
        """
        tensor = self._found.tensor(f"model.{name}").float()
        if not bool(tensor.isfinite().all()):
            raise SourceError(f"{self._found.path}: {name} holds values that are not finite; give another checkpoint")
        return tensor


def huggingface_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face checkpoint: `model.safetensors`, or those that its index names.

    Raises:
        SourceError: there are none, the index is damaged, or a file of it is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise SourceError(
                f"{folder} holds {pickled[0]}: pickled weights can run code when they are read, and are refused; "
                "convert them to safetensors where you trust them (save_pretrained of transformers writes those)"
            )
        raise SourceError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a checkpoint")
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file or not (folder / file).is_file():
            raise SourceError(f"{index} names {file}, which is not in {folder}; fetch it, or the index, again")
    return [folder / file for file in files]


def check_index(folder: Path, source: SafetensorsFolder) -> None:
    """Compare what the index promises with what lies in the files.

    Raises:
        SourceError: naming a tensor that is not in its files, or is not in the index.
    """
    if (folder / SINGLE).is_file():
        return
    weight_map = _weight_map(folder / INDEX)
    for name in sorted(weight_map.keys() ^ source.shapes.keys()):
        where = "is not in the files" if name in weight_map else "is in the files, but not in the index"
        raise SourceError(f"{folder / INDEX}: {name} {where}; fetch the checkpoint again")


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("a file name is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{index} is no index of safetensors files ({error}); fetch it again") from error
    checked: Mapping[str, str] = weight_map
    return checked
