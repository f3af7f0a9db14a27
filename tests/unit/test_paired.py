"""Intervals and paired tests of every metric against SciPy's permutation test and bootstrap, and by simulation."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from harness import metrics, resampling, stats
from harness.errors import InputError

Array = np.ndarray[Any, Any]
METRICS = [
    "rmse",
    "mae",
    "perplexity",
    "r2",
    "psnr",
    "pearson",
    "spearman",
    "f1",
    "f1@binary",
    "matthews",
    "average-precision",
]


@dataclass(frozen=True)
class Median:
    """A user's metric, which has a value and nothing else."""

    name = "median"
    unit = ""
    better = "lower"
    parts = ("error",)
    proportion = False

    def score(self, outputs: Any, against: Any) -> Any:
        raise NotImplementedError

    def value(self, scores: Any) -> Any:
        return np.median(scores[..., 0], axis=-1)


def examples(name: str, n: int, seed: int = 0) -> tuple[Any, Array, Array]:
    """A metric, and scores of two runs of which the second is a little worse."""
    metric: Any = Median() if name == "median" else metrics.create(name)
    rng = np.random.default_rng(seed)
    if name in ("pearson", "spearman", "r2"):
        target = rng.normal(size=n)
        a, b = target + 0.5 * rng.normal(size=n), target + 0.7 * rng.normal(size=n)
        if name == "r2":
            return metric, np.stack([(a - target) ** 2, target], 1), np.stack([(b - target) ** 2, target], 1)
        return metric, np.stack([a, target], 1), np.stack([b, target], 1)
    if name == "average-precision":
        label = (rng.random(n) < 0.4).astype(float)
        a = np.round(label + 0.5 * rng.normal(size=n), 1)
        return metric, np.stack([label, a], 1), np.stack([label, np.round(a + 0.3 * rng.normal(size=n), 1)], 1)
    if "label" in metric.parts:
        classes = 2 if name == "f1@binary" else 4
        label = rng.integers(0, classes, n).astype(float)
        a = np.where(rng.random(n) < 0.8, label, rng.integers(0, classes, n))
        b = np.where(rng.random(n) < 0.85, a, rng.integers(0, classes, n))
        if metric.proportion:
            return metric, np.stack([a == label, label, a], 1), np.stack([b == label, label, b], 1)
        return metric, np.stack([label, a], 1), np.stack([label, b], 1)
    a = rng.exponential(size=(n, len(metric.parts)))
    b = a * rng.uniform(0.8, 1.3, size=a.shape)
    if len(metric.parts) == 2:
        a[:, 1] = b[:, 1] = rng.integers(1, 9, n)
    return metric, a, b


def by_hand(metric: Any, scores: Array) -> Array:
    return np.array([float(metric.value(rows)) for rows in scores])


@pytest.mark.parametrize("name", [*METRICS, "median", "max-abs"])
def test_bootstrap_is_that_of_copied_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWS", 300)
    metric, a, b = examples(name, 40)
    index = resampling._integers(np.random.SFC64([7, 0]), (300, 40), 40)
    with np.errstate(invalid="ignore"):
        found = resampling.bootstrap(metric, [a, b], 7)
    np.testing.assert_allclose(found[0], by_hand(metric, a[index]), rtol=1e-9)
    np.testing.assert_allclose(found[1], by_hand(metric, b[index]), rtol=1e-9)


@pytest.mark.parametrize("name", [*METRICS, "median", "max-abs"])
def test_randomization_is_that_of_swapped_examples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWS", 300)
    metric, a, b = examples(name, 40)
    seen: list[Array] = []
    bits = resampling._bits
    monkeypatch.setattr(resampling, "_bits", lambda stream, shape: seen.append(bits(stream, shape)) or seen[-1])
    with np.errstate(invalid="ignore"):
        first, second = resampling.randomization(metric, a, b, 7)
    swap = np.concatenate(seen)[..., None].astype(bool)
    assert 0.4 < swap.mean() < 0.6
    expected = by_hand(metric, np.where(swap, b, a)), by_hand(metric, np.where(swap, a, b))
    np.testing.assert_allclose(first, expected[0], rtol=1e-9)
    np.testing.assert_allclose(second, expected[1], rtol=1e-9)


