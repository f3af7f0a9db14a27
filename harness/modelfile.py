"""A model in one file, without pickle: loading one runs no code that the file brings along.

Layout: 8 bytes magic, 8 bytes little-endian length, a canonical JSON header, then the tensors' bytes, each at a
multiple of 64. The header describes modules by class name and attributes; a traced ``fx.GraphModule`` is described by
its nodes, and its functions by name. Equal models give equal bytes.

Classes come from ``torch.nn``, ``torchvision``, ``harness`` and ``methods``, and must be ``nn.Module`` subclasses
(attributes may also be dataclasses and enumerations from there); other packages must be named by the caller (``allow``)
or in the environment variable ``ASSAY_TRUSTED_MODULES`` (comma-separated top-level packages), which a process inherits
from the one that knows the user's model.
"""

from __future__ import annotations

import builtins
import dataclasses
import enum
import functools
import importlib
import inspect
import json
import math
import operator
import os
import struct
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from harness.canonical import dumps
from harness.errors import DataError

MAGIC = b"ASSAYNN1"
ALIGNMENT = 64
TRUSTED = ("torch.nn", "torchvision", "harness", "methods")
TRUST_VARIABLE = "ASSAY_TRUSTED_MODULES"

_OPERATORS = frozenset(operator.__all__) - {"attrgetter", "call", "itemgetter", "methodcaller"}
_BUILTINS = frozenset({"abs", "bool", "float", "getattr", "int", "len", "max", "min", "round", "sum"})
# Tensor methods that leave the world of tensors, or touch memory that is not theirs.
_BARRED_METHODS = frozenset(
    {"apply_", "backward", "data_ptr", "map_", "map2_", "module_load", "numpy", "register_hook",
     "register_post_accumulate_grad_hook", "set_", "share_memory_", "storage", "untyped_storage"}
)  # fmt: skip
_BARRED_FUNCTIONS = frozenset({"from_file", "from_numpy", "frombuffer"})
_DATA_TYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def save(model: nn.Module, path: Path) -> Path:
    """Write ``model`` to ``path``.

    Parameters
    ----------
    model : nn.Module
        Parameters and buffers may be shared between modules; sharing is kept.
    path : Path
        The file.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    DataError
        If an attribute cannot be described as data (a hook, a lambda, a class defined inside a function); the message
        names it.
    """
    writer = _Writer()
    root = writer.value(model, type(model).__name__)
    tensors, offset, chunks = [], 0, []
    for tensor in writer.tensors:
        raw = _raw(tensor)
        padding = -offset % ALIGNMENT
        offset += padding
        tensors.append(
            [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, _is_channels_last(tensor)]
        )
        offset += len(raw)
        chunks += [bytes(padding), raw]
    header = dumps({"modules": writer.modules, "root": root, "tensors": tensors, "bytes": offset}).encode()
    header += b" " * (-(len(MAGIC) + 8 + len(header)) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<Q", len(header)) + header)
        stream.writelines(chunks)
    return path


def load(path: Path, *, allow: Sequence[str] = ()) -> nn.Module:
    """Read a model written by :func:`save`.

    Parameters
    ----------
    path : Path
        The file.
    allow : sequence of str
        Further top-level packages whose module classes and functions may be used.

    Raises
    ------
    DataError
        If the file is missing, truncated, not a model file, or names something that is not allowed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Model file {path}: {error.strerror}.") from error
    start = len(MAGIC) + 8
    if content[: len(MAGIC)] != MAGIC or len(content) < start:
        raise DataError(f"{path} is not a model file (it does not begin with {MAGIC.decode()}).")
    (length,) = struct.unpack("<Q", content[len(MAGIC) : start])
    try:
        header = json.loads(content[start : start + length])
        if len(content) != start + length + header["bytes"]:
            raise DataError(f"Model file {path} is truncated or damaged; delete it, and it is made again.")
        reader = _Reader(header, memoryview(content)[start + length :], (*TRUSTED, *allow, *trusted_by_environment()))
        model = reader.value(header["root"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as error:
        raise DataError(
            f"Model file {path} is damaged ({type(error).__name__}: {error}); delete it, and it is made again."
        ) from error
    if not isinstance(model, nn.Module):
        raise DataError(f"Model file {path} holds no model.")
    return model


def trusted_by_environment() -> tuple[str, ...]:
    """Top-level packages named in ``ASSAY_TRUSTED_MODULES``."""
    return tuple(name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip())


def _raw(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu()
    if _is_channels_last(plain):
        plain = plain.permute(0, 2, 3, 1)
    return plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


@functools.cache
def _fresh_state() -> dict[str, Any]:
    return dict(vars(nn.Module()))


@functools.cache
def _tensor_functions() -> dict[str, Callable[..., Any]]:
    """The functions a graph may call, by name: operators, a few builtins, mathematics, tensor functions."""
    found: dict[str, Callable[..., Any]] = {f"operator:{name}": getattr(operator, name) for name in sorted(_OPERATORS)}
    found |= {f"builtins:{name}": getattr(builtins, name) for name in sorted(_BUILTINS)}
    found |= {f"math:{name}": value for name, value in sorted(vars(math).items()) if callable(value)}
    kernels = vars(type(torch._C._VariableFunctions)).keys() | set(dir(torch._C._VariableFunctions))
    for name, value in sorted(vars(torch).items()):
        own = getattr(value, "__module__", None) == "torch.functional" or name in kernels or name == "_assert"
        if (
            own
            and _is_function(value)
            and name not in _BARRED_FUNCTIONS
            and (name == "_assert" or not name.startswith("_"))
        ):
            found[f"torch:{name}"] = value
    for name, value in sorted(vars(F).items()):
        # Some are builtins of torch._C._nn, some dispatchers made in torch._jit_internal.
        if (
            _is_function(value)
            and not name.startswith("_")
            and name not in ("boolean_dispatch", "handle_torch_function")
        ):
            found[f"torch.nn.functional:{name}"] = value
    return found


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.BuiltinFunctionType)


@functools.cache
def _tensor_function_names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(_tensor_functions().items())}


class _Writer:
    """Turns a module into JSON values and a list of tensors."""

    def __init__(self) -> None:
        self.modules: list[Any] = []
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool) or type(value) in (int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, nn.Module):
            return {"module": self._module(value, where)}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, enum.Enum):
            return {"enum": [_qualified(type(value), where), value.name]}
        kind = type(value)
        if kind is list:
            return [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if kind in (tuple, torch.Size, fx.immutable_collections.immutable_list):
            name = "tuple" if kind is tuple else "size" if kind is torch.Size else "list"
            return {name: [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict, fx.immutable_collections.immutable_dict):
            items = [[self.value(k, where), self.value(v, f"{where}.{k}")] for k, v in value.items()]
            return {"ordered" if kind is OrderedDict else "dict": items}
        if kind in (set, frozenset):
            return {kind.__name__: sorted((self.value(item, where) for item in value), key=dumps)}
        if kind is slice:
            return {"slice": [self.value(part, where) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": 0}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind is functools.partial:
            return {"partial": [self.value(part, where) for part in (value.func, list(value.args), value.keywords)]}
        if _is_function(value):
            return {"function": _function_name(value, where)}
        if isinstance(value, type):
            return {"class": _qualified(value, where)}
        if dataclasses.is_dataclass(value):
            fields = [
                [f.name, self.value(getattr(value, f.name), f"{where}.{f.name}")] for f in dataclasses.fields(value)
            ]
            return {"dataclass": [_qualified(kind, where), fields]}
        raise DataError(
            f"The model cannot be saved: {where} is a {kind.__module__}.{kind.__qualname__}, which is not plain data."
        )

    def _tensor(self, tensor: Tensor, where: str) -> Any:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            raise DataError(
                f"The model cannot be saved: {where} is a {type(tensor).__name__} with layout {tensor.layout}."
            )
        if id(tensor) not in self._seen:
            kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
            self._seen[id(tensor)] = {kind: [len(self.tensors), tensor.requires_grad]}
            self.tensors.append(tensor)
        return self._seen[id(tensor)]

    def _module(self, module: nn.Module, where: str) -> int:
        if id(module) in self._open:
            raise DataError(f"The model cannot be saved: {where} refers back to a module that contains it.")
        if id(module) not in self._seen:
            self._open.add(id(module))
            described = self._graph(module, where) if isinstance(module, fx.GraphModule) else self._plain(module, where)
            self._open.discard(id(module))
            self._seen[id(module)] = len(self.modules)
            self.modules.append(described)
        number: int = self._seen[id(module)]
        return number

    def _plain(self, module: nn.Module, where: str) -> Any:
        state = module.__getstate__()  # type: ignore[no-untyped-call]
        if not isinstance(state, dict):
            raise DataError(f"The model cannot be saved: {where} has __slots__ or a state of its own.")
        fresh = _fresh_state()
        changed = {key: item for key, item in state.items() if key not in fresh or not _same(item, fresh[key])}
        attributes = [[key, self.value(item, f"{where}.{key}")] for key, item in changed.items()]
        return {"class": _qualified(type(module), where), "state": attributes}

    def _graph(self, module: fx.GraphModule, where: str) -> Any:
        def argument(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return {"node": value.name}
            if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                return {"list" if isinstance(value, list) else "tuple": [argument(item) for item in value]}
            if isinstance(value, dict):
                return {"dict": [[key, argument(item)] for key, item in value.items()]}
            if isinstance(value, slice):
                return {"slice": [argument(part) for part in (value.start, value.stop, value.step)]}
            return self.value(value, where)

        nodes = []
        for node in module.graph.nodes:
            target = self.value(node.target, f"{where}: {node.name}")
            nodes.append([node.op, node.name, target, [argument(a) for a in node.args], argument(dict(node.kwargs))])
        content = {key: self.value(getattr(module, key), where) for key in ("_parameters", "_buffers", "_modules")}
        meta = {key: value for key, value in module.meta.items() if isinstance(key, str)}
        return {
            "graph": nodes,
            "name": type(module).__name__,
            "training": module.training,
            "meta": self.value(meta, f"{where}.meta"),
            **content,
        }


def _same(value: Any, default: Any) -> bool:
    """Whether an attribute is as ``nn.Module.__init__`` leaves it."""
    return type(value) is type(default) and (value is default or (not isinstance(value, Tensor) and value == default))


def _qualified(kind: type, where: str) -> str:
    name = f"{kind.__module__}:{kind.__qualname__}"
    found: Any = importlib.import_module(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not kind:
        raise DataError(f"The model cannot be saved: the class {name} of {where} cannot be found again by its name.")
    return name


def _function_name(function: Callable[..., Any], where: str) -> str:
    if known := _tensor_function_names().get(id(function)):
        return known
    module = inspect.getmodule(function)
    name = getattr(function, "__qualname__", "")
    if module is None or getattr(module, name, None) is not function:
        raise DataError(
            f"The model cannot be saved: the function {name or function!r} of {where} has no name to find it by."
        )
    return f"{module.__name__}:{name}"


class _Reader:
    """Turns JSON values back; the only place that imports what a file names."""

    def __init__(self, header: Mapping[str, Any], data: memoryview, trusted: Sequence[str]) -> None:
        self._header = header
        self._data = data
        self._trusted = trusted
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._open: set[int] = set()

    def value(self, item: Any) -> Any:
        if isinstance(item, list):
            return [self.value(part) for part in item]
        if not isinstance(item, dict):
            return item
        ((kind, content),) = item.items()
        match kind:
            case "float":
                return float(content)
            case "module":
                return self._module(content)
            case "tensor" | "parameter":
                return self._tensor(kind, *content)
            case "tuple" | "size" | "list" | "set" | "frozenset":
                make = {"tuple": tuple, "size": torch.Size, "list": list, "set": set, "frozenset": frozenset}[kind]
                return make(self.value(part) for part in content)
            case "dict" | "ordered":
                pairs = [(self.value(key), self.value(part)) for key, part in content]
                return dict(pairs) if kind == "dict" else OrderedDict(pairs)
            case "slice":
                return slice(*(self.value(part) for part in content))
            case "ellipsis":
                return ...
            case "dtype":
                return _DATA_TYPES[content]
            case "device":
                return torch.device(content)
            case "function":
                return self._function(content)
            case "class":
                return self._class(content, nn.Module)
            case "partial":
                function, arguments, keywords = (self.value(part) for part in content)
                return functools.partial(function, *arguments, **keywords)
            case "enum":
                return self._class(content[0], enum.Enum)[content[1]]  # type: ignore[index]
            case "dataclass":
                return self._dataclass(*content)
        raise DataError(f"The model file holds a value of unknown kind {kind!r}.")

    def _tensor(self, kind: str, number: int, requires_grad: bool) -> Tensor:
        if (number, kind) not in self._tensors:
            dtype_name, shape, offset, channels_last = self._header["tensors"][number]
            dtype = _DATA_TYPES[dtype_name]
            size = math.prod(shape) * dtype.itemsize
            raw = bytearray(self._data[offset : offset + size])
            flat = torch.frombuffer(raw, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            if channels_last:
                n, c, h, w = shape
                tensor = flat.reshape(n, h, w, c).permute(0, 3, 1, 2)
            else:
                tensor = flat.reshape(shape)
            made = nn.Parameter(tensor, requires_grad) if kind == "parameter" else tensor.requires_grad_(requires_grad)
            self._tensors[number, kind] = made
        return self._tensors[number, kind]

    def _module(self, number: int) -> nn.Module:
        if number in self._open:
            raise DataError("The model file holds a module that contains itself.")
        if number not in self._modules:
            self._open.add(number)
            described = self._header["modules"][number]
            self._modules[number] = self._graph(described) if "graph" in described else self._plain(described)
            self._open.discard(number)
        return self._modules[number]

    def _plain(self, described: Mapping[str, Any]) -> nn.Module:
        kind = self._class(described["class"], nn.Module)
        module: nn.Module = object.__new__(kind)
        nn.Module.__init__(module)
        state = {key: self.value(item) for key, item in described["state"]}
        module.__setstate__({**vars(module), **state})  # type: ignore[no-untyped-call]
        return module

    def _graph(self, described: Mapping[str, Any]) -> nn.Module:
        root = nn.Module()
        for key in ("_parameters", "_buffers", "_modules"):
            vars(root)[key] = self.value(described[key])
        graph = fx.Graph()
        made: dict[str, fx.Node] = {}

        def argument(item: Any) -> Any:
            if isinstance(item, dict):
                ((kind, content),) = item.items()
                if kind == "node":
                    return made[content]
                if kind in ("list", "tuple"):
                    return (list if kind == "list" else tuple)(argument(part) for part in content)
                if kind == "dict":
                    return {key: argument(part) for key, part in content}
                if kind == "slice":
                    return slice(*(argument(part) for part in content))
            return self.value(item)

        for op, name, target, args, kwargs in described["graph"]:
            function = self.value(target)
            arguments, keywords = tuple(argument(item) for item in args), argument(kwargs)
            _check_node(op, name, function, arguments, keywords)
            made[name] = graph.create_node(op, function, arguments, keywords, name)
        name = described["name"]
        module = fx.GraphModule(root, graph, name if str(name).isidentifier() else "GraphModule")
        # GraphModule sorts its parts by first use; keep the order of the file, so that saving again gives the same
        # bytes.
        vars(module).update({key: vars(root)[key] for key in ("_parameters", "_buffers", "_modules")})
        module.meta.update(self.value(described["meta"]))
        # Set on this module alone: the parts carry their own.
        module.training = bool(described["training"])
        return module

    def _function(self, name: str) -> Callable[..., Any]:
        if name in _tensor_functions():
            return _tensor_functions()[name]
        function = self._named(name)
        if not isinstance(function, types.FunctionType) or function.__module__.startswith("torch."):
            raise DataError(f"The model file names {name!r}, which is not a function that a model may call.")
        return function

    def _class(self, name: str, base: type) -> type:
        kind = self._named(name)
        if not (isinstance(kind, type) and issubclass(kind, base)) or issubclass(kind, fx.GraphModule):
            raise DataError(
                f"The model file names {name!r}, which is not a {base.__name__} class that a model may hold."
            )
        return kind

    def _dataclass(self, name: str, fields: Sequence[tuple[str, Any]]) -> Any:
        kind = self._named(name)
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise DataError(f"The model file names {name!r}, which is not a dataclass.")
        made: Any = object.__new__(kind)
        for key, item in fields:
            object.__setattr__(made, key, self.value(item))
        return made

    def _named(self, name: str) -> Any:
        module_name, _, qualified = name.partition(":")
        if not any(module_name == package or module_name.startswith(f"{package}.") for package in self._trusted):
            raise DataError(
                f"The model file names {name!r}, which is not from an allowed package "
                f"({', '.join(self._trusted)}). If you trust it, "
                f"name its package in the environment variable {TRUST_VARIABLE}."
            )
        try:
            found: Any = importlib.import_module(module_name)
            for part in qualified.split("."):
                found = vars(found)[part] if not part.startswith("__") else None
        except (ImportError, KeyError, TypeError) as error:
            raise DataError(f"The model file names {name!r}, which cannot be imported: {error}.") from error
        if getattr(found, "__module__", None) != module_name:
            raise DataError(f"The model file names {name!r}, which is not defined there.")
        return found


def _check_node(op: str, name: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse graph nodes whose generated code could do more than call tensor functions and the model's own parts."""
    words = [name, *kwargs]
    if op in ("placeholder", "get_attr", "call_module"):
        words += (
            str(target).lstrip("*").split(".")
            if op == "placeholder"
            else [p for p in str(target).split(".") if not p.isdigit()]
        )
    elif op == "call_method":
        if (
            target.startswith("_")
            or target in _BARRED_METHODS
            or not (hasattr(Tensor, target) or hasattr(torch.Size, target))
        ):
            raise DataError(f"The model file's graph calls the method {target!r}, which is not a tensor's.")
    elif op == "call_function":
        if target is getattr and not (
            len(args) == 2 and isinstance(args[1], str) and args[1].isidentifier() and args[1][0] != "_"
        ):
            raise DataError("The model file's graph reads a private attribute.")
    elif op != "output":
        raise DataError(f"The model file's graph has a node of unknown kind {op!r}.")
    for word in words:
        if not word.isidentifier():
            raise DataError(f"The model file's graph has the name {word!r}, which is not an identifier.")
