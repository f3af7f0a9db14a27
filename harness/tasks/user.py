"""The user's own model: a function that returns it."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.canonical import dumps
from harness.contracts import Data, TestSet
from harness.errors import InputError, SpecError, suggestion
from harness.training import Recipe

if TYPE_CHECKING:
    from torch import nn

LOADERS = ("train", "validation", "test")
"""The keys that a user's loaders may have."""


def find(target: str) -> Any:
    """What ``module:function`` names; modules in the current directory are found.

    Raises
    ------
    InputError
        If the module cannot be imported or has no such attribute.
    """
    module_name, _, attribute = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything: it is reported as theirs
        raise InputError(f"Task {target!r}: importing {module_name!r} raised {_said(error)}") from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise InputError(
            f"Task {target!r}: module {module_name!r} has no {attribute!r}. {suggestion(attribute, names)}"
        )
    return getattr(module, attribute)


@plain_dataclass(frozen=True)
class Returned:
    """What a user's function returned, checked."""

    model: nn.Module
    loaders: Mapping[str, Any]
    recipe: Recipe | None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UserTask:
    """A model from ``module:function``, called as ``function(**parameters)`` once in each process.

    The module is looked for in the current directory first. The function returns one of:

    ``model``
        An ``nn.Module`` that is taken as trained. There is no data, so accuracy is NULL; latency, size and energy are
        measured. The shape of one example must be known (below).
    ``(model, loaders)``
        ``loaders`` is a mapping with any of the keys "train", "validation" and "test". Each value is an iterable of
        batches (inputs (n, ...), integer classes (n,)), as tensors or NumPy arrays, such as a ``DataLoader`` or a list;
        a generator is read once and kept. Inputs become float32 as they are, unscaled. Batch sizes are the loader's:
        batches are cut and joined as a measurement wants. Accuracy is the top-1 accuracy on "test"; methods see only
        "train" and "validation".
    ``(model, loaders, recipe)``
        As before, but the model is not trained yet: ``recipe`` (:class:`harness.training.Recipe`) trains it on "train".

    The shape of one example is that of the first batch of "test", "validation" or "train"; without loaders it is the
    parameter ``input_shape`` (passed on only if the function takes it), or the model's attribute ``input_shape``,
    without the batch axis.

    Order and augmentation of "train" are the loader's own. While it is read, torch's random state is seeded from the
    cell's seed and epoch, so that a shuffling ``DataLoader`` repeats (NumPy's and Python's random states are not set).
    "validation" and "test" are read under one fixed seed.

    Parameters
    ----------
    target : str
        ``"module:function"``.
    parameters : mapping
        Keyword arguments of the function.
    """

    target: str
    parameters: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """``module:function``, as given."""
        return self.target

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, from the loaders, the parameters or the model."""
        from harness.tasks.user_data import stream

        returned = self._returned()
        for part in ("test", "validation", "train"):
            if part in returned.loaders:
                for x, _ in stream(self.target, part, returned.loaders[part], seed=0):
                    return tuple(int(size) for size in x.shape[1:])
        shape = self.parameters.get("input_shape", getattr(returned.model, "input_shape", None))
        valid = isinstance(shape, list | tuple) and all(isinstance(size, int) and size > 0 for size in shape)
        if not valid or not shape:
            raise InputError(
                f"Task {self.target!r}: the shape of one example is not known (input_shape: {shape!r}). Return "
                "loaders, give the parameter input_shape = [3, 224, 224], or set the model's attribute input_shape."
            )
        return tuple(shape)

    def unavailable(self) -> str | None:
        """None: what the function lacks, it says itself when it is called."""
        return None

    def check(self) -> None:
        """Check that the function exists and takes the parameters, without calling it.

        Raises
        ------
        InputError
            If it does not.
        """
        function = find(self.target)
        if not callable(function):
            raise InputError(f"Task {self.target!r} is {type(function).__name__}, not a function.")
        _arguments(self.target, function, self.parameters)

    def model(self, seed: int) -> nn.Module:  # noqa: ARG002 - the function decides about its own randomness
        """A copy of the model that the function returned."""
        import copy

        return copy.deepcopy(self._returned().model)

    def recipe(self) -> Recipe | None:
        """The recipe that the function returned, or None: the model is taken as trained."""
        return self._returned().recipe

    def data(self) -> Data | None:
        """The loaders "train" and "validation", or None where there is neither."""
        from harness.tasks.user_data import UserData

        loaders = self._returned().loaders
        if "train" not in loaders and "validation" not in loaders:
            return None
        return UserData(target=self.target, training=loaders.get("train", ()), validating=loaders.get("validation", ()))

    def test(self) -> TestSet | None:
        """The loader "test", or None."""
        from harness.tasks.user_data import held_out

        loaders = self._returned().loaders
        return held_out(self.target, loaders["test"]) if "test" in loaders else None

    def resolved_parameters(self) -> dict[str, Any]:
        """What the function is called with, for the record and for making this task again."""
        return dict(self.parameters)

    def dataset_hash(self) -> str | None:
        """Sha256 over the test examples' bytes and classes, or None where there is no test set."""
        from harness.tasks.user_data import content_hash

        loaders = self._returned().loaders
        return content_hash(self.target, loaders["test"]) if "test" in loaders else None

    def no_accuracy_reason(self) -> str | None:
        """Why accuracy is NULL: no "test" loader; or None."""
        if "test" in self._returned().loaders:
            return None
        return f"{self.target} returns no 'test' loader, so there is nothing to measure accuracy on."

    def _returned(self) -> Returned:
        return _call(self.target, dumps(dict(self.parameters)))


