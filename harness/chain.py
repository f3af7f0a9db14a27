"""The models of a cell: the trained baseline and what each step of the chain makes of it, cached by content."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import cache, environment, paths
from harness.canonical import digest, file_sha256
from harness.contracts import Context, Hardware, Method, Split, Task, Training
from harness.errors import InputError, Unsupported
from harness.executor import scratch_folder
from harness.provenance import source_hash, versions
from harness.registry import resolve
from harness.spec import Cell, build, is_assembled

if TYPE_CHECKING:
    from torch import nn

    from harness.jobs import Progress


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the steps of one cell have in common; the lists are what they report, in order."""

    cell: Cell
    task: Task
    hardware: Hardware
    data: Mapping[str, Split]
    not_before: float
    progress: Progress
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def data_key(self) -> str:
        """What the training and validation data add to the identity of what is computed from them."""
        return digest({name: [split.size, split.identity] for name, split in self.data.items()})

    def heard(self, meta: Mapping[str, Any]) -> None:
        """Take over what a cached folder's making had to say."""
        self.notes.extend(meta.get("notes", ()))
        self.warnings.extend(meta.get("warnings", ()))


@dataclass(frozen=True)
class Stored:
    """A model in the cache: its key (hash of all that went into it), file and sha256."""

    key: str
    path: Path
    sha256: str


def code_hash(kind: Any, item: Mapping[str, Any]) -> str:
    """Source hash of what a resolved item names, with its parameters.

    A task may name further modules (``sources()``) that it imports by name, such as that of its network; its recipe
    counts by its values.
    """
    module = resolve(kind, item["name"]).__module__
    if kind != "task":
        return digest([source_hash(module), item])
    task: Task = build("task", item)
    # Nothing is made for its name's sake: the model's bytes identify the cells of such a task.
    recipe = None if is_assembled(item) else task.recipe()
    more: tuple[str, ...] = getattr(task, "sources", tuple)()
    return digest([source_hash(module, *more), item, asdict(recipe) if recipe else None])


def load(stored: Stored) -> nn.Module:
    """The model, in evaluation mode.

    Raises
    ------
    InputError
        If the file was changed after it was written.
    """
    from harness import modelfile

    if file_sha256(stored.path) != stored.sha256:
        raise InputError(
            f"The cached model {stored.path} was changed after it was written. Delete its folder and run again."
        )
    return modelfile.load(stored.path).eval()


def baseline(work: Work) -> Stored:
    """The task's trained model: trained once per task, seed, data, recipe, code and torch version."""
    cell, task = work.cell, work.task
    recipe = task.recipe()
    key = digest(
        {
            "task": code_hash("task", cell.task),
            "training": source_hash("harness.training", "harness.losses"),
            "recipe": asdict(recipe) if recipe else None,
            "seed": cell.seed,
            "data": [task.dataset_hash(), work.data_key],
            "packages": versions(["torch", "torchvision", "timm", "transformers"]),
        }
    )
    if recipe is None or "train" not in work.data:
        return _given(work, key)
    folder = paths.cache("models", key)

    def fill(place: Path) -> dict[str, Any]:
        notes: list[str] = []
        work.progress.step("training the baseline")
        model = task.model(cell.seed)
        train = _trainer(work, lambda f, m: work.progress(0.6 * f, f"train {cell.task['name']}: {m}"), notes)
        metrics = dict(train(model, recipe))
        return {**_save(model.eval(), place), "metrics": metrics, "cores": environment.cores(), "notes": notes}

    meta, cached = cache.obtain(folder, fill, usable=_is_ours)
    work.heard(meta)
    work.stages.append({"name": "train", "cached": cached, "seconds": meta["seconds"], **meta["metrics"]})
    return _stored(folder, meta)


