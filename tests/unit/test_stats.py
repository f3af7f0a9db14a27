"""The closed formulas against SciPy, simulation and known figures; see test_paired.py for resampling."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from harness import stats


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 10), (8, 10), (10, 10), (9352, 10_000), (1, 10_000), (360, 360)]
)
def test_wilson_is_scipys(k: int, n: int) -> None:
    expected = reference.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = stats.wilson(k, n)
    assert (found.value, found.low, found.high) == pytest.approx((k / n, expected.low, expected.high), abs=1e-12)


def test_mcnemar_of_every_small_table_is_scipys() -> None:
    for b in range(41):
        for c in range(41):
            expected = reference.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
            assert stats.mcnemar_exact(b, c) == pytest.approx(expected, abs=1e-12), (b, c)


@settings(max_examples=150, deadline=None)
@given(b=st.integers(0, 50_000), difference=st.integers(-600, 600))
def test_mcnemar_stays_exact_for_large_tables(b: int, difference: int) -> None:
    c = max(0, b + difference)
    expected = 1.0 if b == c else min(1.0, 2 * reference.binom.cdf(min(b, c), b + c, 0.5))
    found = stats.mcnemar_exact(b, c)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found == stats.mcnemar_exact(c, b)


# What the SQL macros of the database's version 2 gave.
WILSON = [
    (0, 1, 0.0, 0.7934506856227627),
    (1, 1, 0.20654931437723736, 1.0),
    (7, 9, 0.452588969106989, 0.9367748928821533),
    (352, 360, 0.9567691737312188, 0.9886975719084741),
    (9135, 10000, 0.9078305089696972, 0.9188519243777533),
    (37941, 50000, 0.7550504509689695, 0.7625497822314021),
]
PAIRED = [
    (0, 0, 1, -0.9239358828997852, 0.9239358828997852, 1.0),
    (1, 0, 2, -0.5625581424161613, 1.0, 1.0),
    (12, 40, 360, -0.11632861493506869, -0.03836751766161639, 0.0001275387838557399),
    (3, 0, 360, -0.003789235154478132, 0.02036382078983725, 0.25),
    (105, 161, 10000, -0.008804960890598706, -0.0023927995573117112, 0.0007159535989513699),
    (2000, 2100, 50000, -0.004510349077714183, 0.0005105090713144393, 0.12206497999145331),
]


@pytest.mark.parametrize(("k", "n", "low", "high"), WILSON)
def test_wilson_is_that_of_earlier_databases(k: int, n: int, low: float, high: float) -> None:
    found = stats.wilson(k, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-15)


@pytest.mark.parametrize(("gained", "lost", "n", "low", "high", "p"), PAIRED)
def test_paired_figures_are_those_of_earlier_databases(
    gained: int, lost: int, n: int, low: float, high: float, p: float
) -> None:
    found = stats.paired_difference(gained, lost, n)
    assert found.value == (gained - lost) / n
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-15)
    assert stats.mcnemar_exact(gained, lost) == pytest.approx(p, abs=1e-12)


@pytest.mark.parametrize(
    ("p_gained", "p_lost", "n"), [(0.02, 0.02, 100), (0.01, 0.05, 300), (0.3, 0.1, 40), (0.002, 0.006, 10_000)]
)
def test_paired_interval_covers_the_true_difference(p_gained: float, p_lost: float, n: int) -> None:
    # Bonett and Price report coverage at or slightly above 95 % in small samples; plain Wald falls well below.
    draws = np.random.default_rng(0).multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], size=4000)
    truth = p_gained - p_lost
    intervals = [stats.paired_difference(int(g), int(lost), n) for g, lost, _ in draws]
    coverage = np.mean([i.low <= truth <= i.high for i in intervals])
    assert 0.935 <= coverage <= 0.995


@pytest.mark.parametrize(("percentile", "n"), [(0.5, 6), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_samples_a_percentile_needs(percentile: float, n: int) -> None:
    assert stats.required_n(percentile) == n


@pytest.mark.parametrize("percentile", [0.9, 0.99])
def test_required_n_is_the_smallest_by_the_binomial_distribution(percentile: float) -> None:
    n = stats.required_n(percentile)
    assert reference.binom.cdf(1, n, 1 - percentile) <= 0.01 < reference.binom.cdf(1, n - 1, 1 - percentile)


def test_mean_interval_is_scipys() -> None:
    values = [0.91, 0.93, 0.905, 0.94]
    found = stats.mean_interval(values)
    expected = reference.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-14)
    assert found.value == pytest.approx(statistics.mean(values), abs=1e-15)
    equal = stats.mean_interval([0.1] * 3)
    assert (equal.low, equal.value, equal.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)


def test_seeds_are_known_and_differ() -> None:
    assert stats.seed_of("a", "b") == int.from_bytes(bytes.fromhex("c14cddc033f64b9d"), "big")
    assert len({stats.seed_of("a", "b"), stats.seed_of("b", "a"), stats.seed_of("a"), stats.seed_of("ab")}) == 4


def test_the_quantile_is_that_of_the_normal_distribution() -> None:
    assert math.isclose(stats.Z95, reference.norm.ppf(0.975), abs_tol=1e-14)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson(0, 0),
        lambda: stats.wilson(3, 2),
        lambda: stats.mcnemar_exact(-1, 2),
        lambda: stats.paired_difference(3, 3, 5),
        lambda: stats.required_n(1.0),
        lambda: stats.mean_interval([1.0]),
    ],
)
def test_impossible_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"need|not"):
        call()
