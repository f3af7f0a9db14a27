"""From a cell to a deployable artifact: train the baseline, apply the chain, build. Every step is cached by content.

Runs in a worker that has torch; what it leaves on disk is all that the measuring process gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import arrays, cache, environment, metrics, paths
from harness.calling import call, evaluating
from harness.canonical import digest, file_sha256
from harness.chain import Stored, Work, baseline, code_hash, load, step, trust
from harness.contracts import Hardware, Signature, Task
from harness.errors import AssayError, InputError, Unavailable, Unsupported, explanation
from harness.jobs import Deployment, Prepared, PrepareJob, Progress, to_json
from harness.measure import counts
from harness.measure.layers import is_quantized, layers
from harness.measure.size import WEIGHTS, codec_source, plain_bytes, weigh, weigh_weights
from harness.planning import metric_hashes
from harness.provenance import source_hash, versions
from harness.reference import OUTPUT_BYTES, mixing_layers, reference, source_of, test_set
from harness.spec import build, users_targets

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Tensors


def prepare(job: PrepareJob, progress: Progress) -> Prepared:
    """Train, compress and build one cell: what a worker does with a :class:`harness.jobs.PrepareJob`.

    Raises
    ------
    Unavailable, Unsupported
        With the reason, where the task, the method or the runtime cannot.
    """
    import torch

    cell = job.cell
    torch.set_num_threads(environment.cores())
    task: Task = build("task", cell.task)
    if reason := task.unavailable():
        raise Unavailable(reason)
    hardware: Hardware = build("hardware", cell.hardware)
    if reason := hardware.unavailable():
        raise Unavailable(reason)
    trusted = trust(task.model(cell.seed)) if users_targets(cell.task) else []
    work = Work(
        cell=cell,
        task=task,
        hardware=hardware,
        data=task.data(),
        not_before=job.not_before,
        progress=progress,
    )
    signature, workload = task.signature, task.workload
    if signature.batch is not None and cell.batch_size != signature.batch:
        raise Unsupported(
            f"The model takes batches of {signature.batch} only; this cell asks for {cell.batch_size}. "
            f"Set batch_size = {signature.batch}."
        )
    original, model, stored, unquantized = _chain(work)
    progress(0.8, "reference outputs")
    folder, probed = reference(work, model, stored, unquantized)
    if probed["mixing"]:
        work.warnings.append(
            f"The model's outputs for an example depend on the other examples of its batch{_using_the_batch(model)}: "
            f"scores are those of batches of {probed['batch']}, and other batches give others."
        )
    if cell.batch_size == 1 and signature.batch is None:
        _check_single(model, _example(folder, 1), signature)
    example = _example(folder, signature.batch or 2)
    progress.step(f"building for {cell.hardware['name']}")
    progress(0.85, f"build for {cell.hardware['name']}")
    artifact, place = _artifact(work, model, stored, example)
    progress.step("storing the test set")
    progress(0.95, "test set")
    reasons: dict[str, str] = {}
    test = split_sha256 = None
    try:
        test, split_sha256 = test_set(work)
    except Unavailable as missing:
        reasons["score"] = str(missing)
    total, nonzero = counts.parameters(model)
    weights = {key: work.stages[-1][key] for key in WEIGHTS}
    reasons |= _unweighed(model, weights, artifact, cell.measure["weigh_below"])
    return Prepared(
        record={
            "artifact": {key: artifact[key] for key in ("sha256", "size_bytes", "zstd_bytes", "files", "format")},
            "params_original": counts.parameters(original[0])[0],
            "params_total": total,
            "params_nonzero": nonzero,
            "macs": counts.macs(model, example, signature),
            "weights": weights,
            "stages": work.stages,
            "reasons": reasons,
            "dataset_hash": task.dataset_hash(),
            "original_sha256": original[1].sha256,
            "signature": to_json(signature),
            "workload": to_json(workload),
            "layers": layers(model, original[0]),
            "random_in_evaluation": probed["random"],
            "notes": list(dict.fromkeys([*task.notes(), *work.notes])),
            "warnings": work.warnings,
        },
        deployment=Deployment(
            artifact=place / artifact["name"],
            signature=signature,
            workload=workload,
            reference=folder,
            reference_data=source_of(work.data),
            test=test,
            test_sha256=split_sha256,
            eval_batch=signature.batch
            or (probed["batch"] if probed["mixing"] else None)
            or min(cell.measure["eval_batch"], max(1, OUTPUT_BYTES // max(1, probed["output_bytes"]))),
            metrics=tuple(metrics.config(metric) for metric in task.metrics),
            fidelity=tuple(metrics.config(metric) for metric in task.fidelity),
            quantized=unquantized is not None,
            random=probed["random"],
        ),
        trusted=tuple(trusted),
        identity=(
            original[1].sha256,
            work.data_key,
            task.dataset_hash(),
            split_sha256,
            reasons.get("score"),
            metric_hashes(task),
        ),
    )


def _chain(
    work: Work,
) -> tuple[tuple[nn.Module, Stored], nn.Module, Stored, tuple[nn.Module, Stored] | None]:
    """The original, the compressed model, and the last model before one of the chain's steps quantized it."""
    cell = work.cell
    first = current = baseline(work)
    original = load(first)
    work.stages[-1] |= _weights(work, original, current)
    model: nn.Module = original
    unquantized: tuple[nn.Module, Stored] | None = None
    for index, item in enumerate(cell.chain):
        work.progress(0.6 + 0.2 * index / len(cell.chain), item["name"])
        before = (model, current)
        current = step(work, current, item, first)
        model = load(current)
        if unquantized is None and is_quantized(model) and not is_quantized(before[0]):
            unquantized = before
        work.stages[-1] |= {"params_nonzero": counts.parameters(model)[1], **_weights(work, model, current)}
    return (original, first), model, current, unquantized


