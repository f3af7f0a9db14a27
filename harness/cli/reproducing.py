"""``assay reproduce``: a paper's claims beside what was measured here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from harness.cli.options import db_option, print_json
from harness.cli.progress import ProgressBar


@click.command()
@click.argument("key")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Change one of the recipe's own settings.")
@click.option("--quick", is_flag=True, help="Minutes, not hours: little data, one seed; no verdict on the paper.")
@click.option("--rerun", is_flag=True, help="Measure again what the database has.")
@click.option("--write-readme", is_flag=True, help="Put the table into the README.md of the paper's folder.")
@db_option
@click.option("--json", "as_json", is_flag=True, help='Print {"paper", "claims": [...], "origin", ...} as JSON.')
def reproduce(
    key: str, settings: tuple[str, ...], quick: bool, rerun: bool, write_readme: bool, db: Path | None, as_json: bool
) -> int:
    """Run the recipe of paper KEY (`assay ls papers`) and judge each of its claims.

    Exit code 0 if every claim was run and none is "not reproduced" or "does not hold", else 1. Stand-ins and runs of
    a smaller budget than the paper's, quick ones among them, are no verdict on the paper: they fail only where
    something could not be run.
    """
    import papers
    from harness import paths
    from papers import tables
    from papers.reproduction import reproduce as run_recipe

    path = db or paths.default_db()
    paper = papers.load(key, settings, quick=quick)
    # Before the work and not after it.
    readme = tables.writable_readme(paper) if write_readme else None
    with ProgressBar(quiet=as_json) as progress:
        report = run_recipe(paper, db=path, rerun=rerun, watch=progress.watch)
    written = report.origin is not None and not report.interrupted
    if readme is not None and written:
        tables.write(readme, report.markdown())
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
        if readme is not None:
            click.echo(f"{readme}: {'table written' if written else 'left as it was: the run is not complete'}.")
    return report.exit_code


def _show(report: Any) -> None:
    from rich.console import Console

    # A pipe or a log has no width: rows must not be folded to rich's default of 80 columns there.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(report.table())
    click.echo(report.summary())
    if report.origin:
        click.echo(report.origin.line().replace("`", ""))
