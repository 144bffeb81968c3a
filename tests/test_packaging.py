"""Metadata, types and docstrings of the package for pip, type checkers and `help()`."""

import pydoc
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import tq_lightning

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_public_names_have_docstrings():
    assert set(tq_lightning.__all__) == {"__version__", *tq_lightning._HOMES}
    assert set(tq_lightning.__all__) <= set(dir(tq_lightning))
    shown = pydoc.plaintext.document(tq_lightning)
    for name in tq_lightning._HOMES:
        first = pydoc.getdoc(getattr(tq_lightning, name)).splitlines()[0]
        assert len(first) > 20 and first in shown, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_type_checker_sees_public_names(tmp_path):
    code = tmp_path / "user.py"
    code.write_text(
        "import torch, tq_lightning\n"
        "from tq_lightning import bit_width, floor_codes, prepare\n"
        "reveal_type(floor_codes(torch.rand(3), 2))\n"
        "reveal_type(tq_lightning.load_packed('model.safetensors', bits=2))\n"
        "prepare(torch.nn.Linear(2, 2), quantiser='floor')\n"
        "tq_lightning.no_such_name\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", str(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert 'Revealed type is "torch._tensor.Tensor"' in done.stdout, done.stdout + done.stderr
    assert 'Revealed type is "torch.nn.modules.module.Module"' in done.stdout
    assert 'Unexpected keyword argument "quantiser" for "prepare"' in done.stdout


def test_python_versions_are_consistent():
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    declared = [c for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    assert [c.rpartition(" ")[2] for c in declared] == ["3", "3.11", "3.12", "3.13"]
    assert "Python 3.11 to 3.13" in (ROOT / "README.md").read_text()


def test_version_is_defined_once():
    quoted = f'"{tq_lightning.__version__}"'
    hits = [p for p in ROOT.glob("tq_lightning/**/*.py") if quoted in p.read_text()]
    assert [p.name for p in hits] == ["provenance.py"]
    assert "version" in PROJECT["dynamic"]


def test_every_requirement_has_a_lower_bound_and_a_tested_version():
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in {r for group in groups for r in group} - {"types-PyYAML"}:
        name, bound, _ = requirement.partition(">=")
        if name.startswith("tq_lightning["):
            continue
        assert bound, f"{requirement} has no lower bound"
        assert name.partition("[")[0] in pins, f"{requirement} has no version in constraints.txt"


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"])
def test_project_file_is_complete(name):
    assert (ROOT / name).stat().st_size > 200
