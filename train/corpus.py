"""Where documents come from: the embedded Python corpus, Hugging Face datasets, local files.

Every source yields the same documents in the same order whenever it is asked, whatever else is installed.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from train.shards import DataError

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"  # the pinned versions of the environment

# Distributions of the core installation with at least some tens of kilobytes of Python or documentation that does not
# depend on the platform. Naming them keeps the corpus independent of what else a user installs.
# fmt: off
PACKAGES = (
    "absl-py", "antlr4-python3-runtime", "anyio", "click", "contourpy", "datasets", "deepspeed", "dill", "einops",
    "filelock", "fonttools", "fsspec", "grpcio", "h11", "hjson", "httpcore", "huggingface_hub", "httpx", "hydra-core",
    "idna", "Jinja2", "Markdown", "markdown-it-py", "matplotlib", "mpmath", "multiprocess", "narwhals", "networkx",
    "numpy", "omegaconf", "opentelemetry-api", "opentelemetry-sdk", "opentelemetry-semantic-conventions", "packaging",
    "pandas", "pillow", "platformdirs", "plotly", "protobuf", "psutil", "pyarrow", "pydantic", "Pygments",
    "pyparsing", "python-dateutil", "PyYAML", "requests", "rich", "scipy", "sympy", "tensorboard", "torch",
    "tqdm", "typing_extensions", "urllib3", "wandb", "Werkzeug",
)
# fmt: on

SUFFIXES = (".py", ".md", ".rst", ".txt")
MAX_FILE_BYTES = 1_000_000  # larger sources are generated (unicode tables, test vectors)
MAX_LINE_BYTES = 5_000  # a longer line is data: base64, minified code, a table
MIN_LETTER_SHARE = 0.35  # of the bytes that are not white space; less is a table of numbers
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "_bundled", "__pycache__", "site-packages", "dist-packages"}
_TEST_FILE = re.compile(r"test_.*|.*_test\.py|conftest\.py")
_BUILD_RECORDS = {"version.py", "_version.py", "__config__.py", "_version_meson.py"}  # differ between builds
_NOT_LETTERS = bytes(c for c in range(0x80) if not chr(c).isalpha())  # bytes from 0x80 up are parts of letters


@dataclass(frozen=True)
class Document:
    """One document of the corpus."""

    name: str  # for messages and provenance
    text: bytes  # UTF-8, not empty
    held_out: bool | None = None  # validation (true) or training (false); None: decided by the hash of the text


def pinned_versions(constraints: Path = CONSTRAINTS) -> dict[str, str]:
    """Version of every distribution that the constraints file pins, keyed by normalised name."""
    if not constraints.is_file():
        raise DataError(
            f"data.source=python needs {constraints}, which pins the packages of the corpus, and it is not there; "
            "install the project editable from its repository (make setup), or use data.source=datasets"
        )
    pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;#]+)", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    return {_normalised(name): version for name, version in pins}


def python_identity(packages: Sequence[str] = PACKAGES, constraints: Path = CONSTRAINTS) -> dict[str, str]:
    """Versions that determine the embedded corpus: of Python and of every package, each checked against its pin.

    Local version labels (`+cpu`) do not matter: such builds share their Python sources.
    """
    pins = pinned_versions(constraints)
    versions = {"python": platform.python_version()}
    for name in packages:
        pinned = pins.get(_normalised(name))
        if pinned is None:
            raise DataError(f"data.source=python reads package {name}, which {constraints} does not pin; pin it there")
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "none"
        if installed.partition("+")[0] != pinned.partition("+")[0]:
            raise DataError(
                f"data.source=python reads package {name} {pinned}, but {installed} is installed; "
                "the corpus must not depend on the machine: restore the pinned environment with `make setup`"
            )
        versions[name] = installed.partition("+")[0]
    return versions


def python_documents(
    val_packages: list[str], max_documents: int | None = None, packages: Sequence[str] = PACKAGES
) -> Iterator[Document]:
    """Sources and documentation of the standard library and of `packages`, sorted by (top-level package, path).

    Args:
        val_packages: Top-level packages or modules held out for validation.
        max_documents: Take only this many files, evenly spread over the sorted list.
        packages: Distribution names.

    Raises:
        DataError: A package to hold out has no file.
    """
    files = sorted(_python_files(packages))
    missing = sorted(set(val_packages) - {group for group, _, _ in files})
    if missing:
        raise DataError(
            f"data.val_packages names {', '.join(missing)}, not among the top-level packages of the corpus; "
            f"name some of {', '.join(sorted({group for group, _, _ in files}))}"
        )
    if max_documents is not None and max_documents < len(files):
        files = [files[i * len(files) // max_documents] for i in range(max_documents)]
    for group, name, path in files:
        text = path.read_bytes()
        if is_written_text(text):
            yield Document(name, text, held_out=group in val_packages)


def is_written_text(text: bytes) -> bool:
    """Whether a file of a package reads as code or prose: UTF-8, not empty, not generated tables or encoded data."""
    if not text.strip() or len(text) > MAX_FILE_BYTES or b"\0" in text:
        return False
    if max(map(len, text.split(b"\n"))) > MAX_LINE_BYTES:
        return False
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    letters = len(text.translate(None, _NOT_LETTERS))
    spaces = sum(map(text.count, (b" ", b"\t", b"\n", b"\r")))
    return letters >= MIN_LETTER_SHARE * (len(text) - spaces)


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_candidate(path: PurePosixPath) -> bool:
    """Whether a file by its path alone is source or documentation, no test, and the same in every build."""
    if path.suffix not in SUFFIXES or path.name in _BUILD_RECORDS or _TEST_FILE.fullmatch(path.name):
        return False
    return not _SKIPPED_FOLDERS & set(path.parts)


def _python_files(packages: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """(top-level package, name, path) of every candidate file, in no order."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for entry in stdlib.iterdir():
        group = entry.name.partition(".")[0]
        if group not in sys.stdlib_module_names:
            continue
        for path in entry.rglob("*") if entry.is_dir() else [entry]:
            relative = PurePosixPath(path.relative_to(stdlib))
            if _is_candidate(relative) and path.is_file():
                yield group, str(relative), path
    for package in packages:
        distribution = importlib.metadata.distribution(package)
        for file in distribution.files or []:
            name = PurePosixPath(file)
            outside = name.parts[0] == ".." or name.parts[0].endswith((".dist-info", ".data"))
            path = Path(str(distribution.locate_file(file)))
            if not outside and _is_candidate(name) and path.is_file():
                yield name.parts[0].partition(".")[0], str(name), path
