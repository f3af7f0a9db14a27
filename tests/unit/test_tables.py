"""Tables: what a cell says, what a missing value says, and that the three formats can be read back."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from harness.errors import UnknownName
from results import cells as cells_module
from results import queries, records, tables
from results.store import Store
from tests.unit.factories import predictions, record, score, unmeasured


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store = Store(tmp_path_factory.mktemp("tables") / "assay.duckdb")
    small = {"sha256": "f" * 64, "size_bytes": 1000, "zstd_bytes": 900, "files": ["m"], "format": "onnx"}
    right = [True] * 900 + [False] * 100
    for item in (
        record(latency_ns=[2_000_000] * 70, **predictions(right)),
        record(
            chain=[{"name": "magnitude", "sparsity": 0.5, "scope": "global"}], **predictions([*right[6:], *right[:6]])
        ),
        record(
            chain=[{"name": "magnitude", "sparsity": 0.9, "scope": "global"}],
            energy=[],
            reasons={"energy": "switched off"},
        ),
        record(
            chain=[
                {"name": "magnitude", "sparsity": 0.5, "scope": "layer"},
                {"name": "ptq-int8", "bits": 8, "n": 50},
            ],
            artifact=small,
            latency_ns=[500_000] * 70,
            **predictions(right[::-1]),
        ),
        unmeasured("failed", "100 % of a_b & c", seed=4),
    ):
        records.write(store.folder, records.checked("record", item))
    store.sync()
    return queries.select(store.path, "latest")


def ok(rows: list[dict[str, Any]]) -> list[Any]:
    return tables.ordered([row for row in rows if row["status"] == "ok"], None)


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in [lines[0], *lines[2:]]]


def test_markdown_says_what_a_reader_wants(rows: list[dict[str, Any]]) -> None:
    text = tables.render(tables.build(ok(rows), tables.columns(None)), "md")
    header, baseline, *others = cells(text)
    assert header[:4] == ["Task", "Method", "Hardware", "Precision"]
    found = dict(zip(header, baseline, strict=True))
    assert found["Method"] == "baseline"
    assert found["Accuracy % [95 %]"] == "90.00 [87.98, 91.71]"
    assert (found["Δ points"], found["Speed-up"], found["p50 ms"], found["Size kB"]) == (
        "0.00",
        "1.00×",
        "2.00",
        "4.00",
    )
    assert found["Energy mJ"] == "20.0 modelled"
    chained = dict(zip(header, next(row for row in others if "ptq-int8" in row[1]), strict=True))
    assert chained["Method"] == "magnitude (scope=layer, sparsity=0.5) > ptq-int8 (bits=8)"
    assert (chained["Ratio"], chained["Speed-up"]) == ("4.00×", "4.00×")
    assert chained["Δ points"] == "0.00 (p = 1.00)"


def test_a_missing_value_is_a_dash_with_its_reason(rows: list[dict[str, Any]]) -> None:
    text = tables.render(tables.build(ok(rows), ["method", "energy_j", "energy_ratio", "latency_p99_ms"]), "md")
    assert "– [1]" in text
    assert "[1] 70 samples; p99 needs 662" in text
    assert re.search(r"\[\d\] switched off", text)
    assert "| 0 " not in text


def test_rows_that_do_not_compare_are_said_so(rows: list[dict[str, Any]]) -> None:
    same, other = (
        ok(rows)[0],
        {**ok(rows)[0], "machine_id": "m2", "threads": 2, "settings": "{}", "energy_method": "measured_counter"},
    )
    assert tables.comparability([same, same]) == []
    models = [{**same, "original_sha256": digit * 64} for digit in "ab"]
    assert "different models" in " ".join(tables.comparability(models))
    assert tables.comparability([models[0], {**models[1], "task": "other"}]) == []
    notes = " ".join(tables.comparability([same, other]))
    for text in ("2 machines", "2 different settings", "2 different thread counts", "measured_counter and modelled"):
        assert text in notes


def test_latex_is_escaped_and_rectangular(rows: list[dict[str, Any]]) -> None:
    chosen = tables.ordered(rows, None)
    text = tables.render(tables.build(chosen, ["task", "method", "status", "reason", "speedup"], "latex"), "latex")
    assert r"100 \% of a\_b \& c" in text
    assert r"$\times$" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    table = text[: text.index(r"\bottomrule")]
    lines = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {4}
    assert not re.search(r"(?<!\\)[%_#]", table[table.index(r"\midrule") :])


def test_csv_gives_raw_values_back(rows: list[dict[str, Any]]) -> None:
    names = ["run_id", "chain", "accuracy", "energy_j"]
    chosen = ok(rows)
    read = list(csv.DictReader(io.StringIO(tables.render(tables.build(chosen, names, "csv"), "csv"))))
    assert [row["chain"] for row in read] == [row["chain"] for row in chosen]
    assert [float(row["accuracy"]) for row in read] == [row["accuracy"] for row in chosen]
    assert [row["energy_j"] == "" for row in read] == [row["energy_j"] is None for row in chosen]


def test_sorting_puts_missing_values_last(rows: list[dict[str, Any]]) -> None:
    for sort, reverse in (("energy_j", False), ("-energy_j", True)):
        values = [row["energy_j"] for row in tables.ordered(rows, sort)]
        there = [value for value in values if value is not None]
        assert there == sorted(there, reverse=reverse)
        assert values[len(there) :] == [None] * (len(values) - len(there))


def test_strengths_of_a_method_come_in_their_order(rows: list[dict[str, Any]]) -> None:
    def row(sparsity: float) -> dict[str, Any]:
        return {**rows[0], "method": "magnitude", "chain": json.dumps([{"name": "magnitude", "sparsity": sparsity}])}

    given = [0.98, 0.9, 1e-05, 0.5, 0.95]
    chains = [entry["chain"] for entry in tables.ordered([row(value) for value in given], None)]
    assert [json.loads(chain)[0]["sparsity"] for chain in chains] == sorted(given)


def test_unknown_columns_get_the_nearest(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'speedup'"):
        tables.columns("task,speed_up")
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        tables.ordered(rows, "-acuracy")


def test_older_results_of_the_same_cell_are_left_out(rows: list[dict[str, Any]]) -> None:
    old, new = rows[0], {**rows[0], "run_id": "9", "created_at": "2027-01-01T00:00:00+00:00", "cell_hash": "other"}
    assert tables.newest_per_cell([new, old, rows[1]]) == ([new, rows[1]] if rows[0] is old else [], 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.012345, "0.0123"), (4.5678, "4.57"), (12345.6, "12346"), (999.6, "1000"), (1e-7, "0.000000100")],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert cells_module.significant(value) == text


def test_the_terminal_table_has_the_same_cells(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=240)
    console.print(tables.console_table(ok(rows), ["method", "speedup", "energy_j"]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4.00×" in shown
    assert "[1] switched off" in shown


# ---- metrics that are no accuracy, and what differs between rows ----


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A classification, a regression, and a language model that is timed by phase; two of each."""
    store = Store(tmp_path_factory.mktemp("mixed") / "assay.duckdb")
    workload = {"phases": [["prefill", 1], ["decode", 3]], "sizes": {"tokens": 16}, "unit": "token"}
    latency = {"prefill": [5_000_000] * 70, "decode": [1_000_000] * 210}
    values = [1 + i / 100 for i in range(50)]
    for chain in ([{"name": "baseline"}], [{"name": "magnitude", "sparsity": 0.5}]):
        worse = [value + 0.25 * (len(chain[0]) - 1) for value in values]
        regression: dict[str, Any] = {"task": "regression", "chain": chain, "scores": [score("mae", worse)]}
        nll = {"nll": worse, "tokens": [1] * len(worse)}
        perplexity = score("perplexity", worse, parts=nll, value=math.exp(sum(worse) / len(worse)))
        model: dict[str, Any] = {"task": "language", "chain": chain, "scores": [perplexity]}
        for item in (record(chain=chain), record(**regression), record(**model, workload=workload, latency=latency)):
            records.write(store.folder, records.checked("record", item))
    store.sync()
    return tables.ordered(queries.select(store.path, "latest"), None)


