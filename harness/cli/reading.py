"""``assay db``, ``table``, ``plot`` and ``show``: reading what was measured, and looking after the database."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from harness.cli.options import database, db_option, json_option, print_json
from harness.errors import InputError

_WHERE_HELP = (
    "Rows to take: key=value, key!=value, a|b, key>=number, wildcards, joined by commas. "
    "Keys are the columns of the view runs, hardware.OPTION and config.STEP.PARAMETER."
)


_over_seeds_option = click.option(
    "--over-seeds", is_flag=True, help="One row a cell: means over the seeds, with 95 % t-intervals."
)


# --------------------------------------------------------------------------------------------------------------------
# assay db


@click.group()
def db() -> None:
    """Query, check, rebuild, export and merge the results database."""


@db.command("path")
@db_option
@json_option
def db_path_command(db: Path | None, as_json: bool) -> None:
    """Print where the database is (or will be)."""
    path = database(db)
    if as_json:
        print_json([{"path": str(path), "exists": path.exists()}])
    else:
        click.echo(str(path))


@db.command("query")
@click.argument("sql")
@db_option
@json_option
def db_query(sql: str, db: Path | None, as_json: bool) -> None:
    """Run one read-only SQL statement over the tables and views, for example "SELECT method, speedup FROM latest"."""
    from results.queries import query

    rows = query(database(db), sql)
    if as_json:
        print_json(rows)
        return
    _print_rows(rows)


@db.command("rebuild")
@click.option(
    "--force",
    is_flag=True,
    help="Go on although runs stay out: those without a record file, and those whose files cannot be read.",
)
@db_option
@json_option
def db_rebuild(force: bool, db: Path | None, as_json: bool) -> None:
    """Make the database anew from its record files; the old one is kept as .bak."""
    from results import rebuild

    done = rebuild(database(db), force=force)
    if as_json:
        aside = None if done.kept_aside is None else str(done.kept_aside)
        counts = {"records": done.records, "claims": done.claims}
        bad = {name: list(map(str, getattr(done, name))) for name in ("damaged", "unreadable")}
        print_json([{**counts, **bad, "kept_aside": aside}])
        return
    click.echo(f"{database(db)}: {done.records} runs and {done.claims} claims from record files.")
    if done.kept_aside:
        click.echo(f"The old database is {done.kept_aside}.")
    for path in done.damaged:
        click.echo(f"Damaged, set aside: {path}", err=True)
    for path in done.unreadable:
        click.echo(f"Cannot be read, left where it is: {path}", err=True)


@db.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@db_option
@json_option
def db_export(folder: Path, db: Path | None, as_json: bool) -> None:
    """Write every table as Parquet, the record files and a README of the schema into FOLDER."""
    from results import export

    counts = export(database(db), folder)
    if as_json:
        print_json([{"name": name, "rows": count} for name, count in counts.items()])
        return
    click.echo(f"{folder}: {counts['files']} record files, {counts['runs']} runs, {counts['claims']} claims.")


@db.command("merge")
@click.argument("source", type=click.Path(path_type=Path, exists=True))
@db_option
@json_option
def db_merge(source: Path, db: Path | None, as_json: bool) -> None:
    """Take up the records of SOURCE: an export, a folder of record files, or another database with its folder."""
    from results import merge

    count = merge(database(db), source)
    if as_json:
        print_json([{"source": str(source), "new": count}])
        return
    click.echo(f"{database(db)}: {count} new records from {source}.")


@db.command("check")
@db_option
@json_option
@click.pass_context
def db_check(ctx: click.Context, db: Path | None, as_json: bool) -> None:
    """Compare record files, hashes and rows with one another. Exit code 1 if something is wrong."""
    from results import check, escaping

    problems = check(database(db))
    if as_json:
        print_json([{"problem": text} for text in problems])
    elif problems:
        click.echo("\n".join(map(escaping.terminal, problems)))
    else:
        click.echo(f"{database(db)}: files and rows agree.")
    ctx.exit(1 if problems else 0)


# --------------------------------------------------------------------------------------------------------------------
# assay table, plot


@click.command()
@click.option("--columns", metavar="A,B,...", help="Columns of the view runs. Default: what a reader wants first.")
@click.option("--where", metavar="EXPR", help=_WHERE_HELP)
@click.option("--sort", metavar="COLUMN", help="Sort within each task; -COLUMN for descending.")
@click.option(
    "--format",
    "fmt",
    type=click.Choice(["md", "latex", "csv"]),
    default="md",
    show_default=True,
    help="Markdown, LaTeX (booktabs), or CSV with raw values.",
)
@click.option(
    "--all", "everything", is_flag=True, help="Every run, of any status; default: the newest ok run of each cell."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write into this file.")
@_over_seeds_option
@db_option
@json_option
def table(
    columns: str | None,
    where: str | None,
    sort: str | None,
    fmt: Any,
    everything: bool,
    out: Path | None,
    over_seeds: bool,
    db: Path | None,
    as_json: bool,
) -> None:
    """Print results as a table: Markdown, LaTeX (booktabs) or CSV. A missing value is a dash with its reason below."""
    from results import escaping, tables

    tables.columns(columns)  # an unknown column is refused before the database is read
    rows, older = _rows(database(db), where, everything, over_seeds)
    rows, names = tables.ordered(rows, sort), tables.columns(columns, rows)
    if as_json:
        text = json.dumps(tables.json_rows(rows, names), indent=2, ensure_ascii=False)
        _write(escaping.json_text(text) + "\n", out)
        return
    if not rows:
        raise InputError(
            f"No rows: {database(db)} has no ok run{' with ' + where if where else ''}. `assay ls runs` lists all."
        )
    made = tables.build(rows, names, fmt)
    if older:
        made.notes.append(
            f"{older} older results of these cells, with other sources or package versions, are left out (--all)."
        )
    _write(tables.render(made, fmt), out)


@click.command()
@click.argument("x")
@click.argument("y")
@click.option("--where", metavar="EXPR", help=_WHERE_HELP)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to draw: .png, .svg or .pdf. [default: Y-over-X.png]",
)
@click.option("--curves", is_flag=True, help="One label and one line for all strengths (sparsity, ...) of a technique.")
@_over_seeds_option
@db_option
@json_option
def plot(
    x: str,
    y: str,
    where: str | None,
    out: Path | None,
    curves: bool,
    over_seeds: bool,
    db: Path | None,
    as_json: bool,
) -> None:
    """Plot column Y over column X of the view runs, with the Pareto front of each task; "score" is the task's metric.

    With --json the points are printed instead, and drawn only where --out is given.
    """
    from results import escaping, plots
    from results.columns import quantity

    quantity(x)
    quantity(y)
    rows, _ = _rows(database(db), where, False, over_seeds)
    found, notes = plots.points(rows, x, y, curves)
    if as_json:
        print_json(found)
    if out is None and as_json:
        return
    target = out or Path(f"{y}-over-{x}.png")
    plots.draw(found, x, y, target, notes)
    if not as_json:
        for note in notes:
            click.echo(escaping.terminal(note), err=True)
        click.echo(str(target))


def _rows(path: Path, where: str | None, everything: bool, over_seeds: bool) -> tuple[list[Any], int]:
    from results import seeds
    from results.queries import select
    from results.tables import newest_per_cell

    if everything and over_seeds:
        raise InputError("--over-seeds takes the newest ok run of each cell: leave --all out.")
    if everything:
        return list(select(path, "runs", where)), 0
    rows, older = newest_per_cell([row for row in select(path, "latest", where) if row["status"] == "ok"])
    return (list(seeds.over_seeds(rows)) if over_seeds else rows), older


def _write(text: str, out: Path | None) -> None:
    if out is None:
        click.echo(text, nl=False)
        return
    from results import output

    try:
        with output.replacing(out) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}.") from error


# --------------------------------------------------------------------------------------------------------------------
# assay show, ls runs


@click.command()
@click.argument("run")
@db_option
@json_option
def show(run: str, db: Path | None, as_json: bool) -> None:
    """Show everything about one RUN (its id, or the beginning of it): values with units, reasons and warnings."""
    from results.queries import full

    row = full(database(db), run)
    if as_json:
        print_json([row])
        return
    _show_sections(row)


def _show_sections(row: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from results import columns
    from results.escaping import terminal
    from results.schema import documented

    console = Console(highlight=False)
    units = {**documented()["records"].columns, **documented()["runs"].columns}
    reasons = row["reasons"]
    sections = {title: columns.section(title) for title in columns.SECTIONS}
    for title, names in sections.items():
        console.print(Text(title, style="bold"))
        grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, min_width=22)
        grid.add_column(overflow="fold")
        for name in names:
            value = row.get(name)
            if value is None and name == "reason":
                continue
            if value is None:
                grid.add_row(f"  {name}", Text(f"–  {terminal(reasons.get(name, ''))}".rstrip(), style="dim"))
            else:
                grid.add_row(f"  {name}", Text(_shown(value) + _unit(units.get(name, ""))))
        console.print(grid)
    shown = {*columns.BY_NAME, *(name for names in sections.values() for name in names)}
    if others := {name: text for name, text in reasons.items() if name not in shown}:
        console.print(Text("Why other things are missing", style="bold"))
        for name, text in others.items():
            console.print(Text(terminal(f"  {name}: {text}")))
    if row["traceback"]:
        console.print(Text("Traceback", style="bold"))
        console.print(Text(terminal(row["traceback"], lines=True)))
    for warning in row["warnings"]:
        console.print(Text(terminal(f"Warning: {warning}"), style="yellow"))


_SHOWN_UNITS = {
    "bytes": "bytes",
    "milliseconds": "ms",
    "joules": "J",
    "nats": "nats",
    "examples per second": "examples/s",
}


def _unit(description: str) -> str:
    unit = description.rpartition("(")[2].rstrip(")")
    return f" {_SHOWN_UNITS[unit]}" if unit in _SHOWN_UNITS else ""


def _shown(value: Any) -> str:
    from results.escaping import terminal

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return terminal(str(value))
    if isinstance(value, Mapping) and value:
        return "\n".join(
            f"{terminal(key)}: {_shown(item) if not isinstance(item, Mapping) else terminal(json.dumps(item))}"
            for key, item in value.items()
        )
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        known = ({key: field for key, field in item.items() if field is not None} for item in value)
        return "\n".join(terminal(json.dumps(item, ensure_ascii=False)) for item in known)
    return ", ".join(terminal(str(item)) for item in value) if value else "(none)"


def ls_runs(db: Path | None, as_json: bool) -> None:
    """Print every run, oldest first: ``assay ls runs``.

    With ``as_json`` each object is the run's row of ``runs``, with ``name`` (its ``run_id``) before it.
    """
    from results.queries import select

    rows = select(database(db), "runs")
    if as_json:
        print_json([{"name": row["run_id"], **row} for row in rows])
        return
    short = ("run_id", "status", "task", "method", "hardware", "precision", "batch_size", "threads", "seed")
    _print_rows([{name: row[name] for name in short} for row in rows])


def _print_rows(rows: list[dict[str, Any]]) -> None:
    if not rows:
        click.echo("(no rows)")
        return
    from results.escaping import terminal

    names = list(rows[0])
    shown = list(map(terminal, names))
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) for i, name in enumerate(shown)]
    click.echo("  ".join(name.ljust(width) for name, width in zip(shown, widths, strict=True)).rstrip())
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    from results.escaping import terminal

    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return terminal(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
