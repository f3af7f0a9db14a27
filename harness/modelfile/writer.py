"""A module described as JSON values and tensors.

Everything that can be shared or refer back (modules, lists, dicts, objects) has a number in one flat table, so that
what was shared is shared again; the order is that in which things are met, so that equal models are described equally.
"""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from harness.errors import DataError
from harness.modelfile import exported, graphs, operators
from harness.modelfile.names import Trust, is_named_tuple, name_of, why_no_module
from harness.modelfile.tensors import TensorWriter

PARTS = ("_parameters", "_buffers", "_modules")
FRESH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

# They act when a checkpoint is read into the model or when it is saved by its owner, never in its forward pass; a model
# that is read back without them refuses a checkpoint that they would have renamed.
_LOADING_HOOKS = frozenset({"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"})
# What fx makes again when a graph module is built.
GENERATED = frozenset(
    operators.words(
        """
    _code _create_node_hooks _deepcopy_hooks _erase_node_hooks _graph _graphmodule_cls_name _in_spec _lineno_map
    _out_spec _prologue_start _replace_hooks _tracer_cls _tracer_extras meta range_constraints shape_env
    validate_inputs
    """
    )
)
# transformers keeps the hash of a text, which differs in each process, to notice later changes.
_OF_THIS_PROCESS = {
    "transformers.generation.configuration_utils:GenerationConfig": frozenset({"_original_object_hash"}),
}
METHODS = frozenset(name for name in dir(nn.Module) if callable(getattr(nn.Module, name)))


