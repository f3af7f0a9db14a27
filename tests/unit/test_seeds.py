"""Means over seeds: against SciPy, and what they do not claim."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from results import labels, plots, queries, records, seeds, tables
from results.store import Store
from tests.unit.factories import predictions, record

PRUNED = [{"name": "magnitude", "sparsity": 0.9}]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    store = Store(tmp_path / "assay.duckdb")
    for seed, right in enumerate((90, 80, 85)):
        answers = [True] * right + [False] * (100 - right)
        records.write(store.folder, records.checked("record", record(seed=seed, **predictions([True] * 100))))
        pruned = record(seed=seed, chain=PRUNED, params_nonzero=100 + seed, **predictions(answers))
        records.write(store.folder, records.checked("record", pruned))
    store.sync()
    return queries.select(store.path, "runs")


def test_the_mean_has_scipys_t_interval(rows: list[dict[str, Any]]) -> None:
    baseline, pruned = sorted(seeds.over_seeds(rows), key=lambda row: row["chain"] != '[{"name":"baseline"}]')
    assert pruned["seeds"] == [0, 1, 2]
    expected = stats.t.interval(0.95, 2, loc=0.85, scale=stats.sem([0.9, 0.8, 0.85]))
    assert pruned["accuracy"] == pytest.approx(0.85)
    assert pruned["intervals"]["accuracy"] == pytest.approx(expected)
    assert pruned["intervals"]["accuracy_delta"] == pytest.approx(np.array(expected) - 1)
    assert pruned["params_nonzero"] == pytest.approx(101)
    assert pruned["mcnemar_p"] is None
    assert (pruned["score"], pruned["intervals"]["score"]) == (pruned["accuracy"], pruned["intervals"]["accuracy"])
    assert (pruned["score_p"], pruned["score_low"]) == (None, None)
    assert pruned["accuracy_low"] is None, "no interval of a single run is left"
    assert baseline["intervals"]["accuracy"] == (1.0, 1.0)


def test_one_seed_has_no_interval_and_a_gap_has_no_mean(rows: list[dict[str, Any]]) -> None:
    (alone,) = seeds.over_seeds([row for row in rows if row["seed"] == 1 and row["chain"] != '[{"name":"baseline"}]'])
    assert alone["intervals"] == {}
    assert alone["accuracy"] == 0.8
    gap = [{**row, "energy_j": None if row["seed"] == 2 else row["energy_j"]} for row in rows]
    assert all(row["energy_j"] is None for row in seeds.over_seeds(gap))


def test_means_over_different_code_are_said_to_be_so(rows: list[dict[str, Any]]) -> None:
    mixed = [{**row, "method_hash": str(row["seed"])} for row in rows]
    assert all("the seeds' runs differ in method_hash" in row["warnings"] for row in seeds.over_seeds(mixed))


def test_table_and_plot_show_the_interval(rows: list[dict[str, Any]]) -> None:
    merged = tables.ordered(seeds.over_seeds(rows), None)
    text = tables.render(tables.build(merged, ["method", "accuracy", "accuracy_delta", "mcnemar_p"]), "md")
    assert "85 ± 12" in text
    assert "−15 ± 12" in text
    assert "there is no mean of p-values" in text
    assert "Means over 3 seeds" in text
    assert "different seeds" not in text
    found, _ = plots.points(merged, "params_nonzero", "accuracy", curves=True)
    pruned = next(p for p in found if p["label"] == "magnitude")
    assert pruned["y_high"] - pruned["y"] == pytest.approx(100 * stats.sem([0.9, 0.8, 0.85]) * stats.t.ppf(0.975, 2))
    assert pruned["seeds"] == [0, 1, 2]
    assert json.loads(merged[0]["chain"]) == [{"name": "baseline"}]


def test_strengths_of_one_technique_are_one_curve(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    weaker = [{**row, "chain": row["chain"].replace("0.9", "0.5")} for row in rows]
    merged = seeds.over_seeds([*rows, *weaker])
    assert sorted(set(labels.curve_labels(merged))) == ["baseline", "magnitude"]
    found, notes = plots.points(merged, "params_nonzero", "accuracy", curves=True)
    plots.draw(found, "params_nonzero", "accuracy", tmp_path / "a.svg", notes)
    assert "95 % t-interval of the mean over seeds" in (tmp_path / "a.svg").read_text(encoding="utf-8")
