"""Intervals and tests of every metric, in float64 NumPy. Nothing heavy is imported before a function is called.

One test for all: where a metric is a proportion, Wilson's interval, the exact McNemar test and the interval of Bonett
and Price; otherwise the bootstrap and approximate randomization, both paired. The unit is the example (an image, a
document), never a token.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from harness.errors import InputError

if TYPE_CHECKING:
    from harness.contracts import FloatArray, Metric

Z95 = NormalDist().inv_cdf(0.975)
"""97.5 % quantile of the standard normal distribution, 1.959963984540054."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Parameters
    ----------
    value, low, high : float
        In the unit of the estimate; ``low <= high``.
    """

    value: float
    low: float
    high: float


def wilson(k: int, n: int) -> Interval:
    """Wilson score interval of a proportion at 95 % (Wilson 1927, JASA 22:209).

    Parameters
    ----------
    k, n : int
        Successes and trials, ``0 <= k <= n``.

    Returns
    -------
    Interval
        Fractions.

    Raises
    ------
    ValueError
        If ``n < 1`` or ``k`` is not in [0, n].
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"need 0 <= k <= n and n >= 1, not k={k}, n={n}")
    z2 = Z95 * Z95
    half = Z95 * math.sqrt(k * (n - k) / n + z2 / 4)
    return Interval(k / n, max(0.0, (k + z2 / 2 - half) / (n + z2)), min(1.0, (k + z2 / 2 + half) / (n + z2)))


def mcnemar_exact(b: int, c: int) -> float:
    """Exact two-sided McNemar test (McNemar 1947): ``min(1, 2 P(X <= min(b, c)))``, X ~ Bin(b + c, 1/2).

    Parameters
    ----------
    b, c : int
        Discordant pairs of either kind.

    Returns
    -------
    float
        The p-value; 1 where nothing is discordant.

    Raises
    ------
    ValueError
        For a negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts must be 0 or more, not b={b}, c={c}")
    if b == c:
        return 1.0
    from scipy.special import bdtr

    return min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5)))


def paired_difference(gained: int, lost: int, n: int) -> Interval:
    """Difference of two paired proportions with the adjusted Wald interval at 95 % (Bonett & Price 2012, eq. 10).

    One is added to each discordant count and two to n before the Wald interval is taken.

    Parameters
    ----------
    gained, lost : int
        Pairs right only in the second, and only in the first classifier.
    n : int
        All pairs.

    Returns
    -------
    Interval
        ``value`` is (gained - lost) / n, as a fraction.

    Raises
    ------
    ValueError
        If the counts are negative or exceed ``n``.
    """
    if min(gained, lost) < 0 or n < 1 or gained + lost > n:
        raise ValueError(f"need gained, lost >= 0 and gained + lost <= n, not {gained}, {lost}, {n}")
    centre = (gained - lost) / (n + 2)
    half = Z95 * math.sqrt(((gained + lost + 2) / (n + 2) - centre * centre) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How a run differs from its reference on the same examples.

    Parameters
    ----------
    delta, low, high : float
        The run's figure less the reference's, with a 95 % interval; NaN where it is not defined.
    p : float
        Of no difference, two-sided; NaN where ``delta`` is.
    test : {"mcnemar", "randomization"}
        What ``p`` is of.
    n : int
        Examples that both have a score for.
    gained, lost : int or None
        Of a proportion: examples that only the run gets right, and only the reference.
    flips : int or None
        Examples whose predicted class differs, where the metric keeps it.
    """

    delta: float
    low: float
    high: float
    p: float
    test: Literal["mcnemar", "randomization"]
    n: int
    gained: int | None = None
    lost: int | None = None
    flips: int | None = None


MIN_RESAMPLED = 10
"""Examples that resampling needs: of fewer the percentile interval covers much less than it says (two examples have
three different resamples), and randomization cannot give a small p."""


def seed_of(*run_ids: str) -> int:
    """The seed of a run's resampling, or of a run against its reference: whoever has the records gets the same."""
    return int.from_bytes(hashlib.sha256("/".join(run_ids).encode()).digest()[:8], "big")


def interval(metric: Metric, scores: FloatArray, seed: int) -> Interval:
    """A metric with its 95 % interval over examples.

    Wilson's where the metric is a proportion, else the percentile bootstrap (Efron 1979) of 10,000 draws.

    Resampled examples repeat, so a metric that rare classes weigh much in (macro F1 of a thousand classes) is lower on
    them than on the set, and so are the ends of its interval.

    Parameters
    ----------
    metric : Metric
    scores : array, shape (n, parts)
        Examples with NaN are left out.
    seed : int
        See :func:`seed_of`.

    Returns
    -------
    Interval
        In plain units, NaN where it is not defined. Draws on which the metric is not defined are left out.

    Raises
    ------
    InputError
        If a proportion's first part is neither 0 nor 1.
    """
    rows = _there(metric, scores)[0]
    if not len(rows):
        return Interval(math.nan, math.nan, math.nan)
    if metric.proportion:
        return wilson(int(_right(metric, rows).sum()), len(rows))
    from harness.resampling import bootstrap

    with _quiet():
        value = float(metric.value(rows))
        return Interval(value, *_percentiles(bootstrap(metric, [rows], seed)[0]))