def test_the_tasks_metric_is_the_heading(mixed: list[dict[str, Any]]) -> None:
    rows = [row for row in mixed if row["task"] == "regression"]
    header, baseline, pruned = cells(tables.render(tables.build(rows, tables.columns(None, rows)), "md"))
    found = dict(zip(header, pruned, strict=True))
    assert "MAE [95 %]" in header
    assert "Metric" not in header
    assert re.fullmatch(r"1\.50 \[1\.\d\d, 1\.\d\d\]", found["MAE [95 %]"])
    assert found["Δ"] == "+0.250 (p < 0.001)"
    assert dict(zip(header, baseline, strict=True))["Δ"] == "0"


def test_rows_of_several_metrics_name_them(mixed: list[dict[str, Any]]) -> None:
    header, *body = cells(tables.render(tables.build(mixed, tables.columns(None, mixed)), "md"))
    found = [dict(zip(header, row, strict=True)) for row in body]
    assert [row["Metric"] for row in found] == ["accuracy"] * 2 + ["perplexity"] * 2 + ["mae"] * 2
    assert found[0]["Score [95 %]"] == "90.00 % [82.56, 94.48]"
    assert found[4]["Score [95 %]"].startswith("1.25")
    assert found[1]["Δ"] == "0.00 points (p = 1.00)"
    assert (found[2]["Prefill p50 ms"], found[2]["Decode p50 ms"], found[0]["p50 ms"]) == ("5.00", "1.00", "1.05")


