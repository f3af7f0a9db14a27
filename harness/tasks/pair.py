"""A task put together in a spec: ``task = {model = "timm/resnet18.a1_in1k", data = "imagenet"}``."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.canonical import dumps
from harness.contracts import Batch, Port, Recipe, Signature, Workload
from harness.errors import InputError
from harness.tasks import sets, sources
from harness.tasks.assembled import Assembled
from harness.text import shown

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Split
    from harness.tasks.assembly import Assembly

_TOKENS = 128
PARAMETERS = {"model": "source", "data": "dataset"}
"""Parameters as a spec has them, and the fields that hold them: ``model`` and ``data`` are a task's own methods."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Pair(Assembled):
    """Any model with any data.

    Parameters
    ----------
    model : str
        A built-in network ("resnet20"), torchvision/NAME, timm/NAME, transformers/FOLDER, FILE.onnx, FILE.pt2 or
        module:function.
    data : str, optional
        A built-in set ("digits", "fashion-mnist", "mnist"), "imagenet" or a folder of class folders, a ``.npz``,
        ``.csv`` or ``.parquet`` file or a folder with "train", "validation" and "test" of them, a folder of Hugging
        Face datasets, or module:function. Without data there is no score.
    metric : str, table or list of them, optional
        What it is scored by; otherwise inferred from outputs and targets.
    input : str, table or list of str, optional
        Inputs where nothing tells their shapes: "pixels=1x3x224x224:float32".
    targets : str, optional
        Columns that are targets, with commas between; otherwise those called label, labels, target, targets or y.
    tokens : int, optional
        Length of texts; 128 where it is not given.
    """

    source: str
    dataset: str | None = None
    metric: Any = None
    input: Any = None
    targets: str | None = None
    tokens: int | None = Field(default=None, ge=1)

    @property
    def name(self) -> str:
        """The registered name."""
        return "pair"

    def __post_init__(self) -> None:
        """Refuse texts that name nothing, without making a model or reading data."""
        from harness import metrics

        sources.find(self.source)
        if self.dataset is not None:
            sets.find(self.dataset)
        for item in _metrics(self.metric):
            metrics.create(item)

    def resolved_parameters(self) -> dict[str, Any]:
        """The parameters as a spec has them; those that are not given are left out."""
        found = {
            "model": self.source,
            "data": self.dataset,
            "metric": self.metric,
            "input": self.input,
            "targets": self.targets,
            "tokens": self.tokens,
        }
        # A list of a spec is one axis of choices; a list in it is one value.
        return {key: value for key, value in found.items() if value is not None}

    def sources(self) -> tuple[str, ...]:
        """The modules of the model and the data, for the task's source hash."""
        from harness.tasks import models

        own = (models.source(self.source),) if self.source in models.MODELS else ()
        data = (type(sets.find(self.dataset)).__module__,) if self.dataset else ()
        return (type(sources.find(self.source)).__module__, *own, *data)

    def unavailable(self) -> str | None:
        """Why the model or the data cannot be had here, or None."""
        reason = sources.find(self.source).unavailable()
        return reason or (sets.find(self.dataset).unavailable() if self.dataset else None)

    def model(self, seed: int) -> nn.Module:
        """The model; ``seed`` counts where its weights are random."""
        from harness.tasks.sources.networks import Network

        source = sources.find(self.source)
        if isinstance(source, Network):
            return source.make(seed).model
        return super().model(seed)

    def recipe(self) -> Recipe | None:
        """The built-in network's, where there are data to train on; otherwise that of the user's function."""
        recipe = sources.find(self.source).recipe() if self.dataset or ":" in self.source else None
        return recipe if recipe is not None and "train" in self._assembly().data else None

    def _assembly(self) -> Assembly:
        states = _state(self.source), _state(self.dataset) if self.dataset else ""
        return _assembled(dumps(self.resolved_parameters()), states)


def _state(text: str) -> str:
    """Sizes and times of the files that a text names, so that a changed one is read again."""
    place = sets.located(text.removeprefix("transformers/")) if ":" not in text else None
    files = [place] if place and place.is_file() else sorted(place.iterdir()) if place and place.is_dir() else []
    return dumps([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])


