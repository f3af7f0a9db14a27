"""Metrics of classes: scores (n, classes), or one logit for two classes, against integer labels.

Labels out of range, shifted by one, one-hot, of another type or text are refused with the remedy; what is to be ignored
is named: ``{name = "accuracy", ignore = [-1, 255]}``. An ignored example is left out, and leaves NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.errors import InputError
from harness.metrics.base import STRICT, Figure, Groups, Scored, Sums
from harness.metrics.reading import columns, labels, numbers, pick

if TYPE_CHECKING:
    from harness.contracts import Arrays, FloatArray


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Classes(Scored):
    """A metric of labels and scores of classes.

    Parameters
    ----------
    ignore : tuple of int
        Labels that mean "no label".
    output, target : str or None
        See :class:`harness.metrics.base.Scored`.
    """

    ignore: tuple[int, ...] = ()

    def read(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any, Any]:
        """Scores (n, classes), labels (n,), and which examples count."""
        scores = columns(pick(outputs, self.output, "output", self.name), self.name)
        found, counts = self.labels(against, (len(scores),), scores.shape[1])
        return scores, found, counts

    def labels(self, against: Arrays, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
        """The labels, checked, and which count."""
        remedy = f'metric = {{{{name = "{self.title}", ignore = {{ignore}}}}}}'
        return labels(pick(against, self.target, "target", self.name), shape, classes, self.ignore, self.name, remedy)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Accuracy(Classes, Sums):
    """Share of examples whose label is among the k highest scores; of equal scores the first counts as higher.

    Parameters
    ----------
    k : int
        1 for the usual accuracy.
    ignore, output, target
        See :class:`Classes`.
    """

    title: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"
    proportion: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("correct", "label", "predicted")
    k: Annotated[int, Field(ge=1)] = 1

    @property
    def name(self) -> str:
        """``accuracy``, or ``accuracy@5``."""
        plain = super().name
        return plain if self.k == 1 else plain.replace(self.title, f"{self.title}@{self.k}", 1)

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Whether right, the label, and the class with the highest score."""
        scores, label, counts = self.read(outputs, against)
        if self.k > scores.shape[1]:
            raise InputError(
                f"{self.name}: the model has {scores.shape[1]} classes; k = {self.k} must not exceed that."
            )
        own = np.take_along_axis(scores, label[:, None], axis=1)
        before = (scores == own) & (np.arange(scores.shape[1]) < label[:, None])
        rank = (scores > own).sum(axis=1) + before.sum(axis=1)
        return _counted(np.stack([rank < self.k, label, scores.argmax(axis=1)], axis=1), counts)

    def terms(self, scores: FloatArray) -> FloatArray:
        """Whether right, and one."""
        return np.stack([scores[:, 0], np.ones(len(scores))], axis=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class F1(Classes):
    """Harmonic mean of precision and recall: 2 TP / (labelled + predicted).

    Parameters
    ----------
    average : {"macro", "binary"}
        "macro": the mean of every class that is labelled or predicted; "binary": class 1 of two, NaN where it is
        neither labelled nor predicted.
    ignore, output, target
        See :class:`Classes`.
    """

    title: ClassVar[str] = "f1"
    parts: ClassVar[tuple[str, ...]] = ("label", "predicted")
    average: Literal["macro", "binary"] = "macro"

    @property
    def name(self) -> str:
        """``f1``, or ``f1@binary``."""
        return super().name if self.average == "macro" else super().name.replace(self.title, "f1@binary", 1)

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The label, and the class with the highest score."""
        scores, label, counts = self.read(outputs, against)
        if self.average == "binary" and scores.shape[1] != 2:
            raise InputError(f'{self.name}: the model has {scores.shape[1]} classes, not two: use average = "macro".')
        return _counted(np.stack([label, scores.argmax(axis=1)], axis=1), counts)

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`harness.metrics.base.Scored.weighted`."""
        confusion = _Confusion(scores, also=(1.0,) if self.average == "binary" else ())

        def figure(weights: FloatArray) -> Any:
            right, labelled, predicted = confusion(weights)
            both = labelled + predicted
            if self.average == "binary":
                return (2 * right / both)[:, confusion.classes == 1][:, 0]
            f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
            return f1.sum(axis=1) / (both > 0).sum(axis=1)

        return figure


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Matthews(Classes):
    """Matthews' correlation coefficient of labels and predicted classes, for any number of classes (Gorodkin 2004).

    0 where one class only is predicted, as is the custom; NaN where one class only is labelled.
    """

    title: ClassVar[str] = "matthews"
    parts: ClassVar[tuple[str, ...]] = ("label", "predicted")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The label, and the class with the highest score."""
        scores, label, counts = self.read(outputs, against)
        return _counted(np.stack([label, scores.argmax(axis=1)], axis=1), counts)

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`harness.metrics.base.Scored.weighted`."""
        confusion = _Confusion(scores)

        def figure(weights: FloatArray) -> Any:
            right, labelled, predicted = confusion(weights)
            n = weights.sum(axis=1)
            covariance = right.sum(axis=1) * n - (labelled * predicted).sum(axis=1)
            of_labels, of_predictions = (n * n - (counts * counts).sum(axis=1) for counts in (labelled, predicted))
            found = covariance / (np.sqrt(of_labels) * np.sqrt(of_predictions))
            return np.where(of_labels > 0, np.where(of_predictions > 0, found, 0.0), np.nan)

        return figure


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AveragePrecision(Classes):
    """Area under the curve of precision over recall of class 1 of two, by steps; NaN without an example of it."""

    title: ClassVar[str] = "average-precision"
    parts: ClassVar[tuple[str, ...]] = ("label", "score")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The label, and how much the score of class 1 exceeds that of class 0."""
        scores, label, counts = self.read(outputs, against)
        if scores.shape[1] != 2:
            raise InputError(f"{self.name}: the model has {scores.shape[1]} classes; two are expected, or one logit.")
        wide = scores.astype(np.float64)
        return _counted(np.stack([label, wide[:, 1] - wide[:, 0]], axis=1), counts)

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`harness.metrics.base.Scored.weighted`."""
        groups = Groups(-scores[:, 1])
        label = scores[groups.order, 0]

        def figure(weights: FloatArray) -> Any:
            ordered = weights.take(groups.order, axis=1)
            positive, seen = groups.sums(ordered * label), np.cumsum(groups.sums(ordered), axis=1)
            right = np.cumsum(positive, axis=1)
            # Where nothing is drawn yet, nothing positive is, so the divisor does not matter.
            return np.einsum("bn,bn->b", right / np.maximum(seen, 1), positive) / right[:, -1]

        return figure


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeanIoU(Classes, Sums):
    """Intersection over union of segments, sums over the whole set, mean of the classes that occur.

    Outputs are scores (n, classes, height, width), labels (n, height, width).

    Parameters
    ----------
    classes : int
        Classes of the model; Pascal VOC has 21.
    ignore, output, target
        See :class:`Classes`; an ignored pixel is left out.
    """

    title: ClassVar[str] = "mean-iou"
    unit: ClassVar[str] = "%"
    classes: Annotated[int, Field(ge=1)] = 21

    @property
    def parts(self) -> tuple[str, ...]:
        """Pixels in the intersection and in the union, for every class."""
        return tuple(f"{kind}_{c}" for kind in ("intersection", "union") for c in range(self.classes))

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Count pixels."""
        scores = numbers(pick(outputs, self.output, "output", self.name), "output", self.name)
        if scores.ndim != 4 or scores.shape[1] != self.classes:
            remedy = f" Set classes = {scores.shape[1]}." if scores.ndim == 4 else ""
            raise InputError(
                f"{self.name}: outputs have shape {scores.shape}; (n, {self.classes}, height, width) is expected."
                f"{remedy}"
            )
        label, counts = self.labels(against, (len(scores), *scores.shape[2:]), self.classes)
        found = np.empty((len(scores), 2 * self.classes))
        for row, (image, truth, valid) in enumerate(zip(scores, label, counts, strict=True)):
            guess, truth = image.argmax(axis=0)[valid], truth[valid]
            both, theirs, ours = (np.bincount(c, minlength=self.classes) for c in (truth[truth == guess], truth, guess))
            found[row] = np.concatenate([both, theirs + ours - both])
        return found

    def total(self, sums: FloatArray) -> Any:
        """The mean of the classes that occur."""
        shared, union = sums[..., : self.classes], sums[..., self.classes :]
        ratios = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        return ratios.sum(axis=-1) / (union > 0).sum(axis=-1)


def _counted(parts: Any, counts: Any) -> FloatArray:
    """The parts as float64, NaN for examples that do not count."""
    return np.where(counts[:, None], parts, np.nan).astype(np.float64)


class _Confusion:
    """Counts by class, as a function of weights.

    Parameters
    ----------
    scores : array, shape (n, 2)
        Label and predicted class.
    also : tuple of float
        Classes that are counted though they may not occur.
    """

    def __init__(self, scores: FloatArray, also: tuple[float, ...] = ()) -> None:
        self.classes = np.unique(np.append(scores, also))
        # One more example of every class, of weight 0, makes the groups the classes.
        self._groups = [Groups(np.concatenate([keys, self.classes])) for keys in scores.T]
        self._right = np.append(scores[:, 0] == scores[:, 1], np.ones(len(self.classes)))[self._groups[0].order]

    def __call__(self, weights: FloatArray) -> tuple[Any, Any, Any]:
        """Right, labelled, predicted, each (b, classes)."""
        filled = np.concatenate([weights, np.zeros((len(weights), len(self.classes)))], axis=1)
        by_label, by_guess = (filled.take(groups.order, axis=1) for groups in self._groups)
        labels, guesses = self._groups
        return labels.sums(by_label * self._right), labels.sums(by_label), guesses.sums(by_guess)
