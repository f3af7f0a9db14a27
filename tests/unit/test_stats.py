"""The statistics against SciPy, simulation and known figures; SQL against Python."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as reference

from harness import stats
from results import schema


@pytest.fixture(scope="module")
def sql() -> Iterator[Any]:
    connection = duckdb.connect()
    schema.create(connection)
    yield connection
    connection.close()


def one(sql: Any, expression: str) -> float:
    (value,) = sql.execute(f"SELECT {expression}").fetchone()
    return float(value)


@pytest.mark.parametrize(
    ("k", "n"), [(0, 1), (1, 1), (0, 10), (8, 10), (10, 10), (9352, 10_000), (1, 10_000), (360, 360)]
)
def test_wilson_is_scipys_and_sqls(sql: Any, k: int, n: int) -> None:
    expected = reference.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = stats.wilson(k, n)
    assert (found.value, found.low, found.high) == pytest.approx((k / n, expected.low, expected.high), abs=1e-12)
    assert one(sql, f"wilson_low({k}, {n})") == pytest.approx(found.low, abs=1e-12)
    assert one(sql, f"wilson_high({k}, {n})") == pytest.approx(found.high, abs=1e-12)


def test_wilson_of_nothing_is_null_in_sql_and_refused_in_python(sql: Any) -> None:
    assert sql.execute("SELECT wilson_low(0, 0), wilson_high(NULL, 3)").fetchone() == (None, None)
    with pytest.raises(ValueError, match="n >= 1"):
        stats.wilson(0, 0)


def test_mcnemar_of_every_small_table_is_scipys(sql: Any) -> None:
    query = "SELECT b, c, mcnemar_exact(b, c) FROM range(41) r(b), range(41) s(c)"
    for b, c, p in sql.execute(query).fetchall():
        expected = reference.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert p == pytest.approx(expected, abs=1e-12), (b, c)
        assert stats.mcnemar_exact(b, c) == pytest.approx(expected, abs=1e-12), (b, c)


@settings(max_examples=150, deadline=None)
@given(b=st.integers(0, 50_000), difference=st.integers(-600, 600))
def test_mcnemar_stays_exact_for_large_tables(sql: Any, b: int, difference: int) -> None:
    c = max(0, b + difference)
    expected = 1.0 if b == c else min(1.0, 2 * reference.binom.cdf(min(b, c), b + c, 0.5))
    assert one(sql, f"mcnemar_exact({b}, {c})") == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert stats.mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(b=st.integers(0, 100_000), c=st.integers(0, 100_000))
def test_mcnemar_is_a_symmetric_probability(sql: Any, b: int, c: int) -> None:
    p = one(sql, f"mcnemar_exact({b}, {c})")
    assert 0.0 <= p <= 1.0
    assert p == one(sql, f"mcnemar_exact({c}, {b})")


@settings(max_examples=100, deadline=None)
@given(gained=st.integers(0, 3000), lost=st.integers(0, 3000), ties=st.integers(1, 10_000))
def test_paired_interval_in_sql_is_pythons(sql: Any, gained: int, lost: int, ties: int) -> None:
    n = gained + lost + ties
    found = stats.paired_difference(gained, lost, n)
    assert found.value == (gained - lost) / n
    assert one(sql, f"paired_low({gained}, {lost}, {n})") == pytest.approx(found.low, abs=1e-12)
    assert one(sql, f"paired_high({gained}, {lost}, {n})") == pytest.approx(found.high, abs=1e-12)


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


def test_paired_bootstrap_is_that_of_resampled_examples() -> None:
    rng = np.random.default_rng(3)
    a = rng.random(400) < 0.9
    b = a ^ (rng.random(400) < 0.06)
    found = stats.paired_bootstrap(a, b, seed=0)
    index = rng.integers(0, 400, size=(10_000, 400))
    low, high = np.quantile(b[index].mean(axis=1) - a[index].mean(axis=1), [0.025, 0.975])
    assert found.value == pytest.approx(b.mean() - a.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.004)
    assert found == stats.paired_bootstrap(a, b, seed=0)


@pytest.mark.parametrize(("percentile", "n"), [(0.5, 6), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_samples_a_percentile_needs(percentile: float, n: int) -> None:
    assert stats.required_n(percentile) == n


@pytest.mark.parametrize("percentile", [0.9, 0.99])
def test_required_n_is_the_smallest_by_the_binomial_distribution(percentile: float) -> None:
    n = stats.required_n(percentile)
    assert reference.binom.cdf(1, n, 1 - percentile) <= 0.01 < reference.binom.cdf(1, n - 1, 1 - percentile)


def test_schema_uses_the_same_numbers_of_samples() -> None:
    for column, percentile in (("p50_ms", 0.5), ("p90_ms", 0.9), ("p99_ms", 0.99)):
        assert f"CASE WHEN l.n >= {stats.required_n(percentile)} THEN" in next(
            line for line in schema.sql().splitlines() if line.strip().endswith(f"AS {column},")
        )


def test_detectable_difference_is_the_known_one_and_has_that_power() -> None:
    # 10,000 examples of which 2 % flip: 0.40 points paired, 1.07 points unpaired at 92 % accuracy.
    d = stats.detectable_difference(10_000, 0.02)
    assert d == pytest.approx(0.0040, abs=5e-5)
    assert stats.detectable_difference_unpaired(10_000, 0.921) == pytest.approx(0.0107, abs=5e-5)
    gained, lost = (0.02 + d) / 2, (0.02 - d) / 2
    draws = np.random.default_rng(1).multinomial(10_000, [gained, lost, 0.98], size=4000)
    z = (draws[:, 0] - draws[:, 1]) / np.sqrt(draws[:, 0] + draws[:, 1])
    assert np.mean(np.abs(z) > stats.Z95) == pytest.approx(0.8, abs=0.03)


def test_detectable_difference_never_exceeds_the_discordant_share() -> None:
    assert stats.detectable_difference(10, 0.02) == 0.02
    assert math.isclose(stats.Z95, reference.norm.ppf(0.975), abs_tol=1e-14)


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mcnemar_exact(-1, 2),
        lambda: stats.paired_difference(3, 3, 5),
        lambda: stats.paired_bootstrap([True], [True, False], 0),
        lambda: stats.required_n(1.0),
        lambda: stats.detectable_difference(0, 0.1),
        lambda: stats.detectable_difference_unpaired(10, 1.5),
    ],
)
def test_impossible_arguments_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"not|must"):
        call()
