"""The command ``assay``. Commands import what they need when they run, so that help is instant."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NoReturn

import click

from harness.cli.reading import db, plot, show, table
from harness.cli.reproducing import reproduce
from harness.cli.running import doctor, ls, run, validate
from harness.cli.weighing import init, weigh
from harness.errors import AssayError, suggestion
from harness.text import printable, shown

_REMEDIES = {
    errno.ENOSPC: "Free some space, or set ASSAY_HOME to another disk.",
    errno.EDQUOT: "Free some space, or set ASSAY_HOME to another disk.",
    errno.EROFS: "Set ASSAY_HOME (and --db) to a place that can be written.",
    errno.EACCES: "Set ASSAY_HOME (and --db) to a place that you can write.",
    errno.EMFILE: "Let the process open more files: ulimit -n 1024.",
}


class _Group(click.Group):
    """A group that suggests the nearest command."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(f"Unknown command {shown(args[0])}. {suggestion(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


_HELP = """Weigh compressed neural networks: size, latency, energy and accuracy on real runtimes.

\b
assay run quickstart      measure, into ./runs/assay.duckdb
assay table               read the results
assay doctor              what this machine can do
"""  # \b keeps click from joining the lines


@click.group(cls=_Group, help=_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="assay-bench", prog_name="assay")
def cli() -> None:
    """Hold the commands."""


for _command in (weigh, init, run, validate, ls, show, table, plot, reproduce, db, doctor):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line; Assay's own errors are one line on standard error, with their exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that knows no Unicode still shows the rest of the line
            stream.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()  # noqa: PTH109
    except OSError:
        click.echo("Error: the current folder no longer exists. Change to one that does.", err=True)
        sys.exit(2)
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        click.echo("Interrupted.", err=True)
        code = 130
    except AssayError as error:
        click.echo(f"Error: {printable(str(error))}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has gone: that is its right.
        sys.stderr.close()
        code = 0
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror}. {_REMEDIES[error.errno]}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
