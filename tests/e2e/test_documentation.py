"""The documents: every command line in them parses, every command is documented, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from harness.cli import cli
from tests.e2e.command import ROOT

PATTERNS = ("*.md", "docs/*.md", "papers/*/*.md", "benchmarks/*.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    for block in re.findall(r"```(?:console|sh|bash)?\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ").rpartition("&& ")[2]
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
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
