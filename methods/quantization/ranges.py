"""The range of every activation, estimated from calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from harness.errors import NotFinite

BINS = 8192
"""Histogram bins per tensor of the percentile range."""

Key = TypeVar("Key", bound=Hashable)


def observe(
    keys: Sequence[Key],
    values: Callable[[], Iterator[tuple[Key, Tensor]]],
    *,
    kind: Literal["min-max", "percentile"],
    percentile: float,
) -> dict[Key, tuple[float, float]]:
    """The range of every value.

    Parameters
    ----------
    keys : sequence
        Of the values.
    values : callable
        Runs over the calibration data, and yields every value of every batch with its key; called twice for
        percentiles.
    kind : {"min-max", "percentile"}
        The extremes, or two-sided percentiles from a histogram between the extremes.
    percentile : float
        See :func:`percentile_range`.

    Raises
    ------
    NotFinite
        If a value is NaN or infinite; it is named by its key.
    """
    low, high = dict.fromkeys(keys, math.inf), dict.fromkeys(keys, -math.inf)
    for key, value in values():
        if not bool(torch.isfinite(value).all()):
            raise NotFinite(f"Calibration: {str(key)!r} holds NaN or infinity.")
        low[key] = min(low[key], value.min().item())
        high[key] = max(high[key], value.max().item())
    found = {key: (low[key], high[key]) for key in keys if low[key] <= high[key]}
    if kind == "min-max":
        return found
    counts = {key: torch.zeros(BINS, dtype=torch.float64) for key in found}
    for key, value in values():
        if low[key] < high[key]:
            counts[key] += torch.histc(value.float(), BINS, low[key], high[key]).double()
    return {key: percentile_range(counts[key], *ends, percentile) for key, ends in found.items()}


def percentile_range(counts: Tensor, low: float, high: float, percentile: float) -> tuple[float, float]:
    """[P(100 - p), P(p)] of a histogram over [low, high], linear inside a bin.

    Parameters
    ----------
    counts : Tensor, float64, shape (bins,)
        Values per bin of equal width.
    low, high : float
        Ends of the histogram.
    percentile : float
        p, in (50, 100].
    """
    if not low < high:
        return low, high
    cumulative = np.concatenate([[0.0], np.cumsum(counts.numpy())])
    edges = np.linspace(low, high, len(counts) + 1)
    tail = (100.0 - percentile) / 100.0
    lower, upper = np.interp([tail * cumulative[-1], (1.0 - tail) * cumulative[-1]], cumulative, edges)
    return float(lower), float(upper)
