"""Plots: the points, the Pareto front, the refusal to mix, and files that are what they claim to be."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError, Unavailable, UnknownName
from results import plots, queries, records, schema
from results.columns import QUANTITIES
from results.store import Store
from tests.unit.factories import predictions, reading, record


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store = Store(tmp_path_factory.mktemp("plots") / "assay.duckdb")
    for task in ("digits-cnn", "fashion-mnist/lenet"):
        for i, (milliseconds, right) in enumerate([(8, 95), (4, 93), (4, 90), (1, 80)]):
            item = record(
                task=task,
                chain=[{"name": "baseline"}] if i == 0 else [{"name": "magnitude", "sparsity": 0.2 * i}],
                latency_ns=[milliseconds * 1_000_000 + 1000 * j for j in range(100)],
                energy=[] if i == 3 else [reading(gross_j=milliseconds)],
                **predictions([True] * right + [False] * (100 - right)),
            )
            records.write(store.folder, records.checked("record", item))
    store.sync()
    return queries.select(store.path, "latest")


def test_points_carry_units_intervals_and_the_front(rows: list[dict[str, Any]]) -> None:
    found, notes = plots.points(rows, "latency_p50_ms", "accuracy")
    assert notes == []
    assert [(round(p["x"]), round(p["y"]), p["pareto"]) for p in found if p["task"] == "digits-cnn"] == [
        (8, 95, True),
        (4, 93, True),
        (4, 90, False),
        (1, 80, True),
    ]
    for p in found:
        assert p["y_low"] < p["y"] < p["y_high"]
        assert p["x_low"] == p["x"] <= p["x_high"]


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
@pytest.mark.parametrize("y", ["accuracy", "energy_j"])
def test_the_front_is_what_nothing_dominates(rows: list[dict[str, Any]], values: list[tuple[int, int]], y: str) -> None:
    made = [{**rows[0], "run_id": str(i), "latency_p50_ms": a, y: b} for i, (a, b) in enumerate(values)]
    found, _ = plots.points(made, "latency_p50_ms", y)
    better = 1 if QUANTITIES[y].better == "higher" else -1
    for p, (a, b) in zip(found, values, strict=True):
        dominated = any(c <= a and better * d >= better * b and (c, d) != (a, b) for c, d in values)
        assert p["pareto"] is not dominated


def test_rows_without_a_value_are_counted_with_the_reason(rows: list[dict[str, Any]]) -> None:
    found, notes = plots.points(rows, "energy_j", "accuracy")
    assert len(found) == 6
    assert notes == ["2 rows left out (energy_j: no meter was read)"]
    with pytest.raises(InputError, match=r"Nothing to plot.*p99 needs 662"):
        plots.points(rows, "latency_p99_ms", "accuracy")


def test_measured_and_modelled_energy_never_share_an_axis(rows: list[dict[str, Any]]) -> None:
    mixed = [rows[0], {**rows[1], "energy_method": "measured_counter"}]
    with pytest.raises(InputError, match="energy_method=modelled"):
        plots.points(mixed, "energy_j", "accuracy")
    assert len(plots.points(mixed, "latency_p50_ms", "accuracy")[0]) == 2


def test_unknown_metrics_and_suffixes_are_refused(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'latency_p50_ms'"):
        plots.points(rows, "latency_p50", "accuracy")
    found, _ = plots.points(rows, "latency_p50_ms", "accuracy")
    with pytest.raises(InputError, match=r"\.png, \.svg, \.pdf"):
        plots.draw(found, "latency_p50_ms", "accuracy", tmp_path / "a.jpg")


def test_every_metric_is_a_numeric_column_and_draws() -> None:
    columns = schema.documented()["runs"].columns
    assert set(QUANTITIES) <= set(columns)
    for metric in QUANTITIES.values():
        assert {metric.low, metric.high} - {None} <= set(columns)
        assert bool(metric.interval) == (metric.low is not None)


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_of_their_kind_and_the_same_each_time(
    rows: list[dict[str, Any]], tmp_path: Path, suffix: str, magic: bytes
) -> None:
    found, notes = plots.points(rows, "latency_p50_ms", "accuracy")
    contents = []
    for name in ("a", "b"):
        plots.draw(found, "latency_p50_ms", "accuracy", tmp_path / f"{name}{suffix}", notes)
        contents.append((tmp_path / f"{name}{suffix}").read_bytes())
    assert contents[0].startswith(magic)
    assert contents[0] == contents[1]


def test_the_svg_says_task_methods_units_and_direction(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    found, notes = plots.points(rows, "energy_j", "accuracy")
    plots.draw(found, "energy_j", "accuracy", tmp_path / "a.svg", notes)
    text = " ".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    for word in (
        "digits-cnn",
        "fashion-mnist/lenet",
        "baseline",
        "magnitude (sparsity=0.2)",
        "mJ",
        "modelled",
        "← better",
    ):
        assert word in text
    assert "2 rows left out" in text
    assert "Pareto front" in text


def test_methods_differ_without_colour(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import matplotlib.image

    found, _ = plots.points(rows, "latency_p50_ms", "accuracy")
    plots.draw(found, "latency_p50_ms", "accuracy", tmp_path / "a.png")
    image = np.asarray(matplotlib.image.imread(tmp_path / "a.png"))[..., :3]
    # Only greys: what a grey printer loses is nothing.
    assert float(np.abs(image - image.mean(axis=-1, keepdims=True)).max()) < 0.01


def test_without_matplotlib_the_install_line_is_given(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = plots.points(rows, "latency_p50_ms", "accuracy")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unavailable, match=r'pip install "assay-bench\[plot\]"'):
        plots.draw(found, "latency_p50_ms", "accuracy", tmp_path / "a.png")