class Writer:
    """Describes one model. :attr:`header` and :attr:`chunks` are complete after :meth:`model`."""

    def __init__(self) -> None:
        self._classes: dict[str, int] = {}
        self._functions: dict[str, int] = {}
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []
        self._open: set[int] = set()
        self._tensors = TensorWriter()
        self._trust = Trust(None)
        self.header: dict[str, Any] = {}
        self.chunks: list[memoryview] = []

    def model(self, model: nn.Module) -> None:
        """Describe ``model``.

        Raises
        ------
        DataError
            If part of it is not data; the message names the attribute.
        """
        root = self._module(model, type(model).__name__, child=False)
        tensors, storages, self.chunks = self._tensors.finish()
        self.header = {
            "classes": list(self._classes),
            "functions": list(self._functions),
            "objects": self._objects,
            "tensors": tensors,
            "storages": storages,
            "root": root,
            "bytes": sum(map(len, self.chunks)),
        }

    def value(self, value: Any, where: str) -> Any:
        """The JSON form of a value."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            if abs(value) >= 2**1024:
                raise _refusal(where, "is an integer of more than 1024 bits")
            return value
        if kind is float:
            return {"float": repr(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._tensors.add(value, where)}
        if isinstance(value, nn.Module):
            return {"ref": self._module(value, where, child=False)}
        if isinstance(value, enum.Enum):
            return {"enum": [self._class(kind, where), value.name]}
        if kind in (tuple, torch.Size, frozenset):
            if kind is frozenset:
                return {"frozenset": self._members(value, where)}
            items = [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return {"tuple" if kind is tuple else "size": items}
        if is_named_tuple(kind):
            parts = [self.value(item, f"{where}.{name}") for name, item in zip(kind._fields, value, strict=True)]
            return {"named": [self._class(kind, where), parts]}
        if kind is slice:
            return {"slice": [self.value(part, where) for part in (value.start, value.stop, value.step)]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if value is Ellipsis:
            return {"ellipsis": 0}
        if kind in (torch.dtype, torch.layout, torch.memory_format):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind is complex:
            return {"complex": [repr(value.real), repr(value.imag)]}
        if kind is bytes:
            return {"bytes": value.hex()}
        if isinstance(value, np.generic) and value.dtype.kind in "biufc":
            return {
                "scalar": [
                    value.dtype.newbyteorder("<").str,
                    value.astype(value.dtype.newbyteorder("<")).tobytes().hex(),
                ]
            }
        if kind is functools.partial:
            return {
                "partial": [self.value(part, where) for part in (value.func, list(value.args), dict(value.keywords))]
            }
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType) or operators.function_name(value):
            return {"function": self._function(value, where)}
        if isinstance(value, type):
            number = self._class(value, where)
            if not self._trust.is_value(value):
                raise _refusal(where, f"is the class {name_of(value)}; only classes of layers can be kept")
            return {"class": number}
        return {"ref": self._object(value, where)}

    # ---- things with a number

    def _reserve(self, value: Any) -> int:
        number = len(self._objects)
        self._numbers[id(value)] = number
        self._kept.append(value)  # an id is only its object's while the object lives
        self._objects.append(None)
        return number

    def _object(self, value: Any, where: str) -> int:
        if id(value) in self._numbers:
            return self._numbers[id(value)]
        kind = type(value)
        number = self._reserve(value)
        entry: dict[str, Any]
        if kind is list:
            entry = {"kind": "list", "items": [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        elif kind in (dict, OrderedDict, fx.immutable_collections.immutable_dict):
            pairs = [[self.value(key, where), self.value(item, f"{where}.{key}")] for key, item in value.items()]
            entry = {"kind": "ordered" if kind is OrderedDict else "dict", "items": pairs}
        elif kind is fx.immutable_collections.immutable_list:
            entry = {"kind": "list", "items": [self.value(item, where) for item in value]}
        elif kind is set:
            entry = {"kind": "set", "items": self._members(value, where)}
        elif kind is collections.deque:
            items = [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]
            entry = {"kind": "deque", "items": items, "longest": value.maxlen}
        elif kind is np.ndarray:
            if value.dtype.kind not in "biufc" or not value.dtype.isnative:
                raise _refusal(where, f"is an array of {value.dtype}")
            flat = torch.from_numpy(np.array(value, order="C", copy=True))
            entry = {"kind": "array", "tensor": self._tensors.add(flat, where), "shape": list(value.shape)}
        else:
            entry = self._plain(value, where)
        self._objects[number] = entry
        return number

    def _members(self, value: Any, where: str) -> list[Any]:
        """The members of a set in an order that does not depend on the process."""
        for item in value:
            if not isinstance(item, str | int | float | bytes | tuple | enum.Enum | torch.dtype | None):
                raise _refusal(where, f"is a set that holds a {type(item).__name__}, which has no order")
        return [self.value(item, where) for item in sorted(value, key=lambda item: (type(item).__name__, repr(item)))]

    def _plain(self, value: Any, where: str) -> dict[str, Any]:
        kind = type(value)
        if isinstance(value, types.MethodType):
            raise _refusal(where, f"is the bound method {value.__qualname__}")
        if reason := self._trust.why_no_object(kind):
            raise _refusal(where, f"is a {kind.__module__}.{kind.__qualname__}, which {reason}")
        number = self._class(kind, where)
        try:
            object.__new__(kind)
        except TypeError as error:
            raise _refusal(where, f"is a {kind.__module__}.{kind.__qualname__}, which is not plain data") from error
        dropped = _OF_THIS_PROCESS.get(name_of(kind), frozenset())
        state = {key: item for key, item in vars(value).items() if key not in dropped}
        return {"kind": "object", "class": number, "state": self._state(state, where)}

    def _state(self, state: dict[Any, Any], where: str) -> list[Any]:
        pairs = []
        # Libraries set some attributes in the order of a set, which differs between processes.
        for key, item in sorted(state.items(), key=lambda pair: str(pair[0])):
            if type(key) is not str or key.startswith("__"):
                raise _refusal(f"{where}.{key}", "has a name that Python keeps for itself")
            described = self.value(item, f"{where}.{key}")
            pairs.append([key, described])
        return pairs

    def _module(self, module: nn.Module, where: str, *, child: bool) -> int:
        # An attribute may refer back; a child that does makes a model without end.
        if id(module) in self._open and (child or isinstance(module, fx.GraphModule)):
            raise DataError(f"The model cannot be saved: {where} refers back to a module that contains it.")
        if id(module) in self._numbers:
            return self._numbers[id(module)]
        number = self._reserve(module)
        self._open.add(id(module))
        entry = self._graph(module, where) if isinstance(module, fx.GraphModule) else self._layer(module, where)
        self._open.discard(id(module))
        self._objects[number] = entry
        return number

    def _layer(self, module: nn.Module, where: str) -> dict[str, Any]:
        kind = type(module)
        if reason := why_no_module(kind):
            raise _refusal(where, f"is a {kind.__qualname__}, which {reason}")
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        if not isinstance(state, dict) or not FRESH.issuperset(PARTS):
            raise _refusal(where, f"is a {kind.__qualname__}, whose __getstate__ returns no dict")
        number = self._class(kind, where)
        described = {"kind": "module", "class": number, **self._parts(state, where)}
        rest = {key: item for key, item in state.items() if key not in FRESH}
        described["state"] = self._state(rest, where)
        for name, item in described["state"]:
            if name in METHODS and is_callable(item, self._objects):
                raise _refusal(f"{where}.{name}", "replaces a method of every module")
        return described

    def _parts(self, state: dict[str, Any], where: str) -> dict[str, Any]:
        def each(part: str) -> list[Any]:
            pairs = []
            for name, item in state.get(part, {}).items():
                place = f"{where}.{name}"
                if item is None:
                    pairs.append([name, None])
                elif part == "_modules":
                    pairs.append([name, self._module(item, place, child=True)])
                else:
                    pairs.append([name, self._tensors.add(item, place)])
            return pairs

        parts = {part: each(part) for part in PARTS}
        for key, hooks in state.items():
            if key in FRESH and key.endswith("hooks") and hooks and key not in _LOADING_HOOKS:
                raise _refusal(
                    f"{where}.{key}", f"holds a hook ({next(iter(hooks.values()))!r:.80}), which is a function"
                )
        return {
            "training": bool(state.get("training", True)),
            **parts,
            "transient": sorted(state.get("_non_persistent_buffers_set", ())),
        }

    def _graph(self, module: fx.GraphModule, where: str) -> dict[str, Any]:
        name = type(module).__name__
        if exported.is_exported(module):
            settled = exported.settle(module)
            self._kept.append(settled)
            module, name = settled, type(settled).__name__
        meta = {key: item for key, item in module.meta.items() if isinstance(key, str)}
        self._kept.append(meta)
        rest = {key: item for key, item in vars(module).items() if key not in FRESH and key not in GENERATED}
        return {
            "kind": "graph",
            "name": name,
            **self._parts(vars(module), where),
            "state": self._state(rest, where),
            "meta": self.value(meta, f"{where}.meta"),
            **graphs.describe(module.graph, where, self._trust),
        }

    # ---- names

    def _class(self, kind: type, where: str) -> int:
        name = name_of(kind)
        if name not in self._classes:
            self._find(kind, name, where)
            self._classes[name] = len(self._classes)
        return self._classes[name]

    def _function(self, function: Any, where: str) -> int:
        name = operators.function_name(function)
        if name is None:
            name = name_of(function)
            if not self._trust.is_users(name.partition(":")[0]):
                raise _refusal(
                    where, f"is the function {name}, which is not on the list of those that a model may keep"
                )
            self._find(function, name, where)
        elif not operators.is_kept(name):
            raise _refusal(where, f"is the function {name}, which is not on the list of those that a model may keep")
        return self._functions.setdefault(name, len(self._functions))

    def _find(self, value: Any, name: str, where: str) -> None:
        kind = "class" if isinstance(value, type) else "function"
        if reason := self._trust.why_not(name):
            raise _refusal(where, f"needs the {kind} {name}, {reason}")
        try:
            found = self._trust.resolve(name)
        except DataError as error:
            raise _refusal(where, f"needs the {kind} {name}, which cannot be found again by its name") from error
        if found is not value:
            raise _refusal(where, f"needs the {kind} {name}, which cannot be found again by its name: another has it")


def is_callable(item: Any, objects: list[Any]) -> bool:
    """Whether a described value can be called: as an attribute of a module it would hide a method of that name."""
    if not isinstance(item, dict):
        return False
    if "ref" in item:
        entry = objects[item["ref"]]
        return entry is None or entry["kind"] in ("module", "graph", "object")
    return not {"function", "class", "partial"}.isdisjoint(item)


def _refusal(where: str, what: str) -> DataError:
    return DataError(f"The model cannot be saved: {where} {what}.")
