"""CONTRIBUTING.md's metric is run as it is printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness import metrics, stats
from harness.errors import InputError
from harness.registry import Entry
from tests.e2e.command import ROOT

SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Add a metric")[2].partition("\n## ")[0]
OBJECT, ROW = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "within.py").write_text(OBJECT)
    monkeypatch.syspath_prepend(tmp_path)
    yield "within:Within"
    sys.modules.pop("within", None)


def test_the_metric_is_scored_and_compared(name: str) -> None:
    metric = metrics.create({"name": name, "tolerance": 0.5})
    assert metric.name == "within"
    assert metrics.config(metric) == {"name": name, "tolerance": 0.5}
    rng = np.random.default_rng(0)
    target = rng.normal(size=200)
    good, bad = target + 0.4 * rng.normal(size=200), target + 0.9 * rng.normal(size=200)
    a, b = (metric.score({"y": output}, {"t": target}) for output in (good, bad))
    share = (np.abs(bad - target) <= 0.5).mean()
    assert metric.value(b) == share
    found = stats.interval(metric, b, 1)
    assert found.low < found.value == share < found.high
    paired = stats.compare(metric, a, b, 1)
    assert paired.test == "mcnemar"
    assert paired.delta == pytest.approx(share - metric.value(a))
    assert paired.p < 0.01
    with pytest.raises(InputError, match="equal shapes"):
        metric.score({"y": np.zeros((3, 2))}, {"t": np.zeros(3)})


def test_the_row_is_of_the_kind_that_the_table_holds() -> None:
    entry = eval(f"{{{ROW}}}", {"Entry": Entry})["within"]
    assert isinstance(entry, Entry)
    assert entry.target == "harness.metrics.within:Within"
    assert set(vars(entry)) == set(vars(metrics.TABLE["rmse"]))


def test_what_the_text_names_is_there() -> None:
    from harness.metrics.base import Scored, Sums
    from harness.metrics.values import R2, Spearman

    assert issubclass(R2, Sums)
    assert {"terms", "total"} <= set(vars(R2))
    assert issubclass(Spearman, Scored)
    assert not issubclass(Spearman, Sums)
    assert "weighted" in vars(Spearman)
