"""How far deployed outputs are from a reference's, torch's as a rule, of the same examples.

The reference's output of the same name is taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic.dataclasses import dataclass

from harness.errors import InputError
from harness.metrics.base import STRICT, Direction, Figure, Scored, Sums
from harness.metrics.reading import numbers, pick

if TYPE_CHECKING:
    from harness.contracts import Arrays, FloatArray


class Fidelity(Scored):
    """A metric of two outputs of one shape."""

    def pair(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any]:
        """Output and reference, (n, …)."""
        output = numbers(pick(outputs, self.output, "output", self.name), "output", self.name)
        name = self.target or self.output or next(iter(outputs))
        reference = numbers(pick(against, name, "reference", self.name), "reference", self.name)
        if output.shape != reference.shape:
            raise InputError(
                f"{self.name}: outputs have shape {output.shape} and the reference {reference.shape}; equal shapes are "
                "expected."
            )
        return output, reference

    def rows(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any]:
        """Both as float64, (n, values of an example)."""
        n = len(next(iter(outputs.values())))
        output, reference = self.pair(outputs, against)
        return output.astype(np.float64).reshape(n, -1), reference.astype(np.float64).reshape(n, -1)

    def classes(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any]:
        """Both as scores (n, positions, classes): one position an example, or one a token, or one a pixel."""
        output, reference = self.pair(outputs, against)
        return _by_position(output), _by_position(reference)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MaxAbs(Fidelity):
    """Largest absolute difference over the whole set."""

    title: ClassVar[str] = "max-abs"
    better: ClassVar[Direction] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("max_abs",)

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The example's largest."""
        output, reference = self.rows(outputs, against)
        return np.stack([np.abs(output - reference).max(axis=1)], axis=1)

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`harness.metrics.base.Scored.weighted`."""
        return lambda weights: np.where(weights > 0, scores[:, 0], -np.inf).max(axis=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SQNR(Fidelity, Sums):
    """Signal to quantization noise, 10 log10(sum of reference² / sum of difference²); infinite where all is equal."""

    title: ClassVar[str] = "sqnr"
    unit: ClassVar[str] = "dB"
    parts: ClassVar[tuple[str, ...]] = ("signal", "noise")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Both sums of squares."""
        output, reference = self.rows(outputs, against)
        return np.stack([(reference**2).sum(axis=1), ((output - reference) ** 2).sum(axis=1)], axis=1)

    def total(self, sums: FloatArray) -> Any:
        """The ratio in decibels."""
        return 10 * np.log10(super().total(sums))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Top1Agreement(Fidelity, Sums):
    """Share of positions whose highest score is the reference's; of equal scores the first counts as higher."""

    title: ClassVar[str] = "top1-agreement"
    unit: ClassVar[str] = "%"
    parts: ClassVar[tuple[str, ...]] = ("agreeing", "positions")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Positions that agree, and positions."""
        output, reference = self.classes(outputs, against)
        agreeing = (output.argmax(axis=-1) == reference.argmax(axis=-1)).sum(axis=1)
        return np.stack([agreeing, np.full(len(agreeing), output.shape[1])], axis=1).astype(np.float64)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeanKL(Fidelity, Sums):
    """Mean over positions of the Kullback-Leibler divergence KL(reference || outputs) of the softmax."""

    title: ClassVar[str] = "mean-kl"
    unit: ClassVar[str] = "nats"
    better: ClassVar[Direction] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("kl", "positions")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The sum over positions, and positions."""
        output, reference = self.classes(outputs, against)
        found = np.empty((len(output), 2))
        for row, (a, b) in enumerate(zip(reference, output, strict=True)):
            p, q = _log_softmax(a), _log_softmax(b)
            found[row] = (np.exp(p) * (p - q)).sum(), len(p)
        return found

    def total(self, sums: FloatArray) -> Any:
        """The mean; rounding can make a zero divergence slightly negative."""
        return np.maximum(0.0, super().total(sums))


def _by_position(scores: Any) -> Any:
    """(n, classes), (n, tokens, classes) or (n, classes, height, width) as (n, positions, classes).

    One logit, (n,) or (n, 1), is that of class 1 of two: it becomes the scores 0 and logit.
    """
    n = len(scores)
    if scores.ndim == 1 or scores.shape[1:] == (1,):
        logit = scores.reshape(n, 1, 1)
        return np.concatenate([np.zeros_like(logit), logit], axis=2)
    if scores.ndim == 4:
        scores = np.moveaxis(scores, 1, -1)
    return scores.reshape(n, -1, scores.shape[-1])


def _log_softmax(scores: Any) -> Any:
    wide = scores.astype(np.float64)
    moved = wide - wide.max(axis=-1, keepdims=True)
    return moved - np.log(np.exp(moved).sum(axis=-1, keepdims=True))
