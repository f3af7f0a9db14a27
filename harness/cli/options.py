"""Options that several commands have, and JSON output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from harness.paths import default_db

db_option = click.option(
    "--db",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Database file. Default: $ASSAY_HOME/assay.duckdb (ASSAY_HOME defaults to ./runs).",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")


def database(db: Path | None) -> Path:
    """The database that ``--db`` names, or the default one; absolute."""
    return Path(db or default_db()).absolute()


def print_json(value: Any) -> None:
    """Print JSON; what it has no form for (dates, paths) as text."""
    from results.escaping import json_text

    click.echo(json_text(json.dumps(value, indent=2, ensure_ascii=False, default=str)))
