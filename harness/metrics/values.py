"""Metrics of values: outputs against targets of the same shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from harness.errors import InputError
from harness.metrics.base import STRICT, Direction, Figure, Groups, Scored, Sums
from harness.metrics.reading import numbers, pick, same_shape

if TYPE_CHECKING:
    from harness.contracts import Arrays, FloatArray


class Values(Scored):
    """A metric of outputs and targets of one shape."""

    def read(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any]:
        """Both as float64 (n, values of an example)."""
        output = numbers(pick(outputs, self.output, "output", self.name), "output", self.name)
        target = numbers(pick(against, self.target, "target", self.name), "target", self.name)
        a, b = same_shape(output, target, self.name)
        return a.astype(np.float64), b.astype(np.float64)

    def read_one(self, outputs: Arrays, against: Arrays) -> tuple[Any, Any]:
        """Both as (n,), refused where an example has several values."""
        output, target = self.read(outputs, against)
        if output.shape[1] != 1:
            raise InputError(
                f"{self.name}: an example has {output.shape[1]} values; one is expected. Use rmse or mae, or choose an "
                "output of one value: output = NAME."
            )
        return output[:, 0], target[:, 0]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RMSE(Values, Sums):
    """Root of the mean squared error, over all values of the set."""

    title: ClassVar[str] = "rmse"
    better: ClassVar[Direction] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("squared_error", "values")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The sum of squared errors, and the number of values."""
        output, target = self.read(outputs, against)
        return _sum_and_count((output - target) ** 2)

    def total(self, sums: FloatArray) -> Any:
        """The root of the ratio."""
        return np.sqrt(super().total(sums))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MAE(Values, Sums):
    """Mean absolute error, over all values of the set."""

    title: ClassVar[str] = "mae"
    better: ClassVar[Direction] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("absolute_error", "values")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The sum of absolute errors, and the number of values."""
        output, target = self.read(outputs, against)
        return _sum_and_count(np.abs(output - target))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class R2(Values, Sums):
    """Coefficient of determination of one value an example; NaN where all targets are equal."""

    title: ClassVar[str] = "r2"
    parts: ClassVar[tuple[str, ...]] = ("squared_error", "target")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The squared error, and the target."""
        output, target = self.read_one(outputs, against)
        return np.stack([(output - target) ** 2, target], axis=1)

    def terms(self, scores: FloatArray) -> FloatArray:
        """Squared error, target, its square and one; centred, so that the variance does not cancel."""
        centred = scores[:, 1] - scores[:, 1].mean()
        return np.stack([scores[:, 0], centred, centred**2, np.ones(len(scores))], axis=1)

    def total(self, sums: FloatArray) -> Any:
        """1 - squared error / squares about the mean."""
        return 1 - sums[..., 0] / _about_mean(sums[..., 1], sums[..., 2], sums[..., 3])


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PSNR(Values, Sums):
    """Peak signal-to-noise ratio, 10 log10(range² / mean squared error): the mean of the images' ratios.

    Infinite where an image is met exactly.

    Parameters
    ----------
    range : float
        Of the values: 1 for images in [0, 1], 255 for bytes.
    output, target : str or None
        See :class:`harness.metrics.base.Scored`.
    """

    title: ClassVar[str] = "psnr"
    unit: ClassVar[str] = "dB"
    parts: ClassVar[tuple[str, ...]] = ("mean_squared_error",)
    range: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """The image's mean squared error."""
        output, target = self.read(outputs, against)
        return np.stack([((output - target) ** 2).mean(axis=1)], axis=1)

    def terms(self, scores: FloatArray) -> FloatArray:
        """The image's ratio, and one."""
        return np.stack([10 * np.log10(self.range**2 / scores[:, 0]), np.ones(len(scores))], axis=1)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Pearson(Values, Sums):
    """Pearson's correlation of one value an example; NaN where either is constant."""

    title: ClassVar[str] = "pearson"
    parts: ClassVar[tuple[str, ...]] = ("output", "target")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Output and target."""
        return np.stack(self.read_one(outputs, against), axis=1)

    def terms(self, scores: FloatArray) -> FloatArray:
        """Both, their squares, their product and one; centred, so that the variances do not cancel."""
        x, y = (scores - scores.mean(axis=0)).T
        return np.stack([x, y, x * x, y * y, x * y, np.ones(len(x))], axis=1)

    def total(self, sums: FloatArray) -> Any:
        """The correlation."""
        x, y, xx, yy, xy, n = np.moveaxis(sums, -1, 0)
        return _correlation(xy - x * y / n, _about_mean(x, xx, n), _about_mean(y, yy, n))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Spearman(Values):
    """Spearman's correlation, of ranks (equal values share their mean rank); NaN where either is constant."""

    title: ClassVar[str] = "spearman"
    parts: ClassVar[tuple[str, ...]] = ("output", "target")

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Output and target."""
        return np.stack(self.read_one(outputs, against), axis=1)

    def weighted(self, scores: FloatArray) -> Figure:
        """See :meth:`harness.metrics.base.Scored.weighted`."""
        x, y = (Groups(values) for values in scores.T)
        place = np.empty(len(scores), dtype=np.int64)
        place[y.order] = np.arange(len(scores))
        y_of_x = place[x.order]

        def figure(weights: FloatArray) -> Any:
            (of_x, rx), (of_y, ry) = (_ranks(groups, weights) for groups in (x, y))
            xy = np.einsum("bn,bn,bn->b", of_x, rx, ry.take(y_of_x, axis=1))
            xx, yy = (np.einsum("bn,bn,bn->b", w, r, r) for w, r in ((of_x, rx), (of_y, ry)))
            return _correlation(xy, xx, yy)

        return figure


def _ranks(groups: Groups, weights: FloatArray) -> tuple[Any, Any]:
    """Weights, and mean ranks less their mean, of the examples in the groups' order."""
    ordered = weights.take(groups.order, axis=1)
    drawn = groups.sums(ordered)
    ranks = np.cumsum(drawn, axis=1)
    middle = ranks[:, -1:] / 2
    return ordered, groups.spread(ranks - drawn / 2 - middle)


def _sum_and_count(errors: Any) -> FloatArray:
    return np.stack([errors.sum(axis=1), np.full(len(errors), errors.shape[1])], axis=1).astype(np.float64)


def _about_mean(total: FloatArray, squares: FloatArray, n: FloatArray) -> Any:
    """Sum of squares about the mean; NaN where the values are equal up to rounding."""
    found = squares - total * total / n
    return np.where(found > 1e-12 * squares, found, np.nan)


def _correlation(xy: FloatArray, xx: FloatArray, yy: FloatArray) -> Any:
    """Within [-1, 1], which rounding may leave; NaN where either is constant."""
    scale = np.sqrt(xx) * np.sqrt(yy)
    return np.clip(np.divide(xy, scale, out=np.full_like(scale, np.nan), where=scale > 0), -1.0, 1.0)
