"""What a user's function returns: a model and what belongs to it, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.contracts import Metric, Recipe, Workload
from harness.errors import InputError, suggestion
from harness.text import shown

if TYPE_CHECKING:
    from torch import nn

LOADERS = ("train", "validation", "test")
"""The keys that loaders may have."""
_VALIDATION = ("val", "valid")


@dataclass(frozen=True, kw_only=True)
class Given:
    """A model with what belongs to it; all but the model may be left out.

    Parameters
    ----------
    model : nn.Module
        Trained, unless there is a ``recipe``.
    data : mapping
        Loaders under "train", "validation" and "test".
    recipe : Recipe or None
        Trains the model from scratch on "train".
    finetune : Recipe or None
        Fine-tuning of a trained model derives from it: at a tenth of its rate.
    loss : object
        A loss of :mod:`harness.losses` or of torch, or a function of output and target (of the mappings of all outputs
        and targets where there are several).
    metrics : sequence
        Names ("f1"), tables ({name = "accuracy", k = 5}) or metric objects; tables show the first.
    example : object
        Inputs of one query or more, as a batch has them: for a model without data.
    workload : Workload or mapping
        What one timed query is.
    """

    model: nn.Module
    data: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    finetune: Recipe | None = None
    loss: Any = None
    metrics: tuple[Any, ...] = ()
    example: Any = None
    workload: Workload = field(default_factory=Workload)
    notes: tuple[str, ...] = ()


_KEYS = tuple(item.name for item in dataclasses.fields(Given) if item.name != "notes")


def parse(result: Any, where: str) -> Given:
    """What the function returned.

    Parameters
    ----------
    result : object
        ``model``, ``(model, loaders)``, ``(model, loaders, recipe)``, a mapping, or a :class:`Given`.
    where : str
        "Task 'mine:make'", for messages.

    Raises
    ------
    InputError
        If it is something else, or a part of it has another kind.
    """
    values = _values(result, where)
    for key in values:
        if key not in _KEYS:
            raise InputError(f"{where} returned {shown(key)}. {suggestion(str(key), _KEYS)}")
    _check_model(values.get("model"), result, where)
    for key in ("recipe", "finetune"):
        if not isinstance(values.get(key), Recipe | None):
            raise InputError(
                f"{where}: {key!r} must be a harness.contracts.Recipe; it is {type(values[key]).__name__}."
            )
    data, notes = loaders(values.get("data"), where)
    recipe: Recipe | None = values.get("recipe")
    finetune: Recipe | None = values.get("finetune")
    if recipe is not None and not recipe.epochs:
        # No epochs: the model is trained, and the recipe's other values are for fine-tuning.
        finetune = finetune or dataclasses.replace(recipe, epochs=1)
        recipe = None
    for name, given in (("recipe", recipe), ("recipe for fine-tuning", finetune)):
        if given is not None and "train" not in data:
            raise InputError(f"{where} returned a {name} but no 'train' loader to train on.")
    return Given(
        model=values["model"],
        data=data,
        recipe=recipe,
        finetune=finetune,
        loss=values.get("loss"),
        metrics=_listed(values.get("metrics")),
        example=values.get("example"),
        workload=_workload(values.get("workload"), where),
        notes=notes,
    )


def _values(result: Any, where: str) -> dict[str, Any]:
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, Given):
        return {key: getattr(result, key) for key in _KEYS}
    parts = result if isinstance(result, tuple) else (result,)
    if len(parts) > 3:
        raise InputError(_expected(where, result))
    return dict(zip(("model", "data", "recipe"), parts, strict=False))


def _check_model(model: Any, result: Any, where: str) -> None:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InputError(_expected(where, result))


def _expected(where: str, result: Any) -> str:
    if isinstance(result, Mapping):
        given = f"a mapping with {', '.join(f'{key}: {type(value).__name__}' for key, value in result.items())}"
    else:
        parts = result if isinstance(result, tuple) else (result,)
        given = f"({', '.join(type(part).__name__ for part in parts)})"
    return (
        f"{where} must return a model, (model, loaders), (model, loaders, recipe) or a mapping with any of "
        f"{', '.join(_KEYS)}, where model is a torch nn.Module; it returned {given}."
    )


def loaders(given: Any, where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A mapping of loaders, checked and made readable again, and what has to be said about it."""
    from harness.tasks.user_data import kept

    if given is None:
        return {}, ()
    if not isinstance(given, Mapping):
        raise InputError(f"{where}: loaders must be a mapping of {', '.join(LOADERS)}; it is {type(given).__name__}.")
    found: dict[str, Any] = {}
    notes = []
    for key, loader in given.items():
        name = "validation" if key in _VALIDATION else key
        if name not in LOADERS:
            raise InputError(f"{where} returned a loader {shown(key)}. {suggestion(str(key), LOADERS)}")
        if name in found:
            raise InputError(f"{where} returned two loaders for validation. Give one, under 'validation'.")
        if name != key:
            notes.append(f"The loader {key!r} is taken as 'validation'.")
        if loader is not None:
            found[name] = kept(loader, f"{where}: the loader {key!r}")
    return found, tuple(notes)


def _listed(metrics: Any) -> tuple[Any, ...]:
    if metrics is None:
        return ()
    several = isinstance(metrics, Sequence) and not isinstance(metrics, str | Metric)
    return tuple(metrics) if several else (metrics,)


def _workload(workload: Any, where: str) -> Workload:
    if workload is None or isinstance(workload, Workload):
        return workload or Workload()
    try:
        return Workload(**workload)
    except TypeError as error:
        raise InputError(
            f"{where}: the workload must be a harness.contracts.Workload or a mapping of its fields (phases, sizes, "
            f"unit): {error}."
        ) from None
