"""Synthetic records for tests: complete, valid, and cheap; every keyword of Record can be overridden.

Scores and latency may be given in the short words of record format 1 (``labels``, ``predictions``, ``n_examples``,
``n_correct``, ``fidelity``, ``latency_ns``): accuracy is what most tests are about.
"""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from harness.canonical import digest
from harness.record import Record, upgrade

_COUNTER = itertools.count()
START = datetime(2026, 1, 1, tzinfo=UTC)
BASELINE = [{"name": "baseline"}]


def record(**overrides: Any) -> dict[str, Any]:
    """The JSON of one ok baseline run on "torch", newer than every one made before it."""
    number = next(_COUNTER)
    chain = overrides.get("chain", BASELINE)
    values: dict[str, Any] = {
        "run_id": f"20260101T000000{number:06d}-{number:010x}",
        "created_at": (START + timedelta(seconds=number)).isoformat(),
        "status": "ok",
        "task": "digits-cnn",
        "task_config": {},
        "method": " > ".join(step["name"] for step in chain),
        "chain": chain,
        "hardware": "torch",
        "hardware_config": {},
        "seed": 0,
        "batch_size": 1,
        "threads": 1,
        "settings": {"measure": {"min_queries": 700}, "energy": {"enabled": True, "watts_per_core": 6.25}},
        "spec_name": "test",
        "spec_hash": "5" * 64,
        "task_hash": "1" * 64,
        "method_hash": digest(chain),
        "hardware_hash": "3" * 64,
        "dataset_hash": "d" * 64,
        "packages": {"torch": "2.15.0"},
        "machine": {
            "machine_id": "m1",
            "hostname": "host",
            "cpu_model": "CPU",
            "isa": ["avx2"],
            "cores": 2,
            "gpus": [],
        },
        "precision": "f32",
        "effective": {"precision": "f32", "threads": 1},
        "params_original": 1000,
        "params_total": 1000,
        "params_nonzero": 1000,
        "macs": 5000,
        "artifact": {
            "sha256": digest(chain),
            "size_bytes": 4000,
            "zstd_bytes": 3600,
            "files": ["model.pt"],
            "format": "torch",
        },
        "weights": {
            "plain_bytes": 4000,
            "container_bytes": 3700,
            "shannon_bytes": 3650,
            "zstd_bytes": 3690,
            "xz_bytes": 3680,
            "gzip_bytes": 3695,
        },
        "latency_ns": [1_000_000 + 1000 * (i % 97) for i in range(700)],
        "warmup_queries": 10,
        "load_ms": 3.0,
        "first_ms": 2.0,
        "peak_rss_bytes": 100_000_000,
        "energy": [reading()],
        "fidelity": {"max_abs": 1e-6, "top1": 1.0, "mean_kl": 0.0, "n": 256, "data": "validation"},
        "git_commit": "a" * 40,
        "git_dirty": False,
    } | predictions([True] * 90 + [False] * 10)
    values |= overrides
    values.setdefault(
        "cell_hash", digest([values[k] for k in ("task", "chain", "hardware", "seed", "batch_size", "threads")])
    )
    given = {name: values[name] for name in ("scores", "latency") if name in values}
    plain: dict[str, Any] = json.loads(json.dumps(Record(**(upgrade(values) | given)).to_json(), default=str))
    return plain


def score(metric: str, values: Any, **overrides: Any) -> dict[str, Any]:
    """An entry of ``scores`` against the targets: a mean absolute error of these values, whatever it is called."""
    values = np.asarray(values, dtype=float)
    return {
        "metric": metric,
        "config": {"name": metric},
        "unit": "",
        "better": "lower",
        "proportion": False,
        "data": "test",
        "against": "targets",
        "split_sha256": "9" * 64,
        "n": values.size,
        "parts": {"absolute_error": values.tolist(), "values": [1] * values.size},
        "value": float(values.mean()),
        **overrides,
    }


def predictions(right: Any, classes: int = 10) -> dict[str, Any]:
    """Labels and predictions that are right where ``right`` says."""
    right = np.asarray(right, dtype=bool)
    labels = np.arange(right.size) % classes
    predicted = np.where(right, labels, (labels + 1) % classes)
    return {
        "labels": labels.tolist(),
        "predictions": predicted.tolist(),
        "n_examples": int(right.size),
        "n_correct": int(right.sum()),
    }


def reading(**overrides: Any) -> dict[str, Any]:
    """One modelled energy reading: 2 J for 100 batches."""
    return {
        "method": "modelled",
        "domain": "cpu",
        "gross_j": 2.0,
        "idle_w": None,
        "window_s": 0.4,
        "inferences": 100,
        "inputs": {"model": "cpu_seconds x watts_per_core"},
        "grid_g_per_kwh": 480.0,
        **overrides,
    }


def unmeasured(status: str, reason: str, **overrides: Any) -> dict[str, Any]:
    """A run that ended before anything was measured."""
    measured = (
        *("labels", "predictions", "n_examples", "n_correct", "artifact", "weights", "params_original", "params_total"),
        *("params_nonzero", "macs", "precision", "fidelity", "load_ms", "first_ms", "peak_rss_bytes", "warmup_queries"),
    )
    empty: dict[str, Any] = dict.fromkeys(measured)
    return record(
        **(empty | {"status": status, "reason": reason, "latency_ns": [], "energy": [], "effective": {}} | overrides)
    )
