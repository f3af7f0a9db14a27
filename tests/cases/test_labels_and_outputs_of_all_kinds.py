"""Labels that do not fit are refused with the remedy; of several outputs, the one that labels are about is scored."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import InputError
from tests.cases.given import Given, deployed, labelled

X, Y = torch.randn(16, 6), torch.arange(16) % 4
IMAGES = torch.randn(16, 3, 4, 4)
PIXELS = torch.arange(256).reshape(16, 4, 4) % 3
TWO = Y % 2

REFUSED: list[tuple[str, Any, Any, Any, str]] = [
    ("pixels, 255", lambda: nn.Conv2d(3, 3, 1), IMAGES, torch.where(PIXELS == 0, 255, PIXELS).to(torch.uint8), "255"),
    ("pixels from 1", lambda: nn.Conv2d(3, 3, 1), IMAGES, PIXELS + 1, "count from 1"),
    ("pixels, -100", lambda: nn.Conv2d(3, 3, 1), IMAGES, PIXELS - 100 * (PIXELS == 0).long(), 'name = "mean-iou", cl'),
    ("from 1", lambda: nn.Linear(6, 4), X, Y + 1, "count from 1"),
    ("-100", lambda: nn.Linear(6, 4), X, torch.where(Y == 0, -100, Y), r"ignore=\[-100\]"),
    ("two classes from 1", lambda: nn.Linear(6, 1), X, TWO + 1, "count from 1"),
    ("-1 and 1", lambda: nn.Linear(6, 2), X, TWO * 2 - 1, r"\(labels \+ 1\) // 2"),
    ("-1 and 1 for a logit", lambda: nn.Linear(6, 1), X, TWO * 2 - 1, r"\(labels \+ 1\) // 2"),
    ("several an example", lambda: nn.Linear(6, 4), X, torch.eye(4)[Y] + torch.eye(4)[(Y + 1) % 4], "several labels"),
    ("one-hot floats", lambda: nn.Linear(6, 4), X, torch.eye(4)[Y], "argmax"),
    ("floats", lambda: nn.Linear(6, 4), X, Y.float(), "int64"),
    ("numbers for a logit", lambda: nn.Linear(6, 1), X, torch.arange(16), "float32"),
    ("all zero for a logit", lambda: nn.Linear(6, 1), X, torch.zeros(16), "they may be classes or values"),
    ("far away", lambda: nn.Linear(6, 4), X, Y * 10, "10, 20, 30"),
    ("NaN", lambda: nn.Linear(6, 1), X, torch.full((16,), torch.nan), "holds NaN"),
]


@pytest.mark.parametrize(("model", "x", "y", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED])
def test_labels_that_do_not_fit_are_refused_with_the_remedy(model: Any, x: Any, y: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = labelled(model(), x, y).metrics


@pytest.mark.parametrize("y", [TWO, TWO.bool(), TWO.float(), TWO.float()[:, None], TWO.to(torch.uint8)])
def test_one_logit_is_a_task_of_two_classes(y: torch.Tensor) -> None:
    task = labelled(nn.Linear(6, 1), X, y)
    assert task.metrics[0].name == "accuracy"
    assert "one logit of two classes" in task.said()


def test_labels_that_mean_no_label_are_ignored_where_that_is_said() -> None:
    y = torch.where(PIXELS == 0, 255, PIXELS).to(torch.uint8)
    task = labelled(nn.Conv2d(3, 3, 1), IMAGES, y, metrics=[{"name": "mean-iou", "classes": 3, "ignore": [255]}])
    assert task.metrics[0].name.startswith("mean-iou")
    outputs = {"output": torch.randn(16, 3, 4, 4, requires_grad=True)}
    assert torch.isfinite(task.loss(outputs, {"label": y}))


Named = namedtuple("Named", "features logits")


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor


class Head(nn.Module):
    """Scores of four classes and eight features, in many forms."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.head = kind, nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        h = torch.relu(self.body(x))
        y = self.head(h)
        if self.kind == "numpy beside":
            _ = y.detach().numpy()
        forms = {
            "tuple": lambda: (y, h),
            "second": lambda: (h, y),
            "none first": lambda: (None, y, None),
            "named": lambda: Named(h, y),
            "ordered": lambda: OrderedDict(aux=h, out=y),
            "dataclass": lambda: Answer(y, h),
            "nested": lambda: {"aux": h, "main": {"logits": y, "more": h}},
            "loss first": lambda: {"loss": None, "logits": y},
            "number first": lambda: (h.mean(), y),
            "list inside": lambda: ([h, h], y),
            "number as key": lambda: {0: y},
            "numpy beside": lambda: (y, h),
            "alike": lambda: (h, 2 * h),
            "batch of two": lambda: y.view(2, 4),
            "batch of eight": lambda: y.view(8, 4),
        }
        return forms[self.kind]()


def of_head(kind: str) -> Given:
    return Given((Head(kind), {part: [(X[:8], Y[:8]), (X[8:], Y[8:])] for part in ("train", "validation", "test")}))


@pytest.mark.parametrize(
    ("kind", "scored"),
    [
        ("tuple", "output"),
        ("second", "output1"),
        ("none first", "output"),
        ("named", "logits"),
        ("ordered", "out"),
        ("dataclass", "logits"),
        ("nested", "main.logits"),
        ("loss first", "logits"),
        ("number first", "output1"),
        ("list inside", "output1"),
        ("number as key", "0"),
        ("numpy beside", "output"),
    ],
)
def test_the_output_that_labels_are_about_is_scored_on_the_runtime(kind: str, scored: str, tmp_path: Path) -> None:
    task = of_head(kind)
    assert f"Inferred from {scored!r} (8, 4)" in task.said()
    assert (task.metrics[0].output or task.signature.outputs[0].name) == scored  # type: ignore[attr-defined]
    assert deployed(task, tmp_path)[0] < 1e-5


def test_which_of_two_outputs_is_scored_is_asked_where_it_is_open() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.a(x), self.b(x)

    with pytest.raises(InputError, match=r"several outputs that the targets may be about: 'output' \(16, 8\)"):
        _ = labelled(Wide(), X, Y).metrics
    with pytest.raises(InputError, match="Say which by a metric"):
        _ = labelled(Wide(), X, torch.arange(16) % 5, metrics=["accuracy"]).loss({}, {})
    given = labelled(Wide(), X, Y, metrics=[{"name": "accuracy", "output": "output1"}])
    assert "Inferred from 'output1' (16, 5)" in given.said()


@pytest.mark.parametrize(("kind", "size"), [("batch of two", 2), ("batch of eight", 8)])
def test_a_batch_size_that_is_written_into_the_code_is_found_and_kept(kind: str, size: int, tmp_path: Path) -> None:
    task = of_head(kind)
    assert task.signature.batch == size
    assert f"The model takes batches of {size} only" in task.said()
    assert deployed(task, tmp_path)[0] < 1e-5