@pytest.mark.parametrize("name", ["rmse", "spearman", "f1", "average-precision", "median"])
def test_p_is_scipys_exact_permutation_test(name: str) -> None:
    metric, a, b = examples(name, 9, seed=3)
    runs = np.stack([a, b])

    def statistic(x: Array, y: Array) -> float:  # which run each example's scores are of
        rows = np.arange(9)
        return float(metric.value(runs[y.astype(int), rows]) - metric.value(runs[x.astype(int), rows]))

    exact = reference.permutation_test(
        (np.zeros(9), np.ones(9)), statistic, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    found = stats.compare(metric, a, b, seed=1)
    assert found.delta == pytest.approx(exact.statistic, abs=1e-12)
    spread = math.sqrt(exact.pvalue * (1 - exact.pvalue) / 10_000)
    assert found.p == pytest.approx(exact.pvalue, abs=4 * spread + 1e-4)
    assert found.test == "randomization"


@pytest.mark.parametrize("name", ["rmse", "mae", "perplexity", "pearson", "spearman", "matthews", "psnr"])
def test_intervals_are_scipys_bootstrap(name: str) -> None:
    metric, a, b = examples(name, 200)

    def value(index: Array) -> float:
        return float(metric.value(b[index]))

    def delta(index: Array) -> float:
        return value(index) - float(metric.value(a[index]))

    for statistic, found in (
        (value, stats.interval(metric, b, seed=1)),
        (delta, stats.compare(metric, a, b, seed=1)),
    ):
        expected = reference.bootstrap(
            (np.arange(200),), statistic, method="percentile", n_resamples=3000, vectorized=False, rng=0
        )
        low, high = expected.confidence_interval
        tolerance = 0.25 * expected.standard_error  # the ends of 3,000 draws vary by some hundredths of it
        assert (found.low, found.high) == pytest.approx((low, high), abs=tolerance)
        centre = found.value if isinstance(found, stats.Interval) else found.delta
        assert centre == pytest.approx(statistic(np.arange(200)), rel=1e-12)


def test_a_proportion_is_wilsons_and_mcnemars() -> None:
    metric, a, b = examples("accuracy", 500)
    right, was = b[:, 0].astype(bool), a[:, 0].astype(bool)
    expected = reference.binomtest(int(right.sum()), 500).proportion_ci(0.95, method="wilson")
    found = stats.interval(metric, b, seed=1)
    assert (found.value, found.low, found.high) == pytest.approx((right.mean(), expected.low, expected.high))
    gained, lost = int((right & ~was).sum()), int((was & ~right).sum())
    paired = stats.compare(metric, a, b, seed=1)
    assert (paired.gained, paired.lost, paired.n, paired.test) == (gained, lost, 500, "mcnemar")
    assert paired.delta == (gained - lost) / 500
    assert paired.p == pytest.approx(reference.binomtest(gained, gained + lost).pvalue)
    assert paired.flips == int((a[:, 2] != b[:, 2]).sum()) > gained + lost
    assert (paired.low, paired.high) == (
        stats.paired_difference(gained, lost, 500).low,
        stats.paired_difference(gained, lost, 500).high,
    )
    opposite = stats.compare(metric, b, a, seed=1)
    assert (opposite.delta, opposite.gained) == (-paired.delta, lost)


@pytest.mark.parametrize("name", ["accuracy", "rmse", "spearman", "f1", "median"])
def test_examples_without_a_score_are_left_out(name: str) -> None:
    metric, a, b = examples(name, 60)
    holed_a, holed_b = a.copy(), b.copy()
    holed_a[3] = holed_b[[5, 7]] = np.nan
    keep = np.setdiff1d(np.arange(60), [3, 5, 7])
    assert stats.compare(metric, holed_a, holed_b, 1) == stats.compare(metric, a[keep], b[keep], 1)
    assert stats.compare(metric, holed_a, holed_b, 1).n == 57
    assert stats.interval(metric, holed_a, 1) == stats.interval(metric, np.delete(a, 3, axis=0), 1)


@pytest.mark.parametrize("name", ["accuracy", "rmse", "spearman", "f1", "average-precision", "median"])
def test_few_or_no_examples(name: str) -> None:
    metric, a, b = examples(name, 1)
    none = stats.compare(metric, a[:0], b[:0], 1)
    assert none.n == 0
    assert math.isnan(none.delta)
    assert math.isnan(none.p)
    assert math.isnan(stats.interval(metric, np.full_like(a, np.nan), 1).value)
    one = stats.compare(metric, a, b, 1)
    # One pair says nothing: swapped or not, it differs as much.
    assert one.p == 1.0 or (math.isnan(one.delta) and math.isnan(one.p))


@pytest.mark.parametrize("name", ["rmse", "spearman", "f1", "median"])
def test_a_run_against_itself_does_not_differ(name: str) -> None:
    metric, a, _ = examples(name, 50)
    found = stats.compare(metric, a, a.copy(), 1)
    assert (found.delta, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["rmse", "spearman", "f1"])
def test_equal_seeds_give_equal_figures_and_others_do_not(name: str) -> None:
    metric, a, b = examples(name, 80)
    assert stats.compare(metric, a, b, 5) == stats.compare(metric, a, b, 5)
    assert stats.compare(metric, a, b, 5).low != stats.compare(metric, a, b, 6).low


def test_the_draws_of_a_seed_are_these_for_ever() -> None:
    # Raw words of SFC64, whose stream NumPy keeps; so a p that somebody published can be computed again.
    assert resampling._integers(np.random.SFC64([1, 0]), (1, 8), 1000).tolist() == [
        [410, 995, 577, 372, 487, 429, 857, 764]
    ]
    assert resampling._bits(np.random.SFC64([1, 1]), (1, 16)).tolist() == [
        [1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 1]
    ]


@pytest.mark.parametrize(("name", "n"), [("rmse", 60), ("f1", 60)])
def test_p_is_uniform_where_nothing_differs(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "DRAWS", 400)
    rng = np.random.default_rng(0)
    found = []
    for seed in range(200):
        metric, a, b = examples(name, n, seed)
        swap = (rng.random(n) < 0.5)[:, None]
        found.append(stats.compare(metric, np.where(swap, b, a), np.where(swap, a, b), seed).p)
    assert np.mean(np.array(found) <= 0.05) <= 0.09  # 0.05 and three standard deviations
    assert reference.kstest(found, "uniform", alternative="greater").pvalue > 0.001


def test_ten_thousand_examples_take_little_memory() -> None:
    metric, a, b = examples("perplexity", 10_000)
    tracemalloc.start()
    found = stats.compare(metric, a, b, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    assert found.low < found.delta < found.high


def test_a_proportion_of_other_numbers_is_refused() -> None:
    metric, a, b = examples("accuracy", 5)
    a[0, 0] = 0.5
    with pytest.raises(InputError, match="set proportion = False"):
        stats.interval(metric, a, 1)
    with pytest.raises(InputError, match="'correct' holds values other than 0 and 1"):
        stats.compare(metric, b, a, 1)


def test_scores_of_unequal_shapes_are_refused() -> None:
    metric, a, b = examples("rmse", 5)
    with pytest.raises(ValueError, match=r"\(4, 2\); \(5, 2\) is expected"):
        stats.compare(metric, a, b[:4], 1)
    with pytest.raises(ValueError, match="is expected"):
        stats.interval(metric, a[:, :1], 1)
