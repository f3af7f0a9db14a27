"""What can be said of a column: its name, meaning and unit, and of a numeric one how a reader wants it shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """How a reader wants a numeric column called, scaled and compared.

    Parameters
    ----------
    label : str
        For an axis.
    unit : str
        After scaling; empty for a plain number.
    better : {"higher", "lower"}
        Which way is better.
    heading : str
        For a table; by default the label.
    scale : float
        Shown value = stored value x scale.
    decimals : int or None
        Digits after the point; None for three significant digits.
    general : bool
        Six significant digits, with an exponent where they need one.
    log : bool
        Whether a logarithmic axis suits it.
    low, high : str or None
        Columns of its interval.
    interval : str
        What the interval is; a table shows it in brackets where it is one of 95 %.
    change : str or None
        Of a difference from the baseline: the column of its p-value. It is written with its sign.
    kind : str or None
        A column whose first word follows the number.
    of_task : bool
        Label, unit, scale and direction are those of the task's metric.
    """

    label: str
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    heading: str = ""
    scale: float = 1.0
    decimals: int | None = None
    general: bool = False
    log: bool = False
    low: str | None = None
    high: str | None = None
    interval: str = ""
    change: str | None = None
    kind: str | None = None
    of_task: bool = False

    def of(self, metric: str, unit: str, better: Literal["higher", "lower"]) -> Quantity:
        """The quantity where the task's metric is the one named; a change is in points where that is in per cent."""
        name, percent = metric_title(metric), unit == "%"
        label, heading = (f"{name} change", self.heading) if self.change else (name, name)
        return replace(
            self,
            label=label,
            heading=heading,
            unit="points" if percent and self.change else unit,
            better=better,
            scale=100.0 if percent else 1.0,
            decimals=2 if percent else None,
            of_task=False,
        )

    @property
    def title(self) -> str:
        """Label and unit, for an axis."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def column_heading(self) -> str:
        """Heading and unit, for a table; a ratio's unit stands behind its numbers."""
        text = self.heading or self.label
        text += f" {self.unit}" if self.unit and self.unit != "×" else ""
        return f"{text} [95 %]" if self.bracketed else text

    @property
    def bracketed(self) -> bool:
        """Whether a table shows the interval behind the value."""
        return self.interval.startswith("95 %") and self.change is None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of ``runs``.

    Parameters
    ----------
    name, sql : str
        Its name, and what it is.
    text, unit : str
        Its meaning, and the unit of the stored value.
    why : tuple of str
        SQL texts: why it is NULL; empty for a column that never is, or needs no reason.
    section : str
        Of ``assay show``; empty where another column there says the same.
    field : str or None
        SQL type of the record's field of this name, where it is stored in ``records`` as it is.
    heading : str
        Of a column that is no quantity.
    shown : Quantity or None
        Of a numeric column.
    """

    name: str
    sql: str
    text: str
    unit: str
    why: tuple[str, ...] = ()
    section: str = ""
    field: str | None = None
    heading: str = ""
    shown: Quantity | None = None


_ACRONYMS = ("f1", "mae", "psnr", "r2", "rmse", "sqnr")


def metric_title(name: str) -> str:
    """A metric's name as a heading: ``Accuracy@5``, ``RMSE``."""
    word = re.match(r"[a-z0-9]*", name)
    first = word[0] if word else ""
    return (first.upper() if first in _ACRONYMS else first.capitalize()) + name[len(first) :]