@functools.lru_cache(maxsize=2)
def _assembled(parameters: str, states: tuple[str, str]) -> Assembly:  # noqa: ARG001 - part of the cache's key
    """Make the model and read the data, once per process and state of the files."""
    import dataclasses

    from harness.tasks import assembly, batches
    from harness.tasks.given import Given
    from harness.tasks.inputs import parse
    from harness.tasks.user import loader_splits

    values: dict[str, Any] = json.loads(parameters)
    where = f"Task {shown(values['model'])}"
    made = sources.find(values["model"]).make(0)
    given = Given(**{**made.given, "model": made.model})
    model, notes = assembly.settled(made.model, where)
    names, required = batches.parameters(model)
    if made.signature is not None:
        names = tuple(port.name for port in made.signature.inputs)
        required = names
    ports = made.inputs
    if "input" in values:
        described = values["input"]
        ports = parse(",".join(described) if isinstance(described, list) else described, names, where)
    tokens = values.get("tokens") or min(_TOKENS, made.longest or _TOKENS)
    loaded = sets.Loaded(parts=given.data)
    if "data" in values:
        wanted = sets.Wanted(
            where=where,
            made=dataclasses.replace(made, inputs=ports),
            names=names,
            targets=tuple(name.strip() for name in values.get("targets", "").split(",") if name.strip()),
            tokens=tokens,
        )
        loaded = sets.find(values["data"]).load(wanted)
    splits_ = {part: loader if hasattr(loader, "identity") else None for part, loader in loaded.parts.items()}
    raw = {part: loader for part, loader in loaded.parts.items() if splits_[part] is None}
    data: dict[str, Split] = {
        part: _renamed(split, names if made.signature else ()) for part, split in splits_.items() if split is not None
    }
    data |= loader_splits(raw, where, names, required)
    recipe = sources.find(values["model"]).recipe() if data else None
    untrained = made.untrained if recipe is None or "train" not in data else ""
    workload = given.workload
    sizes = {axis for port in ports for axis in port.shape if isinstance(axis, str)}
    if "tokens" in values or sizes - set(workload.sizes):
        workload = dataclasses.replace(workload, sizes={**workload.sizes, **dict.fromkeys(sizes, tokens)})
    return assembly.Assembly(
        where=where,
        model=model,
        data=data,
        example=None if data or not ports else _example(ports, workload),
        signature=made.signature if made.signature is not None and made.signature.outputs else None,
        varying=ports if any(isinstance(axis, str) for port in ports for axis in port.shape) else (),
        loss=given.loss,
        metrics=_metrics(values.get("metric")) or given.metrics,
        recipe=recipe,
        finetune=given.finetune,
        workload=workload,
        untested=untrained or f"{where} has no test data: give data.",
        untrained=untrained,
        said=(*given.notes, *made.notes, *loaded.notes, *notes),
    )


def _renamed(split: Split, names: tuple[str, ...]) -> Split:
    """A built-in split, whose input has the name of the model's only one."""
    from harness.tasks.splits import ChangedSplit

    def change(batch: Batch) -> Batch:
        return Batch(inputs=dict(zip(names, batch.inputs.values(), strict=True)), targets=batch.targets)

    first = next(iter(split.batches(1)))
    return ChangedSplit(split=split, change=change) if len(names) == 1 and tuple(first.inputs) != names else split


def _example(ports: tuple[Port, ...], workload: Workload) -> Batch:
    from harness.reference import made_up

    return Batch(inputs=made_up(Signature(inputs=ports, outputs=()), workload, 2))


def _metrics(given: Any) -> tuple[Any, ...]:
    if given is None:
        return ()
    items = given if isinstance(given, list) else [given]
    for item in items:
        if not isinstance(item, str | Mapping):
            raise InputError(f'A metric is a name or {{name = "accuracy", k = 5}}, not {shown(item)}.')
    return tuple(items)
