"""A batch as users have them, to named tensors.

Understood are (x, y), (x, z, y), ((x, z), y), ({...}, y), one mapping with its targets under "label", "labels",
"target", "targets" or "y", and inputs alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.calling import input_names
from harness.contracts import Batch
from harness.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

TARGETS = ("label", "labels", "target", "targets", "y")
"""Keys of a mapping that are targets."""
ALLOWED = (
    "Allowed: (inputs, targets), where inputs are a tensor, a tuple or a mapping by the names of forward's parameters; "
    f"(input, input, ..., targets); or one mapping with the targets under {', '.join(map(repr, TARGETS))}"
)


def unpack(batch: Any, names: Sequence[str], required: Sequence[str], where: str) -> Batch:
    """Name a batch's inputs and targets; the values become tensors.

    Parameters
    ----------
    batch : object
        What the loader gave.
    names : sequence of str
        The parameters of ``forward``, in order; empty where it takes any.
    required : sequence of str
        Those of them that have no default.
    where : str
        "Task 'mine:make': batch 0 of the loader 'test'", for messages.

    Raises
    ------
    InputError
        If the batch is of another form, holds something other than numbers, or its parts are not equally many.
    """
    inputs, targets = _parts(batch, required, where)
    values = _named_inputs(inputs, names, required, where)
    aims = {name: tensor(value, f"{where}: target {name!r}") for name, value in targets.items()}
    _check_lengths({**{f"target {name!r}": value for name, value in aims.items()}, **values}, where)
    return Batch(inputs=values, targets=aims)


def inputs_of(inputs: Any, names: Sequence[str], required: Sequence[str], where: str) -> Batch:
    """Inputs alone: a mapping or a sequence of them; see :func:`unpack`."""
    values = _named_inputs(inputs, names, required, where)
    _check_lengths(values, where)
    return Batch(inputs=values)


def _named_inputs(inputs: Any, names: Sequence[str], required: Sequence[str], where: str) -> dict[str, Tensor]:
    if isinstance(inputs, Mapping):
        named = {str(key): value for key, value in inputs.items()}
        absent = [name for name in required if name not in named] if len(named) > 1 else []
        if absent:
            raise InputError(f"{where} has no {absent[0]!r}, which forward needs; it has {', '.join(named)}. {ALLOWED}")
        if names:
            known = {key: value for key, value in named.items() if key in names}
            named = known or named
    else:
        if names and len(inputs) > len(names):
            raise InputError(
                f"{where} has {len(inputs)} inputs, and forward takes {len(names)} ({', '.join(names)}). {ALLOWED}"
            )
        named = dict(zip(names or _numbered(len(inputs), "input"), inputs, strict=False))
    if not named:
        raise InputError(f"{where} has no inputs. {ALLOWED}")
    return {name: tensor(value, f"{where}: input {name!r}") for name, value in named.items()}


def _parts(batch: Any, required: Sequence[str], where: str) -> tuple[Any, dict[str, Any]]:
    """Inputs (a mapping or a sequence) and named targets."""
    if isinstance(batch, Mapping):
        # A parameter that forward needs is an input, whatever its name.
        keys = [key for key in batch if key in TARGETS and key not in required]
        inputs = {key: value for key, value in batch.items() if key not in keys}
        return inputs, _named_targets({key: batch[key] for key in keys})
    if not isinstance(batch, list | tuple):
        return (batch,), {}
    if not batch:
        raise InputError(f"{where} is an empty {type(batch).__name__}. {ALLOWED}")
    nested = isinstance(batch[0], Mapping) or _is_several(batch[0])
    if len(batch) == 1 or (len(batch) == len(required) and not nested):
        return (batch[0] if isinstance(batch[0], Mapping) else tuple(batch)), {}
    targets, front = batch[-1], batch[:-1]
    given = front[0] if nested and len(front) == 1 else front
    if isinstance(targets, Mapping):
        return given, _named_targets(targets)
    if _is_several(targets):
        return given, dict(zip(_numbered(len(targets), "label"), targets, strict=True))
    return given, {"label": targets}


def _named_targets(targets: Mapping[str, Any]) -> dict[str, Any]:
    """One target is "label", whatever its key; several keep their names."""
    return dict(zip(["label"], targets.values(), strict=True)) if len(targets) == 1 else dict(targets)


def _is_several(value: Any) -> bool:
    """Whether a sequence is several tensors or arrays, and not one in the form of a list of numbers."""
    return isinstance(value, list | tuple) and bool(value) and all(hasattr(part, "shape") for part in value)


def _numbered(count: int, name: str) -> list[str]:
    return [name if place == 0 else f"{name}{place}" for place in range(count)]


def tensor(value: Any, where: str) -> Tensor:
    """A value as a dense tensor in the main memory; numbers keep their type.

    Raises
    ------
    InputError
        If it is text, complex, sparse or no array at all.
    """
    import numpy as np
    import torch

    if getattr(getattr(value, "dtype", None), "kind", "") in ("U", "S", "O", "V", "M", "m"):
        raise InputError(f"{where} is no array of numbers but of {value.dtype}. Give tensors or arrays of numbers.")
    try:
        found = torch.as_tensor(_plain(value) if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(value, "dtype", type(value).__name__)
        raise InputError(f"{where} is no array of numbers ({kind}: {error}). Give tensors or arrays.") from error
    found = found.detach()
    if found.layout is not torch.strided or found.is_quantized:
        raise InputError(f"{where} is {found.layout}, quantized or nested. Give a dense tensor of plain numbers.")
    if found.is_complex():
        raise InputError(f"{where} is complex ({found.dtype}). Give real numbers: real and imaginary parts as two.")
    wider = {torch.uint16: torch.int32, torch.uint32: torch.int64}.get(found.dtype)
    if found.dtype is torch.uint64:
        raise InputError(f"{where} is uint64, which runtimes do not take. Give int64.")
    return found.to("cpu", wider or found.dtype)


def _plain(array: Any) -> Any:
    """An array as torch takes it: in the machine's byte order, in memory that is not reversed and can be written to."""
    import numpy as np

    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")) if array.ndim else array
    return array if array.flags.writeable else array.copy()


def _check_lengths(values: Mapping[str, Tensor], where: str) -> None:
    lengths = {name: len(value) if value.ndim else None for name, value in values.items()}
    if len(set(lengths.values())) > 1 or None in lengths.values():
        said = ", ".join(f"{name}: shape {tuple(value.shape)}" for name, value in values.items())
        raise InputError(f"{where}: the first axis of every input and target is the example; here {said}.")


def parameters(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of ``forward``'s parameters, and those of them that have no default; both empty where it takes any."""
    names = input_names(model)
    signature = inspect.signature(model.forward) if names else None
    required = tuple(
        name for name in names if signature and signature.parameters[name].default is inspect.Parameter.empty
    )
    return names, required
