"""Several seeds: mean, standard deviation and the 95 % t-interval of the mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from harness.stats import mean_interval


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What several runs say together.

    Parameters
    ----------
    mean : float
    n : int
        Runs, at least 1.
    sd : float or None
        Standard deviation of one run (n - 1 in the denominator); None for one run.
    low, high : float or None
        Student's 95 % interval of the mean; None for one run.
    """

    mean: float
    n: int
    sd: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width, or None."""
        return None if self.high is None or self.low is None else (self.high - self.low) / 2


def spread(values: Sequence[float]) -> Spread:
    """Mean and spread of one or more values (Student 1908: mean +- t(0.975, n - 1) sd / sqrt(n)).

    Raises
    ------
    ValueError
        Without values.
    """
    if not values:
        raise ValueError("need at least one value")
    n = len(values)
    # Ten decimals, as the values have: a mean of equal values is that value.
    mean = round(math.fsum(values) / n, 10)
    if n == 1:
        return Spread(mean=mean, n=1)
    found = mean_interval(values)
    return Spread(mean=mean, n=n, sd=statistics.stdev(values), low=found.low, high=found.high)
