"""Results of a model that was since exchanged or edited are not held against the new baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import assay, rows

TASK = """
from pathlib import Path

import torch

from nets import Net


def make():
    torch.manual_seed(0)
    labelling, x = Net(), torch.randn(300, 6)
    with torch.no_grad():
        y = labelling.last(torch.relu(labelling.first(x))).argmax(1)
    torch.manual_seed(int(Path("checkpoint.txt").read_text()))
    model = Net().eval()
    parts = {"train": slice(0, 100), "validation": slice(100, 150), "test": slice(150, 300)}
    return model, {key: [(x[part], y[part])] for key, part in parts.items()}
"""
NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))
"""
SPEC = """
task = "mine:make"
method = {methods}
hardware = "torch"
[measure]
min_queries = 50
min_seconds = 0.01
warmup_seconds = 0.0
"""


def run(home: Path, *methods: str) -> list[dict[str, Any]]:
    path = home.parent / "spec.toml"
    path.write_text(SPEC.format(methods=json.dumps(methods)))
    return list(json.loads(assay(home, "run", str(path), "--json")[0]))


def magnitudes(home: Path) -> list[Any]:
    return rows(home, "SELECT score, score_delta FROM runs WHERE method = 'magnitude' ORDER BY created_at")


@pytest.mark.parametrize("change", ["checkpoint", "code"])
def test_a_row_is_paired_only_with_the_baseline_of_its_own_model(home: Path, change: str) -> None:
    here = home.parent
    (here / "mine.py").write_text(TASK)
    (here / "nets.py").write_text(NETS)
    (here / "checkpoint.txt").write_text("0")
    first = run(home, "baseline", "magnitude")
    assert [row["status"] for row in first] == ["ok", "ok"]
    assert first[0]["score"] == 1.0
    delta = first[1]["score"] - first[0]["score"]
    before = magnitudes(home)
    if change == "checkpoint":
        (here / "checkpoint.txt").write_text("1")
    else:
        (here / "nets.py").write_text(NETS.replace("relu(self.first(x))", "sin(9 * self.first(x))"))
    (second,) = run(home, "baseline")
    assert second["score"] < 0.9  # nothing of the old model was taken for it
    assert magnitudes(home) == before
    assert before[0]["score_delta"] == pytest.approx(delta)
