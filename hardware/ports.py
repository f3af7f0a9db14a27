"""Named arrays on their way to a runtime: which of its inputs is which, and whether shapes and dtypes fit."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import DataError, InputError

if TYPE_CHECKING:
    from harness.contracts import Arrays, Port, Signature

BATCH = "batch"
"""The exported name of the first axis where it may vary."""
LIMITS = "assay.limits"
"""The key of an ONNX file's metadata that holds the sizes of varying axes for which alone it holds."""
_EXAMPLES = "batch size"  # in messages: a port may have an axis of its own that is called "batch"


def matched(ports: Sequence[Port], names: Sequence[str], kind: str) -> list[str]:
    """The runtime's names of the ports: equal names, or else the same places.

    Names differ where the file's format forbids the port's (an input and an output of one name).

    Parameters
    ----------
    ports : sequence of Port
        Inputs or outputs of the signature.
    names : sequence of str
        Inputs or outputs of the artifact.
    kind : str
        "input" or "output", for the message.

    Raises
    ------
    DataError
        If neither fits.
    """
    wanted = [port.name for port in ports]
    if set(wanted) <= set(names):
        return wanted
    if len(names) == len(wanted):
        return list(names)
    raise DataError(
        f"The artifact has the {kind}s {', '.join(names)}; the signature says {', '.join(wanted)}. Build it again."
    )


def axis_names(signature: Signature) -> dict[str, str]:
    """Exported names of the axes that vary: identifiers, all different, none of them :data:`BATCH`."""
    found: dict[str, str] = {}
    for port in (*signature.inputs, *signature.outputs):
        for axis in port.shape:
            if isinstance(axis, str) and axis not in found:
                name = re.sub(r"\W", "_", axis, flags=re.ASCII) or "_"
                if not name.isidentifier() or keyword.iskeyword(name):
                    name = f"axis_{name}"
                while name in (BATCH, *found.values()):
                    name += "_"
                found[axis] = name
    return found


def axis_sizes(signature: Signature, inputs: Arrays) -> dict[str, int]:
    """Sizes of the axes that vary, by their exported names, the batch among them."""
    names = axis_names(signature)
    sizes = {}
    for port in signature.inputs:
        for axis, size in zip(port.shape, inputs[port.name].shape[1:], strict=False):
            if isinstance(axis, str):
                sizes[names[axis]] = size
        if signature.batch is None:
            sizes[BATCH] = len(inputs[port.name])
    return sizes


def check(signature: Signature, inputs: Arrays) -> None:
    """Refuse arrays that are not what the signature says.

    Raises
    ------
    InputError
        Naming the input, what it is and what is allowed.
    """
    missing = [port.name for port in signature.inputs if port.name not in inputs]
    if missing:
        raise InputError(f"The model's input {missing[0]!r} is missing; given: {', '.join(inputs) or '(none)'}.")
    sizes: dict[str, int] = {}
    for port in signature.inputs:
        array = inputs[port.name]
        if array.dtype != np.dtype(port.dtype):
            raise InputError(
                f"The model's input {port.name!r} is {port.dtype}; got {array.dtype}. Nothing is cast on the way."
            )
        wanted = (signature.batch or _EXAMPLES, *port.shape)
        fits = len(wanted) == array.ndim and all(
            size == (sizes.setdefault(axis, size) if isinstance(axis, str) else axis)
            for axis, size in zip(wanted, array.shape, strict=True)
        )
        if not fits:
            shown = ", ".join(str(sizes.get(axis, axis) if isinstance(axis, str) else axis) for axis in wanted)
            raise InputError(f"The model takes inputs of shape ({shown}) as {port.name!r}; got {array.shape}.")


def check_limits(signature: Signature, inputs: Arrays, limits: str | None) -> None:
    """Refuse sizes for which the exported graph does not stand for the model.

    Parameters
    ----------
    signature : Signature
    inputs : Arrays
    limits : str or None
        What the file's metadata say under :data:`LIMITS`.

    Raises
    ------
    InputError
        Naming the axis, its size and what is allowed.
    """
    sizes = axis_sizes(signature, inputs)
    for axis, (low, high) in json.loads(limits or "{}").items():
        size = sizes.get(axis)
        if size is not None and not (low or 0) <= size <= (high or size):
            allowed = f"{low or 1} to {high}" if high else f"{low} and more"
            raise InputError(
                f"The axis {axis!r} has size {size}; the model was exported for {allowed}, since its code does "
                "something else for other sizes or has a table of that length."
            )


def check_bound(bound: Arrays, inputs: Arrays) -> None:
    """Refuse a batch that differs in shape or dtype from what the artifact was loaded for.

    Raises
    ------
    InputError
        Naming the input.
    """
    for name, place in bound.items():
        if name not in inputs:
            raise InputError(f"The model's input {name!r} is missing; given: {', '.join(inputs) or '(none)'}.")
        array = inputs[name]
        if array.shape != place.shape or array.dtype != place.dtype:
            raise InputError(
                f"Bound to {name!r} of shape {place.shape} and type {place.dtype}; got {array.shape}, {array.dtype}."
            )


def zeros(signature: Signature, inputs: Arrays) -> dict[str, Any]:
    """Memory of the inputs' shapes and dtypes, in the signature's order."""
    return {port.name: np.zeros(inputs[port.name].shape, port.dtype) for port in signature.inputs}
