"""CONTRIBUTING.md's worked example is run as it is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.testing import check_method
from tests.e2e.command import ROOT, assay, rows

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD, _, SUITE = re.findall(r"```python\n(.*?)```", TEXT.partition("## Add a metric")[0], re.DOTALL)
SPEC = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "small_weights.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("small_weights", None)


def test_the_example_runs_as_module_and_class(home: Path, folder: Path) -> None:
    spec = SPEC.replace("methods.pruning.small_weights", "small_weights")
    assert spec != SPEC
    path = home.parent / "example.toml"
    path.write_text(spec + "[measure]\nmin_queries = 100\nmin_seconds = 0.01\n")
    assay(home, "run", str(path), PYTHONPATH=f"{ROOT}:{folder}")
    found = rows(home, "SELECT pruning_rate FROM runs WHERE status = 'ok' ORDER BY pruning_rate")
    pruned = [row["pruning_rate"] for row in found]
    assert len(pruned) == 3
    # Gaussian-like weights: about 38 % lie within half a standard deviation, about 68 % within one.
    assert pruned[0] < 0.05
    assert 0.2 < pruned[1] < 0.6 < pruned[2] < 0.9


def test_the_example_keeps_the_contract(folder: Path) -> None:
    check_method("small_weights:SmallWeights", deploy=False).require()


def test_the_suite_is_used_as_shown() -> None:
    assert "check_method(method_name).require()" in SUITE


def test_the_row_is_of_the_kind_that_the_table_holds() -> None:
    (row,) = re.findall(r'^    ("small-weights": Entry\(.*\)),$', TEXT, re.MULTILINE)
    from harness.registry import Entry

    assert eval(f"{{{row}}}", {"Entry": Entry})["small-weights"].target.endswith(":SmallWeights")
