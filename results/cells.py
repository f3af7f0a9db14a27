"""How a value is written in a table: by what :mod:`results.columns` says of its column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from results.quantities import Quantity

Row = Mapping[str, Any]


def written(row: Row, name: str, shown: Quantity | None) -> str:
    """A value that is there.

    Parameters
    ----------
    row : mapping
        Of ``runs``, or a mean over seeds.
    name : str
        The column.
    shown : Quantity or None
        How it is shown; None for a column that is no quantity. Where it is the task's metric of rows that have several,
        the row's own metric says unit and scale.
    """
    if shown is None:
        return f"{row[name]:.6g}" if isinstance(row[name], float) else str(row[name])
    unit = ""
    if shown.of_task:
        shown = shown.of(row["metric"], row["metric_unit"], row["metric_better"])
        unit = f" {shown.unit}" if shown.unit else ""
    if "seeds" in row:
        return _over_seeds(row, name, shown) + unit
    return _single(row, name, shown, "×" if shown.unit == "×" else unit)


def _single(row: Row, name: str, shown: Quantity, unit: str) -> str:
    value = row[name] * shown.scale if shown.scale != 1 else row[name]
    text = number(value, shown, signed=shown.change is not None) + unit
    if shown.bracketed and row[str(shown.low)] is not None:
        low, high = (number(row[str(end)] * shown.scale, shown) for end in (shown.low, shown.high))
        text += f" [{low}, {high}]"
    if shown.change and row["baseline_run_id"] != row["run_id"] and row[shown.change] is not None:
        text += f" ({p_value(row[shown.change])})"
    return f"{text} {row[shown.kind].partition('_')[0]}" if shown.kind else text


def _over_seeds(row: Row, name: str, shown: Quantity) -> str:
    """Mean, and plus or minus half its 95 % interval, in the shown unit."""
    value = row[name] * shown.scale
    if name not in row["intervals"]:
        return significant(value, 4).replace("-", "−")
    low, high = (end * shown.scale for end in row["intervals"][name])
    half = (high - low) / 2
    # Rounding in a mean of equal values is no spread.
    exact = half <= 1e-9 * abs(value)
    # Two significant digits of the half width say how many decimals mean anything.
    decimals = 2 if exact else min(6, max(0, 1 - math.floor(math.log10(half))))
    return f"{value:.{decimals}f} ± {half:.{decimals}f}".replace("-", "−")


def number(value: float, shown: Quantity, *, signed: bool = False) -> str:
    """A value in the shown unit, with the digits that suit its column; a minus is a minus sign."""
    if isinstance(value, int):
        text = str(value)
    elif shown.general:
        text = f"{value:.6g}"
    elif shown.decimals is not None:
        text = f"{value:.{shown.decimals}f}"
    else:
        text = significant(value)
    zero = not float(text)
    sign = "+" if signed and value > 0 and not zero else ""
    return sign + (text.lstrip("-") if zero else text.replace("-", "−", 1) if text.startswith("-") else text)


def significant(value: float, digits: int = 3) -> str:
    """A number with ``digits`` significant digits and no exponent: 0.0123, 4.56, 789, 12300."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def p_value(p: float) -> str:
    """``p = 0.012``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
