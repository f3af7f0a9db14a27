"""The statistics that are computed once, when a record is taken up: intervals, and comparisons with the baseline.

A proportion needs no more than its counts. Other metrics are resampled by the metric's own code, which is the user's
for ``module:Class``: that is imported for records of this machine only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness import environment, stats
from harness.errors import explanation
from results.appending import append

if TYPE_CHECKING:
    from harness.contracts import Metric

Parts = Mapping[str, Sequence[float | None]]
"""Part of a metric to one number an example."""

RANDOM = "the model is random in evaluation"
OTHER_EXAMPLES = "the baseline was not evaluated on the same examples"
NO_PARTS = "no scores of single examples were recorded"
_CHUNK = 50
"""Runs whose scores are in memory together."""
_NOTHING: Mapping[str, Any] = dict.fromkeys(("delta", "low", "high", "p", "test", "gained", "lost", "reason"))
_ITSELF: Mapping[str, Any] = {**_NOTHING, "delta": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}

# Scores against targets of runs that have a baseline with which they are not compared yet.
_CHANGED = """
    SELECT s.run_id, s.i, s.metric, s.config, s.proportion, s.value, s.split_sha256,
        CASE WHEN r.origin IS NULL THEN r.machine_id END AS machine_id,
        p.baseline_run_id, t.i AS baseline_i, t.value AS baseline_value, t.split_sha256 AS baseline_split_sha256,
        coalesce(r.random_in_evaluation, false) OR coalesce(b.random_in_evaluation, false) AS random
    FROM scores s
    JOIN pairs p USING (run_id)
    JOIN records r USING (run_id)
    JOIN records b ON b.run_id = p.baseline_run_id
    LEFT JOIN scores t
        ON t.run_id = p.baseline_run_id AND t.against = 'targets' AND t.metric = s.metric AND t.config = s.config
        AND t.data = s.data
    LEFT JOIN comparisons c ON c.run_id = s.run_id AND c.i = s.i
    WHERE s.against = 'targets' AND c.baseline_run_id IS DISTINCT FROM p.baseline_run_id
    QUALIFY row_number() OVER (PARTITION BY s.run_id, s.i ORDER BY t.i) = 1
    ORDER BY p.baseline_run_id, s.run_id, s.i
"""


class _NoneError(Exception):
    """Why there is no statistic."""


@dataclass(frozen=True)
class _Proportion:
    """What the statistics need of a proportion whose own code is not here: which part says what is right."""

    name: str
    parts: tuple[str]
    proportion: bool = True


def interval(score: Mapping[str, Any], parts: Parts, machine_id: str | None) -> dict[str, Any]:
    """The columns ``low``, ``high`` and ``no_interval`` of a row of ``scores``.

    Parameters
    ----------
    score : mapping
        The rest of the row.
    parts : mapping
        What every example left.
    machine_id : str or None
        Where the record was made; None for a merged one.
    """
    if score["against"] != "targets":
        return {"low": None, "high": None, "no_interval": None}
    try:
        found = _interval(score, parts, machine_id)
    except _NoneError as error:
        return {"low": None, "high": None, "no_interval": str(error)}
    return {"low": found.low, "high": found.high, "no_interval": None}


def _interval(score: Mapping[str, Any], parts: Parts, machine_id: str | None) -> stats.Interval:
    if not score["n"] or score["value"] is None:
        raise _NoneError("there is no value")
    if score["proportion"] and not parts:  # a record of format 1 may have no more than counts
        return stats.wilson(round(score["value"] * score["n"]), score["n"])
    if not score["proportion"] and score["n"] < stats.MIN_RESAMPLED:
        raise _NoneError(_too_few(score["n"]))
    metric = _metric(score, parts, machine_id)
    seed = stats.seed_of(score["run_id"])
    found: stats.Interval = _computed(metric, lambda: stats.interval(metric, _matrix(metric, parts), seed))
    if not math.isclose(found.value, score["value"], rel_tol=1e-6, abs_tol=1e-9):
        raise _NoneError(f"{metric.name} of the recorded examples is {found.value:g} here, not {score['value']:g}")
    _defined(found.low, found.high)
    return found


def _too_few(n: int) -> str:
    return f"{n} examples are too few to be resampled: an interval and a test need {stats.MIN_RESAMPLED}"


def _metric(score: Mapping[str, Any], parts: Parts, machine_id: str | None) -> Any:
    """The metric of a score; of a proportion whose code is not here, what the statistics need of it."""
    if not parts:
        raise _NoneError(NO_PARTS)
    made = _made(score["config"], machine_id)
    if not isinstance(made, str):
        return made
    if score["proportion"]:
        fitting = [name for name, values in parts.items() if _is_mean(values, score["value"])]
        if len(fitting) == 1:
            return _Proportion(score["metric"], (fitting[0],))
    raise _NoneError(made)


def _is_mean(values: Sequence[float | None], value: float) -> bool:
    there = [item for item in values if item is not None]
    return bool(there) and {*there} <= {0, 1} and math.isclose(sum(there) / len(there), value, abs_tol=1e-9)


@functools.lru_cache(maxsize=64)
def _made(config: str, machine_id: str | None) -> Metric | str:
    """The metric of a record, or why it cannot be made here."""
    from harness import metrics

    item = json.loads(config)
    name = str(item.get("name"))
    if ":" in name and (machine_id is None or machine_id != environment.machine()["machine_id"]):
        return f"{name} is the user's own code, which is run for records of this machine only"
    try:
        return metrics.create(item)
    except Exception as error:  # noqa: BLE001  # the user's module may raise anything when it is imported
        return f"the metric {name!r} cannot be made here: {explanation(error)}"


def forget() -> None:
    """Make metrics anew when they are next needed: the user's code may have changed."""
    _made.cache_clear()


