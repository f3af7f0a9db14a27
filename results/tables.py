"""``assay table``: results as Markdown, LaTeX or CSV; a missing value is a dash with a footnote that says why."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import UnknownName
from results import escaping
from results.cells import written
from results.columns import BY_NAME, QUANTITIES, quantity_of
from results.labels import hardware_labels, method_labels, natural, task_labels
from results.seeds import P_VALUES

Format = Literal["md", "latex", "csv"]
Row = Mapping[str, Any]

DEFAULT_COLUMNS = (
    "task",
    "method",
    "hardware",
    "precision",
    "batch_size",
    "score",
    "score_delta",
    "size_bytes",
    "compression_ratio",
    "zstd_compression_ratio",
    "latency_p50_ms",
    "speedup",
    "energy_j",
)
_IDENTITY = (
    "task",
    "task_config",
    "chain",
    "hardware",
    "hardware_config",
    "seed",
    "batch_size",
    "threads",
    "machine_id",
)
_DASH = "–"
_NUMBER = re.compile(r"[+−-]?\d[\d.,]*(e[+-]?\d+)?×?( .*)?", re.DOTALL)
_OF_TASK = frozenset(column.name for column in BY_NAME.values() if column.shown and column.shown.of_task)


@dataclass(frozen=True)
class Table:
    """A table ready to be written.

    Parameters
    ----------
    header : list of str
        Headings, with units.
    body : list of list of str
        Cells; a missing value is a dash with its footnote's mark.
    footnotes : list of str
        In the order of their marks.
    notes : list of str
        What makes rows hard to compare.
    """

    header: list[str]
    body: list[list[str]]
    footnotes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def newest_per_cell(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """Rows without older results of the same cell that differ in source or package versions; and how many those were.

    ``latest`` keeps one row a ``cell_hash``, and a cell whose sources or packages changed has a new hash.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (row["created_at"], row["run_id"])):
        newest[tuple(row[name] for name in _IDENTITY)] = row
    kept = list(newest.values())
    return kept, len(rows) - len(kept)


def columns(names: str | None, rows: Sequence[Row] = ()) -> list[str]:
    """The columns of a comma-separated list; None gives those that suit the rows.

    Raises
    ------
    UnknownName
        With the nearest column of ``runs``.
    """
    if not names:
        return suiting(DEFAULT_COLUMNS, rows)
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in BY_NAME:
            raise UnknownName("column", name, BY_NAME)
    return chosen


