"""``assay table``: results as Markdown, LaTeX or CSV; a missing value is a dash with a footnote that says why."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import UnknownName
from results import schema
from results.metrics import METRICS

Format = Literal["md", "latex", "csv"]
Row = Mapping[str, Any]

DEFAULT_COLUMNS = (
    "task",
    "method",
    "hardware",
    "precision",
    "batch_size",
    "accuracy",
    "accuracy_delta",
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
_STRENGTH = frozenset(
    {
        *("sparsity", "ratio", "rate", "output_rate", "quality"),
        *("bits", "conv_bits", "linear_bits", "clusters", "centroids", "compression", "rank"),
    }
)


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


def columns(names: str | None) -> list[str]:
    """The columns of a comma-separated list; None gives the default ones.

    Raises
    ------
    UnknownName
        With the nearest column of ``runs``.
    """
    if not names:
        return list(DEFAULT_COLUMNS)
    known = schema.documented()["runs"].columns
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UnknownName("column", name, known)
    return chosen


def _natural(text: str) -> list[str | float]:
    """A sort key in which numbers count by value: texts and numbers in turn."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?)", text)
    return [float(part) if place % 2 else part for place, part in enumerate(parts)]


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
                *(r["method"] != "baseline", r["method"], _natural(r["chain"]), r["seed"], r["created_at"]),
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
        return Table(list(names), [["" if row[name] is None else str(row[name]) for name in names] for row in rows])
    footnotes: list[str] = []
    labels = method_labels(rows)
    body = []
    for row, label in zip(rows, labels, strict=True):
        reasons = json.loads(row["reasons"] or "{}")
        cells = []
        for name in names:
            if name == "method":
                cells.append(label)
            elif name == "hardware":
                cells.append(hardware_label(row, rows))
            elif row[name] is None:
                cells.append(_missing(name, _reason(row, name, reasons), footnotes))
            elif "seeds" in row and name in METRICS:
                cells.append(_over_seeds(row, name))
            else:
                cells.append(_FORMATS[name](row) if name in _FORMATS else _plain(row[name]))
        body.append(cells)
    header = [_HEADINGS.get(name, name) for name in names]
    if any("seeds" in row for row in rows):
        header = [METRICS[name].title if name in METRICS else text for name, text in zip(names, header, strict=True)]
    return Table(header, body, footnotes, comparability(rows))


def method_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's chain: ``magnitude (sparsity=0.9) > ptq-int8``.

    What says how strong a technique was is always shown; other parameters where they differ between rows that apply the
    same step.
    """
    chains = [json.loads(row["chain"]) for row in rows]
    seen: dict[tuple[str, str], set[str]] = {}
    for chain in chains:
        for step in chain:
            for key, value in step.items():
                seen.setdefault((step["name"], key), set()).add(json.dumps(value, sort_keys=True))

    def show(step: Mapping[str, Any]) -> str:
        shown = [
            f"{key}={_value(value)}"
            for key, value in step.items()
            if key != "name" and (len(seen[step["name"], key]) > 1 or (key in _STRENGTH and value is not None))
        ]
        return f"{step['name']} ({', '.join(shown)})" if shown else str(step["name"])

    return [" > ".join(show(step) for step in chain) for chain in chains]


def curve_labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's chain without what says how strong a technique was: rows of one curve have one name."""
    bare = [
        {**row, "chain": json.dumps([{k: v for k, v in step.items() if k not in _STRENGTH} for step in steps])}
        for row in rows
        for steps in [json.loads(row["chain"])]
    ]
    return method_labels(bare)


def _reason(row: Row, name: str, reasons: Mapping[str, str]) -> str | None:
    if "seeds" in row and name not in reasons:
        return "there is no mean of p-values" if name == "mcnemar_p" else "one of the seeds' runs has none"
    return reasons.get(name)


