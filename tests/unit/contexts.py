"""What the tests of methods hand to them, and why a method refuses a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from harness.contracts import Batch, Context, Method, Recipe, Split, Trainer
from harness.errors import Unsupported
from harness.tasks.classes import signature
from harness.tasks.splits import ArraySplit
from harness.testing import networks
from harness.testing.networks import reference

NOTHING: dict[str, Any] = {"data": {}, "training": None}
"""Changes to a context that leave nothing to train or calibrate on."""


def context(name: str = "perceptron", *, epochs: int = 2, **changes: Any) -> Context:
    """Of a reference network's task, trained for some epochs."""
    return reference(name).context(**{"recipe": replace(reference(name).recipe, epochs=epochs), **changes})


def bare(*shape: int, classes: int = 10, **changes: Any) -> Context:
    """Of a model that takes one float32 tensor of this shape, without data."""
    return networks.context(signature(shape, classes), **changes)


def split(x: Tensor, y: Tensor | None = None) -> ArraySplit:
    """Examples in memory as the input "input" and the target "label"."""
    return ArraySplit(inputs={"input": x}, targets={} if y is None else {"label": y})


def refusal(method: Method, model: nn.Module, given: Context) -> str | None:
    """Why a method does not treat a model, or None."""
    try:
        method.compress(model, given)
    except Unsupported as error:
        return str(error)
    return None


def recipe_of(given: Context) -> Recipe:
    """Of the context's training."""
    assert given.training is not None
    return given.training.recipe


def fit_of(given: Context) -> Trainer:
    """The context's trainer."""
    assert given.training is not None
    return given.training.fit


def labelled(
    given: networks.Reference | Context, size: int, part: str = "validation", seed: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels of one part of the data."""
    for batch in given.data[part].batches(size, seed=seed):
        yield batch.inputs["input"], batch.targets["label"]


def images(given: networks.Reference, count: int) -> Tensor:
    """The first validation images."""
    return given.inputs(count)["input"]


class Ordered(ArraySplit):
    """Examples that come in their own order, whatever the seed."""

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        return super().batches(size)


def ordered(x: Tensor) -> dict[str, Split]:
    """Training data without targets, in their own order."""
    return {"train": Ordered(inputs={"input": x})}
