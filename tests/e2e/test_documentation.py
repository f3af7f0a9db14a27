"""The documents: every command line in them parses, every command is documented, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from harness.cli import cli
from tests.e2e.command import ROOT, environment

PATTERNS = ("*.md", "docs/*.md", "papers/*/*.md", "benchmarks/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    language: str | None = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            language = None if language is not None else line.removeprefix("```")
        elif language in ("", "console", "sh", "bash"):
            command = line.strip().removeprefix("$ ").rpartition("&& ")[2]
            if command.startswith("assay "):
                yield command


COMMANDS = sorted({line for path in DOCUMENTS for line in _lines(path)})


def _walk(command: click.Command, name: str = "assay") -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for key, child in command.commands.items():
            yield from _walk(child, f"{name} {key}")


ALL = dict(_walk(cli))


def test_there_are_command_lines_to_check() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_in_the_documents_parses(line: str) -> None:
    arguments = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    while isinstance(command, click.Group):
        if arguments[0].startswith("-"):
            assert arguments in (["--help"], ["--version"])
            return
        command = command.commands[arguments.pop(0)]
    # Parsing only: nothing is run, and files need not exist.
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            parameter.type.exists = False
    command.make_context(line, arguments)


@pytest.mark.parametrize("name", ALL)
def test_every_command_and_option_has_help_and_stands_in_the_readme(name: str) -> None:
    command = ALL[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]}"
    assert name in README


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    program = (
        "import sys\nfrom harness.cli import cli\ncli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'numpy', 'duckdb', 'pydantic', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("harness", "methods", "hardware", "results", "papers")
    for path in (ROOT / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_specs_shown_in_the_readme_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.spec import Spec

    (tmp_path / "my_module.py").write_text("def make(width):\n    raise AssertionError('not called by validation')\n")
    monkeypatch.syspath_prepend(tmp_path)
    blocks = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        assert Spec.from_mapping(tomllib.loads(block), "README.md").cells()


def test_the_python_shown_in_the_readme_runs(home: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = block.replace('"runs/assay.duckdb"', repr(str(home / "assay.duckdb")))
    assert program != block
    subprocess.run(
        [sys.executable, "-c", program + "\nassert record.status in ('ok', 'unavailable'), record\n"],
        check=True,
        cwd=home.parent,
        env=environment(home),
    )
