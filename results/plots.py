"""``assay plot X Y``: a plot is a pair of metrics, with its Pareto front and intervals, readable in grey print.

Rows that do not compare (another task, batch size, thread count or machine) get axes of their own.

Methods differ by marker shape and by fill, not by colour alone. The same rows give the same SVG, byte by byte.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import InputError, StoreError, Unavailable
from results import output
from results.columns import ENERGY, quantity, quantity_of
from results.escaping import plot_text
from results.labels import curve_labels, hardware_labels, method_labels, task_labels
from results.quantities import Quantity

SUFFIXES = (".png", ".svg", ".pdf")
_MARKERS = "osD^vP*Xp<>h"
_PANEL = ("task", "metric", "batch_size", "threads", "machine_id")
_GREYS = ("#000000", "#ffffff", "#8c8c8c")


def points(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, curves: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """The points of a plot, and notes about what is not in it.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of ``runs``.
    x, y : str
        Quantities (:data:`results.columns.QUANTITIES`); ``score`` is the task's metric.
    curves : bool
        Give the strengths of one technique (sparsity, ratio, bits, ...) one label, and a line.

    Returns
    -------
    list of dict
        ``run_id``, ``task``, ``method``, ``label``, ``hardware``, ``batch_size``, ``threads``, ``x``, ``y``, their
        intervals (``x_low`` ... or None), all in the shown unit, ``metric``, ``metric_unit``, ``metric_better``, and
        ``pareto``: whether no other point of the same task, metric, batch size, threads and machine is as good in both
        and better in one.
    list of str
        Which rows are left out, and why.

    Raises
    ------
    UnknownName
        For a name that is no numeric column.
    InputError
        If measured and modelled energy would share an axis, or no row has both values.
    """
    names = {"x": x, "y": y}
    for name in names.values():
        quantity(name)
    found: list[dict[str, Any]] = []
    missing: dict[str, int] = {}
    labels = curve_labels(rows) if curves else method_labels(rows)
    for row, label, task, target in zip(rows, labels, task_labels(rows), hardware_labels(rows), strict=True):
        absent = [name for name in (x, y) if row[name] is None]
        if absent:
            why = json.loads(row["reasons"] or "{}").get(absent[0], "no reason was recorded")
            text = f"{absent[0]}: {why}"
            missing[text] = missing.get(text, 0) + 1
            continue
        kept = ("run_id", *_PANEL, "metric_unit", "metric_better", "method", "hardware", "energy_method")
        point = {name: row[name] for name in kept} | {"task": task}
        point["curve"] = curves
        if "seeds" in row:
            point["seeds"] = row["seeds"]
        config = json.loads(row["hardware_config"] or "{}")
        point |= {"label": label, "target": target, "hardware_config": config}
        for axis, name in names.items():
            point |= _scaled(axis, name, quantity_of(name, [row]), row)
        found.append(point)
    if not found:
        detail = "; ".join(missing) or "no rows"
        raise InputError(f"Nothing to plot: no row has both {x} and {y} ({detail}). Change --where or the metrics.")
    if {x, y} & ENERGY:
        kinds = {"modelled" if p["energy_method"] == "modelled" else "measured" for p in found}
        if len(kinds) > 1:
            raise InputError(
                "Measured and modelled energy do not belong on one axis: choose with --where energy_method=modelled or "
                "--where energy_method=measured*."
            )
    for group in _panels(found):
        signs = [1 if quantity_of(name, group).better == "higher" else -1 for name in names.values()]
        for p, best in zip(group, _front([(signs[0] * p["x"], signs[1] * p["y"]) for p in group]), strict=True):
            p["pareto"] = best
    notes = [f"{count} rows left out ({text})" for text, count in missing.items()]
    return found, notes


def _panels(found: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Points that compare with one another, by task, batch size, threads and machine."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for p in found:
        groups.setdefault(
            tuple(f"{p[name]:>9}" if isinstance(p[name], int) else str(p[name]) for name in _PANEL), []
        ).append(p)
    return [groups[key] for key in sorted(groups)]


def _scaled(axis: str, name: str, found: Quantity, row: Mapping[str, Any]) -> dict[str, float | None]:
    def shown(column: str | None) -> float | None:
        return None if column is None or row[column] is None else row[column] * found.scale

    low, high = shown(found.low), shown(found.high)
    if "seeds" in row:
        low, high = (end * found.scale for end in row["intervals"][name]) if name in row["intervals"] else (None, None)
    interval = (low, high) if low is not None and high is not None else (None, None)
    return {axis: row[name] * found.scale, f"{axis}_low": interval[0], f"{axis}_high": interval[1]}


def _front(values: Sequence[tuple[float, float]]) -> list[bool]:
    """Which pairs no other pair is as good as in both and better in one; higher is better."""
    best_of_x: dict[float, float] = {}
    for x, y in values:
        best_of_x[x] = max(y, best_of_x.get(x, y))
    before, floor = -math.inf, {}
    for x in sorted(best_of_x, reverse=True):
        floor[x] = before
        before = max(before, best_of_x[x])
    return [y == best_of_x[x] and y > floor[x] for x, y in values]


def draw(found: Sequence[Mapping[str, Any]], x: str, y: str, out: Path, notes: Sequence[str] = ()) -> None:
    """Draw points into a PNG, SVG or PDF file.

    Parameters
    ----------
    found : sequence of mapping
        From :func:`points`.
    x, y : str
        Their quantities.
    out : Path
        The file; its suffix is the format.
    notes : sequence of str
        Printed below the axes.

    Raises
    ------
    InputError
        For another suffix.
    Unavailable
        If matplotlib is not installed.
    StoreError
        If the file cannot be written.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out {out}: the suffix must be one of {', '.join(SUFFIXES)}.")
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable('matplotlib is not installed: pip install "assay-bench[plot]"') from None
    # The salt fixes the ids in an SVG; text stays text, so that it can be searched and edited.
    style = {
        "font.size": 9,
        "svg.hashsalt": "assay",
        "svg.fonttype": "none",
        "pdf.fonttype": 42,
        "text.parse_math": False,  # a dollar sign in a name is a dollar sign
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    output.require_writable(out)
    found = [
        {**p, **{name: plot_text(str(p[name])) for name in ("task", "label", "target", "machine_id")}} for p in found
    ]
    notes = list(map(plot_text, notes))
    with mpl.rc_context(style), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box, and is no reason to interrupt anybody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        panels = _panels([dict(p) for p in found])
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        width, height = (7.8, 4.6) if len(panels) == 1 else (3.4 * columns + 2.6, 3.2 * rows + 0.6)
        # The legend stands beside the axes, a line a label and one for what is wrapped: it must not be cut off.
        lines = sum(1 + len(label) // 34 for label in {str(p[name]) for p in found for name in ("label", "target")})
        height = max(height, 0.19 * lines + 1.4)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        _draw_panels(figure, panels, figure.subplots(rows, columns, squeeze=False), (x, y), notes)
        suffix = out.suffix.lower()
        metadata = {".png": {"Software": "assay"}, ".svg": {"Date": None, "Creator": "assay"}}.get(
            suffix, {"CreationDate": None, "ModDate": None, "Creator": "assay", "Producer": "assay"}
        )
        try:
            with output.replacing(out) as stream:
                figure.savefig(stream, format=suffix[1:], dpi=200, metadata=metadata)
        except OSError as error:
            raise StoreError(f"{out}: cannot be written: {error.strerror or error}.") from error


def _draw_panels(
    figure: Any, panels: list[list[dict[str, Any]]], grid: Any, names: tuple[str, str], notes: Sequence[str]
) -> None:
    found = [p for panel in panels for p in panel]
    methods = sorted({p["label"] for p in found}, key=lambda label: (label != "baseline", label))
    targets = sorted({p["target"] for p in found})
    places = list(grid.flat)
    for axes, panel in zip(places, panels, strict=False):
        x, y = names
        _draw_axes(axes, panel, (quantity_of(x, panel), quantity_of(y, panel)), methods, targets)
        axes.set_title(_panel_title(panel, found), loc="left", fontsize=9)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    _legend(figure, methods, targets, any(p["curve"] for p in found))
    if any("seeds" in p for p in found):
        bars = ["95 % t-interval of the mean over seeds"]
    else:
        shown = [quantity_of(name, found) for name in names]
        bars = [f"{m.label.lower()}: {m.interval}" for m in shown if m.interval]
    footer = "; ".join([*([f"Bars: {', '.join(bars)}"] if bars else []), *notes])
    if footer:
        text = _wrapped(footer, int(figure.get_figwidth() * 19))
        figure.supxlabel(text, fontsize=7, color="#555555", x=0.01, ha="left")


def _draw_axes(
    axes: Any, panel: list[dict[str, Any]], metrics: tuple[Quantity, Quantity], methods: list[str], targets: list[str]
) -> None:
    mx, my = metrics
    colours = {label: f"C{index % 10}" for index, label in enumerate(methods)}
    front = sorted((p for p in panel if p["pareto"]), key=lambda p: (p["x"], p["y"]))
    # Steps, not slopes: nothing between two points of the front was measured.
    where = "pre" if mx.better == "higher" else "post"
    axes.step([p["x"] for p in front], [p["y"] for p in front], where=where, color="#9a9a9a", lw=1.1, ls="--", zorder=1)
    for key in sorted({(p["label"], p["target"]) for p in panel if p["curve"]}):
        line = sorted((p["x"], p["y"]) for p in panel if (p["label"], p["target"]) == key)
        axes.plot(*zip(*line, strict=True), color=colours[key[0]], lw=0.9, zorder=2)
    for p in panel:
        bars = {"fmt": "none", "ecolor": "#7f7f7f", "elinewidth": 0.8, "capsize": 2, "capthick": 0.8, "zorder": 2}
        axes.errorbar(p["x"], p["y"], xerr=_error(p, "x"), yerr=_error(p, "y"), **bars)
        axes.plot(
            p["x"],
            p["y"],
            marker=_MARKERS[methods.index(p["label"]) % len(_MARKERS)],
            markersize=9 if p["pareto"] else 6.5,
            markerfacecolor=_GREYS[targets.index(p["target"]) % len(_GREYS)],
            markeredgecolor=colours[p["label"]] if p["curve"] else "black",
            markeredgewidth=1.5 if p["pareto"] else 0.8,
            linestyle="none",
            zorder=4 if p["pareto"] else 3,
        )
    for axis, setter, m, name in ((axes.xaxis, axes.set_xscale, mx, "x"), (axes.yaxis, axes.set_yscale, my, "y")):
        values = [p[name] for p in panel]
        if m.log and min(values) > 0 and max(values) / min(values) >= 5:
            setter("log")
            _plain_log_ticks(axis)
    axes.set_xlabel(_axis_title(mx, panel))
    axes.set_ylabel(_axis_title(my, panel))
    axes.grid(True, which="major", color="#e4e4e4", lw=0.6, zorder=0)
    axes.set_axisbelow(True)
    axes.margins(0.08)


def _plain_log_ticks(axis: Any) -> None:
    """Ticks at 1, 2, 5 x 10^n written as plain numbers: narrow ranges hold few powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}".replace(",", " ")))
    axis.set_minor_formatter(NullFormatter())


def _panel_title(panel: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    first = panel[0]
    title = f"{first['task']} · batch {first['batch_size']}"
    for name in ("threads", "machine_id"):
        if len({p[name] for p in found}) > 1:
            title += f" · {name.removesuffix('_id')} {str(first[name])[:12]}"
    return _wrapped(title, 60)


def _legend(figure: Any, methods: Sequence[str], targets: Sequence[str], curves: bool) -> None:
    from matplotlib.lines import Line2D

    def handle(marker: str, fill: str, label: str, mec: str = "black") -> Any:
        return Line2D([], [], ls="none", marker=marker, mfc=fill, mec=mec, ms=6.5, label=label)

    edges = [f"C{i % 10}" if curves else "black" for i in range(len(methods))]
    handles = [
        handle(_MARKERS[i % len(_MARKERS)], "#d0d0d0", _wrapped(label, 34), mec=edges[i])
        for i, label in enumerate(methods)
    ]
    handles.append(Line2D([], [], ls="none", label=" "))
    handles += [handle("o", _GREYS[i % len(_GREYS)], _wrapped(target, 34)) for i, target in enumerate(targets)]
    handles.append(Line2D([], [], ls="none", label=" "))
    handles.append(
        Line2D(
            [],
            [],
            ls="--",
            color="#9a9a9a",
            lw=1.1,
            marker="o",
            mfc="none",
            mec="black",
            mew=1.5,
            ms=9,
            label="Pareto front",
        )
    )
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8)


def _axis_title(found: Quantity, points_: Sequence[Mapping[str, Any]]) -> str:
    title = found.title
    if "nergy" in title or "arbon" in title:
        title += f", {' and '.join(sorted({p['energy_method'].replace('_', ' ') for p in points_}))}"
    return f"{title}  ({'→' if found.better == 'higher' else '←'} better)"


def _error(point: Mapping[str, Any], axis: str) -> list[list[float]] | None:
    low, high = point[f"{axis}_low"], point[f"{axis}_high"]
    if low is None:
        return None
    return [[max(0.0, point[axis] - low)], [max(0.0, high - point[axis])]]


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))