def suiting(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Columns for rows of tasks of several metrics: they name the metric, and time what a language model does."""
    found = list(names)
    metrics = {row["metric"] for row in rows if row["metric"] is not None}
    if len(metrics) > 1 and "score" in found and "metric" not in found:
        found.insert(found.index("score"), "metric")
    if "latency_p50_ms" in found and any(row["decode_p50_ms"] is not None for row in rows):
        place = found.index("latency_p50_ms")
        forward = ["latency_p50_ms"] if any(row["latency_p50_ms"] is not None for row in rows) else []
        found[place : place + 1] = [*forward, "prefill_p50_ms", "decode_p50_ms", "units_per_s"]
    return found


def json_rows(rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
    """The columns' raw values; a task's metric is never without its name, unit and direction."""
    named = [*names]
    if _OF_TASK & {*names}:
        named += [name for name in ("metric", "metric_unit", "metric_better") if name not in names]
    return [{name: row[name] for name in named} for row in rows]


def ordered(rows: Sequence[Row], sort: str | None) -> list[Row]:
    """Rows by task, then by ``sort`` (a column; ``-column`` for descending), missing values last.

    By default: hardware, batch size, threads, baseline first, method, its parameters (numbers by value), age.

    Raises
    ------
    UnknownName
        For a column that ``runs`` does not have.
    """
    if sort is None:
        return sorted(
            rows,
            key=lambda r: (
                *(r["task"], r["task_config"], r["hardware"], r["hardware_config"], r["batch_size"], r["threads"]),
                *(r["method"] != "baseline", r["method"], natural(r["chain"]), r["seed"], r["created_at"]),
            ),
        )
    name, descending = sort.removeprefix("-"), sort.startswith("-")
    columns(name)
    there = sorted((r for r in rows if r[name] is not None), key=lambda r: r[name], reverse=descending)
    return sorted([*there, *(r for r in rows if r[name] is None)], key=lambda r: r["task"])


def build(rows: Sequence[Row], names: Sequence[str], fmt: Format = "md") -> Table:
    """Turn rows of ``runs`` into cells.

    Parameters
    ----------
    rows : sequence of mapping
        In the order wanted.
    names : sequence of str
        Columns.
    fmt : {"md", "latex", "csv"}
        CSV gets raw values under raw names; the others get readable ones.
    """
    if fmt == "csv":
        return Table(list(names), [[escaping.csv_cell(row[name]) for name in names] for row in rows])
    footnotes: dict[str, int] = {}
    labels = {"task": task_labels(rows), "method": method_labels(rows), "hardware": hardware_labels(rows)}
    shown = {name: quantity_of(name, rows) for name in names if name in QUANTITIES}
    body = []
    for place, row in enumerate(rows):
        reasons = json.loads(row["reasons"] or "{}")
        cells = []
        for name in names:
            if name in labels:
                cells.append(labels[name][place])
            elif row[name] is None:
                cells.append(_missing(name, _reason(row, name, reasons), footnotes))
            else:
                cells.append(written(row, name, shown.get(name)))
        body.append(cells)
    means = any("seeds" in row for row in rows)
    header = [
        shown[name].title
        if means and name in shown
        else shown[name].column_heading
        if name in shown
        else _heading(name)
        for name in names
    ]
    return Table(header, body, list(footnotes), comparability(rows))


def _heading(name: str) -> str:
    return BY_NAME[name].heading or name


def _reason(row: Row, name: str, reasons: Mapping[str, str]) -> str | None:
    if "seeds" in row and name not in reasons:
        return "there is no mean of p-values" if name in P_VALUES else "one of the seeds' runs has none"
    return reasons.get(name)


def comparability(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing these rows with one another."""
    notes = []
    if counts := sorted({len(row["seeds"]) for row in rows if "seeds" in row}):
        seeds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
        notes.append(f"Means over {seeds} seeds, plus or minus half the 95 % t-interval of the mean.")
        rows = [{**row, "seed": 0} for row in rows]
    for name, text in (
        (
            "machine_id",
            "Rows come from {} machines: absolute times and energies do not compare; ratios are within a machine.",
        ),
        ("settings", "Rows were measured under {} different settings (column settings)."),
        ("threads", "Rows use {} different thread counts (column threads)."),
        ("seed", "Rows use {} different seeds (column seed)."),
    ):
        count = len({row[name] for row in rows})
        if count > 1:
            notes.append(text.format(count))
    models: dict[Any, set[Any]] = {}
    for row in rows:
        if row["original_sha256"] is not None:
            models.setdefault((row["task"], row["task_config"], row["seed"]), set()).add(row["original_sha256"])
    if any(len(found) > 1 for found in models.values()):
        notes.append("Rows of one task are of different models (column original_sha256): only equal ones compare.")
    # Each runtime brings packages of its own: versions differ only where one runtime was used with several.
    versions = {(row["hardware"], row["packages"]) for row in rows}
    if len(versions) > len({hardware for hardware, _ in versions}):
        notes.append("Rows of one runtime were measured with different package versions (column packages).")
    methods = {row["energy_method"] for row in rows if row["energy_method"]}
    if len(methods) > 1:
        notes.append(f"Energy is {' and '.join(sorted(methods))}: these do not compare with one another.")
    warned = sum(1 for row in rows if row["warnings"] not in (None, "[]"))
    if warned:
        notes.append(f"{warned} of {len(rows)} rows carry warnings: assay show RUN.")
    return notes


def console_table(rows: Sequence[Row], names: Sequence[str] = DEFAULT_COLUMNS) -> Any:
    """The table for a terminal, as a ``rich.table.Table``; its footnotes and notes are the caption.

    Columns are brought to what suits the rows, see :func:`suiting`.
    """
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = build(rows, suiting(names, rows))

    def shown(text: str) -> str:
        return escape(escaping.terminal(text))

    captions = [f"[{i}] {text}" for i, text in enumerate(table.footnotes, 1)] + table.notes
    rich = RichTable(box=None, pad_edge=False, caption="\n".join(map(shown, captions)) or None, caption_justify="left")
    for i, heading in enumerate(table.header):
        rich.add_column(shown(heading), justify="right" if _numeric(table, i) else "left", overflow="fold")
    for row in table.body:
        rich.add_row(*map(shown, row))
    return rich


def render(table: Table, fmt: Format) -> str:
    """The table as text, ending in a newline."""
    return {"md": _markdown, "latex": _latex, "csv": _csv}[fmt](table)


def _markdown(table: Table) -> str:
    rows = [[escaping.markdown(cell) for cell in row] for row in [table.header, *table.body]]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.header))]
    right = [_numeric(table, i) for i in range(len(widths))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|" + "|".join(f" {'-' * (w - 1)}: " if r else f" {'-' * w} " for w, r in zip(widths, right, strict=True)) + "|"
    )
    lines = [line(rows[0]), rule, *(line(row) for row in rows[1:])]
    if table.footnotes or table.notes:
        lines.append("")
        lines += [f"[{i}] {escaping.markdown(text)}  " for i, text in enumerate(table.footnotes, 1)]
        lines += [f"Note: {escaping.markdown(text)}  " for text in table.notes]
    return "\n".join(line.rstrip() if not line.endswith("  ") else line for line in lines) + "\n"


def _latex(table: Table) -> str:
    spec = "".join("r" if _numeric(table, i) else "l" for i in range(len(table.header)))
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    lines += [" & ".join(map(escaping.latex, table.header)) + " \\\\", "\\midrule"]
    lines += [" & ".join(map(escaping.latex, row)) + " \\\\" for row in table.body]
    lines += ["\\bottomrule", "\\end{tabular}"]
    texts = [f"[{i}] {text}" for i, text in enumerate(table.footnotes, 1)] + [f"Note: {text}" for text in table.notes]
    if texts:
        *first, last = map(escaping.latex, texts)
        lines += ["", "\\par\\footnotesize", *(f"{text}\\\\" for text in first), last]
    return "\n".join(lines) + "\n"


def _csv(table: Table) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.body])
    return stream.getvalue()


def _numeric(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.body if not row[index].startswith(_DASH)]
    return bool(cells) and all(map(_NUMBER.fullmatch, cells))


def _missing(name: str, reason: str | None, footnotes: dict[str, int]) -> str:
    if name == "reason":  # an ok run has none to give
        return _DASH
    return f"{_DASH} [{footnotes.setdefault(reason or 'no reason was recorded', len(footnotes) + 1)}]"
