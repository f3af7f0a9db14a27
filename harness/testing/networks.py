"""Reference networks: small, trained within seconds, and unlike one another in what they take, give and are scored by.

================  ==================================  ==========================  ================
name              takes                               gives                       scored by
================  ==================================  ==========================  ================
``perceptron``    an image of a digit                 scores of ten classes       accuracy
``residual``      the same                            the same                    accuracy
``tokens``        token ids, and a mask of padding    scores of the next tokens   perplexity
``denoiser``      a noisy image                       an image                    PSNR
================  ==================================  ==========================  ================
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.contracts import Batch, Context, Loss, Metric, Port, Recipe, Signature, Split, Trainer, Training
from harness.losses import CrossEntropy, MeanSquaredError, TokenCrossEntropy
from harness.metrics import create
from harness.tasks.classes import signature as classes
from harness.tasks.digits import Digits
from harness.tasks.models.references import CLASSES, VOCABULARY, Denoiser, Perceptron, Residual, TokenModel
from harness.tasks.splits import ArraySplit
from harness.training import SGDTrainer

if TYPE_CHECKING:
    from harness.contracts import Tensors

SHAPE = (1, 8, 8)
TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A trained network with the data, the loss and the recipe that trained it.

    Parameters
    ----------
    name : str
        See the module.
    model : nn.Module
        In eval mode. Shared between checks: nobody may change it.
    signature : Signature
        What it takes and gives.
    data : mapping
        "train" and "validation".
    loss : Loss
        What training minimises.
    metric : Metric
        What it is scored by.
    recipe : Recipe
        Of its training.
    fresh : callable
        Returns the network as its training began.
    """

    name: str
    model: nn.Module
    signature: Signature
    data: Mapping[str, Split]
    loss: Loss
    metric: Metric
    recipe: Recipe
    fresh: Callable[[], nn.Module]

    def inputs(self, count: int) -> Tensors:
        """The inputs of the first ``count`` validation examples."""
        return next(iter(self.data["validation"].batches(count))).inputs

    def context(self, **changes: Any) -> Context:
        """What a task about this network hands to a method; ``changes`` replace arguments of :func:`context`."""
        given: dict[str, Any] = {
            "data": self.data,
            "loss": self.loss,
            "metrics": (self.metric,),
            "recipe": self.recipe,
            "fresh": self.fresh,
            "original": lambda: copy.deepcopy(self.model),
        }
        return context(self.signature, **{**given, **changes})


def context(
    signature: Signature,
    *,
    data: Mapping[str, Split] | None = None,
    loss: Loss | None = None,
    recipe: Recipe | None = None,
    fit: Trainer | None = None,
    fresh: Callable[[], nn.Module] | None = None,
    **changes: Any,
) -> Context:
    """A method's context, of seed 0.

    Parameters
    ----------
    signature : Signature
        What the model takes and gives.
    data : mapping, optional
        The splits; none.
    loss : Loss, optional
        Cross-entropy.
    recipe : Recipe, optional
        Of the training. Without it, or without training data and ``fit``, there is none.
    fit : Trainer, optional
        The harness' own.
    fresh : callable, optional
        See :class:`harness.contracts.Training`.
    changes
        Other fields of the context.
    """
    data, loss = data or {}, loss or CrossEntropy()
    training = None
    if recipe is not None and (fit is not None or "train" in data):
        fit = fit or SGDTrainer(data=data, signature=signature, loss=loss, seed=changes.get("seed", 0))
        training = Training(recipe=recipe, fit=fit, fresh=fresh)
    values: dict[str, Any] = {
        "seed": 0,
        "scratch": Path(tempfile.gettempdir()),
        "training": training,
        "original": _no_original,
    }
    return Context(signature=signature, data=data, loss=loss, **{**values, **changes})


def _no_original() -> nn.Module:
    raise AssertionError("this context has no original model")


def _digits() -> Mapping[str, Split]:
    return Digits().data()


def _sentences() -> Mapping[str, Split]:
    """Walks through 16 tokens in which each token has four likely followers; of 5 to 12 tokens, padded with zeros."""
    generator = torch.Generator().manual_seed(0)
    likely = torch.rand(VOCABULARY, VOCABULARY, generator=generator) ** 6
    ids = torch.randint(VOCABULARY, (768, 1), generator=generator)
    for _ in range(TOKENS - 1):
        ids = torch.cat([ids, torch.multinomial(likely[ids[:, -1]], 1, generator=generator)], 1)
    lengths = torch.randint(5, TOKENS + 1, (len(ids), 1), generator=generator)
    mask = (torch.arange(TOKENS)[None] < lengths).long()
    whole = Batch(inputs={"ids": ids * mask, "mask": mask}, targets={"label": ids.masked_fill(mask == 0, -100)})
    return _parted(whole, 640)


def _noisy() -> Mapping[str, Split]:
    """Digits with values in [0, 1], with normal noise of deviation 0.25."""
    parts: dict[str, Split] = {}
    generator = torch.Generator().manual_seed(0)
    for name, split in _digits().items():
        clean = torch.cat([batch.inputs["input"] for batch in split.batches(500)]) / 2 + 0.5
        noise = 0.25 * torch.randn(clean.shape, generator=generator)
        parts[name] = ArraySplit(inputs={"noisy": clean + noise}, targets={"label": clean})
    return parts


def _parted(whole: Batch, first: int) -> Mapping[str, Split]:
    halves = (whole.map(lambda value: value[:first]), whole.map(lambda value: value[first:]))
    return {
        name: ArraySplit(inputs=half.inputs, targets=half.targets)
        for name, half in zip(("train", "validation"), halves, strict=True)
    }


_TRAINED = Recipe(epochs=4, batch_size=32, lr=0.1, weight_decay=5e-4, augment=False)
_TEXT = Signature(
    inputs=(
        Port(name="ids", shape=("tokens",), dtype="int64", values=VOCABULARY),
        Port(name="mask", shape=("tokens",), dtype="int64", values=2),
    ),
    outputs=(Port(name="output", shape=("tokens", VOCABULARY)),),
)
_IMAGE = Signature(inputs=(Port(name="noisy", shape=SHAPE),), outputs=(Port(name="output", shape=SHAPE),))
_ADAM = Recipe(epochs=4, batch_size=32, lr=0.01, optimizer="adamw", weight_decay=0.01, augment=False)

_Network = tuple[Callable[[], nn.Module], Callable[[], Mapping[str, Split]], Signature, Loss, str, Recipe]
_NETWORKS: dict[str, _Network] = {
    "perceptron": (Perceptron, _digits, classes(SHAPE, CLASSES), CrossEntropy(), "accuracy", _TRAINED),
    "residual": (Residual, _digits, classes(SHAPE, CLASSES), CrossEntropy(), "accuracy", _TRAINED),
    "tokens": (TokenModel, _sentences, _TEXT, TokenCrossEntropy(), "perplexity", _ADAM),
    "denoiser": (Denoiser, _noisy, _IMAGE, MeanSquaredError(), "psnr", _ADAM),
}
NAMES = tuple(_NETWORKS)


@functools.cache
def reference(name: str) -> Reference:
    """One of the networks :data:`NAMES`, trained once a process (about a second)."""
    make, data, signature, loss, metric, recipe = _NETWORKS[name]
    splits = data()

    def fresh() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    model = fresh()
    SGDTrainer(data=splits, signature=signature, loss=loss, seed=0)(model, recipe)
    return Reference(
        name=name,
        model=model.eval(),
        signature=signature,
        data=splits,
        loss=loss,
        metric=create(metric),
        recipe=recipe,
        fresh=fresh,
    )
