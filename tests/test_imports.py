"""Imports run one way, read from the source with ast: who may import whom, and what must stay light."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tq_lightning"
FILES = sorted(ROOT.rglob("*.py"))
OWN = "tq_lightning"
COMMAND_LINE = {"cli", "lightning_cli", "__main__"}

MIDDLE = {"quant", "cifar", "models", "data", "training", "callbacks", "export"}

# part of the package -> the parts it may import besides itself and errors; the command line may import everything
ALLOWED = {
    "quant": set(),
    "cifar": set(),
    "data": set(),
    "models": {"cifar", "quant"},
    "training": MIDDLE,
    "callbacks": MIDDLE,
    "export": MIDDLE,
    "sweep": MIDDLE | COMMAND_LINE,
    "report": set(),
}
HEAVY = {"quant": {"lightning", "timm"}, "report": {"torch", "torchvision", "lightning", "timm", "torchmetrics"}}


def imported(source: str) -> list[str]:
    """Full names of everything imported anywhere in a file, also by import_module("a literal")."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert all(alias.name != "*" for alias in node.names), f"star import from {node.module}"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return names


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def faults(who: str, source: str) -> list[str]:
    found = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        if top in HEAVY.get(who, ()):
            found.append(f"{who} imports {name}")
        own = rest.partition(".")[0]
        if top != OWN or own in ("", "errors", "__version__", who):
            continue
        if who in COMMAND_LINE:
            continue
        if own not in ALLOWED.get(who, set()):
            found.append(f"{who} imports {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_directions(path):
    assert faults(part(path), path.read_text()) == []


def test_every_part_has_its_rule():
    parts = {part(p) for p in FILES} - COMMAND_LINE - {"__init__", "errors"}
    assert parts == set(ALLOWED)


def test_no_part_for_leftovers():
    assert not [p for p in FILES if {"utils", "common", "helpers"} & {*p.parts, p.stem}]


WRONG = {  # who -> what it must not import
    "quant": "from tq_lightning.training.joint import joint_loss",
    "models": "from tq_lightning.training import module",
    "export": "import tq_lightning.cli",
    "training": "def f():\n    from tq_lightning.sweep import space",
    "report": "def f():\n    import torch.nn",
    "callbacks": "from importlib import import_module\nimport_module('tq_lightning.report.page')",
    "data": "from tq_lightning import lightning_cli",
    "sweep": "from tq_lightning.report.records import load",
}


@pytest.mark.parametrize("who", WRONG)
def test_counter_example(who):
    assert faults(who, WRONG[who])


def test_counter_example_star():
    with pytest.raises(AssertionError, match="star import"):
        imported("from torch import *")
