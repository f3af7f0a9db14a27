"""The one place where a model is called."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import InputError, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Signature, Tensors


def call(model: nn.Module, inputs: Tensors, signature: Signature) -> dict[str, Tensor]:
    """Call a model on named inputs and name its outputs.

    One input is passed by place, several by name (by place where ``forward`` takes ``*args``). A mapping or a
    ``ModelOutput`` is read by name, a tuple, list or named tuple by place.

    Parameters
    ----------
    model : nn.Module
        In whatever mode it is.
    inputs : Tensors
        One batch; inputs that the signature does not name are left out.
    signature : Signature
        Which inputs are passed and which outputs are read.

    Returns
    -------
    dict of str to Tensor
        The outputs that ``signature`` names, axis 0 the example.

    Raises
    ------
    InputError
        If an input is missing.
    Unsupported
        If an output is missing, is no tensor, or has no axis for the examples; the batch size is named.
    """
    args, kwargs = arguments(model, inputs, signature)
    # Not len(): it would make the batch size a constant where torch.export traces this.
    examples = next(iter((*args, *kwargs.values()))).shape[0]
    return named(model(*args, **kwargs), signature, examples)


def arguments(model: nn.Module, inputs: Tensors, signature: Signature) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the model is called with, by place and by name; see :func:`call`."""
    missing = [port.name for port in signature.inputs if port.name not in inputs]
    if missing:
        raise InputError(f"The model's input {missing[0]!r} is missing; given: {', '.join(inputs)}.")
    values = {port.name: inputs[port.name] for port in signature.inputs}
    by_place = len(values) == 1 or not input_names(model)
    return (tuple(values.values()), {}) if by_place else ((), values)


def named(result: Any, signature: Signature, examples: int) -> dict[str, Tensor]:
    """The outputs of one call by name, checked; see :func:`call`."""
    import torch

    flat = flatten(result)
    found: dict[str, Tensor] = {}
    for place, port in enumerate(signature.outputs):
        if port.name in flat:
            value = flat[port.name]
        elif place < len(flat):
            value = list(flat.values())[place]
        else:
            raise Unsupported(f"The model gives {len(flat)} outputs; {port.name!r} is expected in place {place}.")
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"The model's output {port.name!r} is {type(value).__name__}, not a tensor.")
        if value.ndim == 0 or value.shape[0] != examples:
            raise Unsupported(
                f"At batch size {examples} the model's output {port.name!r} has shape {tuple(value.shape)}: its first "
                f"axis should be the {examples} examples. A squeeze() without an axis, or a batch size written into "
                "the code, does that: name the axis, or use a batch_size that the model takes."
            )
        found[port.name] = value
    return found


def flatten(result: Any) -> dict[str, Any]:
    """A model's result as named values: mappings by key, sequences by place, a single value as "output".

    A dataclass is read as a mapping, and a mapping inside another as "out.logits". Entries that are None are left out;
    values inside a nested sequence are not looked at.
    """
    if dataclasses.is_dataclass(result) and not isinstance(result, Mapping | type):
        result = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        found: dict[str, Any] = {}
        for name, value in result.items():
            if isinstance(value, Mapping) or dataclasses.is_dataclass(value):
                found |= {f"{name}.{inner}": part for inner, part in flatten(value).items()}
            elif value is not None:
                found[str(name)] = value
        return found
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return {name: value for name, value in zip(result._fields, result, strict=True) if value is not None}
    if isinstance(result, Sequence) and not isinstance(result, str):
        values = [value for value in result if value is not None]
        return {"output" if place == 0 else f"output{place}": value for place, value in enumerate(values)}
    return {"output": result}


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The names of ``forward``'s parameters that a positional call fills, in order; empty where it takes ``*args``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return ()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into evaluation mode without gradients, and every module back into its own mode afterwards."""
    import torch

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as its parts: torch's fused inference path hides its products from hooks and exporters."""
    import torch

    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
