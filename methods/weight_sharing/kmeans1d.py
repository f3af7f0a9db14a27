"""k-means of numbers on a line: seconds for tens of millions of weights, and the exact optimum.

On a line a cluster is a run of the sorted values, so that a clustering is ``k - 1`` cuts. With the values sorted once
and their prefix sums in float64, an iteration of Lloyd's algorithm is ``k`` binary searches and ``k`` differences:
O(k log n), whatever n. The best of all clusterings follows from dynamic programming over the cuts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harness.errors import InputError

Init = Literal["linear", "density", "random", "exact"]

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]

EXACT_LIMIT = 2**16
"""Up to this many distinct values the dynamic programme runs on the values themselves, beyond it on as many bins."""

TABLE_LIMIT = 2**27
"""Largest table (clusters times values or bins, 4 bytes each) of the dynamic programme."""


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """A codebook and what uses it.

    Parameters
    ----------
    codebook : ndarray of float32, shape (k,)
        Ascending, all different; each is used at least once.
    assignments : ndarray of uint8, uint16 or uint32
        Index of the nearest codebook entry, shaped as the values (halfway between two: the lower one).
    distortion : float
        Sum of squared differences between the values and their codebook entries.
    lower_bound : float or None
        No codebook of k entries has a lower distortion than this; known for ``init="exact"`` only, where it is the
        distortion itself (up to rounding) if the optimum is exact.
    iterations : int
        Of Lloyd's algorithm.
    """

    codebook: FloatArray
    assignments: npt.NDArray[Any]
    distortion: float
    lower_bound: float | None
    iterations: int


def cluster(
    values: npt.ArrayLike, k: int, *, init: Init = "linear", seed: int = 0, iterations: int = 30000
) -> Clusters:
    """Cluster numbers into ``k`` by Lloyd's algorithm or, with ``init="exact"``, optimally.

    Initial centroids (Han et al. 2016, §3.2): "linear" spaces them evenly between the smallest and the largest value;
    "density" puts them at the quantiles ``(i + 1/2) / k``; "random" draws k values. A cluster that loses all its
    values takes half of the cluster with the largest ``count * range ** 2``, so that none is ever empty.

    "exact" is the optimum of the k-means objective by dynamic programming (Wang and Song, "Ckmeans.1d.dp", The R
    Journal 3/2, 2011), with divide and conquer over the monotone cuts: O(k m log m) for m different values. With more
    than :data:`EXACT_LIMIT` of them the values are first put into as many bins, narrow where values are dense: the
    optimum is then that of the bins, improved by Lloyd's algorithm on all values, and ``lower_bound`` states how far
    from the optimum it can be at most. With B the optimum of the bins and W the scatter within them, the optimum of
    the values is at least ``max(0, sqrt(B) - sqrt(W)) ** 2``, by the triangle inequality.

    Parameters
    ----------
    values : array_like of float32
        Any shape, finite.
    k : int
        Clusters, 1 to the number of different values.
    init : {"linear", "density", "random", "exact"}
        Initial centroids, or the optimum.
    seed : int
        Of "random".
    iterations : int
        After this many the algorithm stops where it is. It ends earlier when nothing changes.

    Returns
    -------
    Clusters

    Raises
    ------
    InputError
        If there are fewer different values than clusters, or a value is NaN or infinite.
    """
    given = np.asarray(values, dtype=np.float32)
    ordered = np.sort(given, axis=None)
    # NaN sorts last, infinities at the ends.
    if ordered.size and not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):
        raise InputError(f"k-means needs finite values; the range is {ordered[0]} to {ordered[-1]}.")
    distinct = count_sorted(ordered)
    if not 1 <= k <= distinct:
        raise InputError(
            f"{k} clusters cannot be made of {distinct} different values: every cluster needs one. "
            f"Allowed: 1 to {distinct}."
        )
    if init == "exact" and k * min(distinct, EXACT_LIMIT) > TABLE_LIMIT:
        raise InputError(
            f'init="exact" with {k} clusters of {distinct} different values needs too large a table; '
            'use fewer clusters or init="density".'
        )
    line = _Line(ordered)
    optimum = None
    if init == "exact":
        cuts, optimum = _optimum(line, k, distinct)
    else:
        cuts = line.cuts(_start(line, k, init, seed))
    codebook, cuts, done = _lloyd(line, cuts, iterations)
    return Clusters(
        codebook=codebook.astype(np.float32),
        assignments=assign(given, codebook.astype(np.float32)),
        distortion=line.distortion(codebook, cuts),
        lower_bound=optimum,
        iterations=done,
    )


def assign(values: npt.ArrayLike, codebook: FloatArray) -> npt.NDArray[Any]:
    """Index of the nearest codebook entry, shaped as ``values``; the lower of two that are equally near.

    Parameters
    ----------
    values : array_like of float32
        Any shape.
    codebook : ndarray of float32, shape (k,)
        Ascending.
    """
    given = np.asarray(values, dtype=np.float32)
    kind = np.uint8 if len(codebook) <= 2**8 else np.uint16 if len(codebook) <= 2**16 else np.uint32
    found = np.empty(given.size, dtype=kind)
    flat, edges = given.reshape(-1), _upper_edges(codebook.astype(np.float64))
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] = np.searchsorted(edges, flat[part], side="left")
    return found.reshape(given.shape)


def count_sorted(ordered: FloatArray) -> int:
    """How many different values a sorted array holds."""
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + 1 if ordered.size else 0


_CHUNK = 2**20


def _upper_edges(codebook: DoubleArray) -> FloatArray:
    """The largest float32 that is not nearer to the next entry, for every entry but the last.

    Comparing float32 with float32 is several times faster than widening millions of values.
    """
    middles = (codebook[1:] + codebook[:-1]) / 2
    edges = middles.astype(np.float32)
    return np.where(edges.astype(np.float64) > middles, np.nextafter(edges, np.float32(-np.inf)), edges)


class _Line:
    """Sorted values with their prefix sums; sums are taken around the mean, for the sake of rounding."""

    def __init__(self, ordered: FloatArray) -> None:
        self.ordered = ordered
        self.centre = float(ordered.mean(dtype=np.float64))
        self.sums = np.zeros(ordered.size + 1)
        np.subtract(ordered, self.centre, out=self.sums[1:], dtype=np.float64)
        np.cumsum(self.sums, out=self.sums)

    def cuts(self, codebook: DoubleArray) -> IndexArray:
        """Where each cluster begins, and the end: (k + 1,) positions, for an ascending codebook."""
        inner = np.searchsorted(self.ordered, _upper_edges(codebook), side="right")
        return np.concatenate(([0], inner, [self.ordered.size])).astype(np.int64)

    def means(self, cuts: IndexArray) -> DoubleArray:
        """Centroids of clusters that are not empty, rounded to float32 (each within its cluster's range)."""
        exact = (self.sums[cuts[1:]] - self.sums[cuts[:-1]]) / np.diff(cuts) + self.centre
        first, last = self.ordered[cuts[:-1]], self.ordered[cuts[1:] - 1]
        return np.clip(exact.astype(np.float32), first, last).astype(np.float64)

    def without_empty(self, cuts: IndexArray) -> IndexArray:
        """As many clusters, none empty: for each empty one the cluster of largest count * range ** 2 is halved."""
        wanted = len(cuts)
        cuts = np.unique(cuts)
        while len(cuts) < wanted:
            first, last = self.ordered[cuts[:-1]], self.ordered[cuts[1:] - 1]
            width = last.astype(np.float64) - first
            # float32 is at least 1e-45, its square is no zero in float64.
            size = np.diff(cuts) * width**2
            chosen = int(size.argmax())
            start, stop = int(cuts[chosen]), int(cuts[chosen + 1])
            run = self.ordered[start:stop]
            # Between neighbouring numbers the middle rounds to one of them; the largest value has to go to the right.
            middle = min(np.float32((float(run[0]) + float(run[-1])) / 2), np.nextafter(run[-1], run[0]))
            cuts = np.insert(cuts, chosen + 1, start + int(np.searchsorted(run, middle, side="right")))
        return cuts

    def distortion(self, codebook: DoubleArray, cuts: IndexArray) -> float:
        """Sum of squared distances, in float64 from the values themselves."""
        total = 0.0
        for entry, start, stop in zip(codebook, cuts[:-1], cuts[1:], strict=True):
            for begin in range(int(start), int(stop), _CHUNK):
                rest = self.ordered[begin : min(begin + _CHUNK, int(stop))] - entry
                total += float(np.dot(rest, rest))
        return total


def _start(line: _Line, k: int, init: Init, seed: int) -> DoubleArray:
    ordered = line.ordered
    if init == "linear":
        return np.linspace(float(ordered[0]), float(ordered[-1]), k)
    if init == "density":
        places = ((np.arange(k) + 0.5) / k * ordered.size).astype(np.int64)
        return ordered[places].astype(np.float64)
    chosen = np.random.default_rng(seed).choice(ordered.size, k, replace=False, shuffle=False)
    return np.sort(ordered[chosen]).astype(np.float64)


def _lloyd(line: _Line, cuts: IndexArray, iterations: int) -> tuple[DoubleArray, IndexArray, int]:
    """Centroids (float32 values) and cuts that are each other's, unless ``iterations`` were not enough.

    Every step lowers the distortion, so that the search for cuts without empty clusters ends as well.
    """
    done = 0
    while True:
        filled = line.without_empty(cuts)
        codebook = line.means(filled)
        cuts = line.cuts(codebook)
        done += 1
        if np.array_equal(cuts, filled) or (done >= iterations and bool((np.diff(cuts) > 0).all())):
            return codebook, cuts, done


def _optimum(line: _Line, k: int, distinct: int) -> tuple[IndexArray, float]:
    """Cuts of the optimum, and a lower bound of the distortion (0 scatter within bins: the optimum itself)."""
    ordered = line.ordered
    exact = distinct <= EXACT_LIMIT
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1 if exact else _bins(ordered)
    bins = np.concatenate(([0], edges, [ordered.size])).astype(np.int64)
    counts = np.diff(bins).astype(np.float64)
    sums = np.diff(line.sums[bins])
    chosen = _best_cuts(sums / counts, counts, k)
    cuts = bins[chosen]
    sizes = np.diff(np.concatenate(([0.0], counts.cumsum()))[chosen])
    totals = np.diff(line.sums[cuts])
    between = float((sums**2 / counts).sum() - (totals**2 / sizes).sum())
    if exact:
        return cuts, line.distortion(totals / sizes + line.centre, cuts)
    within = line.distortion(sums / counts + line.centre, bins)
    return cuts, max(0.0, float(np.sqrt(max(between, 0.0)) - np.sqrt(within))) ** 2


def _bins(ordered: FloatArray) -> IndexArray:
    """Inner edges of at most ``EXACT_LIMIT`` bins.

    Half of the edges have equally many values between them. The other half have a density that is the cube root of
    the values' density, as the best codebook's entries have (Panter and Dite 1951); it suits the tails better.
    """
    half = EXACT_LIMIT // 2
    even = np.linspace(0, ordered.size, half + 1)[1:-1].astype(np.int64)
    groups = min(4096, max(half // 8, 2))
    borders = ordered[np.linspace(0, ordered.size - 1, groups + 1).astype(np.int64)].astype(np.float64)
    # Each group has a density of 1 / width: the integral of its cube root is width ** (2/3).
    share = np.concatenate(([0.0], np.cbrt(np.diff(borders) ** 2).cumsum()))
    edges = np.interp(np.linspace(0.0, share[-1], half + 1)[1:-1], share, borders).astype(np.float32)
    places = np.unique(np.concatenate((even, np.searchsorted(ordered, edges))))
    return places[(places > 0) & (places < ordered.size)].astype(np.int64)


def _best_cuts(values: DoubleArray, weights: DoubleArray, k: int) -> IndexArray:
    """Cuts (k + 1,) of the clustering of ascending weighted values with the least sum of squares.

    ``best[j]`` is the least cost of the first j values in t clusters; the last of these begins at ``begins[t][j]``,
    which grows with j and with t.
    """
    m = len(values)
    weight = np.concatenate(([0.0], weights.cumsum()))
    total = np.concatenate(([0.0], (weights * values).cumsum()))
    square = np.concatenate(([0.0], (weights * values**2).cumsum()))
    best = square - np.divide(total**2, weight, out=np.zeros(m + 1), where=weight > 0)
    begins = np.zeros((k + 1, m + 1), dtype=np.int32)
    for t in range(2, k + 1):
        kept = best - square  # what does not depend on j
        found = np.full(m + 1, np.inf)
        first = begins[t]
        # Every other position of those left out so far, between its neighbours that are known.
        stride = 1 << (m - t + 1).bit_length()
        while stride := stride >> 1:
            ends = np.arange(t + stride - 1, m + 1, 2 * stride)
            low = np.where(ends - stride >= t, first[np.maximum(ends - stride, 0)], t - 1)
            low = np.maximum(low, begins[t - 1][ends])
            high = np.where(ends + stride <= m, first[np.minimum(ends + stride, m)], m)
            high = np.maximum(np.minimum(high, ends - 1), low)
            lengths = high - low + 1
            starts = np.concatenate(([0], lengths.cumsum()[:-1]))
            begin = np.arange(int(lengths.sum())) + np.repeat(low - starts, lengths)
            cost = np.repeat(total[ends], lengths)
            cost -= total[begin]
            cost *= cost
            cost /= np.repeat(weight[ends], lengths) - weight[begin]
            np.subtract(kept[begin], cost, out=cost)
            least = np.minimum.reduceat(cost, starts)
            hits = np.flatnonzero(cost == np.repeat(least, lengths))
            first[ends] = begin[hits[np.searchsorted(hits, starts)]]
            found[ends] = least + square[ends]
        best = found
    cuts = [m]
    for t in range(k, 0, -1):
        cuts.append(int(begins[t][cuts[-1]]) if t > 1 else 0)
    return np.array(cuts[::-1], dtype=np.int64)