def compare(metric: Metric, reference: FloatArray, scores: FloatArray, seed: int) -> Paired:
    """A run against its reference on the same examples.

    Of a proportion the exact McNemar test and the interval of Bonett and Price. Of any other metric approximate
    randomization (Noreen 1989: each example's scores are swapped or not, and the metric is computed anew; p is (1 +
    draws that differ at least as much) / (1 + draws)) and the percentile bootstrap of the difference, 10,000 draws
    each. Ten thousand examples take about half a second where the metric is a function of sums, and several seconds
    where it is one of ranks.

    Parameters
    ----------
    metric : Metric
    reference, scores : array, shape (n, parts)
        In the same order; examples that are NaN in either are left out.
    seed : int
        See :func:`seed_of`.

    Raises
    ------
    ValueError
        If the shapes differ.
    InputError
        If a proportion's first part is neither 0 nor 1.
    """
    a, b = _there(metric, reference, scores)
    n = len(a)
    test: Literal["mcnemar", "randomization"] = "mcnemar" if metric.proportion else "randomization"
    if not n:
        return Paired(delta=math.nan, low=math.nan, high=math.nan, p=math.nan, test=test, n=0)
    place = metric.parts.index("predicted") if "predicted" in metric.parts else None
    flips = None if place is None else int((a[:, place] != b[:, place]).sum())
    if metric.proportion:
        was, now = _right(metric, a), _right(metric, b)
        gained, lost = int((now & ~was).sum()), int((was & ~now).sum())
        found = paired_difference(gained, lost, n)
        p = mcnemar_exact(gained, lost)
        return Paired(
            delta=found.value,
            low=found.low,
            high=found.high,
            p=p,
            test=test,
            n=n,
            gained=gained,
            lost=lost,
            flips=flips,
        )
    with _quiet():
        delta, low, high, p = _resampled(metric, a, b, seed)
    return Paired(delta=delta, low=low, high=high, p=p, test=test, n=n, flips=flips)


def _resampled(metric: Metric, a: FloatArray, b: FloatArray, seed: int) -> tuple[float, float, float, float]:
    """Difference, interval and p of a metric that is no proportion."""
    import numpy as np

    from harness.resampling import bootstrap, randomization

    first, second = float(metric.value(a)), float(metric.value(b))
    delta = second - first
    if math.isnan(delta):
        return math.nan, math.nan, math.nan, math.nan
    if np.array_equal(a, b):
        return 0.0, 0.0, 0.0, 1.0
    was, now = bootstrap(metric, [a, b], seed)
    low, high = _percentiles(now - was)
    was, now = randomization(metric, a, b, seed)
    # Equal differences must count as equal however they were rounded. What is not defined speaks against a difference.
    less = np.abs(now - was) < abs(delta) - 1e-12 * (abs(first) + abs(second))
    return delta, low, high, (1 + int((~less).sum())) / (1 + len(less))


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of at least two values with Student's 95 % interval (1908): mean ± t(0.975, n - 1) s / sqrt(n).

    Raises
    ------
    ValueError
        For fewer than two values.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"need two values or more, not {n}")
    from scipy.special import stdtrit

    mean = math.fsum(values) / n
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _there(metric: Metric, *sets: FloatArray) -> list[Any]:
    """The sets as float64, without the examples that are NaN in any."""
    import numpy as np

    arrays = [np.asarray(scores, dtype=np.float64) for scores in sets]
    expected = (len(arrays[0]), len(metric.parts))
    for array in arrays:
        if array.shape != expected:
            raise ValueError(f"{metric.name}: scores have shape {array.shape}; {expected} is expected")
    keep = ~np.any([np.isnan(array).any(axis=1) for array in arrays], axis=0)
    return [array[keep] for array in arrays]


def _right(metric: Metric, rows: Any) -> Any:
    """The first part as booleans."""
    first = rows[:, 0]
    if not ((first == 0) | (first == 1)).all():
        raise InputError(
            f"Metric {metric.name!r} says that it is a proportion, and its part {metric.parts[0]!r} holds values other "
            "than 0 and 1: set proportion = False."
        )
    return first == 1


def _percentiles(draws: Any) -> tuple[float, float]:
    import numpy as np

    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return math.nan, math.nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def _quiet() -> Any:
    """Draws on which a metric is not defined are NaN, without a warning for each."""
    import numpy as np

    return np.errstate(divide="ignore", invalid="ignore", over="ignore")


def required_n(percentile: float) -> int:
    """Samples that a latency percentile needs before it may be stated.

    The smallest n with P(Bin(n, 1 - percentile) <= 1) <= 0.01: then the second largest sample bounds the percentile
    from above with 99 % confidence (MLPerf inference rules, early stopping).

    Parameters
    ----------
    percentile : float
        As a fraction in [0.5, 1): 0.9, 0.99, ...

    Returns
    -------
    int
        64 for 0.9, 130 for 0.95, 662 for 0.99, 6636 for 0.999; for the median 6, the smallest n whose extremes bound
        it with 95 % confidence (``1 - 2 * 0.5**n >= 0.95``).

    Raises
    ------
    ValueError
        If ``percentile`` is outside of [0.5, 1).
    """
    if not 0.5 <= percentile < 1:
        raise ValueError(f"percentile must be in [0.5, 1), not {percentile}")
    if percentile == 0.5:
        return 6
    tail, n = 1 - percentile, 2
    while percentile**n + n * tail * percentile ** (n - 1) > 0.01:
        n += 1
    return n
