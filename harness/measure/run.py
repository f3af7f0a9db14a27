"""Measures one deployed artifact, in a process of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import arrays, energy, environment, metrics
from harness.errors import Unavailable
from harness.jobs import Deployment, Measured, MeasureJob, Progress
from harness.measure.latency import Timing, time_queries
from harness.measure.memory import peak_rss_bytes
from harness.measure.outputs import Scores, answer, scored
from harness.spec import build

if TYPE_CHECKING:
    from harness.contracts import Arrays, Deployed, Hardware, Signature, Workload

_FAITHFUL_TOP1 = 0.95
_FAITHFUL_SQNR_DB = {"f32": 50.0}
_LOW_SQNR_DB = 10.0
_MOSTLY = 0.95


def measure(job: MeasureJob, progress: Progress) -> Measured:
    """Load an artifact and weigh it: what a worker does with a :class:`harness.jobs.MeasureJob`.

    Raises
    ------
    Unavailable
        With the reason, where the runtime is not here.
    """
    settings, built = job.measure, job.deployment
    signature, workload = built.signature, built.workload
    hardware: Hardware = build("hardware", job.hardware)
    # Importing the runtime is not loading the model: it is done before the clock starts.
    if reason := hardware.unavailable():
        raise Unavailable(reason)
    blocks = arrays.read(built.reference)
    query = query_inputs(blocks[0].inputs, signature, workload, job.batch_size)

    def load(inputs: Arrays) -> Deployed:
        return hardware.load(built.artifact, signature=signature, inputs=inputs, threads=job.threads)

    before = environment.conditions()
    warnings = environment.measurement_warnings(job.threads)
    progress(0.0, "load")
    begin = time.perf_counter_ns()
    deployed = load(query)
    load_ms = (time.perf_counter_ns() - begin) / 1e6
    first_phase = workload.phases[0][0]
    try:
        deployed.bind(query)
        begin = time.perf_counter_ns()
        deployed(first_phase)
        deployed.synchronize()
        first_ms = (time.perf_counter_ns() - begin) / 1e6
        answer(deployed, query, phase=first_phase)
        progress(0.1, "latency")
        timing, readings, reasons = _time(deployed, workload, job)
        # Read before accuracy: its larger batches are not what a deployment holds in memory.
        peak = peak_rss_bytes()
        if not timing.complete:
            warnings.append(
                f"Only {timing.queries} queries fit into measure.max_seconds={settings['max_seconds']:g}; "
                "raise it for higher percentiles."
            )
        effective = dict(deployed.effective)
    finally:
        deployed.close()
    scores = _scores(load, blocks, built, progress)
    if not built.random:
        warnings += output_warnings(scores, effective)
    warnings += runtime_warnings(effective, job.threads)
    return Measured(
        scores=tuple(scores),
        effective=effective,
        precision=effective.get("precision"),
        latency=timing.latency_ns,
        warmup_queries=timing.warmup_queries,
        load_ms=load_ms,
        first_ms=first_ms,
        peak_rss_bytes=peak,
        energy=tuple(readings),
        reasons=reasons,
        warnings=tuple(warnings),
        conditions={"before": before, "after": environment.conditions()},
    )


def query_inputs(inputs: Arrays, signature: Signature, workload: Workload, batch_size: int) -> dict[str, Any]:
    """The inputs of one timed query: the first examples, repeated to the batch size, at the workload's sizes.

    An axis whose size the workload gives is cut, or filled by repeating; other varying axes stay as the examples have
    them.
    """
    found = arrays.repeated(inputs, batch_size)
    for port in signature.inputs:
        for axis, size in enumerate(port.shape, start=1):
            if isinstance(size, str) and size in workload.sizes:
                wanted = workload.sizes[size]
                value = found[port.name]
                found[port.name] = np.take(value, np.arange(wanted) % value.shape[axis], axis=axis)
    return found


def _scores(
    load: Callable[[Arrays], Deployed],
    blocks: Sequence[arrays.Block],
    built: Deployment,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The task's metrics on the test set, then fidelity on the reference examples, of the same artifact."""
    size = built.eval_batch  # whole prompts are scored by a forward pass: a prefill gives its last token's scores only
    task_metrics = [
        Scores(metrics.create(config), config, "test", "targets", built.test_sha256) for config in built.metrics
    ]
    origins = ("torch", "float") if built.quantized else ("torch",)
    fidelity = {
        origin: [
            Scores(metrics.create(config), config, built.reference_data, origin, None) for config in built.fidelity
        ]
        for origin in origins
    }

    def compare(outputs: Arrays, reference: Arrays) -> None:
        for origin, kept in fidelity.items():
            theirs = {name.partition("/")[2]: v for name, v in reference.items() if name.startswith(f"{origin}/")}
            for scores in kept:
                scores.add(outputs, theirs)

    found: list[Scores] = []
    if built.fidelity and any(name.startswith("torch/") for name in blocks[0].targets):
        progress(0.5, "fidelity")
        scored(load, blocks, size, compare)
        found += [scores for kept in fidelity.values() for scores in kept]
    if built.test and task_metrics:
        test = arrays.read(built.test)
        total, done = sum(map(len, test)), 0

        def score(outputs: Arrays, targets: Arrays) -> None:
            nonlocal done
            progress(0.6 + 0.4 * done / total, f"{task_metrics[0].name} {done}/{total}")
            for scores in task_metrics:
                scores.add(outputs, targets)
            done += len(next(iter(outputs.values())))

        scored(load, test, size, score)
        found = task_metrics + found
    return [scores.entry() for scores in found]


