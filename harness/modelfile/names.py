"""Which classes and functions a model file may name.

A name is held against the packages before anything is imported, and what it turns out to be is held against what it is
used for before any of it is made. Classes are never called: an instance is an empty one with its attributes put in.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from harness.errors import DataError
from harness.modelfile import operators

TRUST_VARIABLE = "ASSAY_TRUSTED_MODULES"

# The parts of each package that define layers; the rest of it (downloads, servers, training loops) is never imported
# on a file's word.
_LAYERS = {
    "torch": r"torch\.nn\.modules(\.\w+)*",
    "torchvision": r"torchvision\.(models|ops|transforms)(\.\w+)*",
    "timm": r"timm\.(models|layers)(\.\w+)*",
    "transformers": (
        r"transformers\.(activations|configuration_utils|modeling_layers|modeling_outputs|modeling_utils|"
        r"pytorch_utils|generation\.configuration_utils|models(\.\w+)*\.(modeling|configuration)_\w+)"
    ),
    "harness": r"harness(\.\w+)+",
    "methods": r"methods(\.\w+)+",
}
PACKAGES = tuple(_LAYERS)
"""The packages that are trusted without being named; each with its layers only."""

# Modules that act when they are imported, or whose classes act when they are deleted.
_ACTING = frozenset(
    {"cli", "commands", "conftest", "doctor", "executor", "runner", "scripts", "setup", "testing", "worker"}
)
_NEVER = frozenset({*sys.stdlib_module_names, *_LAYERS, "hardware", "papers", "results"})
# Other than these, transformers' plain objects talk to servers or read folders.
_CONFIGURATIONS = (
    ("transformers.configuration_utils", "PreTrainedConfig"),
    ("transformers.configuration_utils", "PretrainedConfig"),
    ("transformers.generation.configuration_utils", "GenerationConfig"),
)
# ``object`` has the first three of them.
_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")


def trusted_by_environment() -> tuple[str, ...]:
    """Top-level packages named in ``ASSAY_TRUSTED_MODULES``."""
    return tuple(name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip())


class Trust:
    """Which packages may be named.

    Parameters
    ----------
    packages : iterable of str, or None
        Top-level packages beside :data:`PACKAGES`; names of the standard library and of Assay's own packages are
        ignored. None: any other package, which is how models are written.
    """

    def __init__(self, packages: Iterable[str] | None) -> None:
        self._packages = None if packages is None else frozenset(packages) - _NEVER

    def is_users(self, module: str) -> bool:
        """Whether a module is of a package that was named for the user's own model."""
        package = module.partition(".")[0]
        return package not in _NEVER and (self._packages is None or package in self._packages)

    def why_not(self, name: str) -> str | None:
        """Why ``module:qualified.name`` may not be resolved, or None; imports nothing."""
        module, _, qualified = name.partition(":")
        parts = module.split(".")
        words = [*parts, *qualified.split(".")]
        if not all(re.fullmatch(r"\w+", word) for word in words) or any(word.startswith("__") for word in words):
            return "which cannot be found again by its name"
        package = parts[0]
        if package in _LAYERS:
            if _ACTING.intersection(parts) or not re.fullmatch(_LAYERS[package], module):
                return f"which is not among the layers of {package}"
        elif not self.is_users(module):
            trusted = ", ".join([*PACKAGES, *sorted(self._packages or ())])
            return (
                f"which is not from a trusted package ({trusted}). If your model needs it and you trust it, name its "
                f"package in the environment variable {TRUST_VARIABLE}"
            )
        return None

    def resolve(self, name: str) -> Any:
        """What ``module:qualified.name`` names: a class or a function that is defined there.

        Raises
        ------
        DataError
            If it may not be named, cannot be imported or is something else.
        """
        if reason := self.why_not(name):
            raise DataError(f"The model names {name!r}, {reason}.")
        module, _, qualified = name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in qualified.split("."):
                found = vars(found)[part]
        except (Exception, SystemExit) as error:
            raise DataError(
                f"The model names {name!r}, which cannot be imported: {type(error).__name__}: {error}."
            ) from error
        own = (getattr(found, "__module__", None), getattr(found, "__qualname__", None)) == (module, qualified)
        if not own or not isinstance(found, type | types.FunctionType):
            raise DataError(f"The model names {name!r}, which is not defined there.")
        return found

    def function(self, name: str) -> Callable[..., Any] | None:
        """A function that a module may keep or a graph may call: a listed one, or one of the user's own package."""
        if (listed := operators.function(name)) is not None:
            return listed
        if not self.is_users(name.partition(":")[0]):
            return None
        found = self.resolve(name)
        return found if isinstance(found, types.FunctionType) else None

    def is_value(self, kind: Any) -> bool:
        """Whether a module may keep the class itself, as ``norm_layer=nn.LayerNorm``, and so may call it."""
        if not isinstance(kind, type) or not issubclass(kind, nn.Module) or why_no_module(kind):
            return False
        package = kind.__module__.partition(".")[0]
        return package in ("torch", "torchvision", "timm") or self.is_users(kind.__module__)

    def why_no_object(self, kind: type) -> str | None:
        """Why an instance of the class cannot be stored as its attributes, or None."""
        if issubclass(kind, nn.Module | torch.Tensor | type):
            return "is not plain data"
        # Only such instances are an empty one with attributes: no bytes of a C type behind them.
        if any(base.__module__ == "builtins" and base is not object for base in kind.__mro__):
            return "is not plain data"
        if hasattr(kind, "__del__"):
            return "acts when it is deleted"
        if _has_slots(kind):
            return "has __slots__"
        special = [name for name in _PICKLING if getattr(kind, name, None) is not getattr(object, name, None)]
        if special:
            return f"has a state of its own ({special[0]})"
        package = kind.__module__.partition(".")[0]
        if dataclasses.is_dataclass(kind) or package in ("torchvision", "timm") or self.is_users(kind.__module__):
            return None
        if any((base.__module__, base.__qualname__) in _CONFIGURATIONS for base in kind.__mro__):
            return None
        return "is neither a dataclass nor a configuration"


def why_no_module(kind: type) -> str | None:
    """Why an instance of a module class cannot be stored, or None."""
    if issubclass(kind, fx.GraphModule):
        return "is a graph, which is stored by its nodes"
    if issubclass(kind, torch.jit.ScriptModule):
        return "is a TorchScript module; give the module that it was made from"
    if hasattr(kind, "__del__"):
        return "acts when it is deleted"
    if kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__:
        return "has a pickled form of its own (__reduce__)"
    return "has __slots__" if _has_slots(kind) else None


def _has_slots(kind: type) -> bool:
    return any(vars(base).get("__slots__") for base in kind.__mro__)


def is_enumeration(kind: Any) -> bool:
    """Whether a class is an enumeration."""
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def is_named_tuple(kind: Any) -> bool:
    """Whether a class is a named tuple: its instances are tuples and nothing else."""
    return isinstance(kind, type) and kind.__bases__ == (tuple,) and isinstance(getattr(kind, "_fields", None), tuple)


def name_of(value: Any) -> str:
    """``module:qualified.name`` of a class or function."""
    return f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