def _over_seeds(row: Row, name: str) -> str:
    """Mean, and plus or minus half its 95 % interval, in the metric's unit."""
    found = METRICS[name]
    value = row[name] * found.scale
    if name not in row["intervals"]:
        return significant(value, 4)
    low, high = (end * found.scale for end in row["intervals"][name])
    half = (high - low) / 2
    # Rounding in a mean of equal values is no spread.
    exact = half <= 1e-9 * abs(value)
    # Two significant digits of the half width say how many decimals mean anything.
    decimals = 2 if exact else min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{value:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def hardware_label(row: Row, rows: Sequence[Row]) -> str:
    """A runtime's name, with the options in which rows of the same runtime differ: ``openvino (precision=bf16)``."""
    config = json.loads(row["hardware_config"] or "{}")
    others = [json.loads(r["hardware_config"] or "{}") for r in rows if r["hardware"] == row["hardware"]]
    shown = [f"{k}={_value(v)}" for k, v in config.items() if any(other.get(k) != v for other in others)]
    return f"{row['hardware']} ({', '.join(shown)})" if shown else str(row["hardware"])


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
    """The table for a terminal, as a ``rich.table.Table``; its footnotes and notes are the caption."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    table = build(rows, names)
    captions = [f"[{i}] {text}" for i, text in enumerate(table.footnotes, 1)] + table.notes
    rich = RichTable(box=None, pad_edge=False, caption=escape("\n".join(captions)) or None, caption_justify="left")
    for i, heading in enumerate(table.header):
        rich.add_column(escape(heading), justify="right" if _numeric(table, i) else "left", overflow="fold")
    for row in table.body:
        rich.add_row(*map(escape, row))
    return rich


def render(table: Table, fmt: Format) -> str:
    """The table as text, ending in a newline."""
    return {"md": _markdown, "latex": _latex, "csv": _csv}[fmt](table)


def _markdown(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in [table.header, *table.body]]
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
        lines += [f"[{i}] {text}  " for i, text in enumerate(table.footnotes, 1)]
        lines += [f"Note: {text}  " for text in table.notes]
    return "\n".join(line.rstrip() if not line.endswith("  ") else line for line in lines) + "\n"


def _latex(table: Table) -> str:
    spec = "".join("r" if _numeric(table, i) else "l" for i in range(len(table.header)))
    lines = ["% \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    lines += [" & ".join(map(_tex, table.header)) + " \\\\", "\\midrule"]
    lines += [" & ".join(map(_tex, row)) + " \\\\" for row in table.body]
    lines += ["\\bottomrule", "\\end{tabular}"]
    texts = [f"[{i}] {text}" for i, text in enumerate(table.footnotes, 1)] + [f"Note: {text}" for text in table.notes]
    if texts:
        lines += ["", "\\par\\footnotesize"] + [f"{_tex(text)}\\\\" for text in texts[:-1]] + [_tex(texts[-1])]
    return "\n".join(lines) + "\n"


def _csv(table: Table) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([table.header, *table.body])
    return stream.getvalue()


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _numeric(table: Table, index: int) -> bool:
    cells = [row[index] for row in table.body if not row[index].startswith(_DASH)]
    return bool(cells) and all(cell[:1].isdigit() or cell[:1] in "+−" for cell in cells)


def _missing(name: str, reason: str | None, footnotes: list[str]) -> str:
    if name == "reason":  # an ok run has none to give
        return _DASH
    text = reason or "no reason was recorded"
    if text not in footnotes:
        footnotes.append(text)
    return f"{_DASH} [{footnotes.index(text) + 1}]"


def significant(value: float, digits: int = 3) -> str:
    """A number with ``digits`` significant digits and no exponent: 0.0123, 4.56, 789, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}".replace("-", "−")
    return text if float(f"{value:.{decimals}f}") else f"{0:.{decimals}f}"


def _accuracy(row: Row) -> str:
    return (
        f"{row['accuracy']:.2%}".rstrip("%") + f" [{100 * row['accuracy_low']:.2f}, {100 * row['accuracy_high']:.2f}]"
    )


def _delta(row: Row) -> str:
    text = _signed(100 * row["accuracy_delta"], 2)
    if row["baseline_run_id"] == row["run_id"] or row["mcnemar_p"] is None:
        return text
    p = row["mcnemar_p"]
    return f"{text} (p < 0.001)" if p < 0.001 else f"{text} (p = {p:.2f})" if p >= 0.1 else f"{text} (p = {p:.3f})"


def _energy(row: Row) -> str:
    return f"{significant(row['energy_j'] * 1e3)} {row['energy_method'].partition('_')[0]}"


def _scaled(name: str, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: significant(row[name] * scale)


def _ratio(name: str) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.2f}×"


def _percent(name: str) -> Callable[[Row], str]:
    return lambda row: f"{100 * row[name]:.2f}"


_HEADINGS = {
    "task": "Task",
    "method": "Method",
    "hardware": "Hardware",
    "precision": "Precision",
    "batch_size": "Batch",
    "threads": "Threads",
    "seed": "Seed",
    "status": "Status",
    "reason": "Reason",
    "accuracy": "Accuracy % [95 %]",
    "accuracy_delta": "Δ points",
    "size_bytes": "Size kB",
    "zstd_bytes": "zstd kB",
    "compression_ratio": "Ratio",
    "zstd_compression_ratio": "Ratio zstd",
    "plain_bytes": "Plain weights kB",
    "container_bytes": "Weights' file kB",
    "shannon_bytes": "Shannon bound kB",
    "weights_zstd_bytes": "Weights zstd kB",
    "xz_bytes": "Weights xz kB",
    "gzip_bytes": "Weights gzip kB",
    "container_compression_ratio": "Ratio of weights' file",
    "macs_ratio": "MACs ratio",
    "latency_p50_ms": "p50 ms",
    "latency_p90_ms": "p90 ms",
    "latency_p99_ms": "p99 ms",
    "speedup": "Speed-up",
    "throughput_per_s": "Examples/s",
    "energy_j": "Energy mJ",
    "energy_net_j": "Net energy mJ",
    "energy_ratio": "Energy ratio",
    "pruning_rate": "Pruned %",
    "fidelity_top1": "Top-1 agreement %",
    "peak_rss_bytes": "Peak MB",
    "load_ms": "Load ms",
    "first_ms": "First ms",
    "mcnemar_p": "McNemar p",
}

_FORMATS: dict[str, Callable[[Row], str]] = {
    "accuracy": _accuracy,
    "accuracy_delta": _delta,
    "energy_j": _energy,
    "energy_net_j": _scaled("energy_net_j", 1e3),
    **{n: _scaled(n, 1e-3) for n in ("size_bytes", "zstd_bytes", "plain_bytes", "container_bytes", "shannon_bytes")},
    **{n: _scaled(n, 1e-3) for n in ("weights_zstd_bytes", "xz_bytes", "gzip_bytes")},
    "peak_rss_bytes": _scaled("peak_rss_bytes", 1e-6),
    **{
        n: _scaled(n)
        for n in ("latency_p50_ms", "latency_p90_ms", "latency_p99_ms", "throughput_per_s", "load_ms", "first_ms")
    },
    **{n: _ratio(n) for n in ("compression_ratio", "zstd_compression_ratio", "speedup", "energy_ratio")},
    **{n: _ratio(n) for n in ("container_compression_ratio", "macs_ratio")},
    **{n: _percent(n) for n in ("pruning_rate", "fidelity_top1")},
}
