"""Measures one deployed artifact, in a process of its own."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import energy, environment
from harness.errors import Unavailable
from harness.measure.latency import time_queries
from harness.measure.memory import peak_rss_bytes
from harness.measure.outputs import answer, fidelity, predict
from harness.spec import build

if TYPE_CHECKING:
    from harness.contracts import Deployed, FloatArray, Hardware, IntArray


_FAITHFUL_TOP1 = 0.95
_MOSTLY = 0.95


def measure(job: Mapping[str, Any], progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Load an artifact and weigh it.

    Parameters
    ----------
    job : mapping
        ``hardware`` (resolved item), ``artifact`` (path), ``threads``, ``batch_size``, ``measure`` and
        ``energy`` (settings),
        ``reference`` (folder of ``x.npy`` and ``logits.npy``), ``test`` (folder of ``x.npy`` and ``y.npy``, or None).
    progress : callable
        ``progress(fraction, message)``.

    Returns
    -------
    dict
        Fields of :class:`harness.record.Record`.
    """
    settings = job["measure"]
    hardware = build("hardware", job["hardware"])
    # Importing the runtime is not loading the model: it is done before the clock starts.
    if reason := hardware.unavailable():
        raise Unavailable(reason)
    # Mapped, so that only the batch counts towards this process's memory.
    x = np.load(Path(job["reference"]) / "x.npy", mmap_mode="r")
    batch = np.ascontiguousarray(x[np.arange(job["batch_size"]) % len(x)])
    before = environment.conditions()
    warnings = environment.measurement_warnings(job["threads"])

    progress(0.0, "load")
    begin = time.perf_counter_ns()
    deployed = hardware.load(Path(job["artifact"]), threads=job["threads"], batch=batch.shape)
    load_ms = (time.perf_counter_ns() - begin) / 1e6
    try:
        deployed.bind(batch)
        begin = time.perf_counter_ns()
        deployed()
        deployed.synchronize()
        first_ms = (time.perf_counter_ns() - begin) / 1e6
        answer(deployed, batch)

        progress(0.1, "latency")
        timing, readings, reasons = _time(deployed, job)
        # Read before accuracy: its larger batches are not what a deployment holds in memory.
        peak = peak_rss_bytes()
        if not timing["complete"]:
            warnings.append(
                f"Only {len(timing['latency_ns'])} queries fit into measure.max_seconds={settings['max_seconds']:g}; "
                "raise it for higher percentiles."
            )

        effective = dict(deployed.effective)
    finally:
        deployed.close()
    result = _outputs(hardware, job, x, progress)
    warnings += _doubts(result["fidelity"], effective, job["threads"])
    return result | {
        "effective": effective,
        "precision": effective.get("precision"),
        "latency_ns": timing["latency_ns"],
        "warmup_queries": timing["warmup_queries"],
        "load_ms": load_ms,
        "first_ms": first_ms,
        "peak_rss_bytes": peak,
        "energy": readings,
        "reasons": reasons,
        "warnings": warnings,
        "conditions": {"before": before, "after": environment.conditions()},
    }


def _outputs(
    hardware: Hardware,
    job: Mapping[str, Any],
    x: FloatArray,
    progress: Callable[[float, str], None],
) -> dict[str, Any]:
    """Fidelity and accuracy of the same artifact, loaded once more for the larger evaluation batch."""
    size = job["measure"]["eval_batch"]
    progress(0.5, "fidelity")
    deployed = hardware.load(Path(job["artifact"]), threads=job["threads"], batch=(size, *x.shape[1:]))
    try:
        logits = np.load(Path(job["reference"]) / "logits.npy")
        outputs = np.concatenate([answer(deployed, part, size) for part in _parts(x, size)])
        result: dict[str, Any] = {"fidelity": {**fidelity(outputs, logits), "data": job["reference_data"]}}
        if job["test"]:
            progress(0.6, "accuracy")
            labels, predictions = predict(deployed, _stored(Path(job["test"]), size, progress), size)
            result |= {
                "labels": labels,
                "predictions": predictions,
                "n_examples": len(labels),
                "n_correct": sum(a == b for a, b in zip(labels, predictions, strict=True)),
            }
    finally:
        deployed.close()
    return result


def _doubts(faithful: Mapping[str, Any], effective: Mapping[str, Any], threads: int) -> list[str]:
    """What the runtime does otherwise than asked, as warnings."""
    found = []
    if faithful["top1"] < _FAITHFUL_TOP1:
        found.append(
            f"The deployed model and the torch model agree on only {faithful['top1']:.1%} of {faithful['n']} "
            f"{faithful['data']} examples: its accuracy is the runtime's or the export's, not the method's."
        )
    if effective.get("threads") != threads:
        found.append(f"{threads} threads were asked for; the runtime reports {effective.get('threads')}.")
    share = effective.get("mac_share", {}).get(effective.get("precision"), 1.0)
    if share < _MOSTLY:
        found.append(
            f"Only {share:.0%} of the multiply-accumulates ran in {effective['precision']} (see effective.mac_share)."
        )
    return found


def _time(deployed: Deployed, job: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, str]]:
    settings, account = job["measure"], job["energy"]
    meter = energy.choose(account) if account["enabled"] else None
    timing = time_queries(
        deployed,
        deployed.synchronize,
        min_queries=settings["min_queries"],
        min_seconds=max(settings["min_seconds"], meter.min_window_s if meter else 0.0),
        max_seconds=max(settings["max_seconds"], meter.min_window_s if meter else 0.0),
        warmup_queries=settings["warmup_queries"],
        warmup_seconds=settings["warmup_seconds"],
        on_start=meter.start if meter else None,
    )
    if meter is None:
        reason = "switched off by the spec (energy.enabled = false)"
        return dataclasses.asdict(timing), [], dict.fromkeys(("energy_j", "energy_method", "carbon_g"), reason)
    readings = [
        {**dataclasses.asdict(reading), "grid_g_per_kwh": account["grid_g_per_kwh"]}
        for reading in meter.stop(len(timing.latency_ns))
        if reading.gross_j > 0
    ]
    if not readings:
        reason = "the energy counter did not advance during the measurement"
        return dataclasses.asdict(timing), [], dict.fromkeys(("energy_j", "energy_method", "carbon_g"), reason)
    return dataclasses.asdict(timing), readings, {}


def _parts(x: FloatArray, size: int) -> Iterator[FloatArray]:
    for start in range(0, len(x), size):
        yield x[start : start + size]


def _stored(folder: Path, size: int, progress: Callable[[float, str], None]) -> Iterator[tuple[FloatArray, IntArray]]:
    x, y = np.load(folder / "x.npy", mmap_mode="r"), np.load(folder / "y.npy")
    for index, (part, start) in enumerate(zip(_parts(x, size), itertools.count(0, size))):
        if index % 8 == 0:
            progress(0.6 + 0.4 * start / len(x), f"accuracy {start}/{len(x)}")
        yield np.ascontiguousarray(part), y[start : start + size]