def output_warnings(scores: Sequence[Mapping[str, Any]], effective: Mapping[str, Any]) -> list[str]:
    """Where the deployed outputs are not those of the torch model, and whose doing that is, as warnings."""
    found = []
    values = {(score["against"], score["metric"]): score for score in scores if score["against"] != "targets"}
    whose = {
        "torch": "what this artifact scores is the runtime's or the export's doing, not the method's",
        "float": "this is what quantization did to the model",
    }
    for origin, doing in whose.items():
        agreement = values.get((origin, "top1-agreement"))
        if agreement and agreement["value"] is not None and agreement["value"] < _FAITHFUL_TOP1:
            than = "the torch model" if origin == "torch" else "the model before quantization"
            found.append(
                f"The deployed model and {than} agree on only {agreement['value']:.1%} of {agreement['n']} "
                f"{agreement['data']} examples: {doing}."
            )
    sqnr = values.get(("torch", "sqnr"))
    least = _FAITHFUL_SQNR_DB.get(str(effective.get("precision")), _LOW_SQNR_DB)
    if sqnr and sqnr["value"] is not None and sqnr["value"] < least:
        found.append(
            f"The deployed outputs differ from the torch model's by {sqnr['value']:.1f} dB SQNR on {sqnr['n']} "
            f"{sqnr['data']} examples, where {least:g} dB and more are usual: {whose['torch']}."
        )
    return found


def runtime_warnings(effective: Mapping[str, Any], threads: int) -> list[str]:
    """What the runtime does otherwise than asked, as warnings."""
    found = []
    if effective.get("threads") != threads:
        found.append(f"{threads} threads were asked for; the runtime reports {effective.get('threads')}.")
    share = effective.get("mac_share", {}).get(effective.get("precision"), 1.0)
    if share < _MOSTLY:
        found.append(
            f"Only {share:.0%} of the multiply-accumulates ran in {effective['precision']} (see effective.mac_share)."
        )
    return found


def _time(
    deployed: Deployed, workload: Workload, job: MeasureJob
) -> tuple[Timing, list[dict[str, Any]], dict[str, str]]:
    settings, account = job.measure, job.energy
    meter = energy.choose(account) if account["enabled"] else None
    timing = time_queries(
        deployed,
        deployed.synchronize,
        phases=workload.phases,
        min_queries=settings["min_queries"],
        min_seconds=max(settings["min_seconds"], meter.min_window_s if meter else 0.0),
        max_seconds=max(settings["max_seconds"], meter.min_window_s if meter else 0.0),
        warmup_queries=settings["warmup_queries"],
        warmup_seconds=settings["warmup_seconds"],
        on_start=meter.start if meter else None,
    )
    if meter is None:
        reason = "switched off by the spec (energy.enabled = false)"
        return timing, [], dict.fromkeys(("energy_j", "energy_method", "carbon_g"), reason)
    readings = [
        {**dataclasses.asdict(reading), "grid_g_per_kwh": account["grid_g_per_kwh"]}
        for reading in meter.stop(timing.queries)
        if reading.gross_j > 0
    ]
    if not readings:
        reason = "the energy counter did not advance during the measurement"
        return timing, [], dict.fromkeys(("energy_j", "energy_method", "carbon_g"), reason)
    return timing, readings, {}