def test_json_gives_a_metric_with_its_name_unit_and_direction(mixed: list[dict[str, Any]]) -> None:
    rows = tables.json_rows(mixed, ["task", "score"])
    assert rows[-1] == {
        "task": "regression",
        "score": pytest.approx(1.495),
        "metric": "mae",
        "metric_unit": "",
        "metric_better": "lower",
    }
    assert tables.json_rows(mixed, ["task"])[0] == {"task": "digits-cnn"}


def test_rows_that_differ_in_a_tasks_parameters_show_them(rows: list[dict[str, Any]]) -> None:
    first = ok(rows)[0]
    given = [{"epochs": 1, "width": 8}, {"epochs": 2, "width": 8}, {"epochs": 2, "width": 8, "name": "x"}]
    many = [{**first, "task_config": json.dumps(config)} for config in given]
    made = tables.build([*many, {**first, "task": "other"}], ["task"])
    assert [row[0] for row in made.body] == [
        "digits-cnn (epochs=1)",
        "digits-cnn (epochs=2)",
        "digits-cnn (epochs=2, name=x)",
        "other",
    ]


def test_a_name_cannot_make_a_row(rows: list[dict[str, Any]]) -> None:
    forged = {**ok(rows)[0], "task": "a\n| forged | row |"}
    assert len(cells(tables.render(tables.build([forged], ["task", "speedup"]), "md"))) == 2


def test_building_is_linear(rows: list[dict[str, Any]]) -> None:
    """Parameters are parsed once a row, however many rows there are."""
    parsed = 0

    real = json.loads

    def counting(text: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal parsed
        parsed += 1
        return real(text, *args, **kwargs)

    counts = []
    for many in (10, 40):
        parsed = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json, "loads", counting)
            tables.build([ok(rows)[0]] * many, tables.DEFAULT_COLUMNS)
        counts.append(parsed / many)
    assert counts[0] == counts[1]


def test_names_that_begin_with_a_digit_are_no_numbers(rows: list[dict[str, Any]]) -> None:
    text = tables.render(tables.build([{**ok(rows)[0], "task": "22_names:make"}], ["task", "run_id", "speedup"]), "md")
    rule = text.splitlines()[1]
    assert [cell.strip().endswith(":") for cell in rule.strip("|").split("|")] == [False, False, True]
