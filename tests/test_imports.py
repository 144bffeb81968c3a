"""Import rules beyond the contracts in pyproject.toml: dynamic imports, stars, heavy packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tq_lightning"
FILES = sorted(ROOT.rglob("*.py"))
MAY_IMPORT_BY_NAME = {
    "__init__.py",
    "cli/__init__.py",
    "sweep/worker.py",
    "factories.py",  # modules of the user
}  # public names and verbs, loaded on first use


def violations(path: str, source: str) -> list[str]:
    """Find star and relative imports, and `import_module` outside the files that may call it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                found.append(f"relative import of {node.module}")
            found += [
                f"star import from {node.module}" for alias in node.names if alias.name == "*"
            ]
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__") and path not in MAY_IMPORT_BY_NAME:
                found.append(f"{name} at line {node.lineno}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_are_static(path):
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch import *",
        "from . import codes",
        "import_module('tq_lightning.cli')",
        "__import__('torch')",
    ],
)
def test_forbidden_imports_are_found(source):
    assert violations("quant/codes.py", source)


def test_every_package_has_a_contract():
    packages = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - {
        "__init__",
        "__main__",
        "cli",
    }
    text = (ROOT.parent / "pyproject.toml").read_text()
    assert {
        package for package in packages if f'source_modules = ["tq_lightning.{package}"]' in text
    } == packages


def test_there_is_no_utils_module():
    assert not [p for p in FILES if {"utils", "common", "helpers"} & {*p.parts, p.stem}]


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import tq_lightning", {"torch", "lightning", "timm", "numpy"}),
        ("import tq_lightning.cli", {"torch", "lightning", "timm", "numpy"}),
        ("import tq_lightning.quant.prepare", {"lightning", "timm"}),
        ("import tq_lightning.report.html", {"torch", "lightning", "timm", "torchmetrics"}),
    ],
)
def test_heavy_packages_are_imported_lazily(statement, heavy):
    code = f"import sys; {statement}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
