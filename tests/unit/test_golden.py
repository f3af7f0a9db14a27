"""A database of the first record format, taken up by this version, gives the rows that its own version computed.

``golden/format1.zip`` holds record files that Assay wrote at d2cee94 (real runs on three runtimes, and edited copies of
them: counters, failures, other machines, missing values), and ``rows.json``, the rows of ``runs`` of that version.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from results import maintenance, queries

GOLDEN = Path(__file__).parent / "golden" / "format1.zip"


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(GOLDEN) as archive:
        archive.extractall(folder)
    db = folder / "golden.duckdb"
    done = maintenance.rebuild(db)
    expected = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    assert (done.records, done.claims) == (len(expected["runs"]), len(expected["claims"]))
    return db, expected


def test_every_column_has_its_old_value(rebuilt: tuple[Path, dict[str, Any]]) -> None:
    db, expected = rebuilt
    found = {row["run_id"]: row for row in queries.select(db, "runs")}
    assert list(found) == [row["run_id"] for row in expected["runs"]]
    differences = []
    for old in expected["runs"]:
        new = found[old["run_id"]]
        for name, value in old.items():
            if name == "reasons":
                value, now = json.loads(value), json.loads(new[name])
                # Columns that are new give reasons of their own.
                same = value == {key: text for key, text in now.items() if key in value or key in old}
            elif isinstance(value, float):
                now = new[name]
                same = now is not None and now == pytest.approx(value, rel=1e-12, abs=1e-15)
            else:
                now = new[name]
                same = now == value
            if not same:
                differences.append((old["run_id"], name, value, now))
    assert differences == []


def test_latest_and_claims_are_as_they_were(rebuilt: tuple[Path, dict[str, Any]]) -> None:
    db, expected = rebuilt
    assert [row["run_id"] for row in queries.select(db, "latest")] == expected["latest"]
    assert queries.query(db, "SELECT * FROM claims ORDER BY entry_id") == expected["claims"]


def test_the_tasks_metric_is_accuracy(rebuilt: tuple[Path, dict[str, Any]]) -> None:
    """The columns that speak of any metric say the same as those that speak of accuracy."""
    rows = [row for row in queries.select(rebuilt[0], "runs") if row["accuracy"] is not None]
    assert rows
    for row in rows:
        assert (row["metric"], row["metric_unit"], row["metric_better"]) == ("accuracy", "%", "higher")
        for end in ("", "_low", "_high", "_delta", "_delta_low", "_delta_high"):
            assert row[f"score{end}"] == row[f"accuracy{end}"]
        assert row["score_p"] == row["mcnemar_p"]
        assert row["units_per_s"] == pytest.approx(row["throughput_per_s"]) or row["units_per_s"] is None