_COLUMNS = {"zstd_bytes": "weights_zstd_bytes"}
"""Sizes of weights whose column has another name, since the artifact has one of theirs."""


def _unweighed(
    model: nn.Module, weights: Mapping[str, int | None], artifact: Mapping[str, Any], limit: int
) -> dict[str, str]:
    """Why compressed sizes are missing, by column."""
    found: dict[str, str] = {}
    if artifact["zstd_bytes"] is None:
        found["zstd_bytes"] = f"the artifact is larger than measure.weigh_below ({limit} bytes)"
    if counts.file_of(model) is not None:
        why = "the model is a file, whose weights are not taken apart"
    elif weights["container_bytes"] is None:
        why = f"the weights are larger than measure.weigh_below ({limit} bytes)"
    else:
        why = "the weights are so large that xz and the like would take minutes"
    return found | {_COLUMNS.get(key, key): why for key in WEIGHTS if weights[key] is None}


def _example(folder: Path, size: int) -> Tensors:
    """The first reference examples as tensors."""
    import torch

    block = arrays.read(folder)[0]
    return {name: torch.from_numpy(value) for name, value in arrays.repeated(block.inputs, size).items()}


def _check_single(model: nn.Module, example: Tensors, signature: Signature) -> None:
    """Refuse a lone example where the model needs company: each runtime would fail in words of its own, or go on."""
    try:
        with evaluating(model):
            call(model, example, signature)
    except AssayError:
        raise
    except Exception as error:
        raise Unsupported(
            f"At batch size 1 the model raised {explanation(error)}; with two examples it did not"
            f"{_using_the_batch(model)}. Set batch_size = 2 or more."
        ) from error


def _using_the_batch(model: nn.Module) -> str:
    named = ", ".join(mixing_layers(model)[:3])
    return f" ({named}: BatchNorm without running statistics)" if named else ""


def _weights(work: Work, model: nn.Module, stored: Stored) -> dict[str, int | None]:
    """The model's weights in bytes, plain and compressed; kept beside the model, since coding takes a while."""
    if counts.file_of(model) is not None:
        return dict.fromkeys(WEIGHTS)
    plain = plain_bytes(model)
    if plain > work.cell.measure["weigh_below"]:
        return {**dict.fromkeys(WEIGHTS), "plain_bytes": plain}
    measuring = [codec_source(), source_hash("harness.measure.size"), versions(["torch", "zstandard"])]
    folder = paths.cache("weights", digest([stored.key, stored.sha256, measuring]))
    meta, _ = cache.obtain(folder, lambda place: dict(weigh_weights(model, place)))
    return {key: meta[key] for key in WEIGHTS}


def _artifact(work: Work, model: nn.Module, stored: Stored, example: Tensors) -> tuple[dict[str, Any], Path]:
    hardware, signature = work.hardware, work.task.signature
    phases = tuple(name for name, _ in work.task.workload.phases)
    key = digest(
        [
            stored.key,
            stored.sha256,
            code_hash("hardware", work.cell.hardware),
            asdict(signature),
            phases,
            work.cell.measure["weigh_below"],
            source_hash("harness.measure.size"),
            versions([*hardware.packages, "torch"]),
        ]
    )
    folder = paths.cache("artifacts", key)

    def fill(place: Path) -> dict[str, Any]:
        path = hardware.build(model, signature, example, place, phases)
        return {**weigh(path, work.cell.measure["weigh_below"]), "name": path.name}

    meta, _ = cache.obtain(folder, fill, work.not_before)
    if file_sha256(folder / meta["name"]) != meta["sha256"]:
        raise InputError(f"The cached artifact {folder / meta['name']} was changed. Delete {folder} and run again.")
    return meta, folder
