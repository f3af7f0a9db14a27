"""From a cell to a deployable artifact: train the baseline, apply the chain, build. Every step is cached by content.

Runs in a worker that has torch; what it leaves on disk is all that the measuring process gets.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from harness import cache, environment, paths
from harness.canonical import digest, file_sha256
from harness.contracts import Context, Data, Hardware, Method, Task
from harness.errors import InputError, NotFinite, Unavailable, Unsupported
from harness.executor import scratch_folder
from harness.measure import counts
from harness.measure.size import WEIGHTS, codec_source, weigh, weigh_weights
from harness.provenance import source_hash, versions
from harness.registry import resolve
from harness.spec import Cell, build

if TYPE_CHECKING:
    from torch import Tensor, nn

Progress = Callable[[float, str], None]


def code_hash(kind: Any, item: Mapping[str, Any]) -> str:
    """Source hash of what a resolved item names, with its parameters.

    A task may name further modules (``sources()``) that it imports by name, such as that of its network; its recipe
    counts by its values.
    """
    module = resolve(kind, item["name"]).__module__
    if kind != "task":
        return digest([source_hash(module), item])
    task: Task = build("task", item)
    # A user's own function is not called for its name's sake: its model's bytes identify its cells.
    recipe = None if ":" in item["name"] else task.recipe()
    more: tuple[str, ...] = getattr(task, "sources", tuple)()
    return digest([source_hash(module, *more), item, asdict(recipe) if recipe else None])


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the steps of one cell have in common; ``stages`` is what they report, in order."""

    cell: Cell
    task: Task
    hardware: Hardware
    data: Data | None
    data_key: str
    not_before: float
    progress: Progress
    stages: list[dict[str, Any]]


@dataclass(frozen=True)
class Prepared:
    """A model in the cache: its key (hash of all that went into it), file and sha256."""

    key: str
    path: Path
    sha256: str


