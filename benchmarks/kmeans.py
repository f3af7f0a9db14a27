"""k-means of weights into 64 clusters: :mod:`methods.weight_sharing.kmeans1d` against scikit-learn, one thread each.

FIGURES
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from harness import environment
from methods.weight_sharing.kmeans1d import cluster


def distortion(values: np.ndarray, codebook: np.ndarray) -> float:
    """Sum of squared distances to the nearest entry, in float64: the same yardstick for all."""
    ordered = np.sort(codebook.astype(np.float64).ravel())
    nearest = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, values)]
    return float(((values - nearest) ** 2).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="10 million weights instead of 1 million")
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=20, help="of scikit-learn's Lloyd algorithm, and of ours")
    arguments = parser.parse_args()
    n, k, cap = 10_000_000 if arguments.full else 1_000_000, arguments.clusters, arguments.iterations
    # A mixture of scales, as the weights of several layers have.
    random = np.random.default_rng(0)
    values = (random.standard_normal(n) * random.choice([0.01, 0.03, 0.1], n)).astype(np.float32)
    start = np.linspace(values.min(), values.max(), k, dtype=np.float32)[:, None]
    column = values[:, None]
    with threadpool_limits(1), warnings.catch_warnings():
        # Ending at max_iter before convergence is what the cap is for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        rows = [
            (f"kmeans1d, {cap} iterations", lambda: cluster(values, k, init="linear", iterations=cap).codebook),
            (
                f"scikit-learn KMeans, {cap} iterations",
                lambda: KMeans(k, init=start, n_init=1, max_iter=cap, tol=0).fit(column).cluster_centers_,
            ),
            (
                "scikit-learn MiniBatchKMeans, 1 pass (for information)",
                lambda: (
                    MiniBatchKMeans(k, init=start, n_init=1, max_iter=1, batch_size=10_000, random_state=0)
                    .fit(column)
                    .cluster_centers_
                ),
            ),
            ("kmeans1d, to convergence", lambda: cluster(values, k, init="linear", iterations=10**6).codebook),
            ("kmeans1d, exact or its bound", lambda: cluster(values, k, init="exact").codebook),
        ]
        reference = None
        print(f"{n:,} weights, {k} clusters, linear initialisation, one thread")
        for name, run in rows:
            begin = time.perf_counter()
            codebook = run()
            seconds = time.perf_counter() - begin
            reference = reference or seconds
            ratio = seconds / reference
            print(f"{name:56} {seconds:9.2f} s  {ratio:8.1f}x  distortion {distortion(values, codebook):.6g}")
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
