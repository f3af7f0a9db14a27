"""The measurable columns of ``runs``: how a reader wants them called, scaled and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from harness.errors import UnknownName


@dataclass(frozen=True)
class Metric:
    """A numeric column.

    Parameters
    ----------
    label : str
        For an axis or a heading.
    unit : str
        After scaling; empty for a ratio or a count.
    better : {"higher", "lower"}
        Which way is better.
    log : bool
        Whether a logarithmic axis suits it.
    scale : float
        Shown value = stored value x scale.
    low, high : str or None
        Columns of its interval.
    interval : str
        What the interval is.
    """

    label: str
    unit: str
    better: Literal["higher", "lower"]
    log: bool = False
    scale: float = 1.0
    low: str | None = None
    high: str | None = None
    interval: str = ""

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Accuracy", "%", "higher", False, 100, "accuracy_low", "accuracy_high", "95 % Wilson interval"),
    "accuracy_delta": Metric(
        "Accuracy change",
        "points",
        "higher",
        False,
        100,
        "accuracy_delta_low",
        "accuracy_delta_high",
        "95 % Bonett-Price interval",
    ),
    "size_bytes": Metric("Size", "kB", "lower", True, 1e-3),
    "zstd_bytes": Metric("Size, zstd", "kB", "lower", True, 1e-3),
    "compression_ratio": Metric("Compression ratio", "×", "higher", True),
    "zstd_compression_ratio": Metric("Compression ratio, zstd", "×", "higher", True),
    "plain_bytes": Metric("Weights, plain", "kB", "lower", True, 1e-3),
    "container_bytes": Metric("Weights, compressed file", "kB", "lower", True, 1e-3),
    "shannon_bytes": Metric("Weights, Shannon bound", "kB", "lower", True, 1e-3),
    "weights_zstd_bytes": Metric("Weights, zstd", "kB", "lower", True, 1e-3),
    "xz_bytes": Metric("Weights, xz", "kB", "lower", True, 1e-3),
    "gzip_bytes": Metric("Weights, gzip", "kB", "lower", True, 1e-3),
    "container_compression_ratio": Metric("Compression ratio of the weights' file", "×", "higher", True),
    "params_total": Metric("Parameters", "", "lower", True),
    "params_nonzero": Metric("Non-zero parameters", "", "lower", True),
    "pruning_rate": Metric("Pruning rate", "%", "higher", False, 100),
    "macs": Metric("Multiply-accumulates per example", "", "lower", True),
    "macs_ratio": Metric("Ratio of multiply-accumulates", "×", "higher", True),
    "latency_p50_ms": Metric("Latency p50", "ms", "lower", True, 1.0, "latency_p50_ms", "latency_p90_ms", "p50 to p90"),
    "latency_p90_ms": Metric("Latency p90", "ms", "lower", True),
    "latency_p99_ms": Metric("Latency p99", "ms", "lower", True),
    "speedup": Metric("Speed-up", "×", "higher", True),
    "throughput_per_s": Metric("Throughput", "examples/s", "higher", True),
    "energy_j": Metric("Energy per example", "mJ", "lower", True, 1e3),
    "energy_net_j": Metric("Energy per example, idle subtracted", "mJ", "lower", True, 1e3),
    "energy_ratio": Metric("Energy ratio", "×", "higher", True),
    "carbon_g": Metric("Carbon per million examples", "g CO₂e", "lower", True, 1e6),
    "peak_rss_bytes": Metric("Peak memory of the process", "MB", "lower", False, 1e-6),
    "load_ms": Metric("Load time", "ms", "lower", True),
    "first_ms": Metric("First inference", "ms", "lower", True),
    "fidelity_max_abs": Metric("Largest output difference", "", "lower", False),
    "fidelity_top1": Metric("Top-1 agreement with torch", "%", "higher", False, 100),
    "fidelity_mean_kl": Metric("Mean KL divergence from torch", "nats", "lower", False),
    "mcnemar_p": Metric("McNemar p", "", "higher", False),
    "n_gained": Metric("Examples gained", "", "higher"),
    "n_lost": Metric("Examples lost", "", "lower"),
    "n_examples": Metric("Test examples", "", "higher"),
    "n_latency": Metric("Timed inferences", "", "higher", True),
}

ENERGY = frozenset({"energy_j", "energy_net_j", "energy_ratio", "carbon_g"})
"""Metrics that mean different things for measured and for modelled energy."""


def metric(name: str) -> Metric:
    """The metric of a column.

    Raises
    ------
    UnknownName
        With the nearest name.
    """
    if name not in METRICS:
        raise UnknownName("metric", name, METRICS)
    return METRICS[name]
