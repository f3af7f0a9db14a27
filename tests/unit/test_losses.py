"""Losses against torch's functions; what is inferred of outputs and targets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from harness import losses, metrics
from harness.contracts import Loss
from harness.errors import InputError


def value(loss: Loss, output: Tensor, target: Tensor, smoothing: float = 0.0) -> float:
    output = output.clone().requires_grad_()
    found = loss({"output": output}, {"target": target}, smoothing)
    found.backward()
    assert found.shape == ()
    assert output.grad is not None
    assert bool(torch.isfinite(output.grad).all())
    return found.item()


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_cross_entropy_is_torchs(generator: torch.Generator, smoothing: float, dtype: torch.dtype) -> None:
    scores, label = torch.randn(9, 4, generator=generator), torch.randint(4, (9,), generator=generator)
    expected = F.cross_entropy(scores, label, label_smoothing=smoothing).item()
    assert value(losses.CrossEntropy(), scores, label.to(dtype), smoothing) == expected
    assert value(losses.CrossEntropy(), scores, label.to(dtype)[:, None], smoothing) == expected
    marked = label.clone()
    marked[::2] = -1
    ignoring = losses.CrossEntropy(ignore=(-1, 255))
    expected = F.cross_entropy(scores, marked, ignore_index=-1, label_smoothing=smoothing).item()
    assert value(ignoring, scores, marked, smoothing) == expected
    # The mean of no labels is NaN in torch, which would end the training of a batch without labels.
    assert value(ignoring, scores, torch.full((9,), 255)) == 0.0


def test_cross_entropy_of_pixels_is_torchs(generator: torch.Generator) -> None:
    scores, label = torch.randn(2, 3, 5, 6, generator=generator), torch.randint(3, (2, 5, 6), generator=generator)
    assert value(losses.CrossEntropy(), scores, label) == pytest.approx(F.cross_entropy(scores, label).item())


@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_binary_cross_entropy_is_torchs(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = torch.randn(shape, generator=generator)
    target = torch.randint(2, shape, generator=generator)
    expected = F.binary_cross_entropy_with_logits(logits, target.float()).item()
    assert value(losses.BinaryCrossEntropy(), logits, target.to(dtype)) == pytest.approx(expected, rel=1e-6)
    smooth = F.binary_cross_entropy_with_logits(logits, target * 0.8 + 0.1).item()
    assert value(losses.BinaryCrossEntropy(), logits, target.to(dtype), 0.2) == pytest.approx(smooth, rel=1e-6)


def test_binary_cross_entropy_takes_rows_for_columns_and_ignores(generator: torch.Generator) -> None:
    logits = torch.randn(6, 1, generator=generator)
    target = torch.tensor([0, 1, 1, -1, 0, -1])
    kept = target >= 0
    expected = F.binary_cross_entropy_with_logits(logits[kept, 0], target[kept].float()).item()
    for dtype in (torch.int64, torch.float32):
        assert value(losses.BinaryCrossEntropy(ignore=(-1,)), logits, target.to(dtype)) == pytest.approx(expected)
    assert value(losses.BinaryCrossEntropy(ignore=(-1,)), logits, torch.full((6,), -1)) == 0.0
    with pytest.raises(InputError, match=r"labels hold -1 for 2 of 6.*BinaryCrossEntropy\(ignore=\[-1\]\)"):
        value(losses.BinaryCrossEntropy(), logits, target)
    with pytest.raises(InputError, match="between -1 and 1; 0 to 1 is expected"):
        value(losses.BinaryCrossEntropy(), logits, target.float())
    with pytest.raises(InputError, match="equal shapes"):
        value(losses.BinaryCrossEntropy(), logits, torch.zeros(6, 2))


def test_mean_squared_error_is_torchs_and_does_not_broadcast(generator: torch.Generator) -> None:
    output, target = torch.randn(7, generator=generator), torch.randn(7, 1, generator=generator)
    expected = ((output - target[:, 0]) ** 2).mean().item()
    assert value(losses.MeanSquaredError(), output, target) == pytest.approx(expected)
    assert value(losses.MeanSquaredError(), output[:, None], target[:, 0].double()) == pytest.approx(expected)
    with pytest.raises(InputError, match="equal shapes"):
        value(losses.MeanSquaredError(), torch.zeros(7, 7), target)
    with pytest.raises(InputError, match=r"asks for 0.1: set label_smoothing = 0"):
        value(losses.MeanSquaredError(), output, target, 0.1)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_cross_entropy_is_torchs(generator: torch.Generator, shift: bool, smoothing: float) -> None:
    scores, ids = torch.randn(3, 6, 11, generator=generator), torch.randint(11, (3, 6), generator=generator)
    ids[1, 3:] = -100
    a, b = (scores[:, :-1], ids[:, 1:]) if shift else (scores, ids)
    expected = F.cross_entropy(a.flatten(0, 1), b.flatten(), label_smoothing=smoothing).item()
    assert value(losses.TokenCrossEntropy(shift=shift), scores, ids, smoothing) == pytest.approx(expected, rel=1e-6)


def test_token_cross_entropy_is_the_logarithm_of_perplexity(generator: torch.Generator) -> None:
    scores, ids = torch.randn(3, 6, 11, generator=generator), torch.randint(11, (3, 6), generator=generator)
    metric = metrics.create("perplexity")
    perplexity = metric.value(metric.score({"x": scores.numpy()}, {"y": ids.numpy()}))
    assert torch.tensor(value(losses.TokenCrossEntropy(), scores, ids)).exp().item() == pytest.approx(
        perplexity, rel=1e-5
    )


def test_outputs_and_targets_are_chosen_by_name(generator: torch.Generator) -> None:
    outputs = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(4, 2, generator=generator)}
    targets = {"x": torch.tensor([0, 1, 2, 0]), "y": torch.tensor([0, 1, 1, 0])}
    assert losses.CrossEntropy()(outputs, targets) == F.cross_entropy(outputs["a"], targets["x"])
    assert losses.CrossEntropy(output="b", target="y")(outputs, targets) == F.cross_entropy(outputs["b"], targets["y"])
    with pytest.raises(InputError, match="no target 'z'"):
        losses.CrossEntropy(target="z")(outputs, targets)
    with pytest.raises(InputError, match="floating-point"):
        losses.CrossEntropy()({"a": targets["x"]}, targets)


IDS = torch.arange(12).reshape(3, 4)
CASES: dict[str, tuple[Tensor, Tensor, type[Any], list[str], int]] = {
    "classes": (torch.randn(6, 4), torch.arange(6) % 4, losses.CrossEntropy, ["accuracy"], 4),
    "a column": (torch.randn(6, 4), (torch.arange(6) % 4)[:, None], losses.CrossEntropy, ["accuracy"], 4),
    "two classes as booleans": (torch.randn(6, 2), torch.arange(6) > 2, losses.CrossEntropy, ["accuracy"], 4),
    "two classes as floats": (torch.randn(6, 2), (torch.arange(6) > 2).float(), losses.CrossEntropy, ["accuracy"], 4),
    "a logit": (torch.randn(6, 1), torch.arange(6) % 2, losses.BinaryCrossEntropy, ["accuracy"], 4),
    "a logit, one class": (
        torch.randn(6),
        torch.ones(6, dtype=torch.int64),
        losses.BinaryCrossEntropy,
        ["accuracy"],
        4,
    ),
    "a logit and floats": (
        torch.randn(6),
        (torch.arange(6) % 2).float()[:, None],
        losses.BinaryCrossEntropy,
        ["accuracy"],
        4,
    ),
    "values": (torch.randn(6, 1), torch.randn(6), losses.MeanSquaredError, ["rmse"], 2),
    "several values": (torch.randn(6, 5), torch.randn(6, 5), losses.MeanSquaredError, ["rmse"], 2),
    "tokens": (torch.randn(3, 4, 20), IDS, losses.TokenCrossEntropy, ["perplexity"], 4),
    "images": (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), losses.MeanSquaredError, ["psnr", "rmse"], 2),
    "images about 0": (torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4) * 3 - 9, losses.MeanSquaredError, ["rmse"], 2),
    "segments": (torch.rand(2, 3, 4, 4), torch.ones(2, 4, 4, dtype=torch.uint8), losses.CrossEntropy, ["mean-iou"], 4),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_inferred(case: str) -> None:
    output, target, loss, names, fidelity = CASES[case]
    found = losses.infer({"output": output}, {"label": target})
    assert type(found.loss) is loss
    assert [metric.name for metric in found.metrics] == names
    assert [metric.name for metric in found.fidelity] == ["max-abs", "sqnr", "top1-agreement", "mean-kl"][:fidelity]
    (note,) = found.notes
    assert "'output'" in note
    assert "'label'" in note
    arrays = {"output": output.numpy()}
    for metric in found.metrics:
        assert len(metric.score(arrays, {"label": target.numpy()})) == len(output)
    for metric in found.fidelity:
        assert len(metric.score(arrays, arrays)) == len(output)
    assert found.loss({"output": output}, {"label": target}).isfinite()


@pytest.mark.parametrize(("low", "high", "span"), [(0, 1, 1.0), (-1, 1, 2.0), (0, 255, 255.0)])
def test_the_range_of_images_is_said(low: float, high: float, span: float) -> None:
    target = torch.rand(2, 3, 4, 4) * (high - low) + low
    found = losses.infer({"y": torch.zeros(2, 3, 4, 4)}, {"t": target})
    assert found.metrics[0].range == span  # type: ignore[attr-defined]
    assert f"range of {span:g}" in found.notes[0]


REFUSED = {
    "integers for one output": (torch.randn(4, 1), torch.tensor([0, 3, 7, 1]), r"labels hold 3, 7 .* float32"),
    "floats that may be either": (torch.randn(4), torch.zeros(4), "all 4 targets looked at are 0 as floats"),
    "other shape": (torch.randn(4, 3), torch.randn(4, 2), r"\(4, 3\) and targets 'y' \(4, 2\), float32\. Allowed:"),
    "one-hot floats": (torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]], r"one-hot.*argmax\(1\)"),
    "integers of the outputs' shape": (torch.randn(4, 3), torch.full((4, 3), 5), r"labels have shape \(4, 3\)"),
    "integer outputs": (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4), "no loss can be inferred"),
    "tokens out of range": (torch.randn(3, 4, 10), IDS, r"labels hold 10, 11"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_inferred_is_refused(case: str) -> None:
    output, target, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        losses.infer({"x": output}, {"y": target})


def test_the_loss_reads_what_the_given_metric_reads() -> None:
    outputs = {"a": torch.randn(4, 3), "b": torch.randn(3, 4, 20)}
    targets = {"x": torch.tensor([0, 1, -1, 2]), "y": IDS}
    metric = metrics.create({"name": "accuracy", "ignore": [-1], "output": "a", "target": "x"})
    found = losses.infer(outputs, targets, like=metric)
    assert found.loss == losses.CrossEntropy(ignore=(-1,), output="a", target="x")
    assert found.metrics == (metric,)
    assert found.notes[1] == "Not scored: output b; target y."
    assert found.fidelity[0].name == "max-abs[a]"
    metric = metrics.create({"name": "perplexity", "shift": False, "ignore": [0], "output": "b", "target": "y"})
    found = losses.infer(outputs, targets, like=metric)
    assert found.loss == losses.TokenCrossEntropy(shift=False, ignore=(0,), output="b", target="y")
    assert found.metrics == (metric,)
    assert "at t held against the target at t" in found.notes[0]


def test_without_targets_nothing_is_inferred_and_others_are_named() -> None:
    with pytest.raises(InputError, match="there is no target"):
        losses.infer({"x": torch.zeros(2, 2)}, {})
    found = losses.infer({"x": torch.randn(4, 3), "hidden": torch.zeros(4, 9)}, {"y": torch.arange(4) % 3})
    assert found.notes[1] == "Not scored: output hidden."


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shifted", "subtract 1"),
        ("unknown", r'CrossEntropy\(ignore=\[-1, 255\]\) and metric = \{name = "accuracy", ignore = \[-1, 255\]\}'),
        ("one hot", r"argmax\(1\)"),
        ("float", "Convert classes to int64"),
        ("bool", "True and False"),
    ],
)
def test_labels_that_do_not_fit_are_refused(kind: str, message: str) -> None:
    output = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 4
    marked = label.clone()
    marked[::5], marked[1::5] = -1, 255
    given = {
        "shifted": label + 1,
        "unknown": marked,
        "one hot": F.one_hot(label, 4),
        "float": label.float(),
        "bool": label > 1,
    }[kind]
    with pytest.raises(InputError, match=message):
        losses.infer({"output": output}, {"label": given})
    if kind == "unknown":
        found = losses.infer(
            {"output": output}, {"label": given}, like=metrics.create({"name": "accuracy", "ignore": [-1, 255]})
        )
        scores = found.metrics[0].score({"output": output.numpy()}, {"label": marked.numpy()})
        kept = (marked >= 0) & (marked < 255)
        assert found.metrics[0].value(scores) == pytest.approx(
            (output.argmax(1) == marked)[kept].double().mean().item()
        )
