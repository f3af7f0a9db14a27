"""Statistics of accuracy and latency, in float64 NumPy; ``results/schema.sql`` has the first three in SQL.

Tests hold the two together. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

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
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z95 * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(-1.0, p - q - half), min(1.0, p - q + half))


def paired_bootstrap(
    correct_a: Sequence[bool] | Any, correct_b: Sequence[bool] | Any, seed: int, resamples: int = 10_000
) -> Interval:
    """Percentile bootstrap of ``mean(b) - mean(a)`` over examples, kept in pairs (Efron 1979), at 95 %.

    Only the counts of gained, lost and tied pairs matter to the difference, and resampling n pairs with replacement
    draws those counts from a multinomial distribution: that is what is sampled, so the cost does not depend on n.

    Parameters
    ----------
    correct_a, correct_b : array of bool, shape (n,)
        Whether each example is right, in the same order.
    seed : int
        Of the resampling.
    resamples : int
        Bootstrap samples.

    Returns
    -------
    Interval
        Fractions.

    Raises
    ------
    ValueError
        If the shapes differ or there is no example.
    """
    import numpy as np

    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"need two arrays of one equal length, not {a.shape} and {b.shape}")
    n, gained, lost = a.size, int((b & ~a).sum()), int((a & ~b).sum())
    draws = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return Interval((gained - lost) / n, float(low), float(high))


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


def detectable_difference(n: int, discordant: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest paired accuracy difference that a test set shows with the given power.

    Solves Connor's sample-size formula (1987, Biometrics 43:207) for d:
    ``n d² = (z_alpha sqrt(q) + z_beta sqrt(q - d²))²``.

    Parameters
    ----------
    n : int
        Test examples.
    discordant : float
        Share q of examples on which the two classifiers differ, in (0, 1].
    alpha, power : float
        Two-sided level and power.

    Returns
    -------
    float
        As a fraction; ``discordant`` itself (nothing smaller) where the test set is too small to show anything else.

    Raises
    ------
    ValueError
        If ``n < 1`` or ``discordant`` is outside of (0, 1].
    """
    if n < 1 or not 0 < discordant <= 1:
        raise ValueError(f"need n >= 1 and 0 < discordant <= 1, not {n}, {discordant}")
    z_alpha, z_beta = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)

    def short(d: float) -> bool:
        return n * d * d < (z_alpha * math.sqrt(discordant) + z_beta * math.sqrt(max(0.0, discordant - d * d))) ** 2

    low, high = 0.0, min(discordant, 1.0)
    if short(high):
        return high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if short(middle) else (low, middle)
    return high


def detectable_difference_unpaired(n: int, accuracy: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The same for two independent test sets of ``n`` examples: ``(z_alpha + z_beta) sqrt(2 p (1 - p) / n)``.

    Parameters
    ----------
    n : int
        Examples of each.
    accuracy : float
        The common accuracy p, as a fraction.
    alpha, power : float
        Two-sided level and power.

    Returns
    -------
    float
        As a fraction.

    Raises
    ------
    ValueError
        If ``n < 1`` or ``accuracy`` is outside of [0, 1].
    """
    if n < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"need n >= 1 and accuracy in [0, 1], not {n}, {accuracy}")
    z = NormalDist().inv_cdf(1 - alpha / 2) + NormalDist().inv_cdf(power)
    return z * math.sqrt(2 * accuracy * (1 - accuracy) / n)
