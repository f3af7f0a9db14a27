"""k-means on a line against brute force, scikit-learn and its own promises."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import InputError
from methods.weight_sharing import kmeans1d
from methods.weight_sharing.kmeans1d import Init, assign, cluster

INITS: tuple[Init, ...] = ("linear", "density", "random", "exact")
NUMBERS = st.lists(
    st.one_of(
        st.floats(-1e3, 1e3, width=32),
        st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.0, float(np.nextafter(np.float32(1), np.float32(2)))]),
        st.integers(-3, 3).map(float),
    ),
    min_size=1,
    max_size=40,
)


def spread(values: np.ndarray[Any, Any]) -> float:
    """Sum of squared distances from the mean, in float64."""
    values = values.astype(np.float64)
    return float(((values - values.mean()) ** 2).sum())


def brute_force(values: np.ndarray[Any, Any], k: int) -> float:
    ordered = np.sort(values)
    n = len(ordered)
    return min(
        sum(spread(ordered[a:b]) for a, b in itertools.pairwise((0, *cuts, n)))
        for cuts in itertools.combinations(range(1, n), k - 1)
    )


@settings(max_examples=150, deadline=None)
@given(numbers=NUMBERS, init=st.sampled_from(INITS), data=st.data())
def test_codebooks_are_sorted_used_and_nearest(numbers: list[float], init: Init, data: st.DataObject) -> None:
    values = np.array(numbers, dtype=np.float32)
    k = data.draw(st.integers(1, len(np.unique(values))))
    found = cluster(values, k, init=init, seed=data.draw(st.integers(0, 3)))
    assert found.codebook.shape == (k,)
    assert (np.diff(found.codebook) > 0).all()
    assert set(found.assignments.tolist()) == set(range(k)), "no cluster is empty"
    distances = np.abs(values[:, None].astype(np.float64) - found.codebook.astype(np.float64))
    chosen = distances[np.arange(len(values)), found.assignments]
    np.testing.assert_array_equal(chosen, distances.min(1))
    np.testing.assert_allclose(found.distortion, float((chosen**2).sum()), rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=11),
    data=st.data(),
)
def test_the_exact_optimum_is_that_of_brute_force(numbers: list[float], data: st.DataObject) -> None:
    values = np.array(numbers, dtype=np.float32)
    k = data.draw(st.integers(1, min(5, len(np.unique(values)))))
    found = cluster(values, k, init="exact")
    # Centroids are rounded to float32: twice relative 6e-8 of a value of 100.
    assert found.distortion == pytest.approx(brute_force(values, k), rel=1e-9, abs=1e-9)
    assert found.lower_bound == pytest.approx(found.distortion, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 7, 32])
@pytest.mark.parametrize("kind", ["normal", "student", "two lumps"])
def test_nothing_is_better_than_exact(k: int, kind: str) -> None:
    random = np.random.default_rng(1)
    values = {
        "normal": random.standard_normal(3000),
        "student": random.standard_t(2, 3000),
        "two lumps": np.concatenate([random.normal(-1, 0.01, 1500), random.normal(1, 0.3, 1500)]),
    }[kind].astype(np.float32)
    exact = cluster(values, k, init="exact").distortion
    others = [cluster(values, k, init=init, seed=seed) for init in INITS[:3] for seed in range(3)]
    assert exact <= min(other.distortion for other in others) * (1 + 1e-9)


def test_lloyd_is_scikit_learns() -> None:
    from sklearn.cluster import KMeans

    values = np.random.default_rng(2).standard_normal(4000).astype(np.float32)
    ours = cluster(values, 16, init="linear")
    start = np.linspace(values.min(), values.max(), 16, dtype=np.float64)[:, None]
    theirs = KMeans(16, init=start, n_init=1, max_iter=1000, tol=0).fit(values.astype(np.float64)[:, None])
    np.testing.assert_allclose(ours.codebook, np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-5, atol=1e-6)
    assert ours.distortion == pytest.approx(theirs.inertia_, rel=1e-6)


def test_beyond_the_limit_the_bound_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).standard_t(3, 5000).astype(np.float32)
    exact = cluster(values, 16, init="exact").distortion
    monkeypatch.setattr(kmeans1d, "EXACT_LIMIT", 256)
    binned = cluster(values, 16, init="exact")
    assert binned.lower_bound is not None
    assert binned.lower_bound <= exact * (1 + 1e-9) <= binned.distortion * (1 + 1e-8)
    assert binned.distortion <= 1.02 * exact
    assert binned.lower_bound >= 0.5 * exact, "bins narrow enough that the bound says something"


def test_initial_centroids_are_the_papers() -> None:
    values = np.random.default_rng(4).standard_normal(10001).astype(np.float32)
    line = kmeans1d._Line(np.sort(values))
    linear = kmeans1d._start(line, 5, "linear", 0)
    np.testing.assert_allclose(linear, np.linspace(values.min(), values.max(), 5), rtol=1e-6)
    np.testing.assert_allclose(
        kmeans1d._start(line, 4, "density", 0), np.quantile(values, [0.125, 0.375, 0.625, 0.875]), atol=1e-3
    )
    first, again, other = (kmeans1d._start(line, 6, "random", seed) for seed in (0, 0, 1))
    assert np.isin(first.astype(np.float32), values).all()
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_million_values_in_moments_and_the_same_every_time() -> None:
    values = np.random.default_rng(5).standard_normal((1000, 1000)).astype(np.float32)
    first, second = (cluster(values, 64, init="exact") for _ in range(2))
    assert first.assignments.shape == values.shape
    assert first.assignments.dtype == np.uint8
    assert first.codebook.tobytes() == second.codebook.tobytes()
    assert first.lower_bound is not None
    assert first.lower_bound > 0.98 * first.distortion
    # Panter and Dite: for many clusters the optimum is n / (12 k^2) times the cube of the integral of density^(1/3).
    expected = values.size / (12 * 64**2) * 6 * np.sqrt(3) * np.pi
    assert first.distortion == pytest.approx(expected, rel=0.05)


def test_assignments_need_wider_integers_for_more_clusters() -> None:
    values = np.arange(600, dtype=np.float32)
    found = cluster(values, 300, init="linear")
    assert found.assignments.dtype == np.uint16
    np.testing.assert_array_equal(assign(values, found.codebook), found.assignments)


@pytest.mark.parametrize(
    ("values", "k", "message"),
    [
        ([1.0, 1.0, 2.0], 3, "3 clusters cannot be made of 2 different values"),
        ([1.0, 2.0], 0, "Allowed: 1 to 2"),
        ([], 1, "0 different values"),
        ([1.0, float("nan")], 1, "finite"),
        ([float("-inf"), 0.0], 1, "finite"),
    ],
)
def test_what_cannot_be_clustered_is_refused(values: list[float], k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster(values, k)
