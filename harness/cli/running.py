"""``assay run``, ``validate``, ``ls`` and ``doctor``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.options import db_option, json_option, print_json
from harness.cli.progress import ProgressBar
from harness.text import printable

if TYPE_CHECKING:
    from harness.runner import Outcome, Planned
    from harness.spec import Spec

only_option = click.option(
    "--only",
    metavar="EXPR",
    help="Run only matching cells: key=value, key!=value, a|b, wildcards, joined by commas. "
    "Keys: task, method, config, hardware, hardware.OPTION, seed, batch_size, threads.",
)


@click.command()
@click.argument("spec")
@db_option
@only_option
@click.option("--dry-run", is_flag=True, help="List the cells and which of them are in the database; run nothing.")
@click.option(
    "--rerun", is_flag=True, help="Compress, build and measure again what the database has; baselines are kept."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=1e7),
    default=7200.0,
    show_default=True,
    help="Seconds that each step of a cell may take: training it, each method, building it, measuring it. "
    "A step that takes longer is stopped, and its cell is recorded with the step's name.",
)
@json_option
def run(spec: str, db: Path | None, only: str | None, dry_run: bool, rerun: bool, timeout: float, as_json: bool) -> int:
    """Run the cells of SPEC (a TOML file or a packaged name) that the database does not have yet.

    Ctrl-C stops cleanly; the same command goes on where it stopped. Exit code: 0 if all cells are ok, unsupported or
    unavailable, 1 if some failed, 2 for bad input, 130 if interrupted.
    """
    from harness import paths
    from harness.runner import open_store, plan, sweep
    from harness.spec import Spec

    loaded = Spec.load(spec)
    chosen = _filter(loaded, only)
    path = db or paths.default_db()
    if dry_run:
        planned = plan(loaded, chosen)
        # Only looking must not create a database.
        kept = open_store(path).finished([item.cell_hash for item in planned]) if path.exists() else {}
        _show_plan(planned, {key for key in kept if not rerun}, as_json)
        return 0
    with ProgressBar(quiet=as_json) as progress:
        outcome = sweep(loaded, db=path, only=chosen, rerun=rerun, timeout=timeout, watch=progress.watch)
    rows = rows_of(outcome, path)
    if as_json:
        print_json(rows)
    else:
        show_outcome(outcome, rows, path)
    return outcome.exit_code


def _filter(spec: Spec, only: str | None) -> Any:
    from harness.filters import Filter

    if only is None:
        return None
    keys = {key for cell in spec.cells() for key in cell.row()}
    return Filter.parse(only, keys)


def _show_plan(planned: list[Planned], kept: set[str], as_json: bool) -> None:
    rows = [
        {**item.cell.row(), "cell_hash": item.cell_hash, "state": "kept" if item.cell_hash in kept else "to run"}
        for item in planned
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        where = printable(f"{row['task']}  {row['config']}  {row['hardware']}")
        click.echo(f"{row['state']:7} {where}  seed {row['seed']}  batch {row['batch_size']}  threads {row['threads']}")
    click.echo(f"{len(rows)} cells, {len(kept)} kept, {len(rows) - len(kept)} to run.")


def rows_of(outcome: Outcome, db: Path) -> list[dict[str, Any]]:
    """The ``runs`` row of each cell that ran now or was kept, in the order asked for."""
    from results.queries import of_runs

    order = [outcome.run_ids[item.cell_hash] for item in outcome.planned if item.cell_hash in outcome.run_ids]
    by_id = of_runs(db, order) if order else {}
    return [by_id[run_id] for run_id in order]


def show_outcome(outcome: Outcome, rows: list[dict[str, Any]], db: Path) -> None:
    """Print a sweep's rows as a table, and what it came to."""
    from rich.console import Console

    from results.tables import console_table

    # A pipe or a log has no width: rows must not be folded to rich's default of 80 columns there.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(console_table(rows, _SUMMARY))
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    ran = len(outcome.records)
    work = "nothing was computed again" if not ran and outcome.kept else f"{ran} run now"
    click.echo(f"{len(outcome.planned)} cells: {summary or 'none'}; {len(outcome.kept)} kept from before, {work}.")
    for row in rows:
        if row["status"] != "ok":
            line = f"{row['task']} · {row['method']} · {row['hardware']}: {row['status']}: {row['reason']}"
            click.echo(f"  {printable(line)}")
    if outcome.interrupted:
        click.echo("Interrupted. The same command goes on from here.")
    click.echo(f"Records: {db}   (assay table, assay plot latency_p50_ms score, assay show RUN)")


@click.command()
@click.argument("specs", nargs=-1, required=True)
@json_option
def validate(specs: tuple[str, ...], as_json: bool) -> None:
    """Check SPECS without running: names, parameters, values; print how many cells each has."""
    from harness.spec import Spec

    rows = []
    for name in specs:
        spec = Spec.load(name)
        rows.append({"name": spec.name, "cells": len(spec.cells()), "spec_hash": spec.hash()})
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{printable(str(row['name']))}: valid, {row['cells']} cells")


_SUMMARY = (
    *("task", "method", "hardware", "precision", "batch_size", "score", "size_bytes", "compression_ratio"),
    *("zstd_compression_ratio", "latency_p50_ms", "speedup", "energy_j"),
)
_KINDS = ("tasks", "methods", "metrics", "hardware", "specs", "papers", "runs")


@click.command()
@click.argument("what", type=click.Choice(_KINDS))
@db_option
@json_option
def ls(what: str, db: Path | None, as_json: bool) -> None:
    """List tasks, methods, metrics, hardware, specs, papers or runs."""
    if what == "runs":
        from harness.cli.reading import ls_runs

        ls_runs(db, as_json)
        return
    rows = {"specs": _list_specs, "papers": _list_papers}.get(what, lambda: _list_names(what))()
    if as_json:
        print_json(rows)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        click.echo(f"{printable(str(row['name'])):{width}}  {printable(row['summary'])}")


def _list_names(what: str) -> list[dict[str, Any]]:
    from harness import registry

    kind: Any = {"tasks": "task", "methods": "method", "metrics": "metric"}.get(what, what)
    return [
        {"name": f"{name}/MODEL" if entry.family else name, "summary": entry.summary, "target": entry.target}
        for name, entry in sorted(registry.table(kind).items())
    ]


def _list_specs() -> list[dict[str, Any]]:
    import tomllib

    from harness.spec import packaged

    loaded = ((name, tomllib.loads(item.read_text(encoding="utf-8"))) for name, item in packaged().items())
    return [{"name": name, "summary": value.get("description", "")} for name, value in loaded]


def _list_papers() -> list[dict[str, Any]]:
    import papers

    return [{"name": key, "summary": papers.load(key).title} for key in papers.names()]


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Print what this machine can do and what would spoil a measurement."""
    from harness.doctor import examine, render

    report = examine()
    if as_json:
        print_json([report])
    else:
        sys.stdout.write(render(report))
