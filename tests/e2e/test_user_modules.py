"""The user's own modules, called as Assay's or Python's own are, beside the spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.command import assay, rows

TASK = """
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helper_beside import SEED

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=int(Path("width.txt").read_text()))
options = parser.parse_args()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, options.width), nn.Linear(options.width, 4)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def make(workers=0):
    torch.manual_seed(SEED)
    model = Net().eval()
    x = torch.randn(120, 10)
    with torch.no_grad():
        y = model(x).argmax(1)
    parts = {"train": slice(0, 40), "validation": slice(40, 60), "test": slice(60, 120)}
    more = {"num_workers": workers, "persistent_workers": workers > 0}
    return model, {key: DataLoader(TensorDataset(x[part], y[part]), 16, **more) for key, part in parts.items()}
"""
METHOD = """
import copy
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Half:
    share: float = 0.5

    def compress(self, model, context):
        smaller = copy.deepcopy(model)
        with torch.no_grad():
            for weight in smaller.parameters():
                weight.view(-1)[: int(self.share * weight.numel())] = 0
        return smaller
"""
SPEC = """
task = {{name = "methods:make", workers = {workers}}}
method = ["baseline", {{name = "results:Half", share = 0.75}}]
hardware = "torch"
[measure]
min_queries = 50
min_seconds = 0.01
warmup_seconds = 0.0
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A fresh ``ASSAY_HOME``: these models are small, and nothing that was trained before is needed."""
    return tmp_path / "home"


@pytest.fixture
def folder(home: Path) -> Path:
    """A user's folder in which every name is taken."""
    place = home.parent
    (place / "methods.py").write_text(TASK)
    (place / "results.py").write_text(METHOD)
    (place / "helper_beside.py").write_text("SEED = 3")
    (place / "width.txt").write_text("16")
    for name in ("json", "hardware", "harness", "torch", "numpy", "queue"):
        (place / f"{name}.py").write_text("raise SystemExit('a file of the user replaced a module')")
    return place


@pytest.mark.parametrize("workers", [0, 2])
def test_modules_whose_names_are_taken_are_used_and_replace_nothing(home: Path, folder: Path, workers: int) -> None:
    (folder / "mine.toml").write_text(SPEC.format(workers=workers))
    assert "2 cells" in assay(home, "validate", "mine.toml", PYTHONSAFEPATH="1")[0]
    out, _ = assay(home, "run", "mine.toml", "--timeout", "120", "--json", PYTHONSAFEPATH="1")
    baseline, halved = json.loads(out)
    assert (baseline["status"], halved["status"]) == ("ok", "ok"), (baseline["reason"], halved["reason"])
    assert baseline["score"] == 1.0
    assert halved["pruning_rate"] == pytest.approx(0.75, abs=0.02)
    assert (halved["task"], halved["method"]) == ("methods:make", "results:Half")


def test_an_import_that_exits_is_the_users_error(home: Path) -> None:
    (home.parent / "exits.py").write_text("import sys\nsys.exit('no GPU')")
    path = home.parent / "exits.toml"
    for key in ("task", "method", "hardware"):
        path.write_text(("" if key == "task" else 'task = "digits-cnn"\n') + f'{key} = "exits:Thing"\n')
        for command in ("validate", "run"):
            _, err = assay(home, command, str(path), code=2)
            assert "importing 'exits' ended the program (sys.exit('no GPU'))" in err
    assert not rows_or_nothing(home)


def rows_or_nothing(home: Path) -> list[dict[str, object]]:
    return rows(home, "SELECT run_id FROM runs") if (home / "assay.duckdb").exists() else []


CRASHES = """
import os, sys, torch
from torch import nn

class Bad(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(10, 4)

    def forward(self, x):
        if self.kind == "exit":
            sys.exit("enough")
        if self.kind == "hard exit":
            os._exit(7)
        if self.kind == "keyboard":
            raise KeyboardInterrupt
        return self.linear(x)

def make(kind="fine"):
    torch.manual_seed(0)
    if kind == "make exits":
        sys.exit(3)
    if kind == "make asks":
        input("which? ")
    x = torch.randn(40, 10)
    return Bad(kind), {"validation": [(x, torch.arange(40) % 4)], "test": [(x, torch.arange(40) % 4)]}
"""
REASONS = {
    "exit": ["enough"],
    "hard exit": ["exit code 7"],
    "keyboard": ["KeyboardInterrupt"],
    "make exits": ["sys.exit(3)"],
    "make asks": ["input"],
    "fine": [],
}


def test_a_users_model_that_ends_the_process_is_a_record_and_the_sweep_goes_on(home: Path) -> None:
    (home.parent / "crashes.py").write_text(CRASHES)
    path = home.parent / "crashes.toml"
    path.write_text(
        f'task = {{name = "crashes:make", kind = {json.dumps(list(REASONS))}}}\n'
        "[measure]\nmin_queries = 50\nmin_seconds = 0.01\nwarmup_seconds = 0.0\n"
    )
    out, _ = assay(home, "run", str(path), "--json", code=1)
    found = json.loads(out)
    assert len(found) == len(REASONS)
    for row, (kind, words) in zip(found, REASONS.items(), strict=True):
        assert row["status"] == ("failed" if words else "ok"), (kind, row["reason"])
        assert all(word in row["reason"] for word in words), (kind, row["reason"])
