"""Resampling of per-example scores: the bootstrap, and approximate randomization of two paired runs.

The random numbers are raw 64-bit words of NumPy's SFC64, whose stream NumPy promises to keep, so that a seed means the
same draws everywhere. Work is done in blocks that fit a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from harness.contracts import FloatArray, Metric

DRAWS = 10_000
_CELLS = 100_000
"""Draws times examples in a block: below a megabyte an array."""


@runtime_checkable
class Weighted(Protocol):
    """A metric that says its figure where every example counts so many times (:mod:`harness.metrics.base`).

    A metric without it is resampled too, by its ``value`` of copied scores, which takes longer.
    """

    def weighted(self, scores: FloatArray) -> Callable[[FloatArray], Any]:
        """Of scores (n, parts): a function of weights, shape (b, n), that gives figures, shape (b,)."""
        ...


@runtime_checkable
class Additive(Protocol):
    """A metric that is a function of sums over the examples: the fastest to resample."""

    def terms(self, scores: FloatArray) -> FloatArray:
        """What is summed, shape (n, terms)."""
        ...

    def total(self, sums: FloatArray) -> Any:
        """The figures of sums, shape (..., terms)."""
        ...


def bootstrap(metric: Metric, sets: Sequence[FloatArray], seed: int) -> FloatArray:
    """A metric of resampled examples.

    Parameters
    ----------
    metric : Metric
    sets : sequence of array, shape (n, parts)
        Scores of the same examples, without NaN; all sets are resampled alike.
    seed : int

    Returns
    -------
    array, shape (sets, draws)
        NaN where the metric is not defined on a draw.
    """
    stream, n = np.random.SFC64([seed, 0]), len(sets[0])
    found = np.empty((len(sets), DRAWS))
    if not isinstance(metric, Weighted):
        for block in _blocks(sets[0].size):
            index = _integers(stream, (block.stop - block.start, n), n)
            for place, scores in enumerate(sets):
                found[place, block] = metric.value(scores[index])
        return found
    rows, group = _distinct(metric, np.concatenate(sets, axis=1))
    figures = [metric.weighted(np.ascontiguousarray(scores)) for scores in np.split(rows, len(sets), axis=1)]
    for block in _blocks(n):
        index = _integers(stream, (block.stop - block.start, n), n)
        weights = _counts(index if group is None else group[index], len(rows))
        for place, figure in enumerate(figures):
            found[place, block] = figure(weights)
    return found


def randomization(metric: Metric, a: FloatArray, b: FloatArray, seed: int) -> FloatArray:
    """A metric of two runs after every example's scores were swapped between them with probability 1/2.

    Parameters
    ----------
    metric : Metric
    a, b : array, shape (n, parts)
        Scores of the same examples, without NaN.
    seed : int

    Returns
    -------
    array, shape (2, draws)
        Of what took the place of ``a``, and of ``b``.
    """
    stream, n = np.random.SFC64([seed, 1]), len(a)
    found = np.empty((2, DRAWS))
    if isinstance(metric, Additive):
        # Terms of both at once: a metric may centre them.
        first, second = np.split(metric.terms(np.concatenate([a, b])), 2)
        for block in _blocks(n):
            moved = _bits(stream, (block.stop - block.start, n)).astype(np.float64) @ (second - first)
            found[0, block] = metric.total(first.sum(axis=0) + moved)
            found[1, block] = metric.total(second.sum(axis=0) - moved)
        return found
    if not isinstance(metric, Weighted):
        for block in _blocks(a.size):
            swap = _bits(stream, (block.stop - block.start, n))[..., None]
            found[0, block] = metric.value(np.where(swap, b, a))
            found[1, block] = metric.value(np.where(swap, a, b))
        return found
    rows, group = _distinct(metric, np.concatenate([a, b], axis=1))
    order = None if group is None else np.argsort(group, kind="stable")
    counts = np.ones(n) if group is None else np.bincount(group)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    figure = metric.weighted(np.concatenate(np.split(rows, 2, axis=1)))
    for block in _blocks(n):
        swap = _bits(stream, (block.stop - block.start, n))
        swapped = swap if order is None else np.add.reduceat(swap.take(order, axis=1), starts, axis=1, dtype=np.float64)
        found[0, block] = figure(np.concatenate([counts - swapped, swapped], axis=1))
        found[1, block] = figure(np.concatenate([swapped, counts - swapped], axis=1))
    return found


def _distinct(metric: Metric, rows: FloatArray) -> tuple[FloatArray, Any]:
    """Different rows, and the one that each example has; None where each has its own.

    Classes have few different rows, which makes the weights short. Sums are so cheap that looking is not worth it.
    """
    if isinstance(metric, Additive):
        return rows, None
    found, group = np.unique(rows, axis=0, return_inverse=True)
    return (found, group.reshape(-1)) if len(found) < len(rows) else (rows, None)


def _blocks(cells: int) -> Iterator[slice]:
    """The draws, so many at a time that a block has about :data:`_CELLS` numbers."""
    size = max(1, _CELLS // max(1, cells))
    for start in range(0, DRAWS, size):
        yield slice(start, min(DRAWS, start + size))


def _integers(stream: Any, shape: tuple[int, int], n: int) -> Any:
    """Integers in [0, n), of 32 random bits each: some are more likely than others by a factor of 1 + n / 2**32."""
    total = shape[0] * shape[1]
    words = stream.random_raw((total + 1) // 2).view(np.uint32)[:total].astype(np.uint64)
    words *= np.uint64(n)
    words >>= np.uint64(32)
    return words.view(np.int64).reshape(shape)


def _bits(stream: Any, shape: tuple[int, int]) -> Any:
    """Random 0 and 1."""
    total = shape[0] * shape[1]
    return np.unpackbits(stream.random_raw((total + 63) // 64).view(np.uint8), count=total).reshape(shape)


def _counts(index: Any, size: int) -> FloatArray:
    """How often each of ``size`` rows occurs in every line of indices: (b, size)."""
    lines = np.arange(len(index))[:, None] * size
    return np.bincount((index + lines).ravel(), minlength=len(index) * size).reshape(-1, size).astype(np.float64)