@functools.lru_cache(maxsize=4)
def _call(target: str, parameters: str) -> Returned:
    """Call the user's function once per process, and check what it returns."""
    import json

    from torch import nn

    function = find(target)
    arguments = _arguments(target, function, json.loads(parameters))
    try:
        result = function(**arguments)
    except Exception as error:  # the user's function may raise anything: it is reported as theirs
        raise InputError(f"Task {target!r} raised {_said(error)}") from error
    parts = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        given = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"Task {target!r} must return a model, (model, loaders) or (model, loaders, recipe), where model is a "
            f"torch nn.Module; it returned ({given})."
        )
    loaders = parts[1] if len(parts) > 1 and parts[1] is not None else {}
    recipe = parts[2] if len(parts) > 2 else None
    if not isinstance(loaders, Mapping):
        raise InputError(
            f"Task {target!r}: loaders must be a mapping of {', '.join(LOADERS)}; it is {type(loaders).__name__}."
        )
    if not isinstance(recipe, Recipe | None):
        raise InputError(
            f"Task {target!r}: the recipe must be a harness.training.Recipe; it is {type(recipe).__name__}."
        )
    kept = {}
    for key, loader in loaders.items():
        if key not in LOADERS:
            raise InputError(f"Task {target!r} returned a loader {key!r}. {suggestion(str(key), LOADERS)}")
        if loader is None:
            continue
        if not hasattr(loader, "__iter__"):
            raise InputError(f"Task {target!r}: the loader {key!r} cannot be iterated over ({type(loader).__name__}).")
        # An iterator is empty after its first pass, so its batches are kept.
        kept[key] = list(loader) if iter(loader) is loader else loader
    if recipe is not None and "train" not in kept:
        raise InputError(f"Task {target!r} returned a recipe but no 'train' loader to train on.")
    parts[0].eval()
    return Returned(parts[0], kept, recipe)


def _arguments(target: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments to pass: all parameters, but ``input_shape`` only where the function takes it."""
    arguments = dict(parameters)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return arguments
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    if "input_shape" not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
        arguments.pop("input_shape", None)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [name for name in signature.parameters if name != "self"]
        raise SpecError(f"Task {target!r}: {error}. The function takes: {', '.join(names) or 'nothing'}.") from None
    return arguments


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
