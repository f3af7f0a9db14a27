"""Graphs of ``torch.fx`` as data: nodes, what they call by name, and their arguments.

fx makes a graph's ``forward`` by writing Python source, into which it pastes names, paths and the text form of every
argument, and running it. So nothing gets into a graph from a file but names that are identifiers, paths that exist
among the model's parts, listed functions, and arguments whose text form is their literal. All of it is checked, on
writing too, before fx sees any of it.
"""

from __future__ import annotations

import keyword
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import TreeSpec

from harness.errors import DataError
from harness.modelfile import operators
from harness.modelfile.names import Trust, name_of
from harness.modelfile.tensors import DATA_TYPES

_OPS = frozenset({"placeholder", "get_attr", "call_function", "call_method", "call_module", "output"})
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
_EQUATION = re.compile(r"[A-Za-z.,\-> ]{1,200}")
_LEAF = "leaf"
_CONTAINERS: dict[str, type] = {"tuple": tuple, "list": list, "dict": dict, "ordered": OrderedDict}


# ---- writing


def describe(graph: fx.Graph, where: str, trust: Trust) -> dict[str, Any]:
    """A graph's nodes and how its inputs and outputs are nested, as JSON values.

    Raises
    ------
    DataError
        If it holds something that is not on the lists.
    """
    nodes = [
        [node.op, node.name, _target_name(node), _written(node.args, where, node), _keywords(node, where)]
        for node in graph.nodes
    ]
    described: dict[str, Any] = {"nodes": nodes, "nesting": None}
    code = graph._codegen
    if type(code) is _PyTreeCodeGen:
        info = code.pytree_info
        described["nesting"] = {
            "arguments": list(info.orig_args),
            "inputs": _spec(info.in_spec, where),
            "outputs": None if info.out_spec is None else _spec(info.out_spec, where),
        }
    elif type(code) is not CodeGen:
        raise DataError(f"The model cannot be saved: the graph of {where} is written by a {type(code).__name__}.")
    check(described, trust)
    return described


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    return operators.target_name(node.target) or name_of(node.target)


def _keywords(node: fx.Node, where: str) -> list[Any]:
    return [[key, _written(value, where, node)] for key, value in node.kwargs.items()]


