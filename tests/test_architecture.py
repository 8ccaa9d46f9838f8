"""Who may import whom, and how long a file may be."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("models", "train", "sweeps") for path in (ROOT / package).rglob("*.py"))
FORBIDDEN = {
    "models": {"train", "sweeps", "scripts", "tests", "hydra", "omegaconf", "deepspeed", "wandb", "rich"},
    "train": {"sweeps", "scripts", "tests"},
    "sweeps": {"scripts", "tests", "deepspeed", "wandb"},
}
ONLY_IN = {
    "deepspeed": {"train/engine.py"},
    "wandb": {"train/metrics.py"},
    "hydra": {"train/compose.py"},
    "omegaconf": {"train/compose.py"},
}


def imported_modules(path: Path) -> set[str]:
    """Full names of every module that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    modules = imported_modules(path)
    tops = {name.split(".")[0] for name in modules}
    assert not tops & FORBIDDEN[path.relative_to(ROOT).parts[0]]
    for package, allowed in ONLY_IN.items():
        assert package not in tops or relative in allowed, f"{relative} imports {package}"
    assert "triton" not in tops or (relative.startswith("models/kernels/") and relative.endswith("_triton.py"))
    if path.relative_to(ROOT).parts[0] == "models":
        assert "torch.distributed" not in modules
    if relative == "sweeps/fit.py":
        assert "torch" not in tops


def test_an_illegal_import_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from deepspeed.ops import adam\n")
    assert "deepspeed.ops" in imported_modules(bad)


def test_files_are_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_packages_are_ours() -> None:
    import models
    import sweeps
    import train

    for package in (models, train, sweeps):
        assert Path(package.__file__).resolve().is_relative_to(ROOT), f"{package.__name__} is shadowed"