def _computed(metric: Any, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except _NoneError:
        raise
    except Exception as error:  # a metric may be anybody's; what it raises must not keep a record out
        raise _NoneError(f"computing {metric.name} raised {explanation(error)}") from error


def _defined(*values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise _NoneError("it is not defined on these examples")


def _matrix(metric: Any, parts: Parts) -> Any:
    """Scores, shape (n, parts), in the metric's order; an example without a score is NaN."""
    import numpy as np

    if missing := [name for name in metric.parts if name not in parts]:
        raise _NoneError(f"the record lacks the parts {', '.join(missing)} of {metric.name}")
    return np.array([parts[name] for name in metric.parts], dtype=np.float64).T


def bring_up_to_date(connection: Any) -> None:
    """Compare every run whose baseline is another than it was compared with; the caller holds the transaction.

    A newer baseline, or one that arrives late, changes what a run is compared with.
    """
    cursor = connection.execute(_CHANGED)
    names = [column[0] for column in cursor.description]
    changed = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    for start in range(0, len(changed), _CHUNK):
        chunk = changed[start : start + _CHUNK]
        ids = list({row[name] for row in chunk for name in ("run_id", "baseline_run_id")})
        parts: dict[tuple[str, int], dict[str, Any]] = {}
        query = "SELECT run_id, i, part, by_example FROM example_scores WHERE run_id IN (SELECT unnest(?))"
        for run_id, i, part, values in connection.execute(query, [ids]).fetchall():
            parts.setdefault((run_id, i), {})[part] = values
        keys = ("run_id", "i", "metric", "baseline_run_id")
        rows = [{key: row[key] for key in keys} | _compared(row, parts) for row in chunk]
        connection.execute(
            "DELETE FROM comparisons WHERE (run_id, i) IN (SELECT unnest(?), unnest(?))",
            [[row["run_id"] for row in rows], [row["i"] for row in rows]],
        )
        append(connection, "comparisons", rows)


def _compared(row: Mapping[str, Any], parts: Mapping[tuple[str, int], Parts]) -> dict[str, Any]:
    """The columns of ``comparisons`` of a score and the baseline's."""
    if row["random"]:
        return {**_NOTHING, "reason": RANDOM}
    if row["split_sha256"] is None or row["split_sha256"] != row["baseline_split_sha256"]:
        return {**_NOTHING, "reason": OTHER_EXAMPLES}
    if row["value"] is None or row["baseline_value"] is None:
        return {**_NOTHING, "reason": "the metric has no value for this run or for the baseline"}
    if row["run_id"] == row["baseline_run_id"]:
        # A run against itself differs by nothing at all, so its interval has no width.
        counts, test = ({"gained": 0, "lost": 0}, "mcnemar") if row["proportion"] else ({}, "randomization")
        return {**_ITSELF, **counts, "test": test}
    ours, baseline = (
        parts.get((row["run_id"], row["i"]), {}),
        parts.get((row["baseline_run_id"], row["baseline_i"]), {}),
    )
    n = min((len(values) for part in (ours, baseline) for values in part.values()), default=0)
    if not row["proportion"] and 0 < n < stats.MIN_RESAMPLED:
        return {**_NOTHING, "delta": row["value"] - row["baseline_value"], "reason": _too_few(n)}
    try:
        return {**_NOTHING, **_difference(row, ours, baseline)}
    except _NoneError as error:
        return {**_NOTHING, "reason": str(error)}


def _difference(row: Mapping[str, Any], ours: Parts, baseline: Parts) -> dict[str, Any]:
    metric = _metric(row, ours, row["machine_id"])
    seed = stats.seed_of(row["run_id"], row["baseline_run_id"])
    found = _computed(metric, lambda: stats.compare(metric, _matrix(metric, baseline), _matrix(metric, ours), seed))
    _defined(found.delta, found.low, found.high, found.p)
    return {name: getattr(found, name) for name in ("delta", "low", "high", "p", "test", "gained", "lost")}
