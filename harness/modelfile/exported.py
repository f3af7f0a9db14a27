"""Modules that ``torch.export`` returns, as plain graphs whose check of their inputs is data.

``ExportedProgram.module()`` guards its inputs with generated source, refuses ``train()`` and ``eval()``, and carries
hooks. The graph itself needs none of it; what the guards say is read from the inputs' recorded shapes instead.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from harness.errors import InputError

_GUARDS = "_guards_fn"


class InputCheck(nn.Module):
    """Refuses inputs of another type or shape than a graph was exported for.

    Parameters
    ----------
    inputs : list
        One per input: None where nothing is known, else [name, data type, sizes]; a size is a number, the name of a
        size that may vary, or None.
    ranges : dict
        Smallest and largest value of each named size.
    """

    def __init__(self, inputs: list[Any], ranges: dict[str, list[int | None]]) -> None:
        super().__init__()
        self.inputs = inputs
        self.ranges = ranges

    def forward(self, *given: Any) -> None:
        """Raise an :class:`InputError` that names the input."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return
        sizes: dict[str, int] = {}
        for known, value in zip(self.inputs, given, strict=True):
            if known is None:
                continue
            name, dtype, shape = known
            if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != len(shape):
                got = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"The exported model's input {name} is {dtype} with {len(shape)} axes; got {got}.")
            for axis, (wanted, size) in enumerate(zip(shape, value.shape, strict=True)):
                expected = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
                if expected is not None and size != expected:
                    raise InputError(
                        f"The exported model's input {name} has {expected} in axis {axis}; got {size}. Export it with "
                        "dynamic_shapes if it may vary."
                    )
        for name, size in sizes.items():
            low, high = self.ranges.get(name, [None, None])
            if (low is not None and size < low) or (high is not None and size > high):
                raise InputError(f"A size of the exported model's inputs lies in [{low}, {high}]; got {size}.")


def is_exported(module: nn.Module) -> bool:
    """Whether a module comes from ``torch.export`` and was not settled yet."""
    if not isinstance(module, fx.GraphModule):
        return False
    # By name: importing torch.export takes a second, and memory that a measured process would be charged with.
    guards = type(module._modules.get(_GUARDS)).__name__ == "GuardsFn"
    return guards or "_StatefulGraphModule" in {base.__name__ for base in type(module).__mro__}


def settle(module: fx.GraphModule) -> fx.GraphModule:
    """A plain graph module with the same parts and outputs, that can be stored, trained and evaluated.

    Parameters
    ----------
    module : GraphModule
        From ``ExportedProgram.module()``; left untouched. Parameters and buffers are shared with it.
    """
    check = _check_of(module)
    graph = copy.deepcopy(module.graph)
    # A copy has a plain code generator unless it is given the original's.
    graph.set_codegen(copy.deepcopy(module.graph._codegen))
    parts = nn.Module()
    for key in ("_parameters", "_buffers", "_modules"):
        vars(parts)[key] = dict(vars(module)[key])
    vars(parts)["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    constants = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
    vars(parts).update(constants)
    if _GUARDS in parts._modules:
        parts._modules[_GUARDS] = check
    else:
        inputs = graph.find_nodes(op="placeholder")
        if inputs and any(known is not None for known in check.inputs):
            with graph.inserting_after(inputs[-1]):
                node = graph.call_module(_GUARDS, tuple(inputs))
            del node
            parts._modules[_GUARDS] = check
    made = fx.GraphModule(parts, graph, "ExportedModel")
    for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        vars(made)[key] = vars(parts)[key]
    # fx would make buffers of them, which state_dict() then shows.
    vars(made).update(constants)
    return made.eval()


def _check_of(module: fx.GraphModule) -> InputCheck:
    symbols: dict[str, list[int | None]] = {}
    constraints = getattr(module, "range_constraints", None)
    # Where no size varies, torch leaves an empty list.
    for symbol, bounds in constraints.items() if isinstance(constraints, Mapping) else ():
        symbols[str(symbol)] = [_number(bounds.lower), _number(bounds.upper)]
    inputs: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            inputs.append([node.name, value.dtype, [_size(size, symbols) for size in value.shape]])
        else:
            inputs.append(None)
    return InputCheck(inputs, symbols)


def _size(size: Any, symbols: dict[str, list[int | None]]) -> int | str | None:
    if isinstance(size, int):
        return size
    # A size that follows from others by a formula is theirs to check.
    return str(size) if str(size) in symbols else None


def _number(bound: Any) -> int | None:
    try:
        value = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return None
    # torch's own "no limit" is a symbol or the largest size there is.
    return value if abs(value) < 2**62 and math.isfinite(value) else None
