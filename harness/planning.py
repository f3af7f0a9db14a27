"""The cells of a spec with their identities: everything that goes into a result, hashed before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness import environment, metrics
from harness.canonical import digest
from harness.chain import code_hash
from harness.contracts import Hardware, Scheme, Task
from harness.errors import InputError, Unavailable
from harness.filters import Filter
from harness.measure.size import codec_source
from harness.provenance import git_state, source_hash, versions
from harness.spec import Cell, Spec, build, is_assembled, parameters

_CORE_PACKAGES = (
    "assay-bench",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "zstandard",
)


@dataclass(frozen=True)
class Planned:
    """A cell with its identity.

    Parameters
    ----------
    cell : Cell
    cell_hash : str
        Hash of everything that goes into the result: the cell, code, data, package versions, machine.
    provenance : mapping
        Fields of :class:`harness.record.Record` that are known before the run.
    complete : bool
        False for a task that brings its weights (the user's own, torchvision's, a checkpoint): only the prepared model
        tells what is measured, and the final hash is made from it.
    """

    cell: Cell
    cell_hash: str
    provenance: Mapping[str, Any]
    complete: bool = True


def plan(spec: Spec, only: Filter | None = None) -> list[Planned]:
    """The spec's cells with their identities.

    Sources are hashed anew, so that edits between two sweeps of one process are seen.

    Raises
    ------
    InputError
        For anything in the spec that cannot be run, or data that is damaged.
    """
    source_hash.cache_clear()
    spec_hash = spec.hash()
    commit, dirty = git_state()
    machine = environment.machine()
    planned = []
    tasks: dict[str, tuple[str | None, bool, list[str]]] = {}
    for cell in spec.cells():
        if only and not only.accepts(cell.row()):
            continue
        hardware: Hardware = build("hardware", cell.hardware)
        cell = targeted(cell, hardware.scheme)
        packages = versions([*_CORE_PACKAGES, *hardware.packages])
        hashes = {
            "task_hash": code_hash("task", cell.task),
            "method_hash": digest([code_hash("method", step) for step in cell.chain]),
            "hardware_hash": code_hash("hardware", cell.hardware),
        }
        name = digest(cell.task)
        if name not in tasks:
            tasks[name] = _known(cell)
        data, complete, scored_by = tasks[name]
        identity = {
            "cell": cell.to_json(),
            **hashes,
            "core": source_hash("harness.measure.run", "harness.prepare", "harness.training", "harness.losses"),
            "metrics": scored_by,
            "storage": codec_source(),
            "data": data,
            "packages": packages,
            "machine": machine["machine_id"],
        }
        provenance = {
            **hashes,
            "spec_name": spec.name,
            "spec_hash": spec_hash,
            "git_commit": commit,
            "git_dirty": dirty,
            "packages": packages,
            "machine": machine,
            "dataset_hash": data,
        }
        planned.append(Planned(cell, digest(identity), provenance, complete))
    if not planned:
        raise InputError(
            f"No cell of {spec.name!r} is left to run: --only accepts none. See `assay run {spec.name} --dry-run`."
        )
    return planned


def targeted(cell: Cell, scheme: Scheme) -> Cell:
    """The cell with the target's integer scheme written into the methods that left it open."""
    chain = []
    for step in cell.chain:
        method = build("method", step)
        resolve = getattr(method, "targeting", None)
        chain.append({"name": step["name"], **parameters(resolve(scheme))} if resolve else step)
    return replace(cell, chain=tuple(chain))


def metric_hashes(task: Task) -> list[str]:
    """Source and parameters of what a task is scored by."""
    return [
        digest([metrics.config(metric), source_hash(type(metric).__module__)])
        for metric in (*task.metrics, *task.fidelity)
    ]


def _known(cell: Cell) -> tuple[str | None, bool, list[str]]:
    """Before the run: the hash of the cell's data, whether the identity is complete, and the metrics' hashes."""
    # Making such a task may run the user's code and load a large model: that happens in the worker only.
    if is_assembled(cell.task):
        return None, False, []
    task: Task = build("task", cell.task)
    try:
        if task.recipe() is None:
            return None, False, []
        return task.dataset_hash(), True, metric_hashes(task)
    except Unavailable:
        return None, False, []
