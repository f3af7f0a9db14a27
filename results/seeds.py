"""Rows of equal cells that differ in their seed, as one row: the mean with its interval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from harness import stats
from results.columns import QUANTITIES

Row = Mapping[str, Any]

_GROUP = ("task", "task_config", "chain", "hardware", "hardware_config", "batch_size", "threads", "machine_id")
P_VALUES = frozenset(shown.change for shown in QUANTITIES.values() if shown.change)
"""Columns that have no mean."""
_SAME = ("dataset_hash", "method_hash", "settings")


def over_seeds(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a cell, seeds left out: the mean of every metric, and a 95 % t-interval of that mean.

    The seed is the unit: the interval says how far the mean over all seeds may be from the mean over these, and
    replaces the interval of a single run (Wilson, Bonett-Price, p50 to p90). A metric that one of the runs lacks has no
    mean. With one seed there is no interval. p-values of single runs have no mean either.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of ``runs``.

    Returns
    -------
    list of dict
        As rows of ``runs``, the newest run's text columns kept, with ``seeds`` (the seeds, ascending), ``run_ids``, and
        ``intervals``: metric to (low, high) in the stored unit.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    return [_mean(found) for found in groups.values()]


def _mean(rows: Sequence[Row]) -> dict[str, Any]:
    newest = max(rows, key=lambda row: (row["created_at"], row["run_id"]))
    mean: dict[str, Any] = {
        **newest,
        "seeds": sorted(row["seed"] for row in rows),
        "run_ids": [row["run_id"] for row in rows],
        "intervals": {},
    }
    mean["warnings"] = _warnings(rows)
    metrics = {row["metric"] for row in rows}
    for name, shown in QUANTITIES.items():
        values = [row[name] for row in rows]
        for end in (shown.low, shown.high):
            if end is not None and end not in QUANTITIES:
                mean[end] = None
        if len(rows) == 1:
            continue
        if any(value is None for value in values) or name in P_VALUES or (shown.of_task and len(metrics) > 1):
            mean[name] = None
            continue
        found = stats.mean_interval(values)
        mean[name], mean["intervals"][name] = found.value, (found.low, found.high)
    return mean


def _warnings(rows: Sequence[Row]) -> str:
    """Of all the runs; a mean over different code or settings is said to be one."""
    found = dict.fromkeys(text for row in rows for text in json.loads(row["warnings"] or "[]"))
    for name in _SAME:
        if len({row[name] for row in rows}) > 1:
            found[f"the seeds' runs differ in {name}: run them again with --rerun"] = None
    return json.dumps(list(found))
