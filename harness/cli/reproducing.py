"""``assay reproduce``: a paper's claims beside what was measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.cli.running import db_option


@click.command()
@click.argument("key")
@click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Change one of the recipe's own settings.")
@click.option("--rerun", is_flag=True, help="Measure again what the database has.")
@db_option
@click.option("--json", "as_json", is_flag=True, help='Print {"paper", "claims": [...]} as JSON.')
def reproduce(key: str, settings: tuple[str, ...], rerun: bool, db: Path | None, as_json: bool) -> int:
    """Run the recipe of paper KEY (`assay ls papers`) and judge each of its claims.

    Exit code 0 if every claim was run and none is "not reproduced", else 1.
    """
    import papers
    from harness import paths
    from harness.cli.running import _Progress
    from papers.reproduction import reproduce as run_recipe

    path = db or paths.default_db()
    with _Progress(quiet=as_json) as progress:
        report = run_recipe(papers.load(key, settings), db=path, rerun=rerun, watch=progress.watch)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _show(report)
    return report.exit_code


def _show(report: Any) -> None:
    from rich.console import Console

    Console(highlight=False).print(report.table())
    click.echo(report.summary())
