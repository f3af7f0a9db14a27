"""The figure that a claim is about, taken from a run; and how figures are written."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.errors import SpecError, UnknownName
from results.cells import significant
from results.columns import QUANTITIES
from results.quantities import Quantity, metric_title

if TYPE_CHECKING:
    from papers import Claim

Row = Mapping[str, Any]

ERROR = Quantity(label="Error", unit="%", better="lower")
"""100 % less the accuracy: what most papers on small networks print."""

_STAGED = frozenset({"params_nonzero", "plain_bytes", "container_bytes"})


def metric(name: str) -> Quantity:
    """Label, unit, scale and good direction of what a claim is about.

    Parameters
    ----------
    name : str
        "error", a numeric column of ``runs``, or a metric (``assay ls metrics``) that is the task's.

    Raises
    ------
    UnknownName
        With the nearest name.
    """
    if name == "error":
        return ERROR
    if name in QUANTITIES:
        return QUANTITIES[name]
    if not _is_metric(name):
        raise UnknownName("metric", name, ["error", *QUANTITIES, *registry.table("metric")])
    return _of_metric(name)


def _is_metric(name: str) -> bool:
    return name not in QUANTITIES and name in registry.table("metric")


@functools.cache
def _of_metric(name: str) -> Quantity:
    from harness import metrics

    made = metrics.create(name)
    percent = made.unit == "%"
    return Quantity(label=metric_title(name), unit=made.unit, better=made.better, scale=100.0 if percent else 1.0)


def check(claim: Claim) -> None:
    """Refuse a claim whose figure no run could have.

    Raises
    ------
    UnknownName, SpecError
        For an unknown metric, or one that is not kept per stage.
    """
    metric(claim.metric)
    allowed = {*_STAGED, "container_compression_ratio"}
    if claim.stage is not None and (claim.metric not in allowed or claim.stage < 0):
        raise SpecError(
            f"claim {claim.id!r}: metric {claim.metric!r} at stage {claim.stage!r}: stages (from 0, the model before "
            f"its first step) have {', '.join(sorted(allowed))}."
        )


def value(claim: Claim, row: Row) -> float | None:
    """The claim's figure of one run, in the metric's shown unit; None where it was not measured."""
    if claim.metric == "error":
        accuracy = row.get("accuracy")
        return None if accuracy is None else _rounded(100 * (1 - accuracy))
    if _is_metric(claim.metric):
        found = row.get("score") if row.get("metric") == claim.metric else None
    else:
        found = row.get(claim.metric) if claim.stage is None else _staged(claim, row)
    return None if found is None else _rounded(found * metric(claim.metric).scale)


def missing(claim: Claim, row: Row) -> str:
    """Why :func:`value` is None."""
    column = "accuracy" if claim.metric == "error" else claim.metric
    reason = _parsed(row.get("reasons"), {}).get("score" if _is_metric(column) else column)
    if _is_metric(column) and row.get("metric") not in (None, column):
        reason = f"the task's metric is {row['metric']}"
    where = "" if claim.stage is None else f" after stage {claim.stage}"
    return f"{column} was not measured{where}" + (f": {reason}" if reason else "")


def written(name: str, number: float, signed: bool = False) -> str:
    """A number with the digits that suit its metric."""
    sign, unit = ("+" if signed else ""), metric(name).unit
    if unit in ("%", "points"):
        return f"{number:{sign}.2f}"
    if unit == "×":
        return f"{number:{sign}.{1 if abs(number) >= 10 else 2}f}"
    if _is_metric(name):
        text = significant(number, 4)
        return f"+{text}" if signed and number > 0 else text
    if unit == "":
        return f"{number:{sign},.0f}" if abs(number) >= 10 else f"{number:{sign}.3g}"
    return f"{number:{sign},.0f}" if abs(number) >= 1000 else f"{number:{sign}.3g}"


def unit(name: str, difference: bool = False) -> str:
    """The unit that follows the number, with its space; differences of percentages are points."""
    shown = metric(name).unit
    if not shown or shown == "×":
        return shown
    return " points" if difference and shown == "%" else f" {shown}"


def _staged(claim: Claim, row: Row) -> float | None:
    stages = _parsed(row.get("stages"), [])
    if claim.stage is None or claim.stage >= len(stages):
        return None
    stage = stages[claim.stage]  # stage 0 is the model that the chain begins with
    if claim.metric in _STAGED:
        found = stage.get(claim.metric)
        return None if found is None else float(found)
    # The ratio's numerator is the baseline's: it is what the run's own ratio and size multiply to.
    ratio, deployed, then = (
        row.get("container_compression_ratio"),
        row.get("container_bytes"),
        stage.get("container_bytes"),
    )
    return None if ratio is None or deployed is None or not then else ratio * deployed / then


def _parsed(given: Any, default: Any) -> Any:
    return (json.loads(given) if isinstance(given, str) else given) or default


def _rounded(number: float) -> float:
    # Ten decimals: more than any test set resolves, and 0.6676 reads 66.76 and not 66.75999999999999.
    return round(float(number), 10)
