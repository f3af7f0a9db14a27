"""A module made from its description: names first, then what each part says, then the parts.

Nothing is made before every name was held against the trusted packages and every part against what its class may be.
No class is called: a module is an empty instance with its attributes put in, as unpickling does it.
"""

from __future__ import annotations

import collections
import functools
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from harness.errors import DataError
from harness.modelfile import graphs, operators
from harness.modelfile.names import Trust, is_enumeration, is_named_tuple, why_no_module
from harness.modelfile.tensors import DATA_TYPES, TensorReader
from harness.modelfile.writer import FRESH, GENERATED, METHODS, PARTS, is_callable

_SEQUENCES = ("list", "set", "deque")
_MAPPINGS = ("dict", "ordered")
_DEVICE = re.compile(r"[a-z]+(:\d{1,3})?")
_SCALAR = re.compile(r"[<|][biufc]\d{1,2}")


class Reader:
    """Makes one model.

    Parameters
    ----------
    header : mapping
        The description.
    content : memoryview
        The tensors' bytes; writable, kept by the tensors.
    trust : Trust
        What may be named.
    """

    def __init__(self, header: Mapping[str, Any], content: memoryview, trust: Trust) -> None:
        self._header = header
        self._trust = trust
        for name in (*header["classes"], *header["functions"]):
            if operators.function(name) is None and (reason := trust.why_not(name)):
                raise DataError(f"The model names {name!r}, {reason}.")
        self._classes = [trust.resolve(name) for name in header["classes"]]
        self._functions = [self._listed(name) for name in header["functions"]]
        self._entries: list[Mapping[str, Any]] = header["objects"]
        for entry in self._entries:
            self._check(entry)
        self._tensors = TensorReader(header["tensors"], header["storages"], content)
        self._made: dict[int, Any] = {}
        self._open: set[int] = set()

    def model(self) -> nn.Module:
        """The model."""
        return self._module(self._header["root"])

    # ---- checking

    def _listed(self, name: str) -> Any:
        found = self._trust.function(name)
        if found is None or (operators.function(name) is not None and not operators.is_kept(name)):
            raise DataError(f"The model names {name!r}, which is not on the list of functions that a model may keep.")
        return found

    def _check(self, entry: Mapping[str, Any]) -> None:
        kind = entry["kind"]
        if kind in _SEQUENCES or kind in _MAPPINGS or kind == "array":
            return
        if kind in ("module", "graph"):
            self._check_parts(entry)
        if kind == "graph":
            graphs.check(entry, self._trust)
            return
        if kind not in ("module", "object"):
            raise DataError(f"The model file holds a part of unknown kind {kind!r}.")
        name = self._header["classes"][entry["class"]]
        found = self._classes[entry["class"]]
        if kind == "module":
            if not (isinstance(found, type) and issubclass(found, nn.Module)):
                raise DataError(f"The model names {name!r}, which is not a class of modules.")
            reason = why_no_module(found)
        else:
            reason = self._trust.why_no_object(found) if isinstance(found, type) else "is not a class"
            self._check_state(entry, ())
        if reason:
            raise DataError(f"The model names {name!r}, which {reason}.")

    def _check_parts(self, entry: Mapping[str, Any]) -> None:
        for part in PARTS:
            for name, _ in entry[part]:
                if type(name) is not str or "." in name or not name:
                    raise DataError(f"The model file names a part {name!r}.")
        if type(entry["training"]) is not bool or not {name for name, _ in entry["_buffers"]}.issuperset(
            entry["transient"]
        ):
            raise DataError("The model file says neither how a module is used nor which of its buffers are kept.")
        self._check_state(entry, FRESH | GENERATED)

    def _check_state(self, entry: Mapping[str, Any], barred: Any) -> None:
        for name, item in entry["state"]:
            if type(name) is not str or name.startswith("__") or name in barred:
                raise DataError(f"The model file sets the attribute {name!r}, which is the class's own.")
            if entry["kind"] != "object" and name in METHODS and is_callable(item, self._entries):
                raise DataError(f"The model file replaces the method {name!r} of a module.")

    # ---- making

    def _value(self, item: Any) -> Any:
        if item is None or isinstance(item, bool | int | str):
            return item
        ((kind, content),) = item.items()
        match kind:
            case "float":
                return float(content)
            case "tensor":
                return self._tensors.get(content)
            case "ref":
                return self._object(content)
            case "enum":
                found = self._classes[content[0]]
                if not is_enumeration(found):
                    raise DataError("The model file reads a member of what is no enumeration.")
                return found.__members__[content[1]]
            case "tuple" | "size" | "frozenset":
                make = {"tuple": tuple, "size": torch.Size, "frozenset": frozenset}[kind]
                return make(self._value(part) for part in content)
            case "named":
                found = self._classes[content[0]]
                if not is_named_tuple(found) or len(found._fields) != len(content[1]):
                    raise DataError("The model file makes a named tuple of what is none.")
                return tuple.__new__(found, [self._value(part) for part in content[1]])
            case "slice":
                return slice(*(self._value(part) for part in content))
            case "range":
                return range(*content)
            case "ellipsis":
                return ...
            case "dtype":
                return DATA_TYPES[content]
            case "layout" | "memory_format":
                found = getattr(torch, content) if re.fullmatch(r"[a-z_0-9]+", content) else None
                if not isinstance(found, torch.layout | torch.memory_format):
                    raise DataError(f"The model file holds the {kind} {content!r}.")
                return found
            case "device":
                if not _DEVICE.fullmatch(content):
                    raise DataError(f"The model file holds the device {content!r}.")
                return torch.device(content)
            case "complex":
                return complex(float(content[0]), float(content[1]))
            case "bytes":
                return bytes.fromhex(content)
            case "scalar":
                if not _SCALAR.fullmatch(content[0]):
                    raise DataError(f"The model file holds a number of type {content[0]!r}.")
                return np.frombuffer(bytes.fromhex(content[1]), content[0])[0]
            case "function":
                return self._functions[content]
            case "class":
                found = self._classes[content]
                if not self._trust.is_value(found):
                    raise DataError("The model file keeps a class that is not one of layers.")
                return found
            case "partial":
                function, arguments, keywords = content
                if not isinstance(function, dict) or not set(function) <= {"function", "class"}:
                    raise DataError("The model file completes what is neither a function nor a class of layers.")
                return functools.partial(self._value(function), *self._value(arguments), **self._value(keywords))
        raise DataError(f"The model file holds a value of unknown kind {kind!r}.")

    def _object(self, number: int) -> Any:
        if type(number) is not int or not 0 <= number < len(self._entries):
            raise DataError("The model file refers to a part that it does not hold.")
        if number in self._made:
            return self._made[number]
        entry = self._entries[number]
        kind = entry["kind"]
        if kind == "graph":
            if number in self._open:
                raise DataError("The model file holds a graph that contains itself.")
            self._open.add(number)
            self._made[number] = self._graph(entry)
            self._open.discard(number)
            return self._made[number]
        made: Any
        if kind == "module":
            made = object.__new__(self._classes[entry["class"]])
            nn.Module.__init__(made)
            self._made[number] = made
            self._open.add(number)
            self._fill(made, entry)
            self._open.discard(number)
        elif kind == "object":
            made = self._made[number] = object.__new__(self._classes[entry["class"]])
            vars(made).update((name, self._value(item)) for name, item in entry["state"])
        elif kind == "array":
            made = self._made[number] = self._tensors.get(entry["tensor"]).detach().numpy().reshape(entry["shape"])
        elif kind in _MAPPINGS:
            made = self._made[number] = {} if kind == "dict" else OrderedDict()
            made.update((self._value(key), self._value(item)) for key, item in entry["items"])
        elif kind == "set":
            made = self._made[number] = set()
            made.update(self._value(item) for item in entry["items"])
        else:
            made = self._made[number] = [] if kind == "list" else collections.deque(maxlen=entry["longest"])
            made.extend(self._value(item) for item in entry["items"])
        return made

    def _module(self, number: Any) -> nn.Module:
        if number in self._open:
            raise DataError("The model file holds a module that is a part of itself.")
        made = self._object(number)
        if not isinstance(made, nn.Module):
            raise DataError("The model file has something else in a module's place.")
        return made

    def _parts(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        parameters = {name: self._tensor(number) for name, number in entry["_parameters"]}
        if not all(value is None or isinstance(value, nn.Parameter) for value in parameters.values()):
            raise DataError("The model file has a tensor in a parameter's place.")
        return {
            "training": entry["training"],
            "_parameters": parameters,
            "_buffers": {name: self._tensor(number) for name, number in entry["_buffers"]},
            "_modules": {name: None if n is None else self._module(n) for name, n in entry["_modules"]},
            "_non_persistent_buffers_set": set(entry["transient"]),
        }

    def _tensor(self, number: Any) -> torch.Tensor | None:
        return None if number is None else self._tensors.get(number)

    def _fill(self, made: nn.Module, entry: Mapping[str, Any]) -> None:
        state = {name: self._value(item) for name, item in entry["state"]}
        made.__setstate__({**vars(made), **self._parts(entry), **state})  # type: ignore[no-untyped-call]

    def _graph(self, entry: Mapping[str, Any]) -> nn.Module:
        parts = self._parts(entry)
        state = {name: self._value(item) for name, item in entry["state"]}
        root = nn.Module()
        vars(root).update({**parts, **state})
        made = graphs.build(entry, root, entry["name"], self._trust)
        # fx keeps the parts that the graph uses, by first use; all of them in their order is what was stored.
        vars(made).update({**parts, **state})
        meta = self._value(entry["meta"])
        if not isinstance(meta, dict) or not math.isfinite(len(meta)):
            raise DataError("The model file's graph has notes that are no dict.")
        made.meta.update(meta)
        return made
