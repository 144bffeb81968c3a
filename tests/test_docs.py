"""Every shell and Python block of README and docs runs, or states why it does not.

A block that is not run carries `<!-- not run: REASON -->` on the line before it. Its command lines
are still parsed. The blocks of a page run in order, in one folder that holds conf/, sweeps/, docs/
and results/, as a clone does.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tq_lightning.cli import LIGHTNING_VERBS, VERBS, main
from tq_lightning.sweep.config import read_sweep, with_extra

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "results" / "README.md", ROOT / "results" / "digits_example" / "README.md"]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^ *```(?P<language>[\w{}-]*)\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)
REASONS = {
    "builds an environment",
    "large data",
    "replaces a committed result",
    "needs a cluster",
    "needs a database server",
    "needs a device",
    "three traces of a network; tests/export/onnx/test_integer.py runs the same",
    "a file that the reader makes",
    "needs the files of another package",
    "needs ExecuTorch",
    "needs npm",
    "needs an account",
    "needs the packages of the environment that runs this test",
}
MARKED = {
    "README.md": 2,
    "CONTRIBUTING.md": 1,
    "docs/cluster.md": 7,
    "docs/export.md": 1,
    "docs/getting_started.md": 1,
    "docs/method.md": 1,
    "docs/own.md": 5,
    "docs/ship.md": 2,
    "docs/sweeps.md": 3,
    "docs/training.md": 2,
    "results/README.md": 16,
    "results/digits_example/README.md": 1,
}
PLACEHOLDER = {"RUN/config.yaml": "conf/digits.yaml"}
TRAINS = re.compile(r"\b(fit|sweep) ")
# pages that take more than a few seconds without a training among their commands
LONG = {
    "docs/extending.md",
    "docs/library.md",
    "docs/method.md",
    "docs/results.md",
    "results/digits_example/README.md",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    language: str
    code: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, m["language"], m["code"], m["reason"]) for m in BLOCK.finditer(page.read_text())
    ]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands(code: str) -> list[list[str]]:
    """Return the arguments of each call of tq_lightning in a shell block."""
    found: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        argv: list[str] | None = None
        for token in lexer:
            if argv is not None and set(token) <= set("|&;<>()"):
                argv = None
            elif argv is not None:
                argv.append(PLACEHOLDER.get(token, re.sub(r"\$\{?\w+\}?", "1", token)))
            elif token in ("tq-lightning", "tq_lightning"):
                argv = []
                found.append(argv)
    return found


class CommandAccepted(Exception):
    """Raised in place of running a command whose arguments were accepted."""


def parse(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run only the parser of a verb."""
    verb, arguments = argv[0], argv[1:]
    if verb in LIGHTNING_VERBS:
        assert main([verb, *arguments, "--print_config"]) == 0, (
            f"fails to parse: {shlex.join(argv)}"
        )
        return
    assert verb in VERBS, f"unknown verb in {shlex.join(argv)}"
    accepts = argparse.ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        accepts(self, *args, **kwargs)
        raise CommandAccepted

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(CommandAccepted):
            assert main(argv) == 0, f"fails to parse: {shlex.join(argv)}"
    if verb == "sweep":
        cut = arguments.index("--") if "--" in arguments else len(arguments)
        (file,) = (a for a in arguments[:cut] if a.endswith(".yaml"))
        with_extra(read_sweep(file), arguments[cut + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_declare_a_language_or_mark(page):
    """Fences are closed and have a language, marks have a known reason, commands are in fences."""
    text = page.read_text()
    assert text.count("```") % 2 == 0
    for block in blocks(page):
        assert block.language, f"a fence without a language in {name(page)}:\n{block.code}"
        assert block.reason is None or block.reason in REASONS, block.reason
    outside = BLOCK.sub("", text)
    assert "```" not in outside, "a fence that this test does not read"
    assert "<!-- not run" not in outside, "a mark that is not directly before its block"
    stray = [
        line for line in outside.splitlines() if re.match(r" {4,}(python|tq-light|make)", line)
    ]
    assert not stray, "commands outside a fenced block"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_relative_links_point_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/getting_started.md"])
def test_files_of_the_code_tables_exist(page):
    rows = re.findall(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", (ROOT / page).read_text(), re.M)
    named = [name for row in rows for name in re.findall(r"`([\w.]*/[\w/.]*)`", row)]
    assert len(named) > 5
    assert [name for name in named if not (ROOT / "tq_lightning" / name).exists()] == []


def test_blocks_that_are_not_run_are_listed():
    """List the blocks that are not run, by page."""
    marked = {name(p): sum(b.reason is not None for b in blocks(p)) for p in PAGES}
    assert {page: count for page, count in marked.items() if count} == MARKED


def test_readme_has_the_first_commands():
    found = [argv for b in blocks(ROOT / "README.md") for argv in commands(b.code)]
    assert {argv[0] for argv in found} >= {"classify", "fit", "test", "export", "report", "sweep"}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_command_lines_are_accepted(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for block in blocks(page):
        if block.language == "bash":
            for argv in commands(block.code):
                if not {"--help", "--version"} & set(argv):
                    parse(argv, monkeypatch)
            for target in re.findall(r"^(?:\w+=\S+ )*make ([\w-]+)", block.code, re.M):
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"no target {target}"


@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        ("tq-lightning fit --config conf/digits.yaml --trainer.max_epochs 2 | head", True),
        ("tq-lightning fit --config conf/digits.yaml --trainer.max_epoch_s 2", False),
        ("python -m tq_lightning classify m.safetensors images --bits 2 # comment", True),
        ("tq-lightning classify m.safetensors", False),
        ("srun tq-lightning report runs/a && tq-lightning report", False),
        ("OMP_NUM_THREADS=1 tq-lightning sweep sweeps/ste.yaml -- --trainer.max_epochs=2", True),
        ("tq-lightning sweep sweeps/ste.yaml -- --model.ste=dsq", False),
        ("tq-lightning fly", False),
    ],
)
def test_command_line_check_detects_errors(line, accepted, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    found = commands(line)
    assert found

    def parse_all():
        for argv in found:
            parse(argv, monkeypatch)

    if accepted:
        parse_all()
    else:
        with pytest.raises(BaseException):  # noqa: B017 a failed assertion, or pytest.raises' own
            parse_all()


def runnable() -> list:
    rows = []
    for page in PAGES:
        chosen = [b for b in blocks(page) if b.language in ("bash", "python") and b.reason is None]
        slow = name(page) in LONG or any(
            TRAINS.search(b.code) for b in chosen if b.language == "bash"
        )
        marks = [pytest.mark.slow, pytest.mark.timeout(900)] if slow else []
        if chosen:
            rows.append(pytest.param(chosen, id=name(page), marks=marks))
    return rows


@pytest.mark.parametrize("chosen", runnable())
def test_blocks_run_without_errors(chosen, tmp_path, monkeypatch, capsys):
    for folder in ("conf", "sweeps", "docs", "results"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "runs").mkdir()
    tools = tmp_path / ".bin"
    tools.mkdir()
    for tool, call in (("python", ""), ("tq-lightning", "-m tq_lightning")):
        (tools / tool).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {call} "$@"\n')
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(chosen):
        if block.language == "python":
            script = tmp_path / f"block{number}.py"
            script.write_text(block.code)
            call = ["python", script.name]
        else:
            call = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
