"""k-means of weights into 64 clusters: :mod:`methods.weight_sharing.kmeans1d` against scikit-learn, one thread each.

The goal is at least 20 times scikit-learn's speed at equal or lower distortion. Both run Lloyd's algorithm from the
same initial centroids for the same number of iterations; scikit-learn's is capped at 20, because it needs thousands to
converge and each takes seconds. Neither converges in 20, and empty clusters are filled differently: hence the
difference in distortion. ``kmeans1d`` runs to convergence, and to the optimum, in less time than that.

Measured on a 2-core x86 server CPU with AVX-512, one thread, busy with other work (load average 4):

=============================== ============================ ==============================
variant                         1 million                    10 million (``--full``)
=============================== ============================ ==============================
kmeans1d, 20 iterations         0.10 s, distortion 11.410    1.30 s, distortion 125.07
scikit-learn KMeans, 20         4.53 s (43x), 11.426         54.6 s (42x), 151.62
kmeans1d, to convergence        0.32 s, 3.668                1.74 s, 35.531
kmeans1d, exact or its bound    2.41 s, 3.551                3.42 s, 35.526
MiniBatchKMeans, one pass       3.64 s, 14.79                not run
=============================== ============================ ==============================
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
            ("kmeans1d, to convergence", lambda: cluster(values, k, init="linear", iterations=10**6).codebook),
            ("kmeans1d, exact or its bound", lambda: cluster(values, k, init="exact").codebook),
        ]
        if not arguments.full:  # minutes for 10 million
            rows.append(
                (
                    "scikit-learn MiniBatchKMeans, 1 pass (for information)",
                    lambda: (
                        MiniBatchKMeans(k, init=start, n_init=1, max_iter=1, batch_size=10_000, random_state=0)
                        .fit(column)
                        .cluster_centers_
                    ),
                )
            )
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