def prepare(job: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Train, compress and build one cell.

    Parameters
    ----------
    job : mapping
        ``cell`` (:meth:`harness.spec.Cell.to_json`) and ``not_before`` (Unix time: older chain steps and artifacts are
        computed again; baselines are kept).
    progress : callable
        ``progress(fraction, message)``.

    Returns
    -------
    dict
        ``artifact`` (path), ``reference``, ``test`` (paths), and ``record``: fields of :class:`harness.record.Record`.
    """
    import torch

    cell = Cell.from_json(job["cell"])
    torch.set_num_threads(environment.cores())
    task: Task = build("task", cell.task)
    if reason := task.unavailable():
        raise Unavailable(reason)
    hardware: Hardware = build("hardware", cell.hardware)
    if reason := hardware.unavailable():
        raise Unavailable(reason)
    data = task.data()
    data_key = _data_key(digest(cell.task), data, own=":" in cell.task["name"])
    trusted = _trust(task.model(cell.seed)) if ":" in cell.task["name"] else []
    work = _Work(
        cell=cell,
        task=task,
        hardware=hardware,
        data=data,
        data_key=data_key,
        not_before=job["not_before"],
        progress=progress,
        stages=[],
    )
    current = _baseline(work)
    baseline_sha256 = current.sha256
    original = _load(current)
    params_original = counts.parameters(original)[0]
    work.stages[-1] |= _weights(original, current)
    model: nn.Module = original
    for index, step in enumerate(cell.chain):
        progress(0.6 + 0.2 * index / len(cell.chain), step["name"])
        current = _step(work, current, step)
        model = _load(current)
        work.stages[-1] |= {"params_nonzero": counts.parameters(model)[1], **_weights(model, current)}

    progress(0.8, "reference outputs")
    example = torch.zeros(2, *task.input_shape)
    reference = _reference(work, model, current)
    progress(0.85, f"build for {cell.hardware['name']}")
    artifact, folder = _artifact(work, model, current, example)
    progress(0.95, "test set")
    total, nonzero = counts.parameters(model)
    reasons = {}
    if missing := task.no_accuracy_reason():
        columns = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_delta", "mcnemar_p", "n_examples")
        reasons = dict.fromkeys(columns, missing)
    weights = {key: work.stages[-1][key] for key in WEIGHTS}
    if weights["xz_bytes"] is None:
        large = "the weights are so large that xz and the like would take minutes"
        reasons |= dict.fromkeys(("weights_zstd_bytes", "xz_bytes", "gzip_bytes"), large)
    return {
        "artifact": str(folder / artifact["name"]),
        "reference": str(reference),
        "reference_data": _reference_data(data),
        "test": None if missing else _test_set(task, cell),
        "record": {
            "artifact": {key: artifact[key] for key in ("sha256", "size_bytes", "zstd_bytes", "files", "format")},
            "params_original": params_original,
            "params_total": total,
            "params_nonzero": nonzero,
            "macs": counts.macs(model, example),
            "weights": weights,
            "stages": work.stages,
            "reasons": reasons,
            "dataset_hash": task.dataset_hash(),
        },
        "scheme": asdict(hardware.scheme) if _uses_scheme(cell) else None,
        "trusted": trusted,
        "identity": [baseline_sha256, data_key, task.dataset_hash(), missing],
    }


_DATA_KEYS: dict[str, str] = {}


def _data_key(task: str, data: Data | None, own: bool) -> str:
    """What the training and validation data add to the identity of what is computed from them.

    A registered task's data are known by its name and ``dataset_hash``; of a user's own only the bytes tell.
    """
    if not own or data is None:
        return digest([data.train_size, data.validation_size] if data else None)
    if task not in _DATA_KEYS:
        content = hashlib.sha256()
        for batches in (data.train(256, seed=0, shuffle=False, augment=False), data.validation(256)):
            for x, y in batches:
                content.update(x.numpy().tobytes() + y.numpy().tobytes())
        _DATA_KEYS[task] = content.hexdigest()
    return _DATA_KEYS[task]


def _trust(model: nn.Module) -> list[str]:
    """Let stored models name the packages of the classes that the user's own function has just returned."""
    from harness import modelfile

    packages = sorted({type(module).__module__.partition(".")[0] for module in model.modules()})
    known = os.environ.get(modelfile.TRUST_VARIABLE, "")
    os.environ[modelfile.TRUST_VARIABLE] = ",".join({*known.split(","), *packages})
    return packages


def _uses_scheme(cell: Cell) -> bool:
    return any(resolve("method", step["name"]).uses_scheme for step in cell.chain)


def _load(prepared: Prepared) -> nn.Module:
    from harness import modelfile

    if file_sha256(prepared.path) != prepared.sha256:
        raise InputError(
            f"The cached model {prepared.path} was changed after it was written. Delete its folder and run again."
        )
    return modelfile.load(prepared.path).eval()


def _save(model: nn.Module, folder: Path) -> dict[str, Any]:
    from harness import modelfile

    path = folder / "model.pt"
    modelfile.save(model, path)
    return {"sha256": file_sha256(path)}


def _prepared(folder: Path, meta: Mapping[str, Any]) -> Prepared:
    return Prepared(folder.name, folder / "model.pt", meta["sha256"])


def _baseline(work: _Work) -> Prepared:
    """The task's trained model: trained once per task, seed, data, recipe, code and torch version."""
    cell, task, data = work.cell, work.task, work.data
    recipe = task.recipe()
    key = digest(
        {
            "task": code_hash("task", cell.task),
            "training": source_hash("harness.training"),
            "recipe": asdict(recipe) if recipe else None,
            "seed": cell.seed,
            "data": [task.dataset_hash(), work.data_key],
            "packages": versions(["torch", "torchvision"]),
        }
    )
    if recipe is None or data is None:
        return _given(work, key)
    folder = paths.cache("models", key)

    def fill(place: Path) -> dict[str, Any]:
        model = task.model(cell.seed)
        train = _trainer(data, cell.seed, lambda f, m: work.progress(0.6 * f, f"train {cell.task['name']}: {m}"))
        metrics = dict(train(model, recipe))
        return {**_save(model.eval(), place), "metrics": metrics, "cores": environment.cores()}

    meta, cached = cache.obtain(folder, fill)
    work.stages.append({"name": "train", "cached": cached, "seconds": meta["seconds"], **meta["metrics"]})
    return _prepared(folder, meta)


def _given(work: _Work, key: str) -> Prepared:
    """The model of a task that trains none: made anew each time and cached by its bytes.

    Its weights come from files that no source hash knows of.
    """
    begin = time.perf_counter()
    model = work.task.model(work.cell.seed).eval()
    with scratch_folder(paths.cache("models")) as scratch:
        sha256 = _save(model, Path(scratch))["sha256"]
    folder = paths.cache("models", digest([key, sha256]))
    meta, _ = cache.obtain(folder, lambda place: _save(model, place))
    work.stages.append({"name": "model", "cached": False, "seconds": round(time.perf_counter() - begin, 3)})
    return _prepared(folder, meta)


def _trainer(data: Data, seed: int, progress: Progress) -> Any:
    from harness.training import SGDTrainer

    return SGDTrainer(data=data, seed=seed, threads=environment.cores(), progress=progress)


def _step(work: _Work, before: Prepared, step: Mapping[str, Any]) -> Prepared:
    """One chain step, cached by the model before it, its own code and parameters, the seed and, if used, the scheme."""
    cell, task, data, hardware = work.cell, work.task, work.data, work.hardware
    method: Method = build("method", step)
    scheme = asdict(hardware.scheme) if method.uses_scheme else None
    key = digest(
        [
            before.key,
            before.sha256,
            work.data_key,
            code_hash("method", step),
            source_hash("harness.training"),
            cell.seed,
            scheme,
        ]
    )
    folder = paths.cache("models", key)

    def report(_: float, message: str) -> None:
        work.progress(0.7, f"{step['name']}: {message}")

    def fill(place: Path) -> dict[str, Any]:
        model = _load(before)
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(
                data=data,
                recipe=task.recipe(),
                trainer=_trainer(data, cell.seed, report) if data else None,
                scheme=hardware.scheme,
                input_shape=task.input_shape,
                seed=cell.seed,
                scratch=Path(scratch),
                progress=report,
                fresh=(lambda: task.model(cell.seed)) if task.recipe() else None,
            )
            if reason := method.unsupported(model, context):
                raise Unsupported(f"{step['name']}: {reason}")
            return _save(method.compress(model, context).eval(), place)

    meta, cached = cache.obtain(folder, fill, work.not_before)
    work.stages.append({"name": step["name"], "cached": cached, "seconds": meta["seconds"]})
    return _prepared(folder, meta)


def _reference(work: _Work, model: nn.Module, prepared: Prepared) -> Path:
    """Real examples (random ones where a task has no data) and the torch model's logits for them."""
    import torch

    count = work.cell.measure["fidelity_examples"]
    folder = paths.cache("reference", digest([prepared.key, prepared.sha256, work.data_key, count]))

    def fill(place: Path) -> dict[str, Any]:
        x = _examples(work.task, work.data, count)
        with torch.no_grad():
            logits = torch.cat([model(x[start : start + 32]) for start in range(0, len(x), 32)])
        if not torch.isfinite(logits).all():
            raise NotFinite(
                "The model returns NaN or infinity on validation examples, so nothing about it is measured."
            )
        if logits.ndim != 2:
            raise Unsupported(f"The model's output has shape {tuple(logits.shape)}; (n, classes) is expected.")
        np.save(place / "x.npy", x.numpy())
        np.save(place / "logits.npy", logits.numpy())
        return {}

    cache.obtain(folder, fill)
    return folder


def _reference_data(data: Data | None) -> Literal["validation", "train", "random"]:
    """Where fidelity is compared: never on the test set, which only accuracy reads."""
    if data and data.validation_size:
        return "validation"
    return "train" if data and data.train_size else "random"


def _examples(task: Task, data: Data | None, count: int) -> Tensor:
    import torch

    kind = _reference_data(data)
    if data is None or kind == "random":
        return torch.randn(min(count, 32), *task.input_shape, generator=torch.Generator().manual_seed(0))
    size = min(count, 256)
    batches = data.validation(size) if kind == "validation" else data.train(size, seed=0, shuffle=False, augment=False)
    parts: list[Tensor] = []
    for x, _ in batches:
        parts.append(x)
        if sum(map(len, parts)) >= count:
            break
    return torch.cat(parts)[:count].contiguous()


def _weights(model: nn.Module, prepared: Prepared) -> dict[str, int | None]:
    """The model's weights in bytes, plain and compressed; kept beside the model, since coding takes a while."""
    measuring = [codec_source(), source_hash("harness.measure.size"), versions(["torch", "zstandard"])]
    folder = paths.cache("weights", digest([prepared.key, prepared.sha256, measuring]))
    meta, _ = cache.obtain(folder, lambda place: dict(weigh_weights(model, place)))
    return {key: meta[key] for key in WEIGHTS}


def _artifact(work: _Work, model: nn.Module, prepared: Prepared, example: Tensor) -> tuple[dict[str, Any], Path]:
    hardware = work.hardware
    key = digest(
        [
            prepared.key,
            prepared.sha256,
            code_hash("hardware", work.cell.hardware),
            source_hash("harness.measure.size"),
            versions([*hardware.packages, "torch"]),
        ]
    )
    folder = paths.cache("artifacts", key)

    def fill(place: Path) -> dict[str, Any]:
        path = hardware.build(model, example, place)
        return {**weigh(path), "name": path.name}

    meta, _ = cache.obtain(folder, fill, work.not_before)
    if file_sha256(folder / meta["name"]) != meta["sha256"]:
        raise InputError(f"The cached artifact {folder / meta['name']} was changed. Delete {folder} and run again.")
    return meta, folder


def _test_set(task: Task, cell: Cell) -> str | None:
    """The test set as arrays on disk, for the measuring process, which has no torch."""
    test = task.test()
    if test is None:
        return None
    folder = paths.cache("data", digest(["test", cell.task, task.dataset_hash(), source_hash(type(task).__module__)]))

    def fill(place: Path) -> dict[str, Any]:
        needed = 4 * test.size * math.prod(task.input_shape)
        if environment.free_disk_bytes(place) < 1.02 * needed:
            # Writing to a memory map on a full disk would kill the process instead of raising.
            raise OSError(errno.ENOSPC, f"the test set needs {needed / 1e9:.1f} GB")
        x = np.lib.format.open_memmap(
            place / "x.npy", mode="w+", dtype=np.float32, shape=(test.size, *task.input_shape)
        )
        y = np.empty(test.size, dtype=np.int64)
        start = 0
        for part, labels in test.batches(256):
            x[start : start + len(part)], y[start : start + len(part)] = part, labels
            start += len(part)
        if start != test.size:
            raise InputError(f"The task's test set has {start} examples; it said {test.size}.")
        x.flush()
        np.save(place / "y.npy", y)
        return {"n": start}

    cache.obtain(folder, fill)
    return str(folder)