def step(work: Work, before: Stored, item: Mapping[str, Any], original: Stored) -> Stored:
    """One chain step, cached by the model before it, its own code and parameters, the data and the seed."""
    cell, task = work.cell, work.task
    method: Method = build("method", item)
    finetuning = task.finetuning()
    key = digest(
        [
            before.key,
            before.sha256,
            original.sha256,
            work.data_key,
            code_hash("method", item),
            source_hash("harness.training", "harness.losses"),
            asdict(finetuning) if finetuning else None,
            cell.seed,
        ]
    )
    folder = paths.cache("models", key)

    def report(_: float, message: str) -> None:
        work.progress(0.7, f"{item['name']}: {message}")

    def fill(place: Path) -> dict[str, Any]:
        notes: list[str] = []
        warnings: list[str] = []
        work.progress.step(f"the method {item['name']}")
        training = None
        if finetuning is not None and "train" in work.data:
            training = Training(
                recipe=finetuning,
                fit=_trainer(work, report, notes),
                fresh=(lambda: task.model(cell.seed)) if task.recipe() else None,
            )
        with tempfile.TemporaryDirectory() as scratch:
            context = Context(
                signature=task.signature,
                data=work.data,
                loss=task.loss,
                metrics=task.metrics,
                training=training,
                original=lambda: load(original),
                seed=cell.seed,
                scratch=Path(scratch),
                progress=report,
                warn=lambda sentence: warnings.append(f"{item['name']}: {sentence}"),
            )
            try:
                model = load(before)
                if item["name"] != "baseline" and getattr(model, "artifact", None) is not None:
                    raise Unsupported("the model is a file that is deployed as it is; methods need a torch module")
                compressed = method.compress(model, context)
            except Unsupported as error:
                raise Unsupported(f"{item['name']}: {error}") from None
            return {**_save(compressed.eval(), place), "notes": notes, "warnings": warnings}

    meta, cached = cache.obtain(folder, fill, work.not_before, usable=_is_ours)
    work.heard(meta)
    work.stages.append({"name": item["name"], "cached": cached, "seconds": meta["seconds"]})
    return _stored(folder, meta)


def trust(model: nn.Module) -> list[str]:
    """Let stored models name the packages of the classes that the user's own function has just returned."""
    from harness import modelfile

    packages = sorted({type(module).__module__.partition(".")[0] for module in model.modules()})
    known = os.environ.get(modelfile.TRUST_VARIABLE, "")
    os.environ[modelfile.TRUST_VARIABLE] = ",".join({*known.split(","), *packages})
    return packages


def _given(work: Work, key: str) -> Stored:
    """The model of a task that trains none: made anew each time and cached by its bytes.

    Its weights come from files that no source hash knows of.
    """
    begin = time.perf_counter()
    model = work.task.model(work.cell.seed).eval()
    with scratch_folder(paths.cache("models")) as scratch:
        sha256 = _save(model, Path(scratch))["sha256"]
    folder = paths.cache("models", digest([key, sha256]))
    meta, _ = cache.obtain(folder, lambda place: _save(model, place), usable=_is_ours)
    work.stages.append({"name": "model", "cached": False, "seconds": round(time.perf_counter() - begin, 3)})
    return _stored(folder, meta)


def _save(model: nn.Module, folder: Path) -> dict[str, Any]:
    from harness import modelfile

    path = folder / "model.pt"
    modelfile.save(model, path)
    return {"sha256": file_sha256(path)}


def _is_ours(folder: Path) -> bool:
    """A cached model counts only where this machine wrote it: one from elsewhere could be anything."""
    from harness import modelfile

    return modelfile.is_ours(folder / "model.pt")


def _stored(folder: Path, meta: Mapping[str, Any]) -> Stored:
    return Stored(folder.name, folder / "model.pt", meta["sha256"])


def _trainer(work: Work, progress: Callable[[float, str], None], notes: list[str]) -> Any:
    from harness.training import SGDTrainer

    task = work.task
    return SGDTrainer(
        data=work.data,
        signature=task.signature,
        loss=task.loss,
        metrics=task.metrics,
        seed=work.cell.seed,
        threads=environment.cores(),
        progress=progress,
        say=notes.append,
    )