def _written(value: Any, where: str, node: fx.Node) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return {"float": repr(value)}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple) and (kind is tuple or kind is torch.Size):
        return {"tuple": [_written(item, where, node) for item in value]}
    if isinstance(value, list):
        return {"list": [_written(item, where, node) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_text(key), _written(item, where, node)] for key, item in value.items()]}
    if kind is slice:
        return {"slice": [_written(part, where, node) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": 0}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": str(value)}
    if kind is torch.layout:
        return {"layout": str(value).removeprefix("torch.")}
    if kind is torch.memory_format:
        return {"memory_format": str(value).removeprefix("torch.")}
    raise DataError(
        f"The model cannot be saved: node {node.name!r} of the graph of {where} is given a "
        f"{kind.__module__}.{kind.__qualname__}."
    )


def _text(key: Any) -> Any:
    return key if type(key) is str else {"no text": type(key).__name__}


def _spec(spec: TreeSpec, where: str) -> Any:
    if spec.type is None:
        return _LEAF
    children = [_spec(child, where) for child in spec.children()]
    for name, kind in _CONTAINERS.items():
        if spec.type is kind:
            return [name, list(spec.context) if spec.context is not None else None, children]
    if _is_output(spec.type):
        return [name_of(spec.type), list(spec.context), children]
    raise DataError(
        f"The model cannot be saved: its graph takes or returns a {spec.type.__qualname__}; tuples, lists, dicts and "
        "transformers' ModelOutput are possible."
    )


# ---- checking: what a file says, before anything is made of it


def check(described: Mapping[str, Any], trust: Trust) -> None:
    """Refuse a graph that could do more than call listed functions and the model's own parts."""
    seen: set[str] = set()
    for op, name, target, args, keywords in described["nodes"]:
        if op not in _OPS:
            raise DataError(f"The model's graph has a node of unknown kind {op!r}.")
        _check_identifier(name)
        if name in seen:
            raise DataError(f"The model's graph has two nodes {name!r}.")
        if op == "placeholder":
            _check_identifier(str(target).removeprefix("*").removeprefix("*"))
            # Its argument is the default value, which stands in the signature.
            if len(args["tuple"]) > (1 if described["nesting"] is None else 0) or _reads(args):
                raise DataError(f"The model's graph has the input {name!r} with more than a plain default value.")
        elif op in ("get_attr", "call_module"):
            path(target)
        elif op == "call_method":
            if target not in operators.METHODS:
                raise DataError(
                    f"The model's graph calls the method {target!r}, which is not on the list of those it may."
                )
            if not args["tuple"] or not isinstance(args["tuple"][0], dict) or "node" not in args["tuple"][0]:
                raise DataError(f"The model's graph calls the method {target!r} of what is no value of the graph.")
        elif op == "call_function":
            _check_function(target, args, trust)
        free = "dict" if op == "output" else None
        for item in args["tuple"]:
            _check_value(item, seen, target if op == "call_function" else "", free)
        for key, item in keywords:
            _check_identifier(key)
            _check_value(item, seen, target if op == "call_function" else "", None)
        seen.add(name)
    if (nesting := described["nesting"]) is not None:
        for word in nesting["arguments"]:
            _check_identifier(word)
        _check_spec(nesting["inputs"], trust, identifiers=True)
        if nesting["outputs"] is not None:
            _check_spec(nesting["outputs"], trust, identifiers=False)


def _reads(item: Any) -> bool:
    """Whether an argument reads a node."""
    if isinstance(item, dict):
        return "node" in item or any(map(_reads, item.values()))
    return isinstance(item, list) and any(map(_reads, item))


def path(target: Any) -> list[str]:
    """The parts of a dotted path to a module's part; none of them is special."""
    parts = target.split(".") if type(target) is str else [""]
    if not all(re.fullmatch(r"[A-Za-z0-9_]+", part) and not part.startswith("__") for part in parts):
        raise DataError(f"The model's graph has the path {target!r}, which is not made of plain names.")
    return parts


def _check_identifier(word: Any) -> None:
    if not (
        type(word) is str
        and word.isascii()
        and word.isidentifier()
        and not keyword.iskeyword(word)
        and word[:2] != "__"
        and word != "self"
    ):
        raise DataError(f"The model's graph has the name {word!r}, which is not a plain identifier.")


def _check_function(target: Any, args: Mapping[str, Any], trust: Trust) -> None:
    if type(target) is not str or _function(target, trust) is None:
        raise DataError(
            f"The model's graph calls {target!r}, which is not on the list of functions that a stored graph may call."
        )
    if target == "builtins:getattr" and (len(args["tuple"]) != 2 or args["tuple"][1] not in operators.ATTRIBUTES):
        raise DataError(
            f"The model's graph reads the attribute {args['tuple'][1:2]!r}, which is not a tensor's size or type."
        )


def _function(name: str, trust: Trust) -> Callable[..., Any] | None:
    return operators.target(name) or trust.function(name)


def _check_value(item: Any, nodes: set[str], target: str, free: str | None) -> None:
    if item is None or type(item) in (bool, int):
        return
    if type(item) is str:
        _check_text(item, target)
        return
    ((kind, content),) = item.items()
    if kind == "node":
        if content not in nodes:
            raise DataError(f"The model's graph reads {content!r}, which no node before it is called.")
    elif kind in ("tuple", "list", "slice"):
        for part in content:
            _check_value(part, nodes, target, free)
    elif kind == "dict" and free == "dict":
        for key, part in content:
            if type(key) is not str or not key.isprintable():
                raise DataError(f"The model's graph returns a value named {key!r}.")
            _check_value(part, nodes, target, free)
    else:
        _plain(kind, content)


def _check_text(text: str, target: str) -> None:
    """Text is pasted as a literal, which is safe; it is short of meaning too."""
    if target in operators.ASSERTIONS and len(text) <= 2000:
        return
    if target in operators.EINSUMS and _EQUATION.fullmatch(text):
        return
    if target == "builtins:getattr" and text in operators.ATTRIBUTES:
        return
    if text not in operators.WORDS:
        raise DataError(
            f"The model's graph hands over the text {text[:80]!r}, which is not on the list of words it may."
        )


def _plain(kind: str, content: Any) -> Any:
    """A value that is not nested."""
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(float(content[0]), float(content[1]))
    if kind == "ellipsis":
        return ...
    tables: dict[str, Mapping[str, Any]] = {"dtype": DATA_TYPES, "layout": _LAYOUTS, "memory_format": _MEMORY_FORMATS}
    if kind in tables and type(content) is str and content in tables[kind]:
        return tables[kind][content]
    if kind == "device" and type(content) is str and _DEVICE.fullmatch(content):
        return torch.device(content)
    raise DataError(f"The model's graph holds {kind} {content!r}, which is not possible.")


def _check_spec(spec: Any, trust: Trust, *, identifiers: bool) -> None:
    if spec == _LEAF:
        return
    name, context, children = spec
    if name in ("dict", "ordered") or name not in _CONTAINERS:
        if len(context) != len(children):
            raise DataError("The model's graph has another number of names than of values.")
        for key in context:
            # Names of inputs are pasted into source; those of outputs are not.
            if identifiers:
                _check_identifier(key)
            elif type(key) is not str:
                raise DataError(f"The model's graph returns a value named {key!r}.")
    if name not in _CONTAINERS and not (not identifiers and _is_output(trust.resolve(name))):
        raise DataError(f"The model's graph takes or returns a {name}.")
    for child in children:
        _check_spec(child, trust, identifiers=identifiers)


def _is_output(kind: Any) -> bool:
    """Whether a class is one of transformers' ``ModelOutput`` classes: dicts with fields."""
    return isinstance(kind, type) and any(
        (base.__module__, base.__qualname__) == ("transformers.utils.generic", "ModelOutput") for base in kind.__mro__
    )


# ---- building


def build(described: Mapping[str, Any], root: nn.Module, name: Any, trust: Trust) -> fx.GraphModule:
    """Make the graph module of a checked description over ``root``, which holds its parts.

    Raises
    ------
    DataError
        If a path leads to nothing.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, node_name, target, args, keywords in described["nodes"]:
        if op in ("get_attr", "call_module"):
            found = part_of(root, target)
            if not isinstance(found, nn.Module if op == "call_module" else Tensor | fx.GraphModule):
                raise DataError(f"The model's graph uses {target!r}, which the model does not hold.")
        function = _function(target, trust) if op == "call_function" else target
        node = graph.create_node(
            op,
            function,  # type: ignore[arg-type]  # checked: not None
            _value(args, made),
            {key: _value(item, made) for key, item in keywords},
            node_name,
        )
        if node.name != node_name:
            raise DataError(f"The model's graph has the node {node_name!r}, which torch.fx calls {node.name!r}.")
        made[node_name] = node
    if (nesting := described["nesting"]) is not None:
        info = _PyTreeInfo(
            list(nesting["arguments"]),
            _made_spec(nesting["inputs"], trust),
            None if nesting["outputs"] is None else _made_spec(nesting["outputs"], trust),
        )
        graph.set_codegen(_PyTreeCodeGen(info))
    class_name = name if type(name) is str and name.isidentifier() else "GraphModule"
    return fx.GraphModule(root, graph, class_name)


def part_of(root: nn.Module, target: str) -> Any:
    """What a dotted path leads to among registered parts and tensor attributes; None where there is nothing."""
    *before, last = path(target)
    module: nn.Module | None = root
    for word in before:
        module = module._modules.get(word) if module is not None else None
    if module is None:
        return None
    for parts in (module._modules, module._parameters, module._buffers):
        if (found := parts.get(last)) is not None:
            return found
    found = vars(module).get(last)
    return found if isinstance(found, Tensor) else None


def _value(item: Any, made: Mapping[str, fx.Node]) -> Any:
    if not isinstance(item, dict):
        return item
    ((kind, content),) = item.items()
    if kind == "node":
        return made[content]
    if kind in ("tuple", "list"):
        return (tuple if kind == "tuple" else list)(_value(part, made) for part in content)
    if kind == "slice":
        return slice(*(_value(part, made) for part in content))
    if kind == "dict":
        return {key: _value(part, made) for key, part in content}
    return _plain(kind, content)


def _made_spec(spec: Any, trust: Trust) -> TreeSpec:
    if spec == _LEAF:
        return TreeSpec(None, None, [])
    name, context, children = spec
    kind = _CONTAINERS[name] if name in _CONTAINERS else trust.resolve(name)
    return TreeSpec(kind, context, [_made_spec(child, trust) for child in children])
