"""Named outputs and targets, and labels that are checked before they are believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from harness.errors import InputError, NotFinite
from harness.text import shown

T = TypeVar("T")


def pick(arrays: Mapping[str, T], name: str | None, kind: str, who: str) -> T:
    """The output or target of a name, or the first.

    Parameters
    ----------
    arrays : mapping
    name : str or None
    kind : str
        "output" or "target", for messages.
    who : str
        The metric or loss that asks.

    Raises
    ------
    InputError
        If it is not there.
    """
    if not arrays:
        raise InputError(f"{who}: there is no {kind}. Give data with {kind}s, or leave {who} out.")
    if name is None:
        return next(iter(arrays.values()))
    if name not in arrays:
        raise InputError(f"{who}: there is no {kind} {name!r}. Allowed: {', '.join(arrays)}.")
    return arrays[name]


def numbers(values: Any, kind: str, who: str) -> Any:
    """A finite array of float64 (float32 and float64 are kept); booleans, text and complex numbers are refused."""
    array = np.asarray(values)
    if array.dtype.kind not in "iuf":
        raise InputError(f"{who}: the {kind} is {array.dtype}; numbers are expected (float32).")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).reshape(len(array), -1).any(axis=1).sum())
        if kind == "output":
            raise NotFinite(f"{who}: the output holds NaN or infinity for {bad} of {len(array)} examples.")
        raise InputError(
            f"{who}: the {kind} holds NaN or infinity for {bad} of {len(array)} examples; leave those examples out."
        )
    return array


def same_shape(output: Any, target: Any, who: str) -> tuple[Any, Any]:
    """Both as (n, values of an example), refused where their shapes differ; (n,) and (n, 1) are the same.

    Broadcasting (n,) against (n, 1) would compare every example with every other.
    """
    shapes = [
        array.shape[:-1] if array.ndim == 2 and array.shape[-1] == 1 else array.shape for array in (output, target)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{who}: outputs have shape {output.shape} and targets {target.shape}; equal shapes are expected."
        )
    n = len(output)
    return output.reshape(n, -1), target.reshape(n, -1)


def columns(output: Any, who: str) -> Any:
    """Scores of classes, (n, classes): one logit (n,) or (n, 1) becomes the two columns 0 and logit."""
    scores = numbers(output, "output", who)
    if scores.ndim == 1:
        scores = scores[:, None]
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise InputError(
            f"{who}: outputs have shape {scores.shape}; one score a class, (n, classes), or one logit, (n,) or (n, 1), "
            "is expected."
        )
    return np.concatenate([np.zeros_like(scores), scores], axis=1) if scores.shape[1] == 1 else scores


def labels(
    values: Any, shape: tuple[int, ...], classes: int, ignore: Sequence[int], who: str, remedy: str
) -> tuple[Any, Any]:
    """Labels as int64, and which of them count.

    Parameters
    ----------
    values : array
        Integers in [0, classes) or among ``ignore``; for two classes also booleans, or floats that are 0 or 1.
    shape : tuple of int
        The shape that is expected, (n,) for one label an example; a last axis of size 1 is dropped.
    classes : int
        Outputs there are.
    ignore : sequence of int
        Values that mean "no label".
    who : str
        The metric or loss that asks.
    remedy : str
        How values are ignored; ``{ignore}`` stands for those that could be.

    Returns
    -------
    labels, counts : array of the given shape
        Where ``counts`` is False, the label is 0.

    Raises
    ------
    InputError
        Naming the values, what is allowed, and the remedy.
    """
    array = np.asarray(values)
    if array.shape == (*shape, 1):
        array = array[..., 0]
    allowed = (
        f"integers from 0 to {classes - 1} are expected ({classes} outputs)" if classes > 2 else "0 or 1 is expected"
    )
    if array.dtype.kind in "USOTMmVSc":
        raise InputError(
            f"{who}: labels are {array.dtype} ({_some(array)}); {allowed}. Map the names of the classes to their "
            "places among the outputs."
        )
    if array.shape != shape:
        if array.shape == (*shape, classes) and _one_hot(array):
            raise InputError(
                f"{who}: labels are one-hot, of shape {array.shape}; {allowed}. Give labels.argmax({array.ndim - 1})."
            )
        raise InputError(f"{who}: labels have shape {array.shape}; {shape} is expected: one label for each output.")
    if array.dtype.kind == "b":
        if classes != 2:
            raise InputError(
                f"{who}: labels are True and False, and the model has {classes} outputs; {allowed}. "
                "Give the class of every example, or one output."
            )
        array = array.astype(np.int64)
    ignored = np.isin(array, np.asarray(ignore, dtype=np.int64)) if len(ignore) else np.zeros(shape, dtype=bool)
    bad = ~ignored & ~((array >= 0) & (array < classes))
    if array.dtype.kind == "f":
        if classes != 2 or (bad | (~ignored & (array != np.floor(array)))).any():
            raise InputError(
                f"{who}: labels are {array.dtype} ({_some(array)}); {allowed}. Convert classes to int64; for "
                "regression use a metric of values, such as rmse."
            )
    elif bad.any():
        raise InputError(_out_of_range(array, ignored, bad, classes, allowed, who, remedy))
    return np.where(ignored, 0, array).astype(np.int64), ~ignored


def _out_of_range(array: Any, ignored: Any, bad: Any, classes: int, allowed: str, who: str, remedy: str) -> str:
    wrong = np.unique(array[bad])
    said = f"{who}: labels hold {_some(wrong)} for {int(bad.sum())} of {array.size}; {allowed}."
    used = array[~ignored]
    if used.min() >= 1 and used.max() == classes:
        return f"{said} They count from 1: subtract 1 from every label."
    if classes == 2 and set(np.unique(used).tolist()) == {-1, 1}:
        return f"{said} Two classes are 0 and 1: give (labels + 1) // 2."
    marks = [int(value) for value in wrong if value < 0 or value == 255]
    if len(marks) == len(wrong):
        return f"{said} Where that means 'no label': {remedy.format(ignore=marks)}."
    return (
        f"{said} Correct the labels, give a model with an output for every class, or for regression targets of float32."
    )


def _one_hot(array: Any) -> bool:
    return array.dtype.kind in "biuf" and bool(np.isin(array, (0, 1)).all() and (array.sum(axis=-1) == 1).all())


def _some(array: Any) -> str:
    """Up to five different values, for a message."""
    try:
        values = np.unique(array).tolist()
    except TypeError:  # values of different types have no order
        values = array.ravel().tolist()
    return ", ".join(shown(value, 40) for value in values[:5]) + (", …" if len(values) > 5 else "")
