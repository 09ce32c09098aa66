"""Imports point down (``.importlinter``), and light commands stay light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ciuic_async"
LIGHT = ("format", "stores", "transparency", "segments", "codecs", "keeper", "retention", "verify", "cli.main", "chain")
LINT = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports(no_cache=True, no_logo=True))"
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""


def test_imports_point_down() -> None:
    """import-linter finds no import upwards, none between stages, and nothing but names and bytes in format/."""
    done = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_a_layer() -> None:
    """A new folder or module at the top is given a layer, or it would be held by no rule."""
    words = set((ROOT / ".importlinter").read_text().replace("(", " ").replace(")", " ").replace("|", " ").split())
    top = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert top - {"__init__", "__main__"} <= words


def _light_modules() -> list[str]:
    """The modules below LIGHT that exist, by their dotted names."""
    found = []
    for name in LIGHT:
        path = PACKAGE.joinpath(*name.split("."))
        if path.with_suffix(".py").exists():
            found.append(f"ciuic_async.{name}")
        for module in sorted(path.rglob("*.py")) if path.is_dir() else ():
            parts = module.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_torch_is_not_imported_by_what_does_not_need_it() -> None:
    """Importing every module that log, verify and the keeper use leaves torch unimported."""
    names = _light_modules()
    assert "ciuic_async.stores.local" in names
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").glob("*.*")), ids=lambda path: path.name)
def test_only_one_native_file_knows_python(path: Path) -> None:
    """Only module.cpp includes Python or nanobind; no native file includes torch or CUDA."""
    includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
    forbidden = ["torch", "ATen", "c10", "cuda"]
    if path.name != "module.cpp":
        forbidden += ["Python.h", "nanobind", "pybind"]
    assert not [line for line in includes if any(word in line for word in forbidden)]
